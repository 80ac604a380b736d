"""Files below a local folder: written under a temporary name, synced, renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from diagonal.files import renamed_file, sync, whole_file

PART_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Disk:
    """A local folder; errors are the operating system's."""

    root: Path

    def has(self, name: str) -> bool:
        return (self.root / name).is_file()

    def names(self) -> list[str]:
        return [path.name for path in self.root.iterdir()] if self.root.is_dir() else []

    def sizes(self) -> dict[str, int]:
        """Files may come and go meanwhile."""
        found = {}
        for folder, _, names in os.walk(self.root):
            for path in (Path(folder, name) for name in names):
                with suppress(FileNotFoundError):
                    found[path.relative_to(self.root).as_posix()] = path.stat().st_size
        return found

    def versions(self) -> dict[str, str]:
        return {name: self.version(name) for name in self.sizes()}

    def version(self, name: str) -> str:
        about = (self.root / name).stat()
        return f"{about.st_size} {about.st_mtime_ns}"

    def parts(self, name: str) -> Iterator[bytes]:
        with (self.root / name).open("rb") as file:
            while part := file.read(PART_BYTES):
                yield part

    def open(self, name: str) -> pa.NativeFile:
        return pa.OSFile(str(self.root / name), "rb")

    def write(self, name: str, data: bytes) -> None:
        with whole_file(self.root / name) as file:
            file.write(data)

    def write_all(self, files: Mapping[str, bytes]) -> None:
        """Several files, each whole or not there; their names are synced together."""
        self.root.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            with renamed_file(self.root / name) as file:
                file.write(data)
        sync(self.root)

    def put(self, source: Path, name: str) -> None:
        with source.open("rb") as file, whole_file(self.root / name) as target:
            shutil.copyfileobj(file, target, PART_BYTES)

    def remove(self, name: str) -> None:
        (self.root / name).unlink(missing_ok=True)

    def delete(self) -> None:
        if self.root.exists():
            shutil.rmtree(self.root)


def swap_folder(new: Path, target: Path, old: Path) -> None:
    """Give the folder `new` the name `target`, whose older folder becomes `old`; synced to disk."""
    for path in [*new.rglob("*"), new]:
        sync(path)
    if target.exists():
        os.replace(target, old)
    os.replace(new, target)
    sync(target.parent)
