"""How good a model is: bits per byte, agreement with teachers, tasks, samples."""
