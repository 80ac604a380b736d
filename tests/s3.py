"""A real S3 service for tests, in a process of its own, and a proxy before it that fails as storages fail."""

from __future__ import annotations

import http.client
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

import boto3

HOST = "127.0.0.1"
ACCESS_KEY, SECRET_KEY = "AKIATESTSOFDIAGONAL0", "a-secret-that-no-message-may-hold"
DROPPED_HEADERS = {"connection", "keep-alive", "transfer-encoding", "date", "server"}
Kind = Literal["status", "slow", "truncate"]


def environment(url: str) -> dict[str, str]:
    """The AWS_* variables with which boto3, pyarrow and Ray find the service at `url`."""
    return {
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": url,
        "AWS_EC2_METADATA_DISABLED": "true",
    }


@dataclass(frozen=True)
class S3Server:
    """A running S3 service; what it holds ends with it."""

    url: str

    def client(self) -> Any:
        """A boto3 client that needs no environment."""
        return boto3.client(
            "s3",
            endpoint_url=self.url,
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
            region_name="us-east-1",
        )

    @contextmanager
    def bucket(self, name: str = "") -> Iterator[str]:
        """An empty bucket, removed at the end with all it holds."""
        name, client = name or f"bucket-{secrets.token_hex(4)}", self.client()
        client.create_bucket(Bucket=name)
        try:
            yield name
        finally:
            for page in client.get_paginator("list_objects_v2").paginate(Bucket=name):
                if keys := [{"Key": item["Key"]} for item in page.get("Contents", ())]:
                    client.delete_objects(Bucket=name, Delete={"Objects": keys})
            client.delete_bucket(Bucket=name)


@contextmanager
def serve_s3(deadline_s: float = 60.0) -> Iterator[S3Server]:
    """Start moto's server as a process of its own, wait until it answers, and end it by its id."""
    port = _free_port()
    command = [sys.executable, "-m", "moto.server", "-H", HOST, "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_until_it_answers(process, port, time.monotonic() + deadline_s)
        yield S3Server(f"http://{HOST}:{port}")
    finally:
        process.kill()
        process.wait(10)


def _wait_until_it_answers(process: subprocess.Popen[bytes], port: int, until_s: float) -> None:
    while time.monotonic() < until_s:
        if process.poll() is not None:
            raise RuntimeError(f"the S3 service ended with status {process.returncode}")
        try:
            with socket.create_connection((HOST, port), timeout=1):
                return
        except OSError:
            time.sleep(0.1)
    raise TimeoutError("the S3 service did not start")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Request:
    """One request that reached the proxy, and the status that it was answered with."""

    method: str
    key: str  # /bucket/key, unquoted
    query: str
    status: int
    sent_bytes: int


@dataclass
class Fault:
    """What happens to matching requests, until it happened `times` times or `until_s` (monotonic) has passed."""

    kind: Kind
    times: float
    until_s: float
    method: str
    key: str
    status: int = 503
    code: str = "SlowDown"
    message: str = "made for a test"
    delay_s: float = 0.0
    mended: bool = False
    dropped: bool = False

    def takes(self, method: str, target: str) -> bool:
        wanted = self.method in ("", method) and self.key in target
        return wanted and self.times >= 1 and time.monotonic() < self.until_s


@dataclass
class FaultyProxy:
    """A proxy on loopback before an S3 service. It records requests and fails them as told.

    Faults are taken by requests in the order in which they were asked for; `method` and `key` (a part of
    /bucket/key?query) choose the requests. Safe to use from any thread.
    """

    upstream: str
    requests: list[Request] = field(default_factory=list)
    held: int = 0
    """Requests whose answer is delayed at this moment."""
    _faults: list[Fault] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _connections: set[socket.socket] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._server = _Server((HOST, _free_port()), _Handler)  # a port asked for by number is kept during an outage
        self._server.proxy = self
        self._listen()

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self._server.server_address[1]}"

    def fail(self, status: int = 503, code: str = "SlowDown", **which: Any) -> None:
        """Answer with `status` and S3's error `code` and `message`: for the next `times` requests, or for `seconds`."""
        self._add("status", status=status, code=code, **which)

    def slow(self, delay_s: float, **which: Any) -> None:
        """Wait `delay_s` before each answer."""
        self._add("slow", delay_s=delay_s, **which)

    def truncate(self, **which: Any) -> None:
        """Send the right headers and half of the body of GETs, then close the connection."""
        self._add("truncate", **{"method": "GET", **which})

    def mend(self) -> None:
        """Forget all faults that were asked for, and answer the requests that are held."""
        with self._lock:
            for fault in self._faults:
                fault.mended = True
            self._faults = []

    def drop(self) -> None:
        """Forget all faults, and break the connections of the requests that are held: those never arrive."""
        with self._lock:
            for fault in self._faults:
                fault.dropped = True
        self.mend()

    @contextmanager
    def outage(self) -> Iterator[None]:
        """While the block runs, break every connection and refuse new ones."""
        self._server.shutdown()
        self._thread.join(10)
        self._server.socket.shutdown(socket.SHUT_RDWR)
        self._break_connections()
        try:
            yield
        finally:
            self._server.socket.listen(self._server.request_queue_size)
            self._listen()

    def outage_for(self, seconds: float) -> threading.Thread:
        """An outage that has begun when this returns, and that ends after `seconds`; join the thread to wait for it."""
        began = threading.Event()

        def run() -> None:
            with self.outage():
                began.set()
                time.sleep(seconds)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        began.wait(20)
        return thread

    def count(self, method: str = "", key: str = "", query: str = "") -> int:
        """How many recorded requests match."""
        return sum(method in ("", r.method) and key in r.key and query in r.query for r in list(self.requests))

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._break_connections()
        self._thread.join(10)

    def _listen(self) -> None:
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def _break_connections(self) -> None:
        for connection in list(self._connections):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # closed by its client

    def _add(
        self, kind: Kind, *, times: float = 0, seconds: float = 0, method: str = "", key: str = "", **how: Any
    ) -> None:
        until_s = time.monotonic() + seconds if seconds else float("inf")
        with self._lock:
            self._faults.append(Fault(kind, times or float("inf"), until_s, method, key, **how))

    def take(self, method: str, target: str) -> Fault | None:
        """The fault of a request that just came, if there is one for it."""
        with self._lock:
            found = next((fault for fault in self._faults if fault.takes(method, target)), None)
            if found is not None:
                found.times -= 1
            return found


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    proxy: FaultyProxy

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Broken connections are what this proxy is for."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def setup(self) -> None:
        super().setup()
        self.server.proxy._connections.add(self.connection)

    def finish(self) -> None:
        self.server.proxy._connections.discard(self.connection)
        super().finish()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: `FaultyProxy.requests` is the log."""

    def handle_one(self) -> None:
        url, proxy = urlsplit(self.path), self.server.proxy
        key, body = unquote(url.path), self._body()
        fault = proxy.take(self.command, f"{key}?{url.query}")
        if fault is not None and fault.kind == "slow":
            self._hold(fault)
            if fault.dropped:
                self.close_connection = True
                return
        if fault is not None and fault.kind == "status":
            status, headers, answer = fault.status, {"Content-Type": "application/xml"}, _error(fault)
        else:
            status, headers, answer = self._forward(body)
        proxy.requests.append(Request(self.command, key, url.query, status, len(body)))
        self._answer(status, headers, answer, halved=fault is not None and fault.kind == "truncate")

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_one

    def _hold(self, fault: Fault) -> None:
        """Wait as long as the fault says, or until it is mended."""
        proxy, until_s = self.server.proxy, time.monotonic() + fault.delay_s
        with proxy._lock:
            proxy.held += 1
        while time.monotonic() < until_s and not fault.mended:
            time.sleep(0.02)
        with proxy._lock:
            proxy.held -= 1

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(parts)

    def _forward(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        headers = {name: value for name, value in self.headers.items() if name.lower() not in DROPPED_HEADERS}
        headers["Content-Length"] = str(len(body))
        connection = http.client.HTTPConnection(urlsplit(self.server.proxy.upstream).netloc, timeout=60)
        try:
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            kept = {name: value for name, value in answer.getheaders() if name.lower() not in DROPPED_HEADERS}
            return answer.status, kept, answer.read()
        finally:
            connection.close()

    def _answer(self, status: int, headers: dict[str, str], body: bytes, halved: bool) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() != "content-length" or self.command == "HEAD":
                self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if halved else body)
        self.wfile.flush()
        self.close_connection = self.close_connection or halved


def _error(fault: Fault) -> bytes:
    return f"<?xml version='1.0'?><Error><Code>{fault.code}</Code><Message>{fault.message}</Message></Error>".encode()
