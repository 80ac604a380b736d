"""A watchdog inside a worker: a process that makes no progress ends itself, so that Ray Train replaces it."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time

STALLED = 70  # exit status


class Watchdog:
    """Ends the process when `beat` was not called for `limit_s` seconds, after printing where each thread stands.

    The first beat starts the clock: what comes before (loading, compiling) is not timed. It finds what the process
    group's timeout and Ray's health check do not: a rank alone that waits for ever, for a lock or a file.
    """

    def __init__(self, limit_s: float, label: str) -> None:
        self._limit_s, self._label = limit_s, label
        self._beat_s: float | None = None
        self._ended = threading.Event()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def beat(self) -> None:
        self._beat_s = time.monotonic()

    def close(self) -> None:
        self._ended.set()

    def _watch(self) -> None:
        while not self._ended.wait(min(self._limit_s / 10, 5.0)):
            if self._beat_s is not None and time.monotonic() - self._beat_s > self._limit_s:
                print(
                    f"{self._label}: no progress for {self._limit_s:g} s, train.stall_timeout_s: this worker ends, "
                    "to be replaced",
                    file=sys.stderr,
                    flush=True,
                )
                faulthandler.dump_traceback(file=sys.__stderr__ or sys.stderr)
                os._exit(STALLED)
