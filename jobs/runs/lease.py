"""A lease on a run: only one job at a time writes to its folder."""

from __future__ import annotations

import fcntl
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

from diagonal.errors import FieldError
from diagonal.storage import Folder, StorageError

LEASE = "lease.json"
RENEW_EVERY_S, STALE_AFTER_S = 10.0, 60.0
SETTLE_S = 1.0


@contextmanager
def leased(folder: Folder) -> Iterator[None]:
    """Hold the run's lease for the block. `FieldError` while another job holds it.

    On local storage it is a lock that ends with the process, however it ends. On S3 it is a file that is renewed every
    10 s: one whose process is dead on this machine is taken over at once, one of another machine after 60 s.
    """
    with _locked(folder) if folder.is_local else _renewed(folder):
        yield


@contextmanager
def _locked(folder: Folder) -> Iterator[None]:
    folder.path.mkdir(parents=True, exist_ok=True)
    with (folder.path / LEASE).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise _refusal(folder, _said(file)) from error
        file.truncate(0)
        file.write(f"{socket.gethostname()}, process {os.getpid()}")
        file.flush()
        yield


def _said(file: IO[str]) -> str:
    file.seek(0)
    return file.read() or "another process"


def _refusal(folder: Folder, holder: str) -> FieldError:
    return FieldError("--name", folder.name, f"a run that no other job is working on: {holder} holds it")


@contextmanager
def _renewed(folder: Folder) -> Iterator[None]:
    token = secrets.token_hex(8)
    if folder.has(LEASE):
        _check_free(folder, folder.read_json(LEASE))
    _write(folder, token)
    time.sleep(SETTLE_S)  # two that began at once: the last to write has it
    if (found := folder.read_json(LEASE))["token"] != token:
        raise _refusal(folder, _holder(found))
    ended = threading.Event()
    renewing = threading.Thread(target=_renew, args=(folder, token, ended), name="lease", daemon=True)
    renewing.start()
    try:
        yield
    finally:
        ended.set()
        renewing.join()
        if folder.has(LEASE) and folder.read_json(LEASE)["token"] == token:
            folder.remove(LEASE)


def _check_free(folder: Folder, found: dict[str, Any]) -> None:
    here = found["host"] == socket.gethostname()
    dead = here and not _is_alive(int(found["pid"]))
    if not dead and time.time() - found["time"] < STALE_AFTER_S:
        raise _refusal(
            folder,
            f"{_holder(found)}, renewed {time.time() - found['time']:.0f} s ago (it ends "
            f"{STALE_AFTER_S:.0f} s after the last time)",
        )


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's, alive
        return True
    return True


def _holder(found: dict[str, Any]) -> str:
    return f"{found['host']}, process {found['pid']}"


def _write(folder: Folder, token: str) -> None:
    folder.write_json(LEASE, {"token": token, "host": socket.gethostname(), "pid": os.getpid(), "time": time.time()})


def _renew(folder: Folder, token: str, ended: threading.Event) -> None:
    """Renew until the end; a storage that is away is asked again, a lease that was taken over ends the job."""
    while not ended.wait(RENEW_EVERY_S):
        try:
            if folder.read_json(LEASE)["token"] != token:
                print(f"another job took over {folder}: this one stops", flush=True)
                os.kill(os.getpid(), signal.SIGTERM)
                return
            _write(folder, token)
        except (StorageError, FieldError):
            continue
