"""What a cluster would make of a spec and its compiled pipeline: each a line for whoever compiles or submits, or None."""

from __future__ import annotations

from xtoken_core.spec import DistillationSpec, ResourcesSpec
from xtoken_core.workflow.shape import output_lasts

LARGEST = 2**20
"""Characters of a compiled pipeline that are surely stored."""


def image_caution(image: str) -> str | None:
    """What a cluster would make of an image that is not named by digest; None where it is."""
    if "@sha256:" in image:
        return None
    if image == ResourcesSpec().image:
        return "resources.image: not set; build manifests/Dockerfile, push it, and name it by digest (NAME@sha256:...)"
    return f"resources.image: {image} can come to mean another image, which KFP's cache would not notice; name it by digest (NAME@sha256:...)"


def size_caution(compiled: str) -> str | None:
    """What a cluster would make of a compiled pipeline of this size; None where it fits.

    Argo keeps a workflow with all its templates in one object of Kubernetes, whose store takes 1.5 MiB by default; the states of its
    tasks come on top.
    """
    if len(compiled) < LARGEST:
        return None
    return (
        f"compiled pipeline: {len(compiled) / 2**20:.1f} MiB; Kubernetes stores a workflow of at most 1.5 MiB, the states of its tasks "
        "included; have fewer variants or shards"
    )


def output_caution(spec: DistillationSpec) -> str | None:
    """What would become of an output in a pod's own file system; None where it lasts."""
    if output_lasts(spec):
        return None
    return f"output.uri: {spec.output.uri} would be lost with the pod that writes it; name a URI, or a folder on a resources.pvc"


def retry_caution(spec: DistillationSpec) -> str | None:
    """What a retry of training would do without checkpoints; None where there are some, or it costs no GPU."""
    if spec.training.save_steps or not (spec.resources.retries and spec.resources.gpus_per_node):
        return None
    return "training.save_steps: not set; a training that resources.retries starts again begins at its first step"


def root_caution(spec: DistillationSpec) -> str | None:
    """Whose bucket steps would read with the spec's secrets where no pipeline root is named; None where none does."""
    field = "data.shards" if spec.data.shards > 1 else "resources.nodes" if spec.resources.nodes > 1 else None
    return field and f"{field}: above 1, steps read KFP's own bucket with resources.secrets; or name another by --pipeline-root"
