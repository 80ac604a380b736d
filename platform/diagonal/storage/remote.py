"""What every storage speaks of: how places are named, and the failure of a storage. It imports no library of one."""

from __future__ import annotations

import os
import re
from pathlib import Path

REMOTE = "s3://"
HUB = "hf://"
# What a bare org/name never ends with: such a name is a file here, whether it exists or not.
FILES = (".txt", ".jsonl", ".json", ".parquet", ".csv", ".tsv", ".gz", ".pt", ".pth", ".ckpt", ".safetensors", ".bin")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[^/\s]+)?", re.ASCII)


def location(name: str, kind: str = "") -> str:
    """The URI, or the local path, that a user's name for something to read means.

    What exists here is a path, whatever it looks like; `org/name` and `org/name@revision` are a repository of the hub
    (with `kind` "datasets", one of its datasets); all else is a path. `~` is this user's home.
    """
    plain = name.removeprefix("file://")
    if "://" in plain:
        return plain
    path = os.path.expanduser(plain)
    if os.path.exists(path) or plain.endswith(FILES) or not _HUB_ID.fullmatch(plain):
        return path
    return f"{HUB}{kind}/{plain}" if kind else f"{HUB}{plain}"


def meaning(name: str, kind: str = "") -> str:
    """What `location` takes a name for, in words."""
    found = location(name, kind)
    if found.startswith(HUB):
        return f"{name} is on the hub, as {found}"
    return f"{name} is on S3" if found.startswith(REMOTE) else f"{name} is a path, {Path(found).absolute()}"


class StorageError(RuntimeError):
    """A storage that does not answer, or refuses: what was tried, where, for how long, and the newest cause."""


class ConditionsRefused(StorageError):  # noqa: N818  # what was refused is the point
    """A storage that knows no conditional writes."""


class VersionChanged(Exception):  # noqa: N818  # the answer to a condition, not a fault
    """A file has another version than the one that a write was to replace."""
