"""The steps of the workflow, one thin Kubeflow Pipelines component per file."""
