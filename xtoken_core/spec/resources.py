"""Section `resources`: what the steps get on a cluster."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from xtoken_core.spec.section import Quantity, Section
from xtoken_core.uris import has_keys

NAME = r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$"
"""A Kubernetes object's name (RFC 1123)."""

LABEL_NAME = r"^[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?$"
"""Such a name as the value of a label."""

LABEL = r"^([a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$"
LABEL_VALUE = r"^([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?$"
"""Keys and values of labels; annotations have the same keys."""

APPLICATION = "app.kubernetes.io/name"
"""The label by which the network policies of manifests/ find the pods."""

_SECRET = re.compile(r"(^|_)(token|secret|password|passwd|credentials?|api_?key|access_key|private_key)$", re.IGNORECASE)
"""Names of variables whose values are nobody's business."""


class SecretEnv(Section):
    """An environment variable filled from a Kubernetes secret; its value is never in the spec."""

    secret: str = Field(pattern=NAME, description="name of the Kubernetes secret", examples=["hub-token"])
    key: str = Field(pattern=r"^[-._A-Za-z0-9]{1,253}$", description="key in the secret", examples=["token"])
    env: str = Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", description="the environment variable", examples=["HF_TOKEN"])


class Toleration(Section):
    """A Kubernetes toleration of the GPU steps."""

    key: Annotated[str, Field(pattern=LABEL)] | None = Field(
        None, description="the taint's key; default: any", examples=["nvidia.com/gpu"]
    )
    operator: Literal["Exists", "Equal"] = Field("Exists", description="whether the taint's value is compared")
    value: str | None = Field(None, description="the taint's value, for operator: Equal")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = Field(
        None, description="the taint's effect; default: any"
    )

    def contradictions(self) -> Iterator[str]:
        """Yields what of the section does not go together."""
        if self.operator == "Exists" and self.value is not None:
            yield "value: only with operator: Equal"
        if self.operator == "Equal" and self.key is None:
            yield "key: operator Equal needs one"


class VolumeClaim(Section):
    """An existing PersistentVolumeClaim and where the steps see it."""

    name: str = Field(pattern=NAME, description="name of the claim", examples=["models"])
    mount_path: str = Field(pattern=r"^/+[^/:][^:]*$", description="where it is mounted in every step", examples=["/models"])


class NodeRequirement(Section):
    """What a node's label must be for a GPU step to run there."""

    key: str = Field(pattern=LABEL, description="the label", examples=["nvidia.com/gpu.product"])
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt"] = Field("In", description="as in Kubernetes")
    values: Annotated[tuple[str, ...], Field(strict=False, max_length=100)] = Field(
        (), description="what the label is compared with", examples=[["NVIDIA-H100-80GB-HBM3", "NVIDIA-H200"]]
    )

    def contradictions(self) -> Iterator[str]:
        """Yields what of the section does not go together."""
        if (self.operator in ("Exists", "DoesNotExist")) == bool(self.values):
            yield f"values: operator {self.operator} takes {'none' if self.values else 'some'}"
        elif self.operator in ("Gt", "Lt") and len(self.values) != 1:
            yield f"values: operator {self.operator} takes one"


class ResourcesSpec(Section):
    """What the steps get on a cluster; a local run ignores all of it."""

    image: str = Field(
        "registry.example.org/xtoken:unset",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/@-]*$",
        description="image of every step: your build of manifests/Dockerfile, by digest",
    )
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = Field("IfNotPresent", description="as in Kubernetes")
    gpus_per_node: Annotated[int, Field(ge=0, le=1024)] = Field(
        1, description="GPUs of training; evaluations take one each; 0: CPU only"
    )
    nodes: Annotated[int, Field(gt=0, le=10_000)] = Field(
        1, description="hosts of the distill step; more than one runs as a Kubeflow TrainJob"
    )
    gpu_type: str = Field("nvidia.com/gpu", pattern=LABEL, description="Kubernetes resource name of the accelerator")
    cpu: Quantity = Field(
        "8", pattern=r"^([0-9]+(\.[0-9]+)?|[0-9]+m)$", description="CPU cores of a step", examples=["16", "500m"]
    )
    memory: Quantity = Field(
        "64Gi", pattern=r"^[0-9]+(Ki|Mi|Gi|Ti|M|G|T)?$", description="memory of a step; KFP takes whole numbers only"
    )
    evaluation_cpu: Quantity = Field(
        "4", pattern=r"^([0-9]+(\.[0-9]+)?|[0-9]+m)$", description="CPU cores of an evaluation", examples=["2"]
    )
    evaluation_memory: Annotated[Quantity, Field(pattern=r"^[0-9]+(Ki|Mi|Gi|Ti|M|G|T)?$")] | None = Field(
        None,
        description="memory of an evaluation, and of a teacher's scores; default: by the sizes of the models that it loads",
        examples=["48Gi"],
    )
    shm: Quantity = Field(
        "16Gi", pattern=r"^[0-9]+(\.[0-9]+)?(Ki|Mi|Gi|Ti|k|M|G|T)?$", description="size of the in-memory /dev/shm"
    )
    retries: Annotated[int, Field(ge=0, le=100)] = Field(
        2,
        description="times that training, which goes on from its last checkpoint (training.save_steps), and later steps are tried again",
    )
    node_selector: dict[Annotated[str, Field(pattern=LABEL)], Annotated[str, Field(pattern=LABEL_VALUE)]] = Field(
        {}, description="labels that a node must have", examples=[{"pool": "h100"}]
    )
    tolerations: Annotated[tuple[Toleration, ...], Field(strict=False, max_length=100)] = Field(
        (), description="taints that the GPU steps tolerate"
    )
    node_affinity: Annotated[tuple[NodeRequirement, ...], Field(strict=False, max_length=100)] = Field(
        (), description="what a node must fulfil for a GPU step, all of it"
    )
    queue: Annotated[str, Field(pattern=LABEL_NAME)] | None = Field(
        None, description="Kueue's LocalQueue that admits step pods and TrainJobs", examples=["team-a"]
    )
    priority_class: Annotated[str, Field(pattern=LABEL_NAME)] | None = Field(
        None, description="Kueue's WorkloadPriorityClass of step pods and TrainJobs; needs a queue", examples=["low"]
    )
    service_account: Annotated[str, Field(pattern=NAME)] | None = Field(
        None, description="account that the steps run under; default: that of Kubeflow Pipelines", examples=["xtoken"]
    )
    image_pull_secrets: Annotated[tuple[Annotated[str, Field(pattern=NAME)], ...], Field(strict=False, max_length=100)] = Field(
        (), description="secrets for the image's registry", examples=[["registry-credentials"]]
    )
    labels: dict[Annotated[str, Field(pattern=LABEL)], Annotated[str, Field(pattern=LABEL_VALUE)]] = Field(
        {}, description="labels of every pod and TrainJob", examples=[{"team": "nlp"}]
    )
    annotations: dict[Annotated[str, Field(pattern=LABEL)], str] = Field(
        {},
        description="annotations of every pod and TrainJob",
        examples=[{"sidecar.istio.io/inject": "false"}],
    )
    active_deadline_seconds: Annotated[int, Field(gt=0, le=2**31 - 1)] | None = Field(
        None, description="how long a step may take before Kubernetes ends it", examples=[86400]
    )
    ttl_seconds_after_finished: Annotated[int, Field(gt=0, le=2**31 - 1)] | None = Field(
        None, description="when a finished run's pods are deleted", examples=[604800]
    )
    env: dict[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")], str] = Field(
        {}, description="environment variables of every step", examples=[{"HF_HOME": "/models/huggingface"}]
    )
    secrets: Annotated[tuple[SecretEnv, ...], Field(strict=False, max_length=100)] = Field(
        (), description="environment variables of every step from Kubernetes secrets"
    )
    pvc: Annotated[tuple[VolumeClaim, ...], Field(strict=False, max_length=100)] = Field(
        (), description="PersistentVolumeClaims that every step mounts"
    )

    def contradictions(self) -> Iterator[str]:
        """Yields what of the section does not go together."""
        paths = [claim.mount_path.rstrip("/") for claim in self.pvc]
        for index, path in enumerate(paths):
            if path in paths[:index]:
                yield f"pvc.{index}.mount_path: {path} is an earlier claim's"
        if self.priority_class and not self.queue:
            yield "priority_class: is Kueue's, which needs a queue"
        for index, secret in enumerate(self.secrets):
            if secret.env in self.env:
                yield f"secrets.{index}.env: {secret.env} is set in env too"
        if APPLICATION in self.labels:
            yield f"labels: {APPLICATION} is the pods' own, by which network policies find them"
        for name, value in self.env.items():
            if name.startswith("XTOKEN_"):
                yield f"env: {name} is this library's own"
            elif _SECRET.search(name) or has_keys(value):  # it would lie in the compiled pipeline, for all to read
                yield f"env: {name} holds what looks like a secret; name a Kubernetes secret in resources.secrets"

    @property
    def pod_labels(self) -> dict[str, str]:
        """Labels of every step's pod and of TrainJobs: the spec's own, and Kueue's."""
        kueue = {"kueue.x-k8s.io/queue-name": self.queue, "kueue.x-k8s.io/priority-class": self.priority_class}
        return self.labels | {label: value for label, value in kueue.items() if value}

    def keeps(self, path: str) -> bool:
        """Whether a local path lies on one of the volumes, and so outlives the pod that writes it."""
        return any(path.startswith(f"{claim.mount_path.rstrip('/')}/") for claim in self.pvc)
