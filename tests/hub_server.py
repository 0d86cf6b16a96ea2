"""A Hub on loopback for uploads: repositories, branches, preupload, LFS in one or several parts, commits; and faults on demand.

It answers as the Hub's HTTP API does for what a push asks of it, keeps what it was sent in memory, and counts the bytes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_canaryCanaryCanaryCanaryCanary"
SIGNATURE = "X-Amz-Signature=secretOfAnAddress"


@dataclass
class Fault:
    """Goes wrong `times` times where "METHOD path" matches `where`: a status with the server's words, or a dropped connection."""

    where: str
    status: int | None = None  # None: read half of what is sent, then hang up
    says: str = ""
    times: int = 1_000
    skip: int = 0  # requests to let through before


@dataclass
class Repository:
    """Branches with their files; a file is its content, or the SHA-256 of an LFS object. A commit is a copy of the files."""

    private: bool
    branches: dict[str, str] = field(default_factory=lambda: {"main": "0" * 40})
    commits: dict[str, dict[str, bytes | str]] = field(default_factory=lambda: {"0" * 40: {".gitattributes": b"* text"}})

    def head(self, revision: str) -> str:
        return self.branches.get(revision, revision)


class Hub(ThreadingHTTPServer):
    """The server and all that it knows."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.put: list[str] = []  # objects that arrived whole, in order
        self.part_bytes: int | None = None
        self.lock = threading.Lock()

    def content(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """What a repository holds at a revision, LFS objects in place of their names."""
        files = self.repositories[repo].commits[self.repositories[repo].head(revision)]
        return {name: self.objects[value] if isinstance(value, str) else value for name, value in files.items()}

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing: a client that hangs up is part of the tests."""


@contextmanager
def serving() -> Iterator[Hub]:
    """A running server."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, args=(0.01,), daemon=True)  # it looks that often whether it is to end
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()


class _Answers(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: tests read what was asked, not a log."""

    def do_GET(self) -> None:
        self.respond()

    def do_POST(self) -> None:
        self.respond()

    def do_PUT(self) -> None:
        self.respond()

    def respond(self) -> None:
        path = unquote(urlsplit(self.path).path)
        asked, length = f"{self.command} {path}", int(self.headers.get("Content-Length") or 0)
        with self.server.lock:
            self.server.requests.append(asked)
            fault = next((f for f in self.server.faults if f.times and re.search(f.where, asked)), None)
            if fault is not None and fault.skip:
                fault.skip -= 1
                fault = None
            elif fault is not None:
                fault.times -= 1
        if fault is not None and fault.status is None:
            self.rfile.read(length // 2)
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = b"".join(iter(self.chunk, b""))
        else:
            body = self.rfile.read(length)
        if fault is not None:
            self.send(fault.status or 500, {"error": fault.says}, {"Retry-After": "0"})
            return
        # an address of an upload is its own permission, and the client sends no token there
        if not path.startswith("/lfs/") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.send(401, {"error": "Invalid credentials"}, {"X-Error-Message": "Invalid credentials in Authorization header"})
            return
        with self.server.lock:
            self.send(*self.answer(self.command, path, body))

    def chunk(self) -> bytes:
        content = self.rfile.read(int(self.rfile.readline(), 16))
        self.rfile.readline()
        return content

    def send(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        for name, text in ({"Content-Type": "application/json", "Content-Length": str(len(content))} | (headers or {})).items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(content)

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        hub = self.server
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            if repo in hub.repositories:
                return 409, {"error": "You already created this model repo", "url": f"{hub.address}/{repo}"}, {}
            hub.repositories[repo] = Repository(asked.get("visibility") == "private" or bool(asked.get("private")))
            return 200, {"url": f"{hub.address}/{repo}"}, {}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}, {}
        if method == "POST" and path.endswith("/info/lfs/objects/batch"):
            return 200, {"objects": [self.action(wanted) for wanted in json.loads(body)["objects"]]}, {}
        if path.startswith("/lfs/"):
            return self.store(path.split("/")[2:], body)
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(\w+)/(.+))?", path)
        if found is None or found[1] not in hub.repositories:
            return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        return self.of_repository(found[1], found[2] or "revision", found[3] or "main", body)

    def of_repository(self, name: str, verb: str, revision: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        repo = self.server.repositories[name]
        if verb == "branch":
            if revision in repo.branches:
                return 409, {"error": "Reference already exists"}, {}
            repo.branches[revision] = repo.branches["main"]
            return 200, {}, {}
        if repo.head(revision) not in repo.commits:
            return 404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"}
        files = repo.commits[repo.head(revision)]
        if verb == "revision":
            siblings = [{"rfilename": file} for file in files]
            return 200, {"id": name, "sha": repo.head(revision), "private": repo.private, "siblings": siblings}, {}
        if verb == "preupload":
            listed = [_mode(file["path"], files.get(file["path"])) for file in json.loads(body)["files"]]
            return 200, {"files": listed}, {}
        assert verb == "commit"
        head, *changes = [json.loads(line) for line in body.splitlines()]
        if head["value"].get("parentCommit", repo.head(revision)) != repo.head(revision):
            return 412, {"error": "A commit has happened since. Please refresh and try again."}, {}
        new = dict(files)
        for change in changes:
            value = change["value"]
            if change["key"] == "lfsFile" and value["oid"] not in self.server.objects:
                return 422, {"error": f"LFS pointer pointed to a file that does not exist: {value['path']}"}, {}
            new[value["path"]] = value["oid"] if change["key"] == "lfsFile" else base64.b64decode(value["content"])
        commit = hashlib.sha1(body).hexdigest()
        repo.commits[commit] = new
        repo.branches[revision] = commit
        return 200, {"commitUrl": f"{self.server.address}/{name}/commit/{commit}", "commitOid": commit}, {}

    def action(self, wanted: dict[str, Any]) -> dict[str, Any]:
        """Where to send an object; nothing is to be sent that is there."""
        oid, size, address = wanted["oid"], wanted["size"], self.server.address
        if oid in self.server.objects:
            return {"oid": oid, "size": size}
        step = self.server.part_bytes
        if step is None or size <= step:
            return {"oid": oid, "size": size, "actions": {"upload": {"href": f"{address}/lfs/{oid}?{SIGNATURE}"}}}
        parts = {str(number + 1): f"{address}/lfs/{oid}/{number + 1}?{SIGNATURE}" for number in range(-(-size // step))}
        upload = {"href": f"{address}/lfs/{oid}/complete?{SIGNATURE}", "header": {"chunk_size": str(step), **parts}}
        return {"oid": oid, "size": size, "actions": {"upload": upload}}

    def store(self, path: list[str], body: bytes) -> tuple[int, Any, dict[str, str]]:
        hub, oid = self.server, path[0]
        if len(path) == 2 and path[1] != "complete":
            hub.parts.setdefault(oid, {})[int(path[1])] = body
            return 200, {}, {"ETag": hashlib.md5(body).hexdigest()}
        content = body if len(path) == 1 else b"".join(part for _, part in sorted(hub.parts.pop(oid).items()))
        if hashlib.sha256(content).hexdigest() != oid:
            return 400, {"error": "the content does not have this SHA-256"}, {}
        hub.objects[oid] = content
        hub.put.append(oid)
        return 200, {}, {}


def _mode(path: str, present: bytes | str | None) -> dict[str, Any]:
    """Whether a file is stored as LFS, and the id of what is there: SHA-256 of LFS objects, git's SHA-1 of others."""
    known = present
    if isinstance(present, bytes):
        known = hashlib.sha1(b"blob %d\0" % len(present) + present).hexdigest()
    mode = "lfs" if path.endswith(".safetensors") else "regular"
    return {"path": path, "uploadMode": mode, "shouldIgnore": False, **({"oid": known} if known else {})}
