"""Real proxies in front of a service, each with the recipe that `infra/proxies` gives."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from tests.conftest import ROOT, need_program

RECIPES = ROOT / "infra" / "proxies"
_NGINX = """
{user}
daemon off;
pid {folder}/pid;
error_log {folder}/error.log;
events {{ worker_connections 4096; }}
http {{
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    include {folder}/diagonal.conf;
}}
"""


@dataclass(frozen=True)
class Proxy:
    """One that runs: where it listens, and the folder of its logs and files."""

    url: str
    folder: Path

    def logged(self) -> str:
        """All that it wrote to its logs."""
        return "".join(path.read_text() for path in sorted(self.folder.glob("*.log")))


@contextmanager
def nginx(upstream: str, folder: Path) -> Iterator[Proxy]:
    """nginx before the service at that address. Of the recipe, addresses and folders alone are the test's own."""
    port = free_port()
    own = {
        "server 127.0.0.1:8000;": f"server {urlsplit(upstream).netloc};",
        "listen 8080;": f"listen 127.0.0.1:{port};",
        "/var/log/nginx/": f"{folder}/",
        "/var/cache/nginx/": f"{folder}/",
    }
    (folder / "diagonal.conf").write_text(_with(own, (RECIPES / "nginx.conf").read_text()))
    user = "user root;" if os.geteuid() == 0 else ""  # its workers write into the test's own folder
    (folder / "nginx.conf").write_text(_NGINX.format(folder=folder, user=user))
    with _running([need_program("nginx"), "-p", str(folder), "-c", str(folder / "nginx.conf")], port, folder):
        yield Proxy(f"http://127.0.0.1:{port}", folder)


@contextmanager
def haproxy(upstream: str, folder: Path) -> Iterator[Proxy]:
    """HAProxy before the service at that address. Of the recipe, the two addresses alone are the test's own."""
    port = free_port()
    own = {"127.0.0.1:8000": urlsplit(upstream).netloc, "bind :8080": f"bind 127.0.0.1:{port}"}
    (folder / "haproxy.cfg").write_text(_with(own, (RECIPES / "haproxy.cfg").read_text()))
    with _running([need_program("haproxy"), "-db", "-f", str(folder / "haproxy.cfg")], port, folder):
        yield Proxy(f"http://127.0.0.1:{port}", folder)


def _with(own: dict[str, str], recipe: str) -> str:
    for theirs, ours in own.items():
        assert theirs in recipe, theirs
        recipe = recipe.replace(theirs, ours)
    return recipe


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as one:
        return int(one.getsockname()[1])


@contextmanager
def _running(command: list[str], port: int, folder: Path) -> Iterator[None]:
    """A proxy's process, from when it listens on."""
    with (folder / "output.log").open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        end = time.monotonic() + 30
        while not _listens(port):
            assert process.poll() is None and time.monotonic() < end, (folder / "output.log").read_text()
            time.sleep(0.02)
        yield
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True
