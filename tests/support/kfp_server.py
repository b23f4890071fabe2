"""A stand-in for a Kubeflow Pipelines API server (v2beta1): it keeps what it is told and runs pipelines with `kfp.local`.

It stands in for a cluster in tests, and shows nothing about Kubernetes itself: images, GPUs, volumes and secrets are parsed,
not used, and nothing is tried again. What makes it worth asking: requests and answers are held to KFP's published API, and
what is submitted is parsed as the protobuf messages of the real server before it runs.
"""

import json
import re
import threading
import uuid
from datetime import UTC, datetime
from email.message import Message
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import jsonschema
import yaml
from google.protobuf import json_format
from kfp.kubernetes import kubernetes_executor_config_pb2
from kfp.pipeline_spec import pipeline_spec_pb2

from pipelines.warm import fork
from tests.support.execute import execute
from tests.support.schemas import check_message, published


class Refused(Exception):
    """An answer other than 200: HTTP status, gRPC code, message."""

    def __init__(self, status: int, code: int, message: str):
        super().__init__(message)
        self.answer = (status, {"code": code, "message": message})


class FakeKfp:
    """The server: `with FakeKfp(folder) as server: ... server.url`.

    `token`: required of every request. `multi_user`: every experiment lies in a namespace; a pipeline may, and is then seen
    in it alone. `runs`: what is submitted is run here; it stays PENDING otherwise.
    """

    def __init__(self, folder: Path, token: str | None = None, multi_user: bool = False, runs: bool = False):
        self.folder, self.token, self.multi_user, self._runs = folder, token, multi_user, runs
        self.experiments: dict[str, dict[str, Any]] = {}
        self.pipelines: dict[str, dict[str, Any]] = {}
        self.versions: dict[str, dict[str, Any]] = {}
        self.runs: dict[str, dict[str, Any]] = {}
        self._threads: list[threading.Thread] = []
        """One a run."""
        self.requests: list[str] = []
        handler = type("Handler", (_Handler,), {"kfp": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> "FakeKfp":
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def last_run(self) -> dict[str, Any]:
        """The run that was started last, once it has ended."""
        self._threads[-1].join()
        return list(self.runs.values())[-1]

    def HealthzService_GetHealthz(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"multi_user": self.multi_user}

    def ExperimentService_CreateExperiment(self, given: dict[str, Any]) -> dict[str, Any]:
        if self.multi_user and not given["body"].get("namespace"):
            raise Refused(400, 3, "Invalid input error: Experiment namespace is empty")
        experiment = given["body"] | {"experiment_id": str(uuid.uuid4())}
        return self.experiments.setdefault(experiment["experiment_id"], experiment)

    def ExperimentService_ListExperiments(self, given: dict[str, Any]) -> dict[str, Any]:
        return _listed("experiments", _inside(self.experiments, given), given)

    def ExperimentService_GetExperiment(self, given: dict[str, Any]) -> dict[str, Any]:
        return _found(self.experiments, given["experiment_id"], "Experiment")

    def PipelineService_CreatePipeline(self, given: dict[str, Any]) -> dict[str, Any]:
        pipeline = given["body"] | {"pipeline_id": str(uuid.uuid4())}
        for known in _inside(self.pipelines, pipeline):
            if known["display_name"] == pipeline["display_name"]:
                raise Refused(409, 6, f"Already exist error: a pipeline of the name {known['display_name']}")
        return self.pipelines.setdefault(pipeline["pipeline_id"], pipeline)

    def PipelineService_ListPipelines(self, given: dict[str, Any]) -> dict[str, Any]:
        return _listed("pipelines", _inside(self.pipelines, given), given)

    def PipelineService_ListPipelineVersions(self, given: dict[str, Any]) -> dict[str, Any]:
        _found(self.pipelines, given["pipeline_id"], "Pipeline")
        mine = [version for version in self.versions.values() if version["pipeline_id"] == given["pipeline_id"]]
        return _listed("pipeline_versions", mine, given)

    def UploadPipelineVersion(self, given: dict[str, Any]) -> dict[str, Any]:
        _found(self.pipelines, given["pipelineid"], "Pipeline")
        documents = [document for document in yaml.load_all(given["uploadfile"], Loader=yaml.CSafeLoader) if document]
        spec = {"pipeline_spec": documents[0]} | ({"platform_spec": documents[1]} if len(documents) > 1 else {})
        _parsed(spec)
        version = {
            "pipeline_id": given["pipelineid"],
            "pipeline_version_id": str(uuid.uuid4()),
            "display_name": given["name"],
            "pipeline_spec": spec,
        }
        return self.versions.setdefault(version["pipeline_version_id"], version)

    def RunService_CreateRun(self, given: dict[str, Any]) -> dict[str, Any]:
        run = given["body"]
        _found(self.experiments, run.get("experiment_id", ""), "Experiment")
        spec = run.get("pipeline_spec")
        if reference := run.get("pipeline_version_reference"):
            spec = _found(self.versions, reference["pipeline_version_id"], "PipelineVersion")["pipeline_spec"]
        if not spec or not run.get("display_name"):
            raise Refused(400, 3, "Invalid input error: a run has a display_name and a pipeline")
        _parsed(spec)
        parameters = run.get("runtime_config", {}).get("parameters") or {}
        known = spec["pipeline_spec"]["root"].get("inputDefinitions", {}).get("parameters", {})
        if unknown := sorted(parameters.keys() - known.keys()):
            raise Refused(400, 3, f"Invalid input error: unknown pipeline parameters: {', '.join(unknown)}")
        run = run | {"run_id": str(uuid.uuid4()), "state": "PENDING", "run_details": {"task_details": []}}
        run["created_at"] = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
        self.runs[run["run_id"]] = run
        if self._runs:
            arguments = (run, spec["pipeline_spec"], parameters)
            self._threads.append(threading.Thread(target=self._execute, args=arguments, daemon=True))
            self._threads[-1].start()
        return run

    def RunService_ListRuns(self, given: dict[str, Any]) -> dict[str, Any]:
        newest = sorted(_inside(self.runs, given), key=lambda run: run["created_at"], reverse=True)
        return _listed("runs", newest[: int(given["page_size"])], given)

    def RunService_GetRun(self, given: dict[str, Any]) -> dict[str, Any]:
        return _found(self.runs, given["run_id"], "Run")

    def _execute(self, run: dict[str, Any], pipeline: dict[str, Any], parameters: dict[str, Any]) -> None:
        """Runs a pipeline in a process of its own, and notes how its tasks fare."""
        folder = self.folder / run["run_id"]
        folder.mkdir(parents=True)
        (folder / "pipeline.yaml").write_text(yaml.dump(pipeline, Dumper=yaml.CSafeDumper))
        (folder / "parameters.json").write_text(json.dumps(parameters))
        run["state"] = "RUNNING"
        process, output = fork(execute, folder)
        with (folder / "log").open("w") as log, output:
            for line in output:
                log.write(line)
                self._note(run, re.sub(r"\x1b\[\d*m", "", line))
        process.join()
        run["state"] = "SUCCEEDED" if process.exitcode == 0 else "FAILED"

    def _note(self, run: dict[str, Any], line: str) -> None:
        tasks = run["run_details"]["task_details"]
        if found := re.search(r"Executing task '(\S+)'", line):
            tasks.append({"task_id": found[1], "run_id": run["run_id"], "display_name": found[1], "state": "RUNNING"})
        elif found := re.search(r"Task '(\S+)' finished with status (\w+)", line):
            state = {"SUCCESS": "SUCCEEDED", "FAILURE": "FAILED"}[found[2]]
            next(task for task in tasks if task["display_name"] == found[1])["state"] = state


class _Handler(BaseHTTPRequestHandler):
    kfp: FakeKfp

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self) -> None:
        try:
            open_to_all = self.path.endswith("/healthz")  # as the real one is
            if self.kfp.token and not open_to_all and self.headers.get("Authorization") != f"Bearer {self.kfp.token}":
                raise Refused(401, 16, "User identity is empty in the request header.")
            operation, given = self._request()
            self.kfp.requests.append(operation["operationId"])
            answer = getattr(self.kfp, operation["operationId"])(given)
            check_message(answer, operation["responses"]["200"]["schema"])
            status = 200
        except Refused as e:
            status, answer = e.answer
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = do_DELETE = _answer

    def _request(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The operation that is asked for, and its arguments, all of them known to the published API."""
        url = urlsplit(self.path)
        for path, operations in published("kfp_v2beta1.swagger")["paths"].items():
            pattern = re.sub(r"\\\{[^}]*\\\}", "([^/:]+)", re.escape(path))
            if self.command.lower() in operations and (found := re.fullmatch(pattern, url.path)):
                operation = operations[self.command.lower()]
                names = re.findall(r"\{([^}]*)\}", path)
                return operation, self._arguments(operation, dict(zip(names, map(unquote, found.groups()))), parse_qs(url.query))
        raise Refused(404, 5, f"Not Found: {self.command} {url.path}")

    def _arguments(self, operation: dict[str, Any], given: dict[str, Any], query: dict[str, list[str]]) -> dict[str, Any]:
        parameters = {parameter["name"]: parameter for parameter in operation.get("parameters", [])}
        for name, values in query.items():
            if parameters.get(name, {}).get("in") != "query":
                raise Refused(400, 3, f"unknown query parameter {name}")
            given[name] = values[0]
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        for name, parameter in parameters.items():
            if parameter["in"] == "body":
                given["body"] = json.loads(body)
                try:
                    check_message(given["body"], parameter["schema"])
                except jsonschema.ValidationError as e:
                    raise Refused(400, 3, f"not a {name} of the API: {e.message}") from None
            elif parameter["in"] == "formData":
                given[name] = _form(body, self.headers)[name]
        return given


def _form(body: bytes, headers: Message) -> dict[str, bytes]:
    head = f"Content-Type: {headers['Content-Type']}\r\n\r\n".encode()
    parts = BytesParser().parsebytes(head + body).get_payload()
    return {part.get_param("name", header="content-disposition"): part.get_payload(decode=True) for part in parts}


def _parsed(spec: dict[str, Any]) -> None:
    """As the real server does: protobuf messages, without a field that they do not know."""
    try:
        json_format.ParseDict(spec["pipeline_spec"], pipeline_spec_pb2.PipelineSpec())
        platforms = spec.get("platform_spec", {}).get("platforms", {})
        json_format.ParseDict({"platforms": platforms}, pipeline_spec_pb2.PlatformSpec())
        executors = platforms.get("kubernetes", {}).get("deploymentSpec", {}).get("executors", {})
        for config in executors.values():
            json_format.ParseDict(config, kubernetes_executor_config_pb2.KubernetesExecutorConfig())
    except json_format.ParseError as e:
        raise Refused(400, 3, f"Invalid input error: {e}") from None


def _found(where: dict[str, dict[str, Any]], key: str, kind: str) -> dict[str, Any]:
    if key not in where:
        raise Refused(404, 5, f"{kind} {key} not found")
    return where[key]


def _inside(where: dict[str, dict[str, Any]], given: dict[str, Any]) -> list[dict[str, Any]]:
    """Those of the namespace that is given, or of none."""
    return [item for item in where.values() if item.get("namespace", "") == given.get("namespace", "")]


def _listed(name: str, items: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Those that the request's filter lets through (equality alone, which is all that the client asks for here)."""
    for predicate in json.loads(given.get("filter") or "{}").get("predicates", []):
        assert predicate["operation"] in (1, "EQUALS")
        items = [item for item in items if item.get(predicate["key"]) == predicate["stringValue"]]
    items = list(items)
    return {name: items, "total_size": len(items)} if items else {}
