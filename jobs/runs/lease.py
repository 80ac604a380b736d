"""A lease on a run: only one job at a time writes to its folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, Any, Protocol

import psutil

from diagonal.errors import FieldError
from diagonal.storage import ConditionsRefused, Folder, StorageError, VersionChanged

LEASE = "lease.json"
RENEW_EVERY_S, STALE_AFTER_S, LOOK_EVERY_S = 10.0, 60.0, 2.0
WITHOUT = "with train.lease=none nothing keeps two jobs from one run"
CONDITIONAL = f"on an S3 store with conditional writes (If-None-Match, If-Match); {WITHOUT}"


@contextmanager
def leased(folder: Folder, lease: str = "exclusive") -> Iterator[Callable[[], None]]:
    """Hold the run's lease for the block; gives a check that raises `FieldError` once another job took it over.

    `FieldError` while another job holds it. On local storage the lease is a lock that ends with the process, however
    it ends. On S3 it is a file that is renewed every 10 s. Each write of it names the version that it replaces, so of
    two jobs one alone succeeds, however late a request arrives; no clocks are compared. A lease whose process is dead
    on this machine is taken over at once, another one after it was seen unchanged for 60 s.
    With `lease` "none" there is no lease: for file systems without locks, and for stores that ignore conditions.
    """
    if lease == "none":
        yield _no_check
    elif folder.is_local:
        with _locked(folder):
            yield _no_check
    else:
        with _renewed(folder) as remote:
            yield remote.check


def _no_check() -> None:
    """A lock cannot be lost, and without a lease nothing is known."""


@contextmanager
def _locked(folder: Folder) -> Iterator[None]:
    folder.path.mkdir(parents=True, exist_ok=True)
    with (folder.path / LEASE).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise _refusal(folder.name, _content(file)) from error
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP):
                raise
            allowed = f"on a file system with locks (flock: {error.strerror}); {WITHOUT}"
            raise FieldError("train.storage", str(folder), allowed) from error
        file.truncate(0)
        file.write(f"{socket.gethostname()}, process {os.getpid()}")
        file.flush()
        yield


def _content(file: IO[str]) -> str:
    file.seek(0)
    return file.read() or "another process"


def _refusal(run: str, holder: str) -> FieldError:
    return FieldError("--name", run, f"a run that no other job is working on: {holder} holds it")


class Versioned(Protocol):
    """What a lease needs of a storage: files with versions, and writes on the condition of one."""

    @property
    def name(self) -> str: ...

    def read_version(self, name: str) -> tuple[bytes, str]: ...

    def write_version(self, name: str, data: bytes, over: str) -> str: ...


@dataclass
class RemoteLease:
    """The lease file of one run, as one job sees it.

    `number` grows with every holder, `beat` with every write of one. `version` is the version of the file that this
    job last wrote or saw; '' is no file.
    """

    folder: Versioned
    token: str = field(default_factory=lambda: secrets.token_hex(8))
    number: int = 1
    beat: int = 0
    version: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)  # a thread renews, the job checks

    def acquire(self) -> None:
        """Take the lease; `FieldError` where another job holds it, or where the store ignores conditions."""
        while not self.write():
            holder, self.version = self.read()
            if holder and not _is_free(holder):
                self._wait_out()
            self.number = holder.get("number", 0) + 1
        self._require_conditions()

    def write(self, free: bool = False) -> bool:
        """Write the next beat over the version last seen; False where another job wrote in between."""
        with self.lock:
            self.beat += 1
            mine = {"token": self.token, "number": self.number, "beat": self.beat, "free": free}
            data = json.dumps({**mine, "host": socket.gethostname(), "pid": os.getpid()}).encode()
            while True:
                try:
                    self.version = self.folder.write_version(LEASE, data, self.version)
                    return True
                except VersionChanged:
                    stored, version = self.read()
                    if stored.get("token") != self.token:
                        return False
                    self.version = version  # of a write of this job whose answer was lost
                    if stored["beat"] == self.beat:
                        return True

    def read(self) -> tuple[dict[str, Any], str]:
        """What the file holds, and its version; ({}, '') where there is none."""
        try:
            data, version = self.folder.read_version(LEASE)
        except FileNotFoundError:
            return {}, ""
        return json.loads(data), version

    def check(self) -> None:
        """Renew; `FieldError` where another job took the lease over."""
        if not self.write():
            raise _refusal(self.folder.name, "another job, which took it over,")

    def _wait_out(self) -> None:
        """Return once the file was seen unchanged for `STALE_AFTER_S`, or is free; `FieldError` once it is renewed.

        Time in which the storage is away does not count.
        """
        print(f"run {self.folder.name}: is the job that holds it alive? (at most {STALE_AFTER_S:.0f} s)", flush=True)
        for _ in range(math.ceil(STALE_AFTER_S / LOOK_EVERY_S)):
            time.sleep(LOOK_EVERY_S)
            holder, version = self.read()
            if version != self.version:
                if holder and not _is_free(holder):
                    raise _refusal(self.folder.name, f"{holder['host']}, process {holder['pid']}")
                return

    def _require_conditions(self) -> None:
        """A file that is there cannot be created."""
        with contextlib.suppress(VersionChanged):
            self.folder.write_version(LEASE, b"{}", "")
            raise FieldError("train.storage", self.folder.name, CONDITIONAL)


def _is_free(holder: Mapping[str, Any]) -> bool:
    """Whether its job gave the lease back, or was a process of this machine that is dead."""
    here = holder["host"] == socket.gethostname()
    return bool(holder["free"]) or (here and not psutil.pid_exists(int(holder["pid"])))


@contextmanager
def _renewed(folder: Folder) -> Iterator[RemoteLease]:
    lease = RemoteLease(folder)
    try:
        lease.acquire()
    except ConditionsRefused as error:
        raise FieldError("train.storage", str(folder), CONDITIONAL) from error
    ended = threading.Event()
    renewing = threading.Thread(target=_renew, args=(lease, ended), name="lease", daemon=True)
    renewing.start()
    try:
        yield lease
    finally:
        ended.set()
        renewing.join()
        with contextlib.suppress(StorageError):
            lease.write(free=True)


def _renew(lease: RemoteLease, ended: threading.Event) -> None:
    """Renew until the end; a storage that is away is asked again, a lease that was taken over ends the job."""
    while not ended.wait(RENEW_EVERY_S):
        with contextlib.suppress(StorageError):
            if not lease.write():
                print(f"another job took over {lease.folder.name}: this one stops", flush=True)
                os.kill(os.getpid(), signal.SIGTERM)
                return
