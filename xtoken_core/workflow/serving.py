"""How a published student is served: a KServe InferenceService, and a line for vLLM."""

from __future__ import annotations

import math
from typing import Any

from xtoken_core.costs import GIB, STEP_BYTES
from xtoken_core.identity import identity
from xtoken_core.spec import DistillationSpec
from xtoken_core.storage import is_remote, normalize

RUNTIME = "kserve-huggingfaceserver"
"""KServe's runtime for Hugging Face models; it serves them by vLLM where there is a GPU."""

LONGEST = 32
"""Of a service's name: 63 characters, less `-predictor-` and a namespace of 20."""


def inference_service(spec: DistillationSpec, student: str, weights: int) -> dict[str, Any] | None:
    """The InferenceService of the student at `student` under `output.uri`; None where KServe cannot reach it.

    `resources` gives its accelerator, CPU and labels; `weights`, the student's bytes, its memory, unless `resources` names one.
    """
    place = storage_uri(spec, student)
    if place is None:
        return None
    resources = spec.resources
    amounts = {
        "cpu": resources.evaluation_cpu,
        "memory": resources.evaluation_memory or f"{math.ceil((STEP_BYTES + 2 * weights) / GIB)}Gi",
    }
    if resources.gpus_per_node:
        amounts[resources.gpu_type] = "1"
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {"name": _service_name(spec.name), "labels": {"app.kubernetes.io/name": "xtoken-student"} | resources.labels},
        "spec": {
            "predictor": {
                "model": {
                    "modelFormat": {"name": "huggingface"},
                    "runtime": RUNTIME,
                    "storageUri": place,
                    "args": [f"--model_name={spec.name}", f"--max_model_len={spec.data.max_length}"],
                    "resources": {"requests": amounts, "limits": dict(amounts)},
                }
            }
        },
    }


def _service_name(name: str) -> str:
    """The run's name, as the first part of a host name that KServe lengthens by `-predictor-NAMESPACE`: short, and begun by a letter."""
    name = name if name[0].isalpha() else f"run-{name}"
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 9].rstrip('-')}-{identity(name, length=8)}"


def storage_uri(spec: DistillationSpec, student: str) -> str | None:
    """Where KServe finds the student: a URI, or a path on a claim of `resources.pvc`."""
    path = f"{normalize(spec.output.uri).rstrip('/')}/{student}"
    if is_remote(path):
        return path
    for claim in spec.resources.pvc:
        root = claim.mount_path.rstrip("/")
        if path.startswith(f"{root}/"):
            return f"pvc://{claim.name}/{path.removeprefix(f'{root}/')}"
    return None


def vllm_line(spec: DistillationSpec, student: str) -> str:
    """The command that serves the student by vLLM, which streams weights from a store by Run:ai's loader."""
    path = f"{normalize(spec.output.uri).rstrip('/')}/{student}"
    loader = " --load-format runai_streamer" if is_remote(path) else ""
    return f"vllm serve {path} --served-model-name {spec.name} --max-model-len {spec.data.max_length}{loader}"
