"""Folders of runs and releases on local disk or S3, behind one interface; a write appears whole or not at all."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from pyarrow import fs

from diagonal.errors import FieldError, require

T = TypeVar("T")
REMOTE = "s3://"
FIRST_WAIT_S, LONGEST_WAIT_S = 0.25, 10.0
REFUSED = ("ACCESS_DENIED", "INVALID_ACCESS_KEY", "SIGNATURE_DOES_NOT_MATCH", "NO_SUCH_BUCKET", "AccessDenied",
           "InvalidAccessKeyId", "SignatureDoesNotMatch", "NoSuchBucket")  # fmt: skip


class StorageError(RuntimeError):
    """A storage that does not answer, or refuses: what was tried, where, for how long, and the newest cause."""


@dataclass(frozen=True)
class Folder:
    """A folder by its URI: an absolute local path, or `s3://bucket/prefix`; it need not exist.

    S3's address and credentials come from the AWS_* environment. A call that fails is tried again, with growing pauses,
    for `patience_s` seconds, then raises `StorageError`; refused credentials and missing buckets raise at once.
    """

    uri: str
    patience_s: float = 120.0

    def __post_init__(self) -> None:
        remote = self.uri.startswith(REMOTE)
        require(remote or "://" not in self.uri, "storage", self.uri, "a local path or an s3:// URI")
        clean = self.uri.rstrip("/") if remote else str(Path(self.uri).absolute())
        object.__setattr__(self, "uri", clean)

    def __str__(self) -> str:
        return self.uri

    def __truediv__(self, name: str) -> Folder:
        return Folder(f"{self.uri}/{name}", self.patience_s)

    @property
    def name(self) -> str:
        return self.uri.rsplit("/", 1)[-1]

    @property
    def parent(self) -> Folder:
        return Folder(self.uri.rsplit("/", 1)[0], self.patience_s)

    @property
    def is_local(self) -> bool:
        return not self.uri.startswith(REMOTE)

    @property
    def path(self) -> Path:
        """The local path; `FieldError` for an S3 folder."""
        require(self.is_local, "storage", self.uri, "a local folder")
        return Path(self.uri)

    def has(self, name: str) -> bool:
        """Whether the file `name` is there."""
        return self._retried(f"look for {name}", lambda: self._info(name).type == fs.FileType.File)

    def exists(self) -> bool:
        """Whether anything lies in the folder."""
        return self._retried("look", lambda: self._info("").type == fs.FileType.Directory)

    def children(self) -> list[str]:
        """Names of the files and folders directly inside, sorted; none when the folder does not exist."""
        return sorted({relative.split("/")[0] for relative in self._listed(recursive=False)})

    def files(self) -> dict[str, int]:
        """Bytes of every file below, by path relative to the folder."""
        return {name: info.size for name, info in sorted(self._listed(recursive=True).items())
                if info.type == fs.FileType.File}

    def read(self, name: str) -> bytes:
        """A file's bytes; `FieldError` when there is no such file."""
        require(self.has(name), "file", f"{self.uri}/{name}", "a file that exists")

        def read() -> bytes:
            with self._filesystem.open_input_stream(self._full(name)) as stream:
                return bytes(stream.read())

        return self._retried(f"read {name}", read)

    def write(self, name: str, data: bytes) -> None:
        """Write a file, whole or not at all, durably."""
        def write() -> None:
            if self.is_local:
                _write_local(self.path / name, data)
                return
            with self._filesystem.open_output_stream(self._full(name)) as stream:
                stream.write(data)

        self._retried(f"write {name}", write)

    def read_json(self, name: str) -> Any:
        """What a JSON file holds; `FieldError` when it is missing or not JSON."""
        try:
            return json.loads(self.read(name))
        except ValueError as error:
            if isinstance(error, FieldError):
                raise
            raise FieldError("file", f"{self.uri}/{name}", f"JSON ({error})") from error

    def write_json(self, name: str, value: object) -> None:
        """Write `value` as JSON, whole or not at all."""
        text = json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n"
        self.write(name, text.encode())

    def put(self, source: Path, name: str) -> None:
        """Copy one local file here as `name`, whole or not at all."""
        def put() -> None:
            if self.is_local:
                _copy_local(source, self.path / name)
            else:
                fs.copy_files(str(source), self._full(name), source_filesystem=fs.LocalFileSystem(),
                              destination_filesystem=self._filesystem)

        self._retried(f"upload {name}", put)

    def get(self, name: str, target: Path) -> None:
        """Copy the file `name` to a local path, whole or not at all."""
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
        target.parent.mkdir(parents=True, exist_ok=True)

        def get() -> None:
            fs.copy_files(self._full(name), str(temporary), source_filesystem=self._filesystem,
                          destination_filesystem=fs.LocalFileSystem())

        try:
            self._retried(f"download {name}", get)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)

    def delete(self) -> None:
        """Remove the folder and everything below it, if it is there."""
        def delete() -> None:
            if self._info("").type != fs.FileType.NotFound:
                self._filesystem.delete_dir(self._full(""))

        self._retried("delete", delete)

    @contextmanager
    def replaced(self, last: str) -> Iterator[Path]:
        """A local folder to fill; when the block ends well, its files replace this folder's.

        Locally by one rename. On S3, file by file, the file `last` (whose presence makes the folder count) first
        removed and last written, so that a reader who waits for it never takes half a folder.
        """
        parent = self.path.parent if self.is_local else Path(tempfile.gettempdir())
        parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{self.name}.", dir=parent))
        try:
            new = scratch / "new"
            new.mkdir()
            yield new
            require((new / last).is_file(), "folder", last, "a file that the block wrote")
            if self.is_local:
                _swap_folder(new, self.path, scratch / "old")
            else:
                self._upload(new, last)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def check_writable(self) -> None:
        """Write, read and remove a probe; `FieldError` names the folder and the cause when that is not allowed."""
        name = f".probe-{uuid.uuid4().hex}"
        try:
            self.write(name, b"probe")
            right = self.read(name) == b"probe"
            self._retried("delete a probe", lambda: self._filesystem.delete_file(self._full(name)))
        except (OSError, StorageError) as error:
            raise FieldError("storage", self.uri, f"a folder that can be written and read ({error})") from error
        require(right, "storage", self.uri, "a storage that gives back what was written")

    def _upload(self, source: Path, last: str) -> None:
        self.delete()
        names = sorted(str(path.relative_to(source)) for path in source.rglob("*") if path.is_file())
        for name in [*(name for name in names if name != last), last]:
            self.put(source / name, name)

    @cached_property
    def _filesystem(self) -> fs.FileSystem:
        return fs.LocalFileSystem() if self.is_local else fs.FileSystem.from_uri(self.uri)[0]

    def _full(self, name: str) -> str:
        return f"{self.uri.removeprefix(REMOTE)}/{name}".rstrip("/")

    def _info(self, name: str) -> fs.FileInfo:
        return self._filesystem.get_file_info(self._full(name))

    def _listed(self, recursive: bool) -> dict[str, fs.FileInfo]:
        root = self._full("")
        selector = fs.FileSelector(root, recursive=recursive, allow_not_found=True)
        found = self._retried("list", lambda: self._filesystem.get_file_info(selector))
        return {info.path.removeprefix(f"{root}/"): info for info in found}

    def _retried(self, what: str, call: Callable[[], T]) -> T:
        """Local errors are raised as they are; a remote call is tried again until it works or patience ends."""
        started_s, wait_s, tries = time.monotonic(), FIRST_WAIT_S, 0
        while True:
            try:
                return call()
            except OSError as error:
                if self.is_local:
                    raise
                tries += 1
                spent_s = time.monotonic() - started_s
                if spent_s + wait_s > self.patience_s or any(word in str(error) for word in REFUSED):
                    raise StorageError(
                        f"{self.uri}: could not {what} ({tries} tries in {spent_s:.0f} s): {error}"
                    ) from error
            time.sleep(wait_s * secrets.SystemRandom().uniform(0.5, 1.0))
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)


def _write_local(target: Path, data: bytes) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _copy_local(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        shutil.copyfile(source, temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _swap_folder(new: Path, target: Path, old: Path) -> None:
    if target.exists():
        os.replace(target, old)
    os.replace(new, target)
