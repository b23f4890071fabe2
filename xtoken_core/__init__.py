"""The library behind the pipelines: alignment, projection, losses, teachers, training, evaluation, report."""
