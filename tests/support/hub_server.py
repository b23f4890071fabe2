"""A stand-in for the Hugging Face hub on this machine, with what `datasets` asks of it: files of dataset repositories."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
"""The one revision of every repository."""


class Hub:
    """Serves `files` ({repository: {path: content}}) at `endpoint` until closed; `asked` holds the paths of all requests."""

    def __init__(self, files: dict[str, dict[str, bytes]]):
        self.files, self.asked = files, []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
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
