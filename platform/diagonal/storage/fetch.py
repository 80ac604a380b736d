"""Local copies of folders: s3:// ones are downloaded once to a cache."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from diagonal.errors import require
from diagonal.files import one_process
from diagonal.storage.folder import Folder


def fetch(uri: str, cache: str | os.PathLike[str] | None = None) -> Path:
    """A local folder with the files of `uri`: itself when local, else a whole copy of an s3:// folder.

    One process downloads, others wait for it; the copy stays, so what lies under one URI must not change. `FieldError`
    when there is no such folder, `StorageError` when the storage does not answer.
    """
    source = Folder(uri)
    if source.is_local:
        require(source.path.is_dir(), "path", uri, "an existing folder or an s3:// URI")
        return Path(uri)
    root = Path(cache or os.environ.get("DIAGONAL_CACHE") or Path.home() / ".cache" / "diagonal")
    target = root / hashlib.sha256(source.uri.encode()).hexdigest()[:16]
    with one_process(root / f"{target.name}.lock"):
        if not target.exists():
            files = source.files()
            require(bool(files), "path", uri, "an s3:// folder that exists")
            with Folder(str(target)).replaced(last=min(files)) as folder:
                for name in files:
                    source.get(name, folder / name)
    return target
