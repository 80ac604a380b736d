"""A folder by its URI: what jobs, training and serving read and write, wherever it lies."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING, Any, cast

import pyarrow as pa

from diagonal.errors import FieldError, require
from diagonal.files import whole_file
from diagonal.storage.disk import Disk, swap_folder
from diagonal.storage.remote import HUB, REMOTE, ConditionsRefused, StorageError, VersionChanged

if TYPE_CHECKING:
    from diagonal.storage.hub import Hub
    from diagonal.storage.s3 import S3


@dataclass(frozen=True)
class Folder:
    """A folder by its URI: a local path, `s3://bucket/prefix`, or `hf://org/name` to read; it need not exist.

    S3's address and credentials come from the AWS_* environment, also where an object arrives that was pickled. A call
    that the storage fails is tried again, with growing pauses, for `patience_s` seconds, then raises `StorageError`;
    refused credentials and missing buckets raise it at once. Errors of a local disk are raised as they are.
    """

    uri: str
    patience_s: float = 120.0

    def __post_init__(self) -> None:
        remote = self.uri.startswith((REMOTE, HUB))
        require(remote or "://" not in self.uri, "storage", self.uri, "a local path, an s3:// or an hf:// URI")
        if self.uri.startswith(REMOTE):
            _check_remote(self.uri)
        clean = self.uri.rstrip("/") if remote else str(Path(self.uri).absolute())
        object.__setattr__(self, "uri", clean)

    def __reduce__(self) -> tuple[type[Folder], tuple[str, float]]:
        return (type(self), (self.uri, self.patience_s))  # without the client, which holds credentials

    def __str__(self) -> str:
        return self.uri

    def __truediv__(self, name: str) -> Folder:
        return self._beside(f"{self.uri.rstrip('/')}/{name}")

    @property
    def name(self) -> str:
        return self.uri.rsplit("/", 1)[-1]

    @property
    def parent(self) -> Folder:
        """The folder that holds this one; `FieldError` for a bucket."""
        above = self.uri.rsplit("/", 1)[0]
        require(self.is_local or above.startswith((REMOTE, HUB)), "storage", self.uri, "a folder below a bucket")
        return self._beside(above or "/")

    @property
    def is_local(self) -> bool:
        return not self.uri.startswith((REMOTE, HUB))

    @property
    def path(self) -> Path:
        """The local path; `FieldError` for a remote folder."""
        require(self.is_local, "storage", self.uri, "a local folder")
        return Path(self.uri)

    def has(self, name: str) -> bool:
        """Whether the file `name` is there."""
        return self._store.has(name)

    def exists(self) -> bool:
        """Whether anything lies in the folder."""
        return bool(self.children())

    def children(self) -> list[str]:
        """Names of the files and folders directly inside, sorted; none when the folder does not exist."""
        return sorted(name for name in self._store.names() if not _is_temporary(name))

    def files(self) -> dict[str, int]:
        """Bytes of every file below, by path relative to the folder, sorted; without what unfinished writes left."""
        found = self._store.sizes()
        return {name: found[name] for name in sorted(found) if not any(map(_is_temporary, name.split("/")))}

    def versions(self) -> dict[str, str]:
        """What each file's bytes are known by: an ETag, a git hash, or on disk size and time of change."""
        found = self._store.versions()
        return {name: found[name] for name in sorted(found) if not any(map(_is_temporary, name.split("/")))}

    def version(self, name: str) -> str:
        """What one file's bytes are known by; `FieldError` when there is no such file."""
        with self._required(name):
            return self._store.version(name)

    def read(self, name: str) -> bytes:
        """A file's bytes; `FieldError` when there is no such file."""
        return b"".join(self._parts(name))

    def open(self, name: str) -> pa.NativeFile:
        """A file for random access, read range by range; the caller closes it. `FieldError` when there is none.

        Every range is tried again as other calls are, so an `OSError` of its reader speaks of what the file holds.
        """
        with self._required(name):
            return self._store.open(name)

    def write(self, name: str, data: bytes) -> None:
        """Write a file, whole or not at all, durably."""
        self._target.write(name, data)

    def read_json(self, name: str) -> Any:
        """What a JSON file holds; `FieldError` when it is missing or not JSON."""
        data = self.read(name)
        try:
            return json.loads(data)
        except ValueError as error:
            raise FieldError("file", f"{self.uri}/{name}", f"JSON ({error})") from error

    def write_json(self, name: str, value: object) -> None:
        """Write `value` as JSON, whole or not at all."""
        text = json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n"
        self.write(name, text.encode())

    def read_version(self, name: str) -> tuple[bytes, str]:
        """Bytes and version of a small file on S3; `FileNotFoundError` where there is none."""
        return self._remote.read_version(name)

    def write_version(self, name: str, data: bytes, over: str) -> str:
        """Write a file on S3 over its version `over` ('' where there must be none); returns the new version.

        `VersionChanged` where that is not its version, `ConditionsRefused` where the store knows no conditions.
        """
        return self._remote.write_version(name, data, over)

    def put(self, source: Path, name: str) -> None:
        """Copy one local file here as `name`, whole or not at all, durably."""
        self._target.put(source, name)

    def get(self, name: str, target: Path) -> None:
        """Copy the file `name` to a local path, whole or not at all; `FieldError` when there is no such file."""
        with whole_file(target) as file:
            for part in self._parts(name):
                file.write(part)

    def remove(self, name: str) -> None:
        """Remove the file `name`, if it is there."""
        self._target.remove(name)

    def delete(self) -> None:
        """Remove the folder and everything below it, if it is there."""
        self._target.delete()

    @contextmanager
    def replaced(self, last: str, check: Callable[[], None] = lambda: None) -> Iterator[Path]:
        """A local folder to fill; when the block ends well, its files replace this folder's.

        Locally by one rename. On S3, file by file, the file `last` (whose presence makes the folder count) first
        removed and last written, so that a reader who waits for it never takes half a folder. `check` is called
        before that; what it raises keeps the folder from counting. `FieldError` where another writer's `last`
        appeared meanwhile.
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
                check()
                swap_folder(new, self.path, scratch / "old")
            else:
                self._upload(new, last, check)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def check_writable(self) -> None:
        """Write, read and remove a probe; `FieldError` names the folder and the cause when that is not allowed."""
        name = f".probe-{token_hex(8)}.tmp"
        try:
            self.write(name, b"probe")
            right = self.read(name) == b"probe"
            self.remove(name)
        except (OSError, StorageError) as error:
            raise FieldError("storage", self.uri, f"a folder that can be written and read ({error})") from error
        require(right, "storage", self.uri, "a storage that gives back what was written")

    def _upload(self, source: Path, last: str, check: Callable[[], None]) -> None:
        new = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
        self.remove(last)
        for name in sorted(self.files().keys() - new):
            self.remove(name)
        for name in sorted(new - {last}):
            self.put(source / name, name)
        check()
        self._create(last, (source / last).read_bytes())

    def _create(self, name: str, data: bytes) -> None:
        """Write a file that is not there; where the store knows no conditions, over whatever is there."""
        try:
            self.write_version(name, data, "")
        except VersionChanged:
            allowed = "a folder that one job writes at a time; another one finished it meanwhile"
            require(self.read(name) == data, "storage", f"{self.uri}/{name}", allowed)
        except ConditionsRefused:
            self.write(name, data)

    def _parts(self, name: str) -> Iterator[bytes]:
        with self._required(name):
            yield from self._store.parts(name)

    @contextmanager
    def _required(self, name: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise FieldError("file", f"{self.uri}/{name}", "a file that exists") from error

    def _beside(self, uri: str) -> Folder:
        """Another folder of the same storage: it shares this one's client, which is slow to make."""
        other = Folder(uri, self.patience_s)
        if self.uri.startswith(REMOTE) and "_client" in self.__dict__:
            other.__dict__["_client"] = self._client
        return other

    @cached_property
    def _store(self) -> Disk | S3 | Hub:
        if not self.uri.startswith(HUB):
            return self._target
        from diagonal.storage.hub import Hub  # huggingface_hub is asked for by those alone who use it

        return Hub(self.uri)

    @cached_property
    def _target(self) -> Disk | S3:
        """What can be written, too."""
        require(not self.uri.startswith(HUB), "storage", self.uri, "a local path or an s3:// URI: the hub is read only")
        if self.is_local:
            return Disk(self.path)
        from diagonal.storage.s3 import S3  # boto3 is asked for by those alone who use S3

        bucket, _, prefix = self.uri.removeprefix(REMOTE).partition("/")
        return S3(self._client, bucket, f"{prefix}/" if prefix else "", self.patience_s)

    @property
    def _remote(self) -> S3:
        require(self.uri.startswith(REMOTE), "storage", self.uri, "a folder on S3")
        return cast("S3", self._target)

    @cached_property
    def _client(self) -> Any:
        from diagonal.storage.s3 import client

        return client(self.patience_s)


def _check_remote(uri: str) -> None:
    """Refuse what would carry credentials into configurations and logs, without showing it."""
    bucket = uri.removeprefix(REMOTE).split("/")[0]
    require(
        "@" not in bucket and ":" not in bucket,
        "storage",
        f"{REMOTE}...@...",
        "s3://bucket/prefix; credentials come from the AWS_* environment",
    )
    require(
        bool(bucket) and "?" not in uri,
        "storage",
        uri.split("?")[0],
        "s3://bucket/prefix; the address comes from AWS_ENDPOINT_URL, the region from AWS_REGION",
    )


def _is_temporary(name: str) -> bool:
    return name.startswith(".") and name.endswith(".tmp")
