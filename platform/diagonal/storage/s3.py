"""Keys of an S3 bucket below a prefix; a call is tried again, with growing pauses, while its failure may pass."""

from __future__ import annotations

import io
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import boto3
import pyarrow as pa
from boto3.s3.transfer import TransferConfig
from botocore import exceptions as aws
from botocore.config import Config

from diagonal.storage.disk import PART_BYTES
from diagonal.storage.remote import REMOTE, ConditionsRefused, StorageError, VersionChanged

T = TypeVar("T")
FIRST_WAIT_S, LONGEST_WAIT_S = 0.25, 10.0
CONNECT_TIMEOUT_S, SILENCE_TIMEOUT_S = 5.0, 30.0
ATTEMPTS_A_REQUEST = 3  # by the S3 client, so that one lost part does not repeat an upload of gigabytes
KEYS_A_REQUEST = 1000  # S3's limit of a deletion
UPLOADS_AT_ONCE = 4
PASSING = (aws.HTTPClientError, aws.ConnectionError, aws.IncompleteReadError, aws.CredentialRetrievalError)
PASSING_CODES = (
    "InternalError",
    "NoSuchUpload",
    "RequestTimeout",
    "SlowDown",
    "Throttl",
    "TooManyRequests",
    "429",
    "409",
)
MISSING_CODES = ("404", "NoSuchKey", "NotFound")
CHANGED_CODES = ("412", "PreconditionFailed")
SECRETS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")

_log = logging.getLogger(__name__)


def client(patience_s: float) -> Any:
    """A boto3 client by the AWS_* environment, of timeouts and attempts that leave patience to `S3`."""
    return boto3.session.Session().client(
        "s3",
        config=Config(
            connect_timeout=CONNECT_TIMEOUT_S,
            read_timeout=min(SILENCE_TIMEOUT_S, max(1.0, patience_s)),
            retries={"mode": "standard", "total_max_attempts": ATTEMPTS_A_REQUEST},
        ),
    )


@dataclass(frozen=True)
class S3:
    """The keys of a bucket below a prefix; every call is tried again while its failure may pass."""

    client: Any
    bucket: str
    prefix: str
    patience_s: float

    def has(self, name: str) -> bool:
        try:
            self._head(name)
        except FileNotFoundError:
            return False
        return True

    def names(self) -> set[str]:
        pages = self._pages(Delimiter="/")
        folders = {item["Prefix"] for page in pages for item in page.get("CommonPrefixes", ())}
        files = {item["Key"] for page in pages for item in page.get("Contents", ())}
        return {key.removeprefix(self.prefix).strip("/") for key in folders | files} - {""}

    def sizes(self) -> dict[str, int]:
        found = {item["Key"]: item["Size"] for page in self._pages() for item in page.get("Contents", ())}
        return {key.removeprefix(self.prefix): size for key, size in found.items() if not key.endswith("/")}

    def versions(self) -> dict[str, str]:
        found = {item["Key"]: item["ETag"] for page in self._pages() for item in page.get("Contents", ())}
        return {key.removeprefix(self.prefix): etag for key, etag in found.items() if not key.endswith("/")}

    def version(self, name: str) -> str:
        return str(self._head(name)["ETag"])

    def parts(self, name: str) -> Iterator[bytes]:
        """A file's bytes in order, of one version of it; what is lost of a large one does not repeat the rest."""
        size_bytes, version, data = self._retried("read", name, lambda: self._beginning(name))
        yield data
        for start in range(len(data), size_bytes, PART_BYTES):
            yield self._range(name, version, start, min(PART_BYTES, size_bytes - start))

    def open(self, name: str) -> pa.NativeFile:
        head = self._head(name)
        return pa.PythonFile(_Ranges(head["ContentLength"], partial(self._range, name, head["ETag"])), mode="r")

    def write(self, name: str, data: bytes) -> None:
        self._retried("write", name, lambda: self._object("put_object", name, Body=data))

    def read_version(self, name: str) -> tuple[bytes, str]:
        """A small file's bytes and version; `FileNotFoundError` where there is none."""
        _, version, data = self._retried("read", name, lambda: self._beginning(name))
        return data, version

    def write_version(self, name: str, data: bytes, over: str) -> str:
        """Write a file over its version `over` ('' where there must be none); returns the new version.

        `VersionChanged` where the file has another version, or one appeared. It also comes where this very write
        arrived, its answer was lost, and the storage was asked again: see what the file holds then.
        """
        condition = {"IfMatch": over} if over else {"IfNoneMatch": "*"}

        def write() -> str:
            try:
                return str(self._object("put_object", name, Body=data, **condition)["ETag"])
            except aws.ClientError as error:
                if _code(error) in CHANGED_CODES or (over and _code(error) in MISSING_CODES):
                    raise VersionChanged(name) from None
                if _code(error) == "NotImplemented":
                    raise ConditionsRefused(f"{REMOTE}{self.bucket} knows no conditional writes") from None
                raise

        return self._retried("write", name, write)

    def put(self, source: Path, name: str) -> None:
        transfer = TransferConfig(
            multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES, max_concurrency=UPLOADS_AT_ONCE
        )

        def put() -> None:
            with source.open("rb") as file:
                self.client.upload_fileobj(file, self.bucket, self.prefix + name, Config=transfer)

        self._retried("upload", name, put)

    def remove(self, name: str) -> None:
        self._retried("remove", name, lambda: self._object("delete_object", name))

    def delete(self) -> None:
        keys = [item["Key"] for page in self._pages() for item in page.get("Contents", ())]
        for start in range(0, len(keys), KEYS_A_REQUEST):
            self._retried("delete", "", partial(self._delete, keys[start : start + KEYS_A_REQUEST]))

    def _delete(self, keys: list[str]) -> None:
        found = self.client.delete_objects(
            Bucket=self.bucket, Delete={"Objects": [{"Key": key} for key in keys], "Quiet": True}
        )
        for problem in found.get("Errors", ()):
            raise aws.ClientError({"Error": problem}, "DeleteObjects")

    def _beginning(self, name: str) -> tuple[int, str, bytes]:
        """Size and version of a file, and all its bytes unless it is large."""
        answer = self._object("get_object", name)
        with closing(answer["Body"]) as body:
            size_bytes = int(answer["ContentLength"])
            return size_bytes, str(answer["ETag"]), body.read() if size_bytes <= PART_BYTES else b""

    def _range(self, name: str, version: str, start: int, count: int) -> bytes:
        which = {"Range": f"bytes={start}-{start + count - 1}", "IfMatch": version}
        return self._retried("read", name, lambda: self._object("get_object", name, **which)["Body"].read())

    def _head(self, name: str) -> dict[str, Any]:
        return self._retried("look for", name, lambda: self._object("head_object", name))

    def _object(self, operation: str, name: str, **arguments: Any) -> Any:
        return getattr(self.client, operation)(Bucket=self.bucket, Key=self.prefix + name, **arguments)

    def _pages(self, **arguments: Any) -> list[dict[str, Any]]:
        listing = self.client.get_paginator("list_objects_v2")
        pages = listing.paginate(Bucket=self.bucket, Prefix=self.prefix, **arguments)
        return self._retried("list", "", lambda: list(pages))

    def _retried(self, what: str, name: str, call: Callable[[], T]) -> T:
        """`FileNotFoundError` where there is no such key; errors of this machine as they are."""
        uri = f"{REMOTE}{self.bucket}/{self.prefix}{name}"
        started_s, wait_s, tries = time.monotonic(), FIRST_WAIT_S, 0
        while True:
            try:
                return call()
            except (aws.BotoCoreError, aws.ClientError) as error:
                if _code(error) in MISSING_CODES:
                    raise FileNotFoundError(uri) from None
                cause, passes, tries = _without_secrets(str(error)), _may_pass(error), tries + 1
            spent_s = time.monotonic() - started_s
            if spent_s >= self.patience_s or not passes:
                raise StorageError(f"could not {what} {uri} ({tries} tries in {spent_s:.1f} s): {cause}")
            left_s = self.patience_s - spent_s
            _log.warning("could not %s %s (try %d); goes on for %.0f s: %s", what, uri, tries, left_s, cause)
            time.sleep(min(left_s, wait_s * secrets.SystemRandom().uniform(0.5, 1.0)))
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)


def _code(error: Exception) -> str:
    return str(error.response.get("Error", {}).get("Code", "")) if isinstance(error, aws.ClientError) else ""


def _may_pass(error: Exception) -> bool:
    if not isinstance(error, aws.ClientError):
        return isinstance(error, PASSING)
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return status >= 500 or any(word in _code(error) for word in PASSING_CODES)


def _without_secrets(text: str) -> str:
    for secret in filter(None, map(os.environ.get, SECRETS)):
        text = text.replace(secret, "***")
    return text


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
