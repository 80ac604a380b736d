"""Manifests: what each rank wrote into a checkpoint's folder, so that a half-written or altered one is never used."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

FORMAT_VERSION = 1
Manifest = dict[str, Any]


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: `folder` and `reason` say which and why."""

    def __init__(self, folder: Path, reason: str) -> None:
        super().__init__(f"checkpoint {folder}: {reason}")
        self.folder = folder
        self.reason = reason

    def __reduce__(self) -> tuple[type[CheckpointError], tuple[Path, str]]:
        return (type(self), (self.folder, self.reason))


def name_of(rank: int) -> str:
    """File name of one rank's manifest."""
    return f"manifest.rank{rank:02d}.json"


def write(folder: Path, rank: int, world_size: int, token: str, progress: Mapping[str, int]) -> None:
    """List the files that `rank` wrote into `folder`, with sizes and hashes, and where the run stands.

    `token` is the same on all ranks of one save. Each rank's names are its own, so folders can be merged.
    """
    own = sorted(folder.glob(f"__{rank}_*.distcp")) + ([folder / ".metadata"] if rank == 0 else [])
    files = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in own}
    head = {"format_version": FORMAT_VERSION, "rank": rank, "world_size": world_size, "token": token}
    path = folder / name_of(rank)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w") as file:
        file.write(json.dumps({**head, **progress, "files": files}, indent=2, sort_keys=True) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(folder)


def read_all(folder: Path) -> list[Manifest]:
    """The manifests of all ranks of one and the same save; rank 0's says how many (others are leftovers)."""
    first = _read(folder, 0)
    manifests = [first, *(_read(folder, rank) for rank in range(1, first["world_size"]))]
    for rank, manifest in enumerate(manifests):
        if manifest["token"] != first["token"]:
            raise CheckpointError(folder, f"{name_of(rank)} is of another save than {name_of(0)}")
    return manifests


def check_files(folder: Path, manifests: Iterable[Manifest]) -> None:
    """Raise `CheckpointError` unless every listed file is there, with its size and its hash."""
    for manifest in manifests:
        for name, expected in manifest["files"].items():
            path = folder / name
            if not path.is_file():
                raise CheckpointError(folder, f"{name} is missing")
            if path.stat().st_size != expected["bytes"]:
                raise CheckpointError(folder, f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}")
            if _sha256(path) != expected["sha256"]:
                raise CheckpointError(folder, f"{name} is altered: its sha256 is not the manifest's")


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(folder: Path, rank: int) -> Manifest:
    path = folder / name_of(rank)
    try:
        manifest = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(folder, f"{path.name} is missing or unreadable ({error})") from error
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise CheckpointError(folder, f"{path.name}: format_version = {version!r}: allowed is {FORMAT_VERSION}")
    return manifest


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
