"""Section `resources`: what the steps get on a cluster."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from xtoken_core.spec.section import Quantity, Section


class SecretEnv(Section):
    """An environment variable filled from a Kubernetes secret; its value is never in the spec."""

    secret: str = Field(min_length=1, description="name of the Kubernetes secret", examples=["hub-token"])
    key: str = Field(min_length=1, description="key in the secret", examples=["token"])
    env: str = Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", description="the environment variable", examples=["HF_TOKEN"])


class Toleration(Section):
    """A Kubernetes toleration of the GPU steps."""

    key: str | None = Field(None, description="the taint's key; default: any", examples=["nvidia.com/gpu"])
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

    name: str = Field(min_length=1, description="name of the claim", examples=["models"])
    mount_path: str = Field(pattern=r"^/", description="where it is mounted in every step", examples=["/models"])


class ResourcesSpec(Section):
    """What the steps get on a cluster; a local run ignores all of it."""

    image: str = Field(
        "registry.example.org/xtoken:unset", description="image of every step: your build of manifests/Dockerfile, by digest"
    )
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = Field("IfNotPresent", description="as in Kubernetes")
    gpus_per_node: Annotated[int, Field(ge=0, le=1024)] = Field(
        1, description="GPUs of training; evaluations take one each; 0: CPU only"
    )
    nodes: Annotated[int, Field(gt=0, le=10_000)] = Field(
        1, description="hosts of the distill step; more than one runs as a Kubeflow TrainJob"
    )
    gpu_type: str = Field("nvidia.com/gpu", description="Kubernetes resource name of the accelerator")
    cpu: Quantity = Field(
        "8", pattern=r"^([0-9]+(\.[0-9]+)?|[0-9]+m)$", description="CPU cores of a step", examples=["16", "500m"]
    )
    memory: Quantity = Field(
        "64Gi", pattern=r"^[0-9]+(Ki|Mi|Gi|Ti|M|G|T)?$", description="memory of a step; KFP takes whole numbers only"
    )
    shm: Quantity = Field(
        "16Gi", pattern=r"^[0-9]+(\.[0-9]+)?(Ki|Mi|Gi|Ti|k|M|G|T)?$", description="size of the in-memory /dev/shm"
    )
    retries: Annotated[int, Field(ge=0, le=100)] = Field(
        2, description="of training, which goes on from its last checkpoint (see training.save_steps), and of every step after it"
    )
    node_selector: dict[str, str] = Field(
        default_factory=dict, description="labels that a node must have", examples=[{"pool": "h100"}]
    )
    tolerations: Annotated[tuple[Toleration, ...], Field(strict=False, max_length=100)] = Field(
        (), description="taints that the GPU steps tolerate"
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

    def keeps(self, path: str) -> bool:
        """Whether a local path lies on one of the volumes, and so outlives the pod that writes it."""
        return any(path.startswith(f"{claim.mount_path.rstrip('/')}/") for claim in self.pvc)
