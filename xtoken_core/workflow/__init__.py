"""What the steps of a run share: views of the spec, cache keys, publication, TrainJobs."""
