"""A run on a cluster: the spec's pipeline uploaded (or found again) as a version named by its content, and started."""

from __future__ import annotations

import json
import shlex
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import kfp
import kfp_server_api
import urllib3

from pipelines.cautions import image_caution, output_caution, retry_caution, root_caution, size_caution
from pipelines.compiling import compile_spec, compile_sweep, documents
from xtoken_core.errors import InputError, in_one_line
from xtoken_core.identity import identity
from xtoken_core.spec import DistillationSpec, ResourcesSpec
from xtoken_core.workflow.shape import check_ranks, shape

FINISHED = ("SUCCEEDED", "FAILED", "CANCELED", "SKIPPED")
"""States in which a run stays. (The client's own waiting does not know CANCELED.)"""

POLL_SECONDS = 5.0
"""Between two looks at a run that is waited for."""

LISTED = 10
"""Runs that `last_runs` tells of."""

PATIENCE = 10
"""Failed looks at a run, one after the other, before waiting for it is given up."""


@dataclass(frozen=True)
class Cluster:
    """A Kubeflow Pipelines endpoint, as its client takes it; None: what the client finds in the environment or kubeconfig.

    `namespace`: the user's own, where Kubeflow has several. (The client takes its own argument of that name for Kubeflow's.)
    """

    endpoint: str | None = None
    namespace: str | None = None
    token: str | None = None

    def client(self) -> kfp.Client:
        """Connects. Raises InputError."""
        with warnings.catch_warnings(), self.reported():
            warnings.simplefilter("ignore")
            return kfp.Client(host=self.endpoint, existing_token=self.token)

    @contextmanager
    def reported(self) -> Iterator[None]:
        """Turns what the client raises into one line that names the endpoint."""
        where = self.endpoint or "KFP endpoint"
        try:
            yield
        except kfp_server_api.ApiException as e:
            raise InputError(f"{where}: {e.status} {e.reason}: {_message(e.body)}") from None
        except TimeoutError as e:  # the client's word for an answer to its question after health that it can't read
            raise InputError(f"{where}: does not answer as Kubeflow Pipelines: {e}") from None
        except urllib3.exceptions.HTTPError as e:
            hint = "" if self.endpoint else " (--endpoint names another)"
            raise InputError(f"{where}: cannot be reached{hint}: {in_one_line(e)}") from None


def submit(
    path: Path,
    overrides: Sequence[str],
    cluster: Cluster,
    experiment: str | None = None,
    pipeline_root: str | None = None,
    say: Callable[[str], None] = print,
) -> tuple[kfp.Client, str]:
    """Starts a run of the spec at `path`; returns the client and the run's id. Raises InputError.

    `experiment`: the spec's name by default; `pipeline_root`: URI for the steps' results, the cluster's own by default.

    Overrides that the compiled spec can follow go with the run, so that its pipeline version serves again; those that
    change the workflow itself are compiled in.
    """
    spec, changed = DistillationSpec.from_yaml(path), DistillationSpec.from_yaml(path, overrides)
    _check(path, changed, say)
    if not pipeline_root and (caution := root_caution(changed)):
        say(caution)
    fits = shape(spec) == shape(changed) and spec.name == changed.name
    parameters = {"overrides": shlex.join(overrides)} if fits and overrides else {}
    compiled = compile_spec(spec if fits else changed)
    return _start(changed, compiled, cluster, say, experiment, params=parameters, pipeline_root=pipeline_root)


def submit_sweep(
    path: Path, variants: Mapping[str, DistillationSpec], cluster: Cluster, say: Callable[[str], None]
) -> tuple[kfp.Client, str]:
    """Starts a sweep (see `pipelines.sweeps`) of the spec at `path`; returns the client and the run's id. Raises InputError."""
    first = next(iter(variants.values()))
    _check(path, first, say)
    return _start(first, compile_sweep(variants), cluster, say)


def _check(path: Path, spec: DistillationSpec, say: Callable[[str], None]) -> None:
    """Raises InputError for what would be lost on a cluster, and says what to be careful about."""
    if caution := image_caution(spec.resources.image):
        if spec.resources.image == ResourcesSpec().image:
            raise InputError(f"{path}: {caution}")
        say(caution)
    if caution := output_caution(spec):
        raise InputError(f"{path}: {caution}")
    check_ranks(spec)
    if caution := retry_caution(spec):
        say(caution)


def _start(
    spec: DistillationSpec,
    compiled: str,
    cluster: Cluster,
    say: Callable[[str], None],
    experiment: str | None = None,
    **options: Any,
) -> tuple[kfp.Client, str]:
    """Starts a run of a compiled pipeline, whose version is named by its content; `options`: others of the client's `run_pipeline`."""
    if caution := size_caution(compiled):
        say(caution)
    digest = identity(documents(compiled), length=12)
    client = cluster.client()
    with cluster.reported():
        version = _version(client, spec.name, f"{spec.name}-{digest}", compiled, cluster.namespace, say)
        found = client.create_experiment(experiment or spec.name, namespace=cluster.namespace)
        run = client.run_pipeline(  # which prints a link to the run
            experiment_id=found.experiment_id,
            job_name=f"{spec.name} {datetime.now():%Y-%m-%d %H:%M:%S}",
            pipeline_id=version.pipeline_id,
            version_id=version.pipeline_version_id,
            service_account=spec.resources.service_account,
            **options,
        )
    return client, run.run_id


def follow(client: kfp.Client, run_id: str, cluster: Cluster, say: Callable[[str], None]) -> str:
    """Waits for a run, says how its tasks fare, and returns its last state: SUCCEEDED, FAILED, CANCELED or SKIPPED."""
    told: dict[str, str] = {}
    failures = 0
    while True:
        try:
            with cluster.reported():
                run = client.get_run(run_id)
            failures = 0
        except InputError as e:
            failures += 1
            if failures == PATIENCE:
                raise
            say(f"{e}; looking again")
            time.sleep(POLL_SECONDS)
            continue
        for task in (run.run_details and run.run_details.task_details) or []:
            name, state = task.display_name or task.task_id, task.state or "PENDING"
            if told.get(name) != state and state not in ("PENDING", "RUNTIME_STATE_UNSPECIFIED"):
                told[name] = state
                say(f"{name}: {state.lower()}{_reason(task)}")
        if run.state in FINISHED:
            say(f"run {run_id}: {run.state}")
            return str(run.state)
        time.sleep(POLL_SECONDS)


def last_runs(cluster: Cluster) -> list[str]:
    """A line for each of the last runs: its name, its state, and the tasks that are at work. Raises InputError."""
    client = cluster.client()
    with cluster.reported():
        runs = client.list_runs(page_size=LISTED, sort_by="created_at desc", namespace=cluster.namespace).runs or []
        found = [client.get_run(run.run_id) for run in runs]
    lines = []
    for run in found:
        tasks = (run.run_details and run.run_details.task_details) or []
        working = [task.display_name for task in tasks if task.state == "RUNNING"]
        lines.append(f"{run.display_name}: {run.state}" + (f", at work: {', '.join(working)}" if working else ""))
    return lines


def _version(
    client: kfp.Client, name: str, version: str, compiled: str, namespace: str | None, say: Callable[[str], None]
) -> Any:
    """The pipeline version of this content: found, or uploaded."""

    def pipelines() -> Any:
        return client.list_pipelines(filter=_called(name), namespace=namespace, sort_by="created_at").pipelines

    def create() -> Any:
        body = kfp_server_api.V2beta1Pipeline(display_name=name, namespace=namespace)
        return client.pipelines.pipeline_service_create_pipeline(pipeline=body)

    pipeline_id = _found_or_made(pipelines, create).pipeline_id  # of several of this name the first one keeps all versions

    def versions() -> Any:
        known = client.list_pipeline_versions(pipeline_id, filter=_called(version)).pipeline_versions
        if known:
            say(f"{version}: reused")
        return known

    def upload() -> Any:
        with tempfile.TemporaryDirectory() as scratch:
            package = Path(scratch) / "pipeline.yaml"
            package.write_text(compiled, encoding="utf-8")
            say(f"{version}: uploading")
            return client.upload_pipeline_version(str(package), version, pipeline_id=pipeline_id)

    return _found_or_made(versions, upload)


def _found_or_made(find: Callable[[], Any], make: Callable[[], Any]) -> Any:
    """The first that is found, else what is made; found again where another submission has made it meanwhile."""
    if found := find():
        return found[0]
    try:
        return make()
    except kfp_server_api.ApiException as e:
        if e.status == 409 and (found := find()):
            return found[0]
        raise


def _called(name: str) -> str:
    """The API's filter for what has this name."""
    return json.dumps({"predicates": [{"operation": 1, "key": "display_name", "stringValue": name}]})


def _reason(task: Any) -> str:
    message = task.error and task.error.message
    return f": {' '.join(message.split())[:300]}" if message else ""


def _message(body: Any) -> str:
    """What a server's answer says, in one line."""
    text = body.decode(errors="replace") if isinstance(body, bytes) else str(body or "")
    with suppress(ValueError, AttributeError):
        text = json.loads(text).get("message") or text
    return " ".join(text.split())[:300]
