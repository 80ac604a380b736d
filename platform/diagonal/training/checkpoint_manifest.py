"""Manifests: what each rank wrote into a checkpoint's folder, so that a half-written or altered one is never used.

One rule on every storage: a checkpoint counts when the manifests of all ranks of one save are there and every file that
they list has its size. Each rank writes its manifest after its files, so a kill at any write leaves no folder that
counts and is not whole. Hashes are looked at before a checkpoint is loaded. Needs no torch.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diagonal.errors import FieldError
from diagonal.files import file_hash
from diagonal.storage import Folder

FORMAT_VERSION = 2
FOLDER_PREFIX = "update-"
READERS = 8
Manifest = dict[str, Any]


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or used: `folder` and `reason` say which and why."""

    def __init__(self, folder: Folder | str, reason: str) -> None:
        super().__init__(f"checkpoint {folder}: {reason}")
        self.folder = str(folder)
        self.reason = reason

    def __reduce__(self) -> tuple[type[CheckpointError], tuple[str, str]]:
        return (type(self), (self.folder, self.reason))


class UnfinishedError(CheckpointError):
    """One that never counted: a save, or the deletion of one, that was cut off."""


@dataclass(frozen=True)
class Checkpoint:
    """One that counts: its folder and the manifests of all its ranks."""

    folder: Folder
    manifests: tuple[Manifest, ...]

    @property
    def update(self) -> int:
        return int(self.manifests[0]["update"])

    @property
    def progress(self) -> dict[str, int]:
        """Where the run stood: `stage`, `update`, `epoch`, `samples_seen`."""
        return {name: int(self.manifests[0][name]) for name in ("stage", "update", "epoch", "samples_seen")}

    @property
    def world_size(self) -> int:
        return len(self.manifests)

    @property
    def files(self) -> dict[str, dict[str, Any]]:
        """`bytes` and `sha256` of every file but the manifests, by name."""
        return {name: entry for manifest in self.manifests for name, entry in sorted(manifest["files"].items())}

    @property
    def size_bytes(self) -> int:
        return sum(entry["bytes"] for entry in self.files.values())

    @property
    def saved_at_s(self) -> float:
        """When it was written, in seconds since 1970 by its writer's clock."""
        return float(self.manifests[0]["saved_at_s"])

    @property
    def age_s(self) -> float:
        """Seconds since it was written."""
        return max(0.0, time.time() - self.saved_at_s)


def checkpoints(root: Folder) -> list[Checkpoint]:
    """The checkpoints below `root` that count, newest first; reads manifests only, loads nothing."""
    return scan(root)[0]


def scan(root: Folder) -> tuple[list[Checkpoint], list[CheckpointError]]:
    """The checkpoints below `root` that count, newest first, and why its other folders of that name do not."""
    sizes: dict[str, dict[str, int]] = {}
    for path, size in root.files().items():
        folder, _, name = path.partition("/")
        if folder.startswith(FOLDER_PREFIX):
            sizes.setdefault(folder, {})[name] = size
    whole, broken = [], []
    with ThreadPoolExecutor(READERS) as readers:
        for found in readers.map(lambda name: _look(root / name, sizes[name]), sorted(sizes)):
            if isinstance(found, Checkpoint):
                whole.append(found)
            else:
                broken.append(found)
    return sorted(whole, key=lambda c: (c.update, c.saved_at_s, c.folder.name), reverse=True), broken


def folder_name(update: int, token: str) -> str:
    """Name of the checkpoint after `update` updates by the save `token`; names sort by update."""
    return f"{FOLDER_PREFIX}{update:08d}-{token}"


def name_of(rank: int) -> str:
    """File name of one rank's manifest."""
    return f"manifest.rank{rank:02d}.json"


def compose(source: Path, rank: int, world_size: int, token: str, progress: Mapping[str, int]) -> Manifest:
    """The files that `rank` wrote into the local folder `source`, with sizes and hashes, and where the run stands."""
    own = sorted(source.glob(f"__{rank}_*.distcp")) + ([source / ".metadata"] if rank == 0 else [])
    files = {path.name: {"bytes": path.stat().st_size, "sha256": file_hash(path)} for path in own}
    return {
        "format_version": FORMAT_VERSION,
        "rank": rank,
        "world_size": world_size,
        "token": token,
        "saved_at_s": time.time(),
        **progress,
        "files": files,
    }


def check_file(checkpoint: Checkpoint, name: str, path: Path) -> None:
    """Raise `CheckpointError` unless the local copy `path` of a listed file has its size and its hash."""
    expected = checkpoint.files[name]
    try:
        size, digest = path.stat().st_size, file_hash(path)
    except OSError as error:
        raise CheckpointError(checkpoint.folder, f"{name} cannot be read: {error}") from error
    _check_size(checkpoint.folder, name, size, expected["bytes"])
    if digest != expected["sha256"]:
        raise CheckpointError(checkpoint.folder, f"{name} is altered: its sha256 is not the manifest's")


def delete_checkpoint(folder: Folder) -> None:
    """Delete a checkpoint; it no longer counts from the first file on."""
    folder.remove(name_of(0))
    folder.delete()


def _look(folder: Folder, sizes: Mapping[str, int]) -> Checkpoint | CheckpointError:
    try:
        manifests = _read_all(folder)
        for name, entry in ((n, e) for manifest in manifests for n, e in manifest["files"].items()):
            if name not in sizes:
                raise CheckpointError(folder, f"{name} is missing")
            _check_size(folder, name, sizes[name], entry["bytes"])
    except CheckpointError as error:
        return error
    return Checkpoint(folder, tuple(manifests))


def _read_all(folder: Folder) -> list[Manifest]:
    """The manifests of all ranks of one and the same save; rank 0's says how many."""
    first = _read(folder, 0)
    manifests = [first, *(_read(folder, rank) for rank in range(1, first["world_size"]))]
    for rank, manifest in enumerate(manifests):
        if manifest["token"] != first["token"]:
            raise UnfinishedError(folder, f"{name_of(rank)} is of another save than {name_of(0)}")
    return manifests


def _read(folder: Folder, rank: int) -> Manifest:
    name = name_of(rank)
    try:
        manifest = json.loads(folder.read(name))
    except (FieldError, ValueError, FileNotFoundError) as error:
        raise UnfinishedError(folder, f"{name} is missing or unreadable ({error})") from error
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise CheckpointError(folder, f"{name}: format_version = {version!r}: allowed is {FORMAT_VERSION}")
    return manifest


def _check_size(folder: Folder, name: str, found: int, expected: int) -> None:
    if found != expected:
        raise CheckpointError(folder, f"{name} has {found} bytes instead of {expected}")
