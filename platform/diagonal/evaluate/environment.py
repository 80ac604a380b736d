"""What a figure is worth nothing without: when, on what, by which command, from which commit, on how busy a machine."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import diagonal

Circumstances = dict[str, str | float | int]


def circumstances(module: str) -> Circumstances:
    """Of a measurement by `python -m module` with this process's arguments; `load` is the machine's of five minutes."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{processor()}, {os.cpu_count()} CPUs",
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "commit": commit(),
        "load": round(os.getloadavg()[1], 2),
        "python": platform.python_version(),
        "diagonal": diagonal.__version__,
    }


def processor() -> str:
    """The CPU's name, or its kind where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str:
    """The repository's commit, or that the sources lie in none."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10
        )
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"
