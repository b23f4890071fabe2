"""A stand-in for a Kubernetes API server with Kubeflow Trainer: it takes TrainJobs and runs each host as a process here.

It stands in for a cluster in tests: a job is held to the published CRD, then every host's command is started with the
variables that Trainer's torch policy would inject (PET_*). It schedules nothing, pulls no image and mounts no volume.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import jsonschema
import yaml

from tests.support.ports import free_ports
from tests.support.schemas import check_resource

JOBS = "/apis/trainer.kubeflow.org/v1alpha1/namespaces/default/trainjobs"
PODS = "/api/v1/namespaces/default/pods"


class FakeKubernetes:
    """The server: `with FakeKubernetes(folder) as server: ...`; `server.kubeconfig` leads clients to it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.jobs: dict[str, dict[str, Any]] = {}
        self.hosts: dict[str, list[subprocess.Popen]] = {}
        self.asked: set[tuple[str, str]] = set()
        """(verb, resource) of every request, as RBAC names them."""
        self.hiccups = 0
        """So many of the next looks at something are answered with 503."""
        self.lingers = 0
        """So many looks find a job that has been deleted, which only then is gone."""
        self.progress: dict[str, dict[str, Any]] = {}
        """What the trainer of each job says of itself, as Trainer's gate TrainJobRuntimeStatus has it."""
        self.states: list[dict[str, Any]] = []
        """Every look at a job that was answered."""
        (folder / "token").write_text("of the job")
        self.scratch = tempfile.mkdtemp()  # a short path, as /tmp in a pod: sockets lie in it
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"kubernetes": self}))
        self.address = address = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.kubeconfig = folder / "kubeconfig"
        self.kubeconfig.write_text(
            yaml.safe_dump(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "clusters": [{"name": "fake", "cluster": {"server": address}}],
                    "contexts": [{"name": "fake", "context": {"cluster": "fake", "user": "fake"}}],
                    "users": [{"name": "fake", "user": {}}],
                    "current-context": "fake",
                }
            )
        )

    def __enter__(self) -> "FakeKubernetes":
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self.jobs):
            self.stop(name)
        self.server.shutdown()
        self.server.server_close()
        shutil.rmtree(self.scratch, ignore_errors=True)

    def start(self, job: dict[str, Any]) -> None:
        name, trainer = job["metadata"]["name"], job["spec"]["trainer"]
        [port] = free_ports(1)
        given = {entry["name"]: entry.get("value", "") for entry in trainer["env"]}
        self.hosts[name] = []
        for rank in range(trainer["numNodes"]):
            injected = {
                "PET_NNODES": str(trainer["numNodes"]),
                "PET_NPROC_PER_NODE": str(trainer["numProcPerNode"]),
                "PET_NODE_RANK": str(rank),
                "PET_MASTER_ADDR": "127.0.0.1",
                "PET_MASTER_PORT": str(port),
            }
            injected |= {
                "KUBEFLOW_TRAINER_SERVER_URL": f"{self.address}/progress/{name}",
                "KUBEFLOW_TRAINER_SERVER_TOKEN": str(self.folder / "token"),
            }
            own = self.folder / f"{name}-{rank}"
            own.mkdir(exist_ok=True)
            with (own / "log").open("w") as log:
                environment = os.environ | given | injected | {"TMPDIR": self.scratch}
                process = subprocess.Popen(trainer["command"], stdout=log, stderr=log, env=environment, start_new_session=True)
            self.hosts[name].append(process)

    def stop(self, name: str) -> None:
        for process in self.hosts.get(name, []):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def state(self, name: str) -> dict[str, Any]:
        """The job, with the conditions that its processes give rise to."""
        codes = [process.poll() for process in self.hosts[name]]
        ended = None if None in codes else "Failed" if any(codes) else "Complete"
        conditions = []
        if ended:
            told = {"Failed": "jobset failed due to one or more job failures", "Complete": "jobset completed successfully"}[ended]
            conditions = [
                {
                    "type": ended,
                    "status": "True",
                    "reason": "JobsDone",
                    "message": told,
                    "lastTransitionTime": "2026-01-01T00:00:00Z",
                }
            ]
        status = {"conditions": conditions} | self.progress.get(name, {})
        self.states.append(self.jobs[name] | {"status": status})
        return self.states[-1]


class _Handler(BaseHTTPRequestHandler):
    kubernetes: FakeKubernetes

    def log_message(self, *_: object) -> None:
        pass

    def _send(self, status: int, body: Any) -> None:
        text = body if isinstance(body, str) else json.dumps(body)
        self.send_response(status)
        self.send_header("Content-Type", "text/plain" if isinstance(body, str) else "application/json")
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def _refuse(self, status: int, message: str) -> None:
        self._send(status, {"kind": "Status", "status": "Failure", "message": message, "code": status})

    def do_POST(self) -> None:
        server, body = self.kubernetes, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path.startswith("/progress/"):
            assert self.headers["Authorization"] == "Bearer of the job"
            server.progress[self.path.removeprefix("/progress/")] = body
            return self._send(200, {})
        server.asked.add(("create", "trainjobs"))
        job = body
        name = job["metadata"]["name"]
        try:
            check_resource(job, "trainjobs")
        except jsonschema.ValidationError as e:
            return self._refuse(422, f"TrainJob {name} is invalid: {e.json_path}: {e.message}")
        if name in server.jobs:
            return self._refuse(409, f'trainjobs "{name}" already exists')
        server.jobs[name] = job
        server.start(job)
        self._send(201, job)

    def do_GET(self) -> None:
        server, url = self.kubernetes, urlsplit(self.path)
        if server.hiccups:
            server.hiccups -= 1
            return self._refuse(503, "apiserver not ready")
        if url.path.startswith(f"{JOBS}/"):
            server.asked.add(("get", "trainjobs"))
            name = url.path.removeprefix(f"{JOBS}/")
            if name in server.jobs and "deletionTimestamp" in server.jobs[name]["metadata"]:
                server.lingers -= 1
                if server.lingers < 0:
                    del server.jobs[name]
            return self._send(200, server.state(name)) if name in server.jobs else self._refuse(404, f"{name} not found")
        if found := re.fullmatch(f"{PODS}/([^/]+)/log", url.path):
            server.asked.add(("get", "pods/log"))
            return self._send(200, (server.folder / found[1] / "log").read_text())
        server.asked.add(("list", "pods"))
        wanted = dict(part.split("=") for part in parse_qs(url.query)["labelSelector"][0].split(","))
        name, rank = wanted["jobset.sigs.k8s.io/jobset-name"], wanted["batch.kubernetes.io/job-completion-index"]
        running = server.hosts[name][int(rank)].poll() is None
        pod = {"metadata": {"name": f"{name}-{rank}"}, "status": {"phase": "Running" if running else "Succeeded"}}
        self._send(200, {"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": [pod]})

    def do_DELETE(self) -> None:
        server, name = self.kubernetes, urlsplit(self.path).path.removeprefix(f"{JOBS}/")
        server.asked.add(("delete", "trainjobs"))
        server.stop(name)
        if server.lingers:
            server.jobs[name]["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
        else:
            del server.jobs[name]
        self._send(200, {"kind": "Status", "status": "Success"})
