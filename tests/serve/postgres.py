"""A PostgreSQL server of the test's own: a temporary folder, a free port of this machine, ended by its process id."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest

_START_S = 60.0
_NOBODY = 65534  # the server refuses to run as root


def programs() -> Path:
    """The folder of initdb and postgres; skips with a reason that CI turns into a failure."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: int(path.parts[-3]))
    if found:
        return found[-1].parent
    path = shutil.which("postgres")
    if path is None or shutil.which("initdb") is None:
        pytest.skip("needs program: postgres")
    return Path(path).parent


@contextmanager
def server(folder: Path) -> Iterator[str]:
    """Start one and give the SQLAlchemy URL of its first database; ended when the block ends."""
    data, port = folder / "data", _free_port()
    user = _NOBODY if os.geteuid() == 0 else None
    if user is not None:
        os.chown(folder, user, user)
    where = {"user": user, "group": user, "extra_groups": []} if user is not None else {}
    initialise = [programs() / "initdb", "-D", data, "-U", "diagonal", "--auth=trust", "--no-sync", "-E", "UTF8"]
    subprocess.run(initialise, check=True, capture_output=True, timeout=_START_S, **where)  # type: ignore[call-overload]
    options = ["-c", "listen_addresses=127.0.0.1", "-c", f"unix_socket_directories={folder}", "-c", "fsync=off"]
    command = [programs() / "postgres", "-D", data, "-p", str(port), *options]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, **where)  # type: ignore[call-overload]
    try:
        _wait_until_it_answers(process, port)
        yield f"postgresql+psycopg://diagonal@127.0.0.1:{port}/postgres"
    finally:
        process.send_signal(signal.SIGINT)  # a fast shutdown: connections are cut
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(20)


def new_database(url: str, name: str) -> str:
    """An empty database on that server, and its URL."""
    with psycopg.connect(url.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"'.encode())
    return f"{url.rpartition('/')[0]}/{name}"


def _wait_until_it_answers(process: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        assert process.poll() is None, "PostgreSQL ended at once"
        try:
            psycopg.connect(host="127.0.0.1", port=port, user="diagonal", dbname="postgres").close()
            return
        except psycopg.OperationalError:
            time.sleep(0.1)
    raise TimeoutError("PostgreSQL did not answer")


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
