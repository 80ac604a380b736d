"""What a figure is worth nothing without: when, on what, by which command, from which commit, on how busy a machine."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import diagonal
from diagonal.jsonfile import write_json
from diagonal.storage import Folder

SystemDescription = dict[str, str | float | int]


def system_description(command: str) -> SystemDescription:
    """Of a measurement by `command`; `load` is the machine's of five minutes."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{processor()}, {os.cpu_count()} CPUs",
        "command": command,
        "commit": commit(),
        "load": round(os.getloadavg()[1], 2),
        "python": platform.python_version(),
        "torch": version("torch"),
        "diagonal": diagonal.__version__,
    }


def this_command(module: str) -> str:
    """`python -m module` with this process's arguments."""
    return shlex.join(["python", "-m", module, *sys.argv[1:]])


def write_report(out: str, figures: Mapping[str, Any], text: str) -> None:
    """OUT.json and OUT.md, each whole or not at all."""
    write_json(f"{out}.json", figures)
    Folder(str(Path(out).absolute().parent)).write(f"{Path(out).name}.md", text.encode())


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
