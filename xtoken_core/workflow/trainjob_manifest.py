"""The TrainJob of a training on several hosts, as a Kubernetes resource."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from xtoken_core.spec import ResourcesSpec

GROUP, VERSION = "trainer.kubeflow.org", "v1alpha1"
RUNTIME = "xtoken-torch"
"""The ClusterTrainingRuntime of manifests/."""


_SCRIPT = (
    'printf "%s" "$XTOKEN_SPEC" > "${TMPDIR:-/tmp}/spec.yaml" && '
    'exec torchrun -m -- components.distill --spec "${TMPDIR:-/tmp}/spec.yaml" "$@"'
)


@dataclass(frozen=True)
class Reads:
    """What every host reads, as components/distill.py is told it: folders and URIs that all of them reach."""

    rows: Sequence[str]
    """One per shard."""
    modes: Mapping[str, str] = field(default_factory=dict)
    projections: str | None = None
    scores: Sequence[str] = ()
    checkpoints: str = ""

    @property
    def places(self) -> list[str]:
        """Where they lie, but for the checkpoints."""
        return [*self.rows, *self.scores, *([self.projections] if self.projections else [])]

    @property
    def options(self) -> list[str]:
        """On the command line."""
        told = ["--rows", self.rows[0], "--more-rows", json.dumps(list(self.rows[1:]))]
        told += ["--modes", json.dumps(dict(self.modes), sort_keys=True), "--checkpoints", self.checkpoints]
        told += ["--scores", json.dumps(list(self.scores))] if self.scores else []
        return [*told, *(["--projections", self.projections] if self.projections else [])]


def worker_command(reads: Reads, run_uri: str, baseline: bool, candidate: str) -> list[str]:
    """What every host runs. The spec comes as the variable XTOKEN_SPEC, since it may hold anything."""
    trained = ["--baseline"] if baseline else ["--candidate", candidate] if candidate else []
    return ["sh", "-c", _SCRIPT, "distill", "--run", run_uri, *reads.options, *trained]


def trial_command(reads: Reads, out: str, fields: Sequence[str]) -> list[str]:
    """So for a trial of an OptimizationJob, whose values of `fields` come as variables; its run is a folder of `out` named by them."""
    values = {field: f"$KUBEFLOW_TRAINER_OPT_{parameter_name(field).upper()}" for field in fields}
    folder = "-".join(f"{field.rpartition('.')[2]}-{value}" for field, value in values.items())
    told = [f'--set {shlex.quote(field)}="{value}"' for field, value in values.items()]
    script = " ".join([_SCRIPT, *told, f'--run {shlex.quote(out)}/"{folder}"'])
    return ["sh", "-c", script, "distill", *reads.options]


def parameter_name(field: str) -> str:
    """The name of a dotted field of the spec as a parameter: a part of a variable's."""
    return re.sub(r"\W", "_", field)


def manifest(
    name: str, spec: str, resources: ResourcesSpec, command: Sequence[str], env: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The TrainJob: image, hosts and accelerators, and what the pods need beyond the runtime's template.

    `env`: variables that the pods get beside those of `resources`, which win.
    """
    amounts = {"cpu": resources.cpu, "memory": resources.memory}
    if resources.gpus_per_node:
        amounts[resources.gpu_type] = str(resources.gpus_per_node)
    pod = {"metadata": about(resources.labels, resources.annotations), "spec": _pod(resources)}
    node = {"name": "node", "template": {"spec": {"template": pod}}}
    deadline = resources.active_deadline_seconds
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": "TrainJob",
        "metadata": {
            "name": name,
            **about({"app.kubernetes.io/name": "xtoken-pipelines"} | resources.pod_labels, resources.annotations),
        },
        "spec": {
            "runtimeRef": {"apiGroup": GROUP, "kind": "ClusterTrainingRuntime", "name": RUNTIME},
            **({"activeDeadlineSeconds": deadline} if deadline else {}),
            "trainer": {
                "image": resources.image,
                "command": list(command),
                "numNodes": resources.nodes,
                "numProcPerNode": max(resources.gpus_per_node, 1),
                "resourcesPerNode": {"requests": amounts, "limits": dict(amounts)},
                "env": _environment(spec, resources, env or {}),
            },
            "runtimePatches": [
                {
                    "manager": "xtoken.pipelines/launcher",
                    "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [node]}}},
                }
            ],
        },
    }


def about(labels: Mapping[str, str], annotations: Mapping[str, str]) -> dict[str, Any]:
    """Metadata of a pod or a job."""
    given = {"labels": dict(labels), "annotations": dict(annotations)}
    return {name: values for name, values in given.items() if values}


def _environment(spec: str, resources: ResourcesSpec, env: Mapping[str, str]) -> list[dict[str, Any]]:
    plain = {name: value for name, value in env.items() if name not in {secret.env for secret in resources.secrets}}
    given = [{"name": name, "value": value} for name, value in ({"XTOKEN_SPEC": spec} | plain | resources.env).items()]
    secrets = [{"name": s.env, "valueFrom": {"secretKeyRef": {"name": s.secret, "key": s.key}}} for s in resources.secrets]
    return [*given, *secrets]


def _pod(resources: ResourcesSpec) -> dict[str, Any]:
    """What is added to the pod template of the runtime."""
    claims = [(f"claim-{index}", claim) for index, claim in enumerate(resources.pvc)]
    mounts = [
        {"name": "shared-memory", "mountPath": "/dev/shm"},
        *({"name": name, "mountPath": claim.mount_path} for name, claim in claims),
    ]
    pod: dict[str, Any] = {
        "volumes": [
            {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": resources.shm}},
            *({"name": name, "persistentVolumeClaim": {"claimName": claim.name}} for name, claim in claims),
        ],
        "containers": [{"name": "node", "volumeMounts": mounts}],
        "nodeSelector": dict(resources.node_selector),
        "tolerations": [toleration.model_dump(exclude_none=True) for toleration in resources.tolerations],
        "imagePullSecrets": [{"name": secret} for secret in resources.image_pull_secrets],
    }
    if resources.node_affinity:
        terms = [
            requirement.model_dump(mode="json", exclude_defaults=True) | {"operator": requirement.operator}
            for requirement in resources.node_affinity
        ]
        required = {"nodeSelectorTerms": [{"matchExpressions": terms}]}
        pod["affinity"] = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": required}}
    return {name: value for name, value in pod.items() if value}
