"""A folder's file for random access, as Parquet's readers want it."""

from __future__ import annotations

import pyarrow as pa

from diagonal.errors import require
from diagonal.storage import Folder


def open_file(folder: Folder, name: str) -> pa.NativeFile:
    """The file, to be closed by the caller; `FieldError` when there is none."""
    require(folder.has(name), "file", f"{folder}/{name}", "a file that exists")
    if folder.is_local:
        return pa.OSFile(str(folder.path / name))
    return pa.BufferReader(folder.read(name))
