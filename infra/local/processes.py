"""Processes of this machine that carry a mark, ended by identity: psutil compares start times before it signals."""

import os
import signal
import time
from collections.abc import Callable, Iterable

import psutil

POLL_S = 0.1


def marked(name: str, value: str) -> set[psutil.Process]:
    """Processes that were started with this variable in their environment, and everything below them.

    A process that renames itself may overwrite the environment that is shown (Ray's workers do), so descendants are
    followed too.
    """
    every = {process.pid: process for process in psutil.process_iter(["ppid", "environ", "status"])}
    members = {pid for pid, process in every.items() if (process.info["environ"] or {}).get(name) == value}
    while True:
        children = {pid for pid, process in every.items() if process.info["ppid"] in members}
        if children <= members:
            break
        members |= children
    members -= {os.getpid()}
    return {every[pid] for pid in members if every[pid].info["status"] != psutil.STATUS_ZOMBIE}


def is_alive(process: psutil.Process) -> bool:
    """Whether it runs: its id may belong to another process by now, and a zombie has ended."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def send(process: psutil.Process, number: signal.Signals) -> bool:
    """Signal `process`; False, and nothing is sent, where its id is free or belongs to another process by now."""
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return False
    return True


def end(
    find: Callable[[], Iterable[psutil.Process]], grace_s: float = 10.0, kill_s: float = 10.0
) -> set[psutil.Process]:
    """Ask what `find` returns to end (SIGTERM), kill what is left after `grace_s`, and return all that was signalled.

    `find` is asked again and again, because a process that is ending may still start others, and every process is
    remembered, because an orphan can no longer be found through its parent.
    Raises TimeoutError when something still lives `kill_s` after it was killed.
    """
    members: set[psutil.Process] = set()
    for number, limit_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, kill_s)):
        deadline, signalled = time.monotonic() + limit_s, set[psutil.Process]()
        while living := {process for process in members.union(find()) if is_alive(process)}:
            members |= living
            signalled |= {process for process in living - signalled if send(process, number)}
            if time.monotonic() > deadline:
                break
            time.sleep(POLL_S)
        else:
            return members
    raise TimeoutError(f"processes {sorted(process.pid for process in living)} live on {kill_s} s after SIGKILL")
