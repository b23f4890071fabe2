"""Specs compiled to Kubeflow pipelines, and run here or on a cluster."""
