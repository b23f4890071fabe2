"""Section `resources`: what the steps get on a cluster."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from xtoken_core.spec.section import NonNegativeInt, PositiveInt, Quantity, Section


class SecretEnv(Section):
    """An environment variable filled from a Kubernetes secret; its value is never in the spec."""

    secret: str = Field(min_length=1)
    key: str = Field(min_length=1)
    env: str = Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")


class Toleration(Section):
    """A Kubernetes toleration of the GPU steps."""

    key: str | None = None
    operator: Literal["Exists", "Equal"] = "Exists"
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None

    @model_validator(mode="after")
    def _operator_fits(self) -> Self:
        if self.operator == "Exists" and self.value is not None:
            raise ValueError("value: only with operator: Equal")
        if self.operator == "Equal" and self.key is None:
            raise ValueError("key: operator Equal needs one")
        return self


class VolumeClaim(Section):
    """An existing PersistentVolumeClaim and where the steps see it."""

    name: str = Field(min_length=1)
    mount_path: str = Field(pattern=r"^/")


class ResourcesSpec(Section):
    """What the steps get on a cluster; a local run ignores all of it."""

    image: str = Field(
        "registry.example.org/xtoken:unset", description="image of every step: your build of manifests/Dockerfile, by digest"
    )
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    gpus_per_node: NonNegativeInt = Field(1, description="GPUs of training; evaluations take one each; 0: CPU only")
    nodes: PositiveInt = Field(1, description="hosts of the distill step; more than one runs as a Kubeflow TrainJob")
    gpu_type: str = Field("nvidia.com/gpu", description="Kubernetes resource name of the accelerator")
    cpu: Quantity = Field("8", pattern=r"^([0-9]+(\.[0-9]+)?|[0-9]+m)$")
    memory: Quantity = Field("64Gi", pattern=r"^[0-9]+(Ki|Mi|Gi|Ti|M|G|T)?$", description="KFP takes whole numbers alone")
    shm: Quantity = Field(
        "16Gi", pattern=r"^[0-9]+(\.[0-9]+)?(Ki|Mi|Gi|Ti|k|M|G|T)?$", description="size of the in-memory /dev/shm"
    )
    retries: NonNegativeInt = Field(
        2, description="of training, which goes on from its last checkpoint (see training.save_steps), and of every step after it"
    )
    node_selector: dict[str, str] = Field(default_factory=dict)
    tolerations: Annotated[tuple[Toleration, ...], Field(strict=False)] = ()
    secrets: Annotated[tuple[SecretEnv, ...], Field(strict=False)] = ()
    pvc: Annotated[tuple[VolumeClaim, ...], Field(strict=False)] = ()

    @model_validator(mode="after")
    def _mounts_differ(self) -> Self:
        paths = [claim.mount_path.rstrip("/") for claim in self.pvc]
        for index, path in enumerate(paths):
            if path in paths[:index]:
                raise ValueError(f"pvc.{index}.mount_path: {path} is an earlier claim's")
        return self

    def keeps(self, path: str) -> bool:
        """Whether a local path lies on one of the volumes, and so outlives the pod that writes it."""
        return any(path.startswith(f"{claim.mount_path.rstrip('/')}/") for claim in self.pvc)
