"""Files that are there whole or not at all; of a stream that is cut off, what came is kept beside it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path


def write_whole(path: str | os.PathLike[str], parts: Iterable[bytes]) -> Path:
    """Write `parts` beside the file's final name, then rename; on an error nothing is left."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            for part in parts:
                file.write(part)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


def write_kept(path: str | os.PathLike[str], parts: Iterable[bytes]) -> Path:
    """Write `parts` to `path`.part, then rename; what came before an error is a video that plays, and stays there."""
    target, partial = Path(path), part_of(path)
    with partial.open("wb") as file:
        try:
            for part in parts:
                file.write(part)
                file.flush()
        finally:
            if not file.tell():
                partial.unlink()
    if partial.exists():
        os.replace(partial, target)
    return target


def part_of(path: str | os.PathLike[str]) -> Path:
    """Where `write_kept` keeps what came of a stream that was cut off."""
    return Path(f"{os.fspath(path)}.part")
