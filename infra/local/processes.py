"""Processes of this machine that carry a mark, found in /proc and ended by identity (Linux)."""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
POLL_S = 0.1


@dataclass(frozen=True, order=True)
class Process:
    """One process: a process id is used again after its process ends, a pair with the start time is not."""

    pid: int
    start_ticks: int  # clock ticks between boot and the process's start


def current(pid: int) -> tuple[Process, int] | None:
    """The process that holds `pid` now, with its parent's id; None where nothing (or only a zombie) does."""
    try:
        fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, parent, start_ticks = fields[0], int(fields[1]), int(fields[19])
    return None if state in "ZX" else (Process(pid, start_ticks), parent)


def command_line(pid: int) -> list[bytes]:
    """The words with which a process was started; none where it is gone."""
    try:
        return (PROC / str(pid) / "cmdline").read_bytes().rstrip(b"\0").split(b"\0")
    except (FileNotFoundError, ProcessLookupError):
        return []


def marked(mark: str) -> set[Process]:
    """Processes that were started with `mark` ("NAME=value") in their environment, and everything below them.

    A process that renames itself may overwrite the environment that /proc shows (Ray's workers do), so descendants
    are followed too.
    """
    parents: dict[Process, int] = {}
    roots: set[int] = set()
    for entry in PROC.iterdir():
        if not entry.name.isdigit() or (found := current(int(entry.name))) is None:
            continue
        parents[found[0]] = found[1]
        if _carries(entry, mark):
            roots.add(found[0].pid)
    while True:
        wider = roots | {process.pid for process, parent in parents.items() if parent in roots}
        if wider == roots:
            break
        roots = wider
    return {process for process in parents if process.pid in roots and process.pid != os.getpid()}


def _carries(entry: Path, mark: str) -> bool:
    try:
        return mark.encode() in (entry / "environ").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return False


def send(process: Process, number: signal.Signals) -> bool:
    """Signal `process`; False, and nothing is sent, where its id is free or belongs to another process by now.

    The descriptor is opened before the start time is compared, so the id cannot change hands in between.
    """
    try:
        descriptor = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return False
    try:
        found = current(process.pid)
        if found is None or found[0] != process:
            return False
        signal.pidfd_send_signal(descriptor, number)
        return True
    except ProcessLookupError:
        return False
    finally:
        os.close(descriptor)


def end(find: Callable[[], set[Process]], grace_s: float = 10.0, kill_s: float = 10.0) -> set[Process]:
    """Ask what `find` returns to end (SIGTERM), kill what is left after `grace_s`, and return all that was signalled.

    `find` is asked again and again, because a process that is ending may still start others, and what was found
    once is remembered, because an orphan can no longer be found through its parent.
    Raises TimeoutError when something still lives `kill_s` after it was killed.
    """
    known: set[Process] = set()
    for number, limit_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, kill_s)):
        deadline = time.monotonic() + limit_s
        told: set[Process] = set()
        while living := _living(known | find()):
            known |= living
            told |= {process for process in living - told if send(process, number)}
            if time.monotonic() > deadline:
                break
            time.sleep(POLL_S)
        else:
            return known
    raise TimeoutError(f"processes {sorted(process.pid for process in living)} live on {kill_s} s after SIGKILL")


def _living(processes: set[Process]) -> set[Process]:
    return {process for process in processes if (found := current(process.pid)) is not None and found[0] == process}
