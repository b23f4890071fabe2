"""A stand-in for the Hugging Face hub on this machine: it serves files of dataset repositories, as `datasets` asks for them, and
takes files of models, as `huggingface_hub` sends them: small ones within the commit, weights by git-lfs."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
"""The one revision of every repository."""


class Hub:
    """Serves `files` ({repository: {path: content}}) at `endpoint` until closed; `asked` holds the paths of all requests.

    `models` and `private`: what was pushed, and whether only its owner sees it, by repository. `token`: asked of who pushes.
    """

    def __init__(self, files: dict[str, dict[str, bytes]], token: str = "hf_of_the_tests"):
        self.files, self.asked, self.token = files, [], token
        self.models: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.large: dict[str, bytes] = {}
        """By SHA-256."""
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Hub:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def entries(self, repo: str, under: str = "") -> list[dict[str, Any]]:
        """The files of a repository below a folder, and the folders, as the hub lists them."""
        files = {path: content for path, content in self.files[repo].items() if path.startswith(f"{under}/" if under else "")}
        folders = {path.rpartition("/")[0] for path in files} - {"", under}
        return [
            *({"type": "directory", "path": path, "oid": COMMIT, "size": 0} for path in sorted(folders)),
            *({"type": "file", "path": path, "oid": _oid(content), "size": len(content)} for path, content in files.items()),
        ]


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.hub.asked.append(path)
        repo = next((repo for repo in self.hub.files if f"datasets/{repo}" in path), None)
        kind, _, rest = path.partition(f"datasets/{repo}")
        parts = rest.strip("/").split("/")
        if repo is None:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif kind == "" and parts[0] == "resolve" and (content := self.hub.files[repo].get("/".join(parts[2:]))) is not None:
            self._send(200, content, {"ETag": f'"{_oid(content)}"', "X-Repo-Commit": COMMIT})
        elif kind == "api/" and parts[0] in ("", "revision"):
            siblings = [{"rfilename": name} for name in self.hub.files[repo]]
            about = {"id": repo, "sha": COMMIT, "siblings": siblings, "private": False, "tags": [], "downloads": 0, "likes": 0}
            self._send(200, json.dumps(about).encode())
        elif kind == "api/" and parts[0] == "tree":
            self._send(200, json.dumps(self.hub.entries(repo, "/".join(parts[2:]))).encode())
        else:
            self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        content = self._body()
        self.hub.large[hashlib.sha256(content).hexdigest()] = content
        self._send(200, b"")

    def do_POST(self) -> None:
        path, body = urlsplit(self.path).path, self._body()
        repo = next((repo for repo in self.hub.models if f"/{repo}" in path), "")
        if self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self._send(401, b'{"error": "Invalid username or password."}')
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            status = 409 if repo in self.hub.models else 200
            self.hub.models.setdefault(repo, {})
            self.hub.private[repo] = asked.get("private") or asked.get("visibility") == "private"
            told: dict[str, Any] = {
                "url": f"{self.hub.endpoint}/{repo}",
                "name": repo,
                "error": "You already created this model repo",
            }
        elif path == "/api/validate-yaml":
            status, told = 200, {"errors": [], "warnings": []}
        elif path == f"/api/models/{repo}/preupload/main":
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in names}
            status, told = (
                200,
                {"files": [{"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in modes.items()]},
            )
        elif path == f"/{repo}.git/info/lfs/objects/batch":
            objects = [{key: file[key] for key in ("oid", "size")} for file in json.loads(body)["objects"]]
            uploads = {"upload": {"href": f"{self.hub.endpoint}/upload"}}
            status, told = 200, {"transfer": "basic", "objects": [file | {"actions": uploads} for file in objects]}
        elif path == f"/api/models/{repo}/commit/main":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.hub.models[repo][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "lfsFile":
                    self.hub.models[repo][line["value"]["path"]] = self.hub.large[line["value"]["oid"]]
            place = f"{self.hub.endpoint}/{repo}/commit/{COMMIT}"
            status, told = 200, {"success": True, "commitOid": COMMIT, "commitUrl": place, "hookOutput": ""}
        else:
            status, told = 404, {"error": path}
        self._send(status, json.dumps(told).encode())

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Silent."""


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
