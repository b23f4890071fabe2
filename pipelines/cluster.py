"""What a task gets on a cluster: image, accelerators, memory, volumes and secrets, as the spec's `resources` say."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from kfp import dsl, kubernetes

from xtoken_core.spec import NodeRequirement, ResourcesSpec
from xtoken_core.workflow.kubeflow import OF_RUN

USER = 1000
"""Of manifests/Dockerfile."""

WRITABLE = {"/tmp": "scratch", "/home/xtoken": "home"}
"""Where a step may write, by the volume there, beside /dev/shm and what KFP itself mounts (/gcs, /s3, /minio, /.cache, ...).

Fetched models and rows, and what KFP's executor writes, lie in the first; caches of libraries in the second. KFP cannot ask for a
read-only root; manifests/read-only-root.yaml does, and these make it possible.
"""


class Size(StrEnum):
    """How much of a node a task takes."""

    SMALL = "small"
    """Looks at tokenizers and files."""
    HEAVY = "heavy"
    """The spec's CPU and memory."""
    TEACHER = "teacher"
    """Evaluates teachers, or computes their scores: `resolve` tells the memory, by the sizes of the models."""
    STUDENT = "student"
    """Evaluates the student, beside a teacher at a time: so here."""


def on_cluster(
    task: dsl.PipelineTask,
    resources: ResourcesSpec,
    amounts: tuple[str, Any],
    gpus: int | None,
    retried: bool,
) -> None:
    """Sets up one task.

    `amounts`: CPU and memory, each as Kubernetes writes it or another task's output; `gpus`: so many accelerators (0: a CPU runs it),
    shared memory and the nodes of GPU steps; `retried`: it is tried again as often as the spec says.
    """
    task.set_container_image(resources.image)
    kubernetes.set_image_pull_policy(task, resources.image_pull_policy)
    if resources.image_pull_secrets:
        kubernetes.set_image_pull_secrets(task, list(resources.image_pull_secrets))
    # KFP's backend adds the rest of Pod Security's "restricted": no escalation, no capabilities, the runtime's seccomp profile.
    kubernetes.set_security_context(task, run_as_user=USER, run_as_group=USER, run_as_non_root=True)
    if resources.retries and retried:
        task.set_retry(resources.retries, backoff_duration="30s", backoff_factor=2, backoff_max_duration="600s")
    if resources.active_deadline_seconds:
        kubernetes.set_timeout(task, resources.active_deadline_seconds)
    cpu, memory = amounts  # a quota refuses pods that ask for none
    task.set_cpu_request(cpu).set_cpu_limit(cpu).set_memory_request(memory).set_memory_limit(memory)
    _describe_pod(task, resources)
    if gpus is not None:
        _on_gpu_node(task, resources, gpus)


def amounts_of(resources: ResourcesSpec, size: Size, resolved: Mapping[str, Any]) -> tuple[str, Any]:
    """CPU and memory of a task; `resolved`: outputs of the first task, which knows the models."""
    if size is Size.SMALL:
        return "1", "4Gi"
    if size is Size.HEAVY:
        return resources.cpu, resources.memory
    return resources.evaluation_cpu, resources.evaluation_memory or resolved[f"{size}_memory"]


def _describe_pod(task: dsl.PipelineTask, resources: ResourcesSpec) -> None:
    """Labels, annotations, environment and volumes of a task's pod."""
    for label, value in ({"app.kubernetes.io/name": "xtoken-step"} | resources.pod_labels).items():
        kubernetes.add_pod_label(task, label, value)
    for annotation, value in resources.annotations.items():
        kubernetes.add_pod_annotation(task, annotation, value)
    for name, value in resources.env.items():
        task.set_env_variable(name, value)
    if resources.nodes > 1:  # its launcher tells the TrainJob which run has made it
        for name, (kind, key) in OF_RUN.items():
            kubernetes.use_field_path_as_env(task, name, f"metadata.{kind}['{key}']")
    for secret in resources.secrets:
        kubernetes.use_secret_as_env(task, secret.secret, {secret.key: secret.env})
    for claim in resources.pvc:
        kubernetes.mount_pvc(task, claim.name, claim.mount_path)
    claimed = {claim.mount_path.rstrip("/") for claim in resources.pvc}
    for path, volume in WRITABLE.items():
        if path not in claimed:
            kubernetes.empty_dir_mount(task, volume, path)


def _on_gpu_node(task: dsl.PipelineTask, resources: ResourcesSpec, gpus: int) -> None:
    if gpus:
        task.set_accelerator_type(resources.gpu_type).set_accelerator_limit(gpus)
    # The teachers hand their output over in shared memory, of which a pod has 64 MiB by default.
    kubernetes.empty_dir_mount(task, "shared-memory", "/dev/shm", medium="Memory", size_limit=resources.shm)
    for label, value in resources.node_selector.items():
        kubernetes.add_node_selector(task, label, value)
    for toleration in resources.tolerations:
        kubernetes.add_toleration(task, **toleration.model_dump(exclude_none=True))
    if resources.node_affinity:
        kubernetes.add_node_affinity(task, [_requirement(r) for r in resources.node_affinity])


def _requirement(requirement: NodeRequirement) -> dict[str, Any]:
    values = {"values": list(requirement.values)} if requirement.values else {}
    return {"key": requirement.key, "operator": requirement.operator, **values}
