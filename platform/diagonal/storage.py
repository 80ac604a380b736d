"""Folders of runs and releases on local disk or S3, behind one interface; a write appears whole or not at all."""

from __future__ import annotations

import io
import json
import logging
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import pyarrow as pa
from pyarrow import fs

from diagonal.errors import FieldError, require

T = TypeVar("T")
REMOTE = "s3://"
FIRST_WAIT_S, LONGEST_WAIT_S = 0.25, 10.0
CONNECT_TIMEOUT_S, SILENCE_TIMEOUT_S = 5.0, 30.0
ATTEMPTS_A_REQUEST = 3  # by the S3 client, so that one lost part does not repeat a file of gigabytes
PART_BYTES = 16 * 2**20  # of a download: one ranged request
REFUSED = (
    "ACCESS_DENIED", "INVALID_ACCESS_KEY_ID", "INVALID_CLIENT_TOKEN_ID", "SIGNATURE_DOES_NOT_MATCH", "ExpiredToken",
    "InvalidToken", "NO_SUCH_BUCKET", "HTTP status 301", "HTTP status 400", "HTTP status 401", "HTTP status 403",
)  # fmt: skip
SECRETS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")

_log = logging.getLogger(__name__)


class StorageError(RuntimeError):
    """A storage that does not answer, or refuses: what was tried, where, for how long, and the newest cause."""


@dataclass(frozen=True)
class Folder:
    """A folder by its URI: a local path, or `s3://bucket/prefix`; it need not exist.

    S3's address and credentials come from the AWS_* environment, also where an object arrives that was pickled. A call
    that the storage fails is tried again, with growing pauses, for `patience_s` seconds, then raises `StorageError`;
    refused credentials and missing buckets raise it at once. Errors of a local disk are raised as they are.
    """

    uri: str
    patience_s: float = 120.0

    def __post_init__(self) -> None:
        remote = self.uri.startswith(REMOTE)
        require(remote or "://" not in self.uri, "storage", self.uri, "a local path or an s3:// URI")
        if remote:
            _check_remote(self.uri)
        clean = self.uri.rstrip("/") if remote else str(Path(self.uri).absolute())
        object.__setattr__(self, "uri", clean)

    def __reduce__(self) -> tuple[type[Folder], tuple[str, float]]:
        return (type(self), (self.uri, self.patience_s))  # without the client, which holds credentials

    def __str__(self) -> str:
        return self.uri

    def __truediv__(self, name: str) -> Folder:
        return Folder(f"{self.uri.rstrip('/')}/{name}", self.patience_s)

    @property
    def name(self) -> str:
        return self.uri.rsplit("/", 1)[-1]

    @property
    def parent(self) -> Folder:
        """The folder that holds this one; `FieldError` for a bucket."""
        above = self.uri.rsplit("/", 1)[0]
        require(above != REMOTE.rstrip("/"), "storage", self.uri, "a folder below a bucket")
        return Folder(above or "/", self.patience_s)

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
        return bool(self.children())

    def children(self) -> list[str]:
        """Names of the files and folders directly inside, sorted; none when the folder does not exist."""
        return sorted(self._listed(recursive=False))

    def files(self) -> dict[str, int]:
        """Bytes of every file below, by path relative to the folder."""
        return {name: info.size for name, info in sorted(self._listed(recursive=True).items())
                if info.type == fs.FileType.File}

    def read(self, name: str) -> bytes:
        """A file's bytes; `FieldError` when there is no such file."""
        parts: list[bytes] = []

        def read() -> bytes:
            parts.clear()
            self._stream(name, parts.append)
            return b"".join(parts)

        return self._retried(f"read {name}", read)

    def open(self, name: str) -> pa.NativeFile:
        """A file for random access, read range by range; the caller closes it. `FieldError` when there is none.

        Every range is tried again as other calls are, so an `OSError` of its reader speaks of what the file holds.
        """
        info = self._retried(f"look for {name}", lambda: self._info(name))
        require(info.type == fs.FileType.File, "file", f"{self.uri}/{name}", "a file that exists")
        if self.is_local:
            return self._filesystem.open_input_file(self._full(name))

        def read(start: int, count: int) -> bytes:
            with self._filesystem.open_input_file(self._full(name)) as file:
                data = bytes(file.read_at(count, start))
            _check_size(name, len(data), count)
            return data

        ranges = _Ranges(info.size, lambda start, count: self._retried(f"read {name}", lambda: read(start, count)))
        return pa.PythonFile(ranges, mode="r")

    def write(self, name: str, data: bytes) -> None:
        """Write a file, whole or not at all, durably."""
        if self.is_local:
            with _whole_file(self.path / name) as file:
                file.write(data)
            return

        def write() -> None:
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
        """Copy one local file here as `name`, whole or not at all, durably."""
        if self.is_local:
            with source.open("rb") as file, _whole_file(self.path / name) as target:
                shutil.copyfileobj(file, target, PART_BYTES)
            return

        def put() -> None:
            fs.copy_files(str(source), self._full(name), source_filesystem=fs.LocalFileSystem(),
                          destination_filesystem=self._filesystem)
            _check_size(name, self._info(name).size, source.stat().st_size)

        self._retried(f"upload {name}", put)

    def get(self, name: str, target: Path) -> None:
        """Copy the file `name` to a local path, whole or not at all; `FieldError` when there is no such file."""
        with _whole_file(target) as file:

            def get() -> None:
                file.seek(0)
                file.truncate()
                self._stream(name, file.write)

            self._retried(f"download {name}", get)

    def remove(self, name: str) -> None:
        """Remove the file `name`, if it is there."""

        def remove() -> None:
            with suppress(FileNotFoundError):
                self._filesystem.delete_file(self._full(name))

        self._retried(f"remove {name}", remove)

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
        scratch = Path(tempfile.mkdtemp(prefix=f".{self.name}.", suffix=".tmp", dir=parent))
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
        name = f".probe-{secrets.token_hex(8)}.tmp"
        try:
            self.write(name, b"probe")
            right = self.read(name) == b"probe"
            self.remove(name)
        except (OSError, StorageError) as error:
            raise FieldError("storage", self.uri, f"a folder that can be written and read ({error})") from error
        require(right, "storage", self.uri, "a storage that gives back what was written")

    def _upload(self, source: Path, last: str) -> None:
        new = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
        self.remove(last)
        for name in sorted(self.files().keys() - new):
            self.remove(name)
        for name in [*sorted(new - {last}), last]:
            self.put(source / name, name)

    @cached_property
    def _filesystem(self) -> fs.FileSystem:
        if self.is_local:
            return fs.LocalFileSystem()
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        if not region:
            region = "us-east-1" if endpoint else fs.resolve_s3_region(self._full("").split("/")[0])
        return fs.S3FileSystem(
            region=region, endpoint_override=endpoint, connect_timeout=CONNECT_TIMEOUT_S,
            request_timeout=min(SILENCE_TIMEOUT_S, max(1.0, self.patience_s)),
            retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS_A_REQUEST),
            allow_delayed_open=True,  # a small file is then one request, not a multipart upload
        )

    def _full(self, name: str) -> str:
        return f"{self.uri.removeprefix(REMOTE)}/{name}".rstrip("/") or "/"

    def _info(self, name: str) -> fs.FileInfo:
        return self._filesystem.get_file_info(self._full(name))

    def _listed(self, recursive: bool) -> dict[str, fs.FileInfo]:
        """Everything inside by relative path, but for what unfinished writes left."""
        root = self._full("")
        selector = fs.FileSelector(root, recursive=recursive, allow_not_found=True)
        found = self._retried("list", lambda: self._filesystem.get_file_info(selector))
        named = {info.path.removeprefix(root).strip("/"): info for info in found}
        return {name: info for name, info in named.items() if not any(map(_is_temporary, name.split("/")))}

    def _stream(self, name: str, take: Callable[[bytes], object]) -> None:
        """Hand over a file's bytes part by part; an `OSError` when it ends before its size."""
        try:
            with self._filesystem.open_input_file(self._full(name)) as file:
                size, seen = file.size(), 0
                while part := file.read(PART_BYTES):
                    seen += len(part)
                    take(part)
        except FileNotFoundError as error:
            raise FieldError("file", f"{self.uri}/{name}", "a file that exists") from error
        _check_size(name, seen, size)

    def _retried(self, what: str, call: Callable[[], T]) -> T:
        """Errors of this machine (they have an errno) are raised; a remote call is tried again till patience ends."""
        started_s, wait_s, tries = time.monotonic(), FIRST_WAIT_S, 0
        while True:
            try:
                return call()
            except OSError as error:
                if self.is_local or error.errno is not None:
                    raise
                tries, cause = tries + 1, _without_secrets(str(error))
            left_s = self.patience_s - (time.monotonic() - started_s)
            if left_s <= 0 or any(word in cause for word in REFUSED):
                spent = f"{tries} tries in {time.monotonic() - started_s:.1f} s"
                raise StorageError(f"{self.uri}: could not {what} ({spent}): {cause}")
            _log.warning("%s: could not %s (try %d); goes on for %.0f s: %s", self.uri, what, tries, left_s, cause)
            time.sleep(min(left_s, wait_s * secrets.SystemRandom().uniform(0.5, 1.0)))
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)


class _Ranges(io.RawIOBase):
    """A file of known size whose bytes a function of (start, count) gives."""

    def __init__(self, size_bytes: int, read: Callable[[int, int], bytes]) -> None:
        self._size_bytes, self._read, self._position = size_bytes, read, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size_bytes}[whence]
        self._position = max(0, start + offset)
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._size_bytes - self._position)
        count = left if size is None or size < 0 else min(size, left)
        data = self._read(self._position, count) if count else b""
        self._position += len(data)
        return data


def _check_remote(uri: str) -> None:
    """Refuse what would carry credentials into configurations and logs, without showing it."""
    bucket = uri.removeprefix(REMOTE).split("/")[0]
    require("@" not in bucket and ":" not in bucket, "storage", f"{REMOTE}...@...",
            "s3://bucket/prefix; credentials come from the AWS_* environment")
    require(bool(bucket) and "?" not in uri, "storage", uri.split("?")[0],
            "s3://bucket/prefix; the address comes from AWS_ENDPOINT_URL, the region from AWS_REGION")


def _check_size(name: str, found: int | None, expected: int) -> None:
    if found != expected:
        raise OSError(f"{name} has {found} bytes, not {expected}")


def _without_secrets(text: str) -> str:
    for secret in filter(None, map(os.environ.get, SECRETS)):
        text = text.replace(secret, "***")
    return text


def _is_temporary(name: str) -> bool:
    return name.startswith(".") and name.endswith(".tmp")


@contextmanager
def _whole_file(target: Path) -> Iterator[BinaryIO]:
    """A file that takes its name, synced to disk, when the block ends well, and else leaves nothing."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        _sync(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _swap_folder(new: Path, target: Path, old: Path) -> None:
    for path in [*new.rglob("*"), new]:
        _sync(path)
    if target.exists():
        os.replace(target, old)
    os.replace(new, target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
