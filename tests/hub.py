"""A small hub for tests: what the real client asks of repositories, over HTTP on loopback."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

_API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info|preupload|commit)/([^/?]+)(.*))?")
_FILE = re.compile(r"/(?:(datasets)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
TOKEN = "hf_of_the_tests"


@dataclass
class SmallHub:
    """Repositories by id (`org/name`, datasets as `datasets/org/name`): files of each revision. `asked` is a log."""

    repos: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    asked: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        hub = self

        class Handler(_Handler):
            owner = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def add(self, repo: str, files: dict[str, bytes], revision: str = "main") -> None:
        self.repos.setdefault(repo, {})[revision] = dict(files)

    def commit(self, repo: str, revision: str) -> str:
        files = self.repos[repo][revision]
        return hashlib.sha1(b"".join(name.encode() + files[name] for name in sorted(files))).hexdigest()

    def find(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Commit and files of a branch, or of a commit's hash."""
        for name, files in self.repos.get(repo, {}).items():
            if unquote(revision) in (name, self.commit(repo, name)):
                return self.commit(repo, name), files
        return None

    def downloads(self) -> list[str]:
        """Names of the files whose bytes were asked for."""
        return [path.split("/", 5)[-1] for method, path in self.asked if method == "GET" and "/resolve/" in path]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    owner: SmallHub
    protocol_version = "HTTP/1.0"  # a connection for each request: none outlives the hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._dispatch()

    def do_GET(self) -> None:
        self._dispatch()

    def do_POST(self) -> None:
        self._dispatch()

    def _dispatch(self) -> None:
        path = urlsplit(self.path).path
        self.owner.asked.append((self.command, path))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if path == "/api/repos/create":
            about = json.loads(body)
            repo = f"{about['organization']}/{about['name']}" if about.get("organization") else about["name"]
            self.owner.repos.setdefault(repo, {"main": {}})
            return self._json({"url": f"{self.owner.url}/{repo}", "id": repo})
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if match := _API.fullmatch(path):
            kind, repo, what, revision, below = match.groups()
            return self._api(kind, repo, what, revision, below, body)
        if match := _FILE.fullmatch(path):
            kind, repo, revision, name = match.groups()
            return self._file(kind, repo, revision, name)
        self._error(404, "")

    def _found(self, kind: str | None, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        name = f"datasets/{repo}" if kind == "datasets" else repo
        secret = name in self.owner.private and self.headers.get("Authorization") != f"Bearer {TOKEN}"
        if secret or name not in self.owner.repos:
            self._error(401 if secret else 404, "RepoNotFound")
            return None
        found = self.owner.find(name, revision)
        if found is None:
            self._error(404, "RevisionNotFound")
        return found

    def _api(
        self, kind: str, repo: str, what: str | None, revision: str | None, below: str | None, body: bytes
    ) -> None:
        found = self._found(kind, repo, revision or "main")
        if found is None:
            return
        sha, files = found
        if what == "preupload":
            names = [file["path"] for file in json.loads(body)["files"]]
            answer = [{"path": name, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for name in names]
            return self._json({"files": answer, "commitOid": sha})
        if what == "commit":
            return self._committed(repo, body)
        entries = [_entry(name, data) for name, data in files.items()]
        if what == "tree":
            start = unquote(below or "").strip("/")
            return self._json([entry for entry in entries if not start or entry["path"].startswith(f"{start}/")])
        if what == "paths-info":
            names = re.findall(r"paths=([^&]*)", body.decode()) or json.loads(body)["paths"]
            return self._json([entry for entry in entries if entry["path"] in map(unquote, names)])
        siblings = [{"rfilename": e["path"], "size": e["size"], "blobId": e["oid"]} for e in entries]
        self._json({"id": repo, "modelId": repo, "sha": sha, "private": False, "siblings": siblings})

    def _committed(self, repo: str, body: bytes) -> None:
        files = self.owner.repos[repo]["main"]
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        oid = self.owner.commit(repo, "main")
        self._json({"success": True, "commitOid": oid, "commitUrl": f"{self.owner.url}/{repo}/commit/{oid}"})

    def _file(self, kind: str | None, repo: str, revision: str, name: str) -> None:
        found = self._found(kind, repo, revision)
        if found is None:
            return
        sha, files = found
        data = files.get(unquote(name))
        if data is None:
            return self._error(404, "EntryNotFound", {"X-Repo-Commit": sha})
        headers = {"X-Repo-Commit": sha, "ETag": f'"{_oid(data)}"', "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            return self._send(200, data, headers)
        start, end = int(asked[1]), min(int(asked[2] or len(data) - 1), len(data) - 1)
        headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
        self._send(206, data[start : end + 1], headers)

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        self._send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code, **(headers or {})})

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _entry(name: str, data: bytes) -> dict[str, Any]:
    return {"type": "file", "path": name, "size": len(data), "oid": _oid(data)}
