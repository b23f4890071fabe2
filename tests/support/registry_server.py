"""A stand-in for Kubeflow's Model Registry, held to its OpenAPI: every body is one of the models generated from it, no field unknown."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from mr_openapi import models
from pydantic import BaseModel, ValidationError

ROOT = "/api/model_registry/v1"
KINDS: dict[str, type[BaseModel]] = {
    "registered_models": models.RegisteredModelCreate,
    "model_versions": models.ModelVersionCreate,
    "model_artifacts": models.ModelArtifact,
}


class FakeRegistry:
    """The server: `with FakeRegistry() as registry: ...`; `registry.url` leads clients to it."""

    def __init__(self) -> None:
        self.kept: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"registry": self}))
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> "FakeRegistry":
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def keep(self, kind: str, body: dict[str, Any]) -> dict[str, Any]:
        """Checks a body and keeps it under a new id. Raises ValidationError or AssertionError."""
        model = KINDS[kind]
        model.model_validate(body)
        known = {field.alias or name for name, field in model.model_fields.items()}
        assert set(body) <= known, f"unknown: {sorted(set(body) - known)}"
        stamps = {"createTimeSinceEpoch": "1", "lastUpdateTimeSinceEpoch": "1"}
        entry = body | stamps | {"id": str(1 + sum(map(len, self.kept.values())))}
        self.kept[kind].append(entry)
        return entry


class _Handler(BaseHTTPRequestHandler):
    registry: FakeRegistry

    def log_message(self, *_: object) -> None:
        pass

    def _send(self, status: int, body: dict[str, Any]) -> None:
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        kind, query = url.path.removeprefix(f"{ROOT}/"), parse_qs(url.query)
        if kind in KINDS:
            items = self.registry.kept[kind]
            return self._send(200, {"items": items, "size": len(items), "pageSize": 100, "nextPageToken": ""})
        wanted = {"name": query.get("name", [None])[0], "registeredModelId": query.get("parentResourceId", [None])[0]}
        asked = {name: value for name, value in wanted.items() if value is not None}
        found = [e for e in self.registry.kept.get(f"{kind}s", []) if asked.items() <= e.items()]
        self._send(200, found[0]) if found else self._send(404, {"code": "404", "message": "not found"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        kind = self.path.removeprefix(f"{ROOT}/")
        kind = "model_artifacts" if kind.endswith("/artifacts") else kind
        try:
            self._send(201, self.registry.keep(kind, body))
        except (ValidationError, AssertionError) as e:
            self._send(400, {"code": "400", "message": " ".join(str(e).split())})
