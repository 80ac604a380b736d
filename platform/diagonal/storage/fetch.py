"""Local copies of what lies elsewhere: s3:// folders and repositories of the hub, each known by what is in it."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from diagonal.errors import require
from diagonal.files import one_process, write_text
from diagonal.storage.folder import Folder
from diagonal.storage.remote import HUB, StorageError, location, meaning

NO_PROGRAMS = ("*.safetensors", "*.json", "*.txt", "*.model", "*.md")  # kinds of files that run no code
STUDENT_FILES = ("transformer/*.safetensors", "transformer/*.json", "*config.json", "lineage.json")
_FRESH_S = 10.0  # how long a storage is asked what is there now, where a copy is here
RECORD = ".json"  # of a copy: the versions of its files; one without is not whole
_CHANGES = 3  # how often a folder may change while it is copied
_log = logging.getLogger(__name__)


def fetch(name: str, cache: str | os.PathLike[str] | None = None, patterns: Sequence[str] = NO_PROGRAMS) -> Path:
    """A local folder with the files of `name`: itself when local, else a whole copy of what lies on S3 or on the hub.

    From the hub come the files that match `patterns` alone, through its own cache. A copy of an s3:// folder is known
    by its files' ETags: what was uploaded anew is fetched anew, unchanged files are taken from an older copy. Where
    the storage does not answer, the newest copy is taken with a warning. One process downloads, others wait for it.
    `FieldError` when there is no such folder, `StorageError` when the storage does not answer and nothing is here.
    """
    uri = location(name)
    _log.info("%s", meaning(name))
    if uri.startswith(HUB):
        from diagonal.storage import hub

        return hub.download(uri, patterns)
    source = Folder(uri)
    if source.is_local:
        require(source.path.is_dir(), "path", name, "an existing folder, an s3:// URI, or org/name on the hub")
        return Path(uri)
    root = _cache_root(cache) / hashlib.sha256(source.uri.encode()).hexdigest()[:16]
    with one_process(root.with_suffix(".lock")):
        return _copy(source, root)


def fetch_file(name: str, cache: str | os.PathLike[str] | None = None) -> Path:
    """A local path of the one file that `name` names, with the rules of `fetch`."""
    uri = location(name)
    _log.info("%s", meaning(name))
    if uri.startswith(HUB):
        from diagonal.storage import hub

        return hub.download_file(uri)
    file = Folder(uri)
    if file.is_local:
        require(file.path.is_file(), "path", name, "an existing file, one on S3, or hf://org/name/file on the hub")
        return Path(uri)
    version = file.parent.version(file.name)
    key = hashlib.sha256(f"{file.uri} {version}".encode()).hexdigest()[:16]
    target = _cache_root(cache) / "files" / key / file.name
    with one_process(target.parent.with_suffix(".lock")):
        if not target.exists():
            file.parent.get(file.name, target)
    return target


def _cache_root(cache: str | os.PathLike[str] | None) -> Path:
    return Path(cache or os.environ.get("DIAGONAL_CACHE") or Path.home() / ".cache" / "diagonal")


def _copy(source: Folder, root: Path) -> Path:
    """The copy of a remote folder as it is now, below `root`, which holds a listing beside each copy."""
    copies = sorted(root.glob(f"*{RECORD}"), key=lambda path: path.stat().st_mtime, reverse=True)
    try:
        listing = Folder(source.uri, _FRESH_S if copies else source.patience_s).versions()
    except StorageError as error:
        if not copies:
            raise
        _log.warning("%s; the copy of it that is here is taken", error)
        return copies[0].with_suffix("")
    for _ in range(_CHANGES):
        require(bool(listing), "path", source.uri, "an s3:// folder that exists")
        target = root / hashlib.sha256(json.dumps(sorted(listing.items())).encode()).hexdigest()[:16]
        if target.with_suffix(RECORD) not in copies:
            with Folder(str(target)).replaced(last=min(listing)) as folder:
                _fill(folder, source, listing, copies)
            now = source.versions()
            if now != listing:  # a mixture
                shutil.rmtree(target)
                listing = now
                continue
        write_text(target.with_suffix(RECORD), json.dumps(dict(listing)))
        return target
    raise StorageError(f"{source.uri} changes while it is copied, {_CHANGES} times in a row")


def _fill(folder: Path, source: Folder, listing: Mapping[str, str], copies: Sequence[Path]) -> None:
    """Files that an older copy has, unchanged, are taken from it; the others are downloaded."""
    older = [(copy.with_suffix(""), json.loads(copy.read_text())) for copy in copies]
    for name, version in listing.items():
        same = next((copy / name for copy, files in older if files.get(name) == version), None)
        if same is None or not same.is_file():
            source.get(name, folder / name)
            continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(same, folder / name)
        except OSError:  # a file system without links
            shutil.copyfile(same, folder / name)
