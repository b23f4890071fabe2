"""What the process that others are forked from imports before and after what its copies need."""
