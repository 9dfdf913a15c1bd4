"""A local server that implements the endpoints of the Hugging Face Hub used by its client.

It serves models and data sets with commits, branches and large files. It can return errors, drop a connection after a
number of bytes, and records each request.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "tok-5EcReT-0123456789"
# Minimum size of files stored as large files (LFS), in bytes.
LARGE = 4000


@dataclass
class Repository:
    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        text = f"{len(self.commits)}{sorted((n, hashlib.sha1(c).hexdigest()) for n, c in files.items())}"
        sha = hashlib.sha1(text.encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha

    def resolved(self, revision: str) -> str | None:
        sha = self.branches.get(revision, revision)
        return sha if sha in self.commits else None

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[self.branches["main"]]


@dataclass
class Fault:
    """A failure of matching requests: an error status, or a connection closed after ``cut_after`` bytes."""

    pattern: str
    status: int = 0
    cut_after: int | None = None
    times: int = 1


@dataclass
class Hub:
    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)  # by "models/user/name"
    large: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, dict[str, str], int]] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)

    def matching_requests(self, pattern: str) -> list[tuple[str, dict[str, str], int]]:
        """Return matching requests as (request line, headers by lowercase name, received body bytes)."""
        return [request for request in self.requests if re.search(pattern, request[0])]


@contextlib.contextmanager
def running_hub() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def _any(self) -> None:
        self.line = f"{self.command} {unquote(self.path)}"
        fault = next((f for f in self.hub.faults if f.times > 0 and re.search(f.pattern, self.line)), None)
        self.cut = None
        if fault is not None:
            fault.times -= 1
            self.cut = fault.cut_after
        length = int(self.headers.get("Content-Length") or 0)
        chunked = "chunked" in self.headers.get("Transfer-Encoding", "")
        if self.cut is not None and self.command in ("PUT", "POST"):
            received = len(self.rfile.read(min(self.cut, length)))
            self._note(received)
            return self._hang_up()
        self.body = self._chunks() if chunked else self.rfile.read(length)
        self._note(len(self.body))
        if fault is not None and fault.status:
            return self._answer({"error": f"no; your header was {self.headers.get('Authorization')}"}, fault.status)
        for method, pattern, handle in ROUTES:
            match = re.fullmatch(pattern, unquote(urlsplit(self.path).path))
            if match and self.command in method:
                return handle(self, **match.groupdict())
        return self._answer({"error": "no such route"}, 404)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _any

    def _note(self, received: int) -> None:
        self.hub.requests.append((self.line, {key.lower(): text for key, text in self.headers.items()}, received))

    def _chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline().strip() or b"0", 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _hang_up(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def _answer(self, value: Any, status: int = 200, **headers: str) -> None:
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for key, text in headers.items():
            self.send_header(key.replace("_", "-"), text)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.cut is not None:
            self.wfile.write(content[: self.cut])
            self.wfile.flush()
            return self._hang_up()
        self.wfile.write(content)

    @property
    def is_known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _repository(self, kind: str, name: str, revision: str = "main") -> tuple[Repository, str] | None:
        """Return the repository and commit. If there is an error, send it and return None."""
        repository = self.hub.repositories.get(f"{kind}/{name}")
        if repository is None or (repository.private and not self.is_known):
            self._answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
            return None
        if (sha := repository.resolved(revision)) is None:
            self._answer({"error": "Invalid rev"}, 404, X_Error_Code="RevisionNotFound")
            return None
        return repository, sha

    def _writable(self) -> bool:
        if not self.is_known:
            self._answer({"error": "Invalid username or password."}, 401)
        return self.is_known

    def whoami(self) -> None:
        if self._writable():
            self._answer({"type": "user", "name": "me", "auth": {"accessToken": {"role": "write"}}})

    def create(self) -> None:
        if not self._writable():
            return
        request = json.loads(self.body)
        name = f"{request.get('organization') or 'me'}/{request['name']}"
        key = f"{request.get('type', 'model')}s/{name}"
        if key in self.hub.repositories:
            return self._answer({"error": "You already created this", "url": f"{self.hub.url}/{name}"}, 409)
        repository = Repository(private=request.get("visibility") == "private" or bool(request.get("private")))
        repository.commit({".gitattributes": b""})
        self.hub.repositories[key] = repository
        self._answer({"url": f"{self.hub.url}/{name}", "name": name})

    def branch(self, kind: str, name: str, branch: str) -> None:
        if self._writable() and (repository_commit := self._repository(kind, name)):
            if branch in repository_commit[0].branches:
                return self._answer({"error": "Reference already exists"}, 409)
            repository_commit[0].branches[branch] = repository_commit[1]
            self._answer({})

    def info(self, kind: str, name: str, revision: str | None = None) -> None:
        if repository_commit := self._repository(kind, name, revision or "main"):
            repository, sha = repository_commit
            files = repository.commits[sha]
            description = {"id": name, "modelId": name, "sha": sha, "tags": [], "downloads": 0}
            description["private"] = repository.private
            description |= {"siblings": [{"rfilename": file} for file in files], "likes": 0, "gated": False}
            if "README.md" in files and files["README.md"].startswith(b"---"):
                description["cardData"] = yaml.safe_load(files["README.md"].split(b"---")[1])
            self._answer(description)

    def tree(self, kind: str, name: str, revision: str, path: str | None = None) -> None:
        if repository_commit := self._repository(kind, name, revision):
            files = {
                f: c
                for f, c in repository_commit[0].commits[repository_commit[1]].items()
                if f.startswith(f"{path}/" if path else "")
            }
            if "recursive" not in self.path or "recursive=False" in self.path or "recursive=false" in self.path:
                depth = (path or "").count("/") + bool(path)
                folders = {"/".join(f.split("/")[: depth + 1]) for f in files if f.count("/") > depth}
                files = {f: c for f, c in files.items() if f.count("/") == depth}
                listed = [{"type": "directory", "path": f, "oid": "0" * 40, "size": 0} for f in sorted(folders)]
            else:
                listed = []
            self._answer(listed + [_described(file, content) for file, content in files.items()])

    def paths_info(self, kind: str, name: str, revision: str) -> None:
        if repository_commit := self._repository(kind, name, revision):
            text = self.body.decode()
            paths = json.loads(text)["paths"] if text.startswith("{") else parse_qs(text).get("paths", [])
            files = repository_commit[0].commits[repository_commit[1]]
            self._answer([_described(path, files[path]) for path in paths if path in files])

    def resolve(self, name: str, revision: str, file: str, kind: str | None = None) -> None:
        repository_commit = self._repository("datasets" if kind else "models", name, revision)
        if repository_commit is None:
            return
        content = repository_commit[0].commits[repository_commit[1]].get(file)
        if content is None:
            return self._answer({"error": "no"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=repository_commit[1])
        description = _described(file, content)
        headers = {"X_Repo_Commit": repository_commit[1], "ETag": f'"{description["oid"]}"', "Accept_Ranges": "bytes"}
        if "lfs" in description:
            headers |= {"X_Linked_ETag": f'"{description["lfs"]["oid"]}"', "X_Linked_Size": str(len(content))}
        if range_match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start = int(range_match[1])
            end = int(range_match[2] or len(content) - 1)
            headers["Content_Range"] = f"bytes {start}-{end}/{len(content)}"
            return self._answer(content[start : end + 1], 206, **headers)
        self._answer(content, **headers)

    def validate(self) -> None:
        content = json.loads(self.body)["content"]
        base = yaml.safe_load(content.split("---")[1]).get("base_model", "any/model") if "---" in content else ""
        if re.fullmatch(r"[\w.-]+/[\w.-]+", base):
            return self._answer({"errors": [], "warnings": []})
        self._answer({"errors": [{"message": f'"base_model" with value "{base}" is not valid'}], "warnings": []}, 400)

    def preupload(self, kind: str, name: str, revision: str) -> None:
        if self._writable() and (repository_commit := self._repository(kind, name, revision)):
            existing = repository_commit[0].commits[repository_commit[1]]
            files = []
            for file in json.loads(self.body)["files"]:
                description = {"path": file["path"], "shouldIgnore": False}
                description["uploadMode"] = "lfs" if file["size"] >= LARGE else "regular"
                if file["path"] in existing:
                    stored = _described(file["path"], existing[file["path"]])
                    description["oid"] = stored["lfs"]["oid"] if "lfs" in stored else stored["oid"]
                files.append(description)
            self._answer({"files": files})

    def batch(self, name: str, kind: str | None = None) -> None:
        if self._writable():
            objects = []
            for item in json.loads(self.body)["objects"]:
                upload = {"href": f"{self.hub.url}/lfs/{item['oid']}", "header": {}}
                objects.append(item if item["oid"] in self.hub.large else {**item, "actions": {"upload": upload}})
            self._answer({"objects": objects, "transfer": "basic"})

    def put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self._answer({"error": "another content"}, 400)
        self.hub.large[oid] = self.body
        self._answer({})

    def commit(self, kind: str, name: str, revision: str) -> None:
        if not self._writable() or not (repository_commit := self._repository(kind, name, revision)):
            return
        repository, parent = repository_commit
        files = dict(repository.commits[parent])
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            elif line["key"] == "deletedFile":
                files.pop(value["path"])
        sha = repository.commit(files, revision)
        self._answer({"commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha, "success": True})


def _described(path: str, content: bytes) -> dict[str, Any]:
    oid = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
    description: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": oid}
    if len(content) >= LARGE:
        description["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return description


_ID = r"(?P<name>[\w.-]+/[\w.-]+)"
_API = rf"/api/(?P<kind>models|datasets)/{_ID}"
ROUTES = [
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate),
    ("GET", rf"{_API}", _Handler.info),
    ("GET", rf"{_API}/revision/(?P<revision>.+)", _Handler.info),
    ("GET", rf"{_API}/tree/(?P<revision>refs/\w+/\w+|[^/]+)(?:/(?P<path>.+))?", _Handler.tree),
    ("POST", rf"{_API}/paths-info/(?P<revision>.+)", _Handler.paths_info),
    ("POST", rf"{_API}/branch/(?P<branch>.+)", _Handler.branch),
    ("POST", rf"{_API}/preupload/(?P<revision>.+)", _Handler.preupload),
    ("POST", rf"{_API}/commit/(?P<revision>.+)", _Handler.commit),
    ("POST", rf"/(?P<kind>datasets/)?{_ID}\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", r"/lfs/(?P<oid>\w+)", _Handler.put),
    (
        "GET HEAD",
        rf"/(?P<kind>datasets/)?{_ID}/resolve/(?P<revision>refs/\w+/\w+|[^/]+)/(?P<file>.+)",
        _Handler.resolve,
    ),
]
