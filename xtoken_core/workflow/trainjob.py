"""Training on several hosts: a Kubeflow Trainer v2 TrainJob, made, followed and passed on.

The job's pods run `torchrun -m components.distill` (the runtime's torch policy tells torchrun who is who through PET_*
variables) and read rows and projections from, and publish the run to, URIs that every host reaches.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from typing import Any

from xtoken_core.errors import InputError, RunError
from xtoken_core.identity import identity
from xtoken_core.spec import ResourcesSpec
from xtoken_core.storage import is_remote, normalize
from xtoken_core.training.trackers import PIPELINES_MLFLOW
from xtoken_core.workflow.kubeflow import namespace, run_metadata
from xtoken_core.workflow.trainjob_manifest import GROUP, VERSION, Reads, manifest, worker_command

PLURAL = "trainjobs"
POLL_SECONDS = 5.0
PATIENCE = 60
"""Failed looks at a running job, one after the other, after which its launcher gives up (five minutes)."""


class TrainJobError(RunError):
    """The job failed; its pods' log says why."""


def launch(spec: str, resources: str, reads: Reads, run_uri: str, baseline: bool = False, candidate: str = "") -> None:
    """Trains on several hosts, and returns when the job is complete; arguments as of components/launch.py.

    Raises TrainJobError where the job fails, InputError where the cluster refuses it or something isn't in reach of every host.
    """
    given = ResourcesSpec.model_validate_json(resources)
    for uri in (*reads.places, run_uri):
        if not is_remote(uri) and not given.keeps(uri):
            raise InputError(
                f"resources.nodes: several hosts cannot all reach {uri}; use a pipeline root that is a URI or on a resources.pvc"
            )
    command = worker_command(reads, normalize(run_uri), baseline, candidate)
    key = identity(json.loads(spec), json.loads(resources), command, length=12)
    mlflow = {name: os.environ[name] for name in PIPELINES_MLFLOW if name in os.environ}
    job = manifest(f"xtoken-distill-{key}", spec, given, command, mlflow)
    for kind, told in run_metadata().items():
        job["metadata"].setdefault(kind, {}).update(told)
    run_job(job)


def run_job(job: Mapping[str, Any]) -> None:
    """Creates the job, prints the log of its first host, and returns when it is complete.

    A job of this name that is running already, of a launcher that was pre-empted, is followed instead of made again.
    Raises TrainJobError where it fails, InputError where the cluster refuses it. When this process is told to stop, the job
    is deleted.
    """
    import kubernetes
    import urllib3

    own = _load_config(kubernetes)
    jobs, pods = kubernetes.client.CustomObjectsApi(), kubernetes.client.CoreV1Api()
    place = {"group": GROUP, "version": VERSION, "namespace": own, "plural": PLURAL}
    name = job["metadata"]["name"]
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        _create(jobs, place, job, kubernetes.client.ApiException)
        _follow(jobs, pods, place, name, (kubernetes.client.ApiException, urllib3.exceptions.HTTPError))
    except (KeyboardInterrupt, SystemExit):
        jobs.delete_namespaced_custom_object(**place, name=name)
        print(f"{name}: deleted, since this step was cancelled", flush=True)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _load_config(kubernetes: Any) -> str:
    """Makes the cluster known to the client; the namespace of this pod, or of the kubeconfig's context. Raises InputError."""
    try:
        kubernetes.config.load_incluster_config()
        return namespace() or "default"
    except kubernetes.config.ConfigException:
        try:
            kubernetes.config.load_kube_config()
            _, context = kubernetes.config.list_kube_config_contexts()
            return str(context["context"].get("namespace") or "default")
        except kubernetes.config.ConfigException:
            raise InputError("resources.nodes: several hosts need a Kubernetes cluster with Kubeflow Trainer") from None


def _create(jobs: Any, place: dict[str, str], job: Mapping[str, Any], api_exception: type[Exception]) -> None:
    name = job["metadata"]["name"]
    try:
        jobs.create_namespaced_custom_object(**place, body=job)
        print(f"{name}: created, {job['spec']['trainer']['numNodes']} hosts", flush=True)
    except api_exception as e:
        if getattr(e, "status", None) != 409:
            raise InputError(f"TrainJob {name}: {getattr(e, 'status', '')} {_message(e)}") from None
        found = _found(jobs, place, name, api_exception)
        if found is not None and _ended(found) != "Failed" and not _going(found):
            print(f"{name}: is there already; followed", flush=True)
            return
        if found is not None and not _going(found):
            jobs.delete_namespaced_custom_object(**place, name=name)
        _wait_until_gone(jobs, place, name, api_exception)
        jobs.create_namespaced_custom_object(**place, body=job)
        print(f"{name}: had {'failed' if found and not _going(found) else 'been deleted'}; created again", flush=True)


def _found(jobs: Any, place: dict[str, str], name: str, api_exception: type[Exception]) -> dict[str, Any] | None:
    """The job of this name; None where there is none."""
    try:
        job: dict[str, Any] = jobs.get_namespaced_custom_object(**place, name=name)
        return job
    except api_exception as e:
        if getattr(e, "status", None) == 404:
            return None
        raise


def _going(job: Mapping[str, Any]) -> bool:
    """Whether it has been deleted, as by a launcher that was cancelled, and is there until its pods have ended."""
    return "deletionTimestamp" in job["metadata"]


def _wait_until_gone(jobs: Any, place: dict[str, str], name: str, api_exception: type[Exception]) -> None:
    for look in range(PATIENCE):
        if _found(jobs, place, name, api_exception) is None:
            return
        if look == 0:
            print(f"{name}: waiting until the job before is gone", flush=True)
        time.sleep(POLL_SECONDS)
    raise TrainJobError(f"TrainJob {name}: the one before has been deleted and does not go; kubectl describe tells what holds it")


def _follow(jobs: Any, pods: Any, place: dict[str, str], name: str, trouble: tuple[type[Exception], ...]) -> None:
    """Until the job has ended; `trouble`: what an API that is away for a while raises, which is borne PATIENCE times in a row."""
    seen: dict[str, int] = {}
    told, failures = "", 0
    while True:
        try:
            job = jobs.get_namespaced_custom_object(**place, name=name)
            failures = 0
        except trouble as e:
            failures += 1
            if getattr(e, "status", None) == 404:
                raise TrainJobError(f"TrainJob {name}: deleted by another") from None
            if failures == PATIENCE:
                raise TrainJobError(f"TrainJob {name}: left running, since the cluster does not answer: {_message(e)}") from None
            print(f"{name}: {_message(e)}; looking again", flush=True)
            time.sleep(POLL_SECONDS)
            continue
        if (now := progress(job)) != told:
            told = now
            print(f"{name}: {told}", flush=True)
        with contextlib.suppress(*trouble):  # lines that cannot be had now come with the next look
            _print_log(pods, place["namespace"], name, seen)
        ended = _ended(job)
        if ended == "Complete":
            print(f"{name}: complete", flush=True)
            return
        if ended:
            conditions = job["status"]["conditions"]
            reason = next(c.get("message", "") for c in conditions if c["type"] == "Failed" and c["status"] == "True")
            raise TrainJobError(f"TrainJob {name}: {' '.join(reason.split()) or 'failed'}")
        time.sleep(POLL_SECONDS)


def progress(job: Mapping[str, Any]) -> str:
    """How far a job's trainer says it is; empty where its status does not tell (Trainer's gate TrainJobRuntimeStatus is off)."""
    status = (job.get("status") or {}).get("trainerStatus") or {}
    percentage, left = status.get("progressPercentage"), status.get("estimatedRemainingSeconds")
    numbers = {metric["name"]: metric["value"] for metric in status.get("metrics") or []}
    words = [f"{percentage} % done"] if percentage is not None else []
    words += [f"{left // 60} min {left % 60:02} s left"] if left is not None else []
    words += [f"{name} {_rounded(numbers[name])}" for name in ("loss", "tokens_per_second") if name in numbers]
    return ", ".join(words)


def _rounded(number: str) -> str:
    try:
        return f"{float(number):,.0f}" if abs(float(number)) >= 1000 else f"{float(number):.4g}"
    except ValueError:
        return number


def _ended(job: Mapping[str, Any]) -> str | None:
    """`Complete`, `Failed` or None, by the job's conditions."""
    conditions = (job.get("status") or {}).get("conditions") or []
    return next((c["type"] for c in conditions if c["type"] in ("Complete", "Failed") and c["status"] == "True"), None)


def _print_log(pods: Any, namespace: str, name: str, seen: dict[str, int]) -> None:
    """Prints what the first host's pods have logged since the last look; `seen`: lines told, by pod."""
    first = f"jobset.sigs.k8s.io/jobset-name={name},batch.kubernetes.io/job-completion-index=0"
    for pod in pods.list_namespaced_pod(namespace, label_selector=first).items:
        if pod.status.phase in ("Running", "Succeeded", "Failed"):
            lines = pods.read_namespaced_pod_log(pod.metadata.name, namespace).splitlines()
            told = seen.get(pod.metadata.name, 0)
            for line in lines[told if told <= len(lines) else 0 :]:  # fewer than before: the kubelet has rotated the log
                print(line, flush=True)
            seen[pod.metadata.name] = len(lines)


def _message(error: Any) -> str:
    try:
        return " ".join(json.loads(error.body)["message"].split())
    except (TypeError, ValueError, KeyError, AttributeError):
        return str(getattr(error, "reason", error))
