"""A spec to a trained student: the step, the trainer, checkpoints, logs."""
