"""A job of ours as the process that a user starts, small enough for a minute, and what it left on storage."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diagonal.storage import Folder
from diagonal.training.checkpoint_manifest import Checkpoint, checkpoints
from jobs.runs.update_log import UPDATES, Entry, Record, read_journal
from tests.faults.nodes import until

ROOT = Path(__file__).resolve().parents[2]
START_S = 300.0  # a busy machine's time until the first update
STAGE1, STAGE2, EVERY = 6, 6, 3  # updates, and updates between checkpoints
UPDATES_IN_ALL = STAGE1 + STAGE2
MIDDLE = 2 * EVERY + 2  # a checkpoint is whole before it, and work is left after it
SMALL = {
    "distill.stage1_updates": STAGE1,
    "distill.stage2_updates": STAGE2,
    "distill.checkpoint_every": EVERY,
    "distill.keep_checkpoints": 3,
    "distill.batch_size": 4,
    "distill.micro_batch_size": 2,
    "distill.generator_every": 2,
    "distill.ema_start": 2,
    "train.workers": 2,
    "train.cpus_per_worker": 2,
    "train.sample_every": 0,
    "train.stall_timeout_s": 60,
}
TIMES = {"update_s", "data_wait_s"}
RAYS_OWN = re.compile(r"(\x1b\[\d+m)?\([\w-]+ pid=\d+")  # a line that a worker wrote, as Ray passes it on


@dataclass
class Job:
    """A started job and its log."""

    name: str
    storage: str
    log: Path
    process: subprocess.Popen[bytes]

    @property
    def folder(self) -> Folder:
        """The run's folder."""
        return Folder(self.storage, patience_s=20) / self.name

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def error(self) -> str:
        """What it said to end with: its one error, to the end. Lines of Ray's own processes may come after it."""
        own = [line for line in self.text.splitlines() if not RAYS_OWN.match(line)]
        starts = [number for number, line in enumerate(own) if line.startswith("error: ")]
        assert len(starts) == 1, f"{len(starts)} errors in\n{self.tail()}"
        return "\n".join(own[starts[0] :])

    def line(self, pattern: str, deadline_s: float = START_S) -> str:
        """Wait for a line of the log that matches; fails at once when the job ended without it."""

        def found() -> str:
            match = re.search(f".*{pattern}.*", self.text)
            assert match or self.process.poll() is None, f"{pattern!r} never came, the job ended:\n{self.tail()}"
            return match.group(0) if match else ""

        return until(f"{pattern!r} in\n{self.tail()}", found, deadline_s)

    def update(self, number: int, deadline_s: float = START_S) -> int:
        """Wait until `number` updates are in the journal; gives how many are."""

        def found() -> int:
            assert self.process.poll() is None, f"update {number} never came, the job ended:\n{self.tail()}"
            done = [entry["update"] for entry in self.record().updates]
            return done[-1] if done and done[-1] >= number else 0

        return until(f"update {number}", found, deadline_s)

    def record(self, stage: str = "distill") -> Record:
        """A stage's journal as it is now."""
        path = f"train/{stage}/{UPDATES}"
        return read_journal(self.folder.read(path).decode().splitlines() if self.folder.has(path) else ())

    def checkpoints(self, stage: str = "distill") -> list[Checkpoint]:
        """The checkpoints that count, newest first."""
        return checkpoints(self.folder / "train" / stage / "checkpoints")

    def ended(self, deadline_s: float = 2 * START_S) -> int:
        """The exit status, waited for."""
        try:
            return self.process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"the job goes on after {deadline_s:.0f} s:\n{self.tail()}") from None

    def trained(self) -> None:
        """Wait until all its updates are done and its student is written; what follows is the same in every run."""
        self.line("distill: student in ", 2 * START_S)

    def succeeded(self) -> None:
        """Wait until it ended well, and has a release."""
        assert self.ended() == 0, self.tail()
        assert self.folder.has("release/manifest.json")

    def tail(self, lines: int = 60) -> str:
        return "\n".join(self.text.splitlines()[-lines:])

    def terminate(self) -> None:
        """What a scheduler sends first."""
        os.kill(self.process.pid, signal.SIGTERM)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(20)


@dataclass
class Launcher:
    """Starts jobs on the cluster at `address`, and ends those that are left."""

    address: str
    folder: Path
    started: list[Job] = field(default_factory=list)

    def __call__(
        self,
        *arguments: str,
        job: str = "distill",
        name: str = "r",
        storage: str = "",
        settings: Mapping[str, Any] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Job:
        """Run `jobs/<job>.py` as its own process, with the small settings and any others."""
        chosen = {**SMALL, "train.storage": storage or str(self.folder / "runs"), **(settings or {})}
        command = [
            sys.executable,
            f"jobs/{job}.py",
            "--name",
            name,
            *arguments,
            *(f"--set={key}={value}" for key, value in chosen.items()),
        ]
        variables = {**os.environ, "RAY_ADDRESS": self.address, "RAY_DEDUP_LOGS": "0", **(environment or {})}
        log = self.folder / f"{len(self.started)}-{job}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(command, cwd=ROOT, env=variables, stdout=file, stderr=subprocess.STDOUT)
        self.started.append(Job(name, str(chosen["train.storage"]), log, process))
        return self.started[-1]

    def close(self) -> None:
        for job in self.started:
            job.close()


def curve(record: Record) -> list[Entry]:
    """The figures of every update that counts, without times."""
    return [{key: value for key, value in entry.items() if key not in TIMES} for entry in record.updates]


def difference(found: Record, expected: Record) -> str:
    """Where two curves part; empty when they are equal to the last bit."""
    ours, theirs = curve(found), curve(expected)
    if [entry["update"] for entry in ours] != [entry["update"] for entry in theirs]:
        return f"updates {[entry['update'] for entry in ours]} and {[entry['update'] for entry in theirs]}"
    return "; ".join(f"{mine} and {other}" for mine, other in zip(ours, theirs, strict=True) if mine != other)


def sample_numbers(record: Record) -> list[int]:
    """The global number of every sample that what counts was trained on, in order."""
    return [number for entry in record.updates for number in range(entry["samples"][0], entry["samples"][1] + 1)]
