"""A real OpenAI-compatible endpoint on loopback that answers, and fails, as a test tells it."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[str, int], tuple[int, Any]]


def longer(prompt: str, asked: int) -> tuple[int, Any]:
    """A right answer: the prompt, extended."""
    return 200, {"choices": [{"message": {"role": "assistant", "content": f"{prompt},  at\ndawn "}}]}


class ChatServer(ThreadingHTTPServer):
    """Records every request; `answer` is called with a prompt and how often it was asked for."""

    daemon_threads = True

    def __init__(self, answer: Answer) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer, self.lock = answer, threading.Lock()
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.asked: Counter[str] = Counter()
        self.now = self.most_at_once = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ChatServer

    def log_message(self, format: str, *args: Any) -> None:
        """The server's records are the log."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][1]["content"]
        with self.server.lock:
            self.server.bodies.append({"path": self.path, **body})
            self.server.headers.append(dict(self.headers.items()))
            self.server.asked[prompt] += 1
            self.server.now += 1
            self.server.most_at_once = max(self.server.most_at_once, self.server.now)
            asked = self.server.asked[prompt]
        time.sleep(0.01)
        status, answer = self.server.answer(prompt, asked)
        with self.server.lock:
            self.server.now -= 1
        if status == 0:  # as a server that dies
            self.close_connection = True
            return
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        if status == 429:
            self.send_header("Retry-After", "0")
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def chat_server(answer: Answer = longer) -> Iterator[ChatServer]:
    server = ChatServer(answer)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
