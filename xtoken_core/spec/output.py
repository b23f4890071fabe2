"""Section `output`: where the finished run is published, and what becomes of its student."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from xtoken_core.spec.section import Section, Uri


class RegistrySpec(Section):
    """The Kubeflow Model Registry that the student is registered in."""

    server: str = Field(
        pattern=r"^https?://[^\s/]+$",
        description="URL of the registry; its token is the pod's own, or in the file that KF_PIPELINES_SA_TOKEN_PATH names",
        examples=["http://model-registry-service.kubeflow.svc.cluster.local:8080"],
    )
    name: Annotated[str, Field(min_length=1)] | None = Field(None, description="the registered model's name; default: the spec's")
    author: str = Field("xtoken-pipelines", min_length=1, description="whom the registry names as author")


class BetterThan(Section):
    """An earlier run whose student must be beaten."""

    better_than: Uri = Field(
        description="output.uri of the earlier run; both must have been measured on the same documents",
        examples=["s3://bucket/runs/llama-1b-last-month"],
    )


class OutputSpec(Section):
    """Where the finished run is published, and what becomes of its student."""

    uri: Uri = Field(
        description="folder or fsspec URI; a finished run appears there whole or not at all",
        examples=["s3://bucket/runs/llama-1b"],
    )
    replace: bool = Field(
        False, description="publish in place of whatever folder lies at uri; default: only of an earlier run of the same name"
    )
    pipelines_ui: Annotated[str, Field(pattern=r"^https?://[^\s?#]+$")] | None = Field(
        None,
        description="address of Kubeflow Pipelines' pages, so that the report links to its run there",
        examples=["https://kubeflow.example.org/pipeline"],
    )
    registry: RegistrySpec | None = Field(None, description="where the student is registered; default: nowhere")
    promote_if: Literal["better_than_before", "better_than_ce"] | BetterThan | None = Field(
        None,
        description="what the student must beat in bits per byte, beyond the noise, to be registered: itself before, its twin trained "
        "on cross-entropy only, or an earlier run's; default: nothing",
    )

    def under(self, name: str) -> str:
        """Path or URI of a file or folder of the published run."""
        return f"{self.uri.rstrip('/')}/{name}"
