"""Repositories on the Hugging Face hub, read through `huggingface_hub`: its cache, token, endpoint and offline mode."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote

import pyarrow as pa
from huggingface_hub import CommitOperationAdd, HfApi, HfFileSystem, hf_hub_download, snapshot_download
from huggingface_hub import errors as hub_errors
from huggingface_hub.constants import is_offline_mode

from diagonal.errors import FieldError
from diagonal.storage.disk import PART_BYTES, Disk
from diagonal.storage.remote import HUB, StorageError

T = TypeVar("T")
_URI = re.compile(r"(?:(?P<kind>datasets|models)/)?(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?(?:/(?P<path>.*))?")
_ALLOWED = (
    "hf://org/name, hf://org/name@revision/sub/folder, or hf://datasets/org/name/file of a repository that exists"
)
_ABSENT = (
    hub_errors.RepositoryNotFoundError,
    hub_errors.RevisionNotFoundError,
    hub_errors.RemoteEntryNotFoundError,
    hub_errors.HFValidationError,
)


@dataclass(frozen=True)
class Place:
    """A repository at a revision (None is its main branch), and a path inside; `kind` is model or dataset."""

    kind: str
    repo: str
    revision: str | None
    path: str

    @classmethod
    def of(cls, uri: str) -> Place:
        """`FieldError` when the URI names no repository."""
        match = _URI.fullmatch(uri.removeprefix(HUB).rstrip("/"))
        if match is None:
            raise FieldError("hub", uri, _ALLOWED)
        kind, revision = (match["kind"] or "models").removesuffix("s"), match["revision"]
        return cls(kind, match["repo"], unquote(revision) if revision else None, match["path"] or "")

    @property
    def query(self) -> dict[str, Any]:
        """What every function of the library takes."""
        return {"repo_id": self.repo, "repo_type": self.kind, "revision": self.revision}


class Hub:
    """The files below a path of a repository, for reading; `FieldError` when there is no such repository."""

    def __init__(self, uri: str) -> None:
        self._uri, self._place = uri, Place.of(uri)
        self._known = _in_cache(uri) if is_offline_mode() else None

    def has(self, name: str) -> bool:
        return name in self.sizes()

    def names(self) -> set[str]:
        return {name.split("/", 1)[0] for name in self.sizes()}

    def sizes(self) -> dict[str, int]:
        if self._known is not None:
            return self._known.sizes()
        return {name: size for name, (size, _) in listing(self._uri).items()}

    def versions(self) -> dict[str, str]:
        if self._known is not None:
            return self._known.versions()
        return {name: version for name, (_, version) in listing(self._uri).items()}

    def version(self, name: str) -> str:
        found = self.versions()
        if name not in found:
            raise FileNotFoundError(f"{self._uri}/{name}")
        return found[name]

    def parts(self, name: str) -> Iterator[bytes]:
        with self.open(name) as file:
            while part := file.read(PART_BYTES):
                yield part

    def open(self, name: str) -> pa.NativeFile:
        if self._known is not None:
            return self._known.open(name)
        if not self.has(name):
            raise FileNotFoundError(f"{self._uri}/{name}")
        path = f"{self._uri.removeprefix(HUB).removeprefix('models/').rstrip('/')}/{name}"
        files = HfFileSystem(skip_instance_cache=True)
        return pa.PythonFile(answered(self._uri, lambda: files.open(path, "rb")), mode="r")


def listing(uri: str) -> dict[str, tuple[int, str]]:
    """Bytes and git hash of every file below a hub URI, by path relative to it."""
    place = Place.of(uri)
    info = answered(uri, lambda: HfApi().repo_info(**place.query, files_metadata=True))
    start = f"{place.path}/" if place.path else ""
    found = {file.rfilename: (file.size or 0, file.blob_id or "") for file in getattr(info, "siblings", None) or ()}
    return {name.removeprefix(start): about for name, about in found.items() if name.startswith(start)}


def download(uri: str, patterns: Sequence[str]) -> Path:
    """A local folder with the files below a hub URI that match: the library's own snapshot, whole, of one commit."""
    place = Place.of(uri)
    start = f"{place.path}/" if place.path else ""
    wanted = [start + pattern for pattern in patterns]
    folder = Path(answered(uri, lambda: snapshot_download(**place.query, allow_patterns=wanted))) / place.path
    if not folder.is_dir() or not any(path.is_file() for path in folder.rglob("*")):
        raise FieldError("hub", uri, f"{_ALLOWED}, with files that are read here: {', '.join(patterns)}")
    return folder


def download_file(uri: str) -> Path:
    """A local copy of the one file that a hub URI names."""
    place = Place.of(uri)
    return Path(answered(uri, lambda: hf_hub_download(filename=place.path, **place.query)))


def upload(files: Mapping[str, Path | bytes], repo: str) -> str:
    """Write files into a model repository in one commit; a new one is private. Returns the commit's URL."""
    api = HfApi()
    added = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=data) for name, data in files.items()]

    def commit() -> str:
        api.create_repo(repo, private=True, exist_ok=True)
        return str(api.create_commit(repo, added, commit_message="Upload a release").commit_url)

    return answered(f"{HUB}{repo}", commit)


def _in_cache(uri: str) -> Disk:
    """The newest snapshot that is here, whichever of its files are."""
    place = Place.of(uri)
    here = answered(uri, lambda: snapshot_download(**place.query, local_files_only=True, allow_patterns=[]))
    return Disk(Path(here) / place.path)


def answered(uri: str, call: Callable[[], T]) -> T:
    """What the hub answers; `FieldError` for what it does not have or show, `StorageError` when it does not answer."""
    try:
        return call()
    except hub_errors.GatedRepoError as error:
        raise FieldError("hub", uri, "a repository whose terms this token's account accepted (HF_TOKEN)") from error
    except _ABSENT as error:
        cause = str(error).strip().splitlines()[0]
        raise FieldError("hub", uri, f"{_ALLOWED}; a private one needs HF_TOKEN ({cause})") from error
    except (hub_errors.HfHubHTTPError, hub_errors.LocalEntryNotFoundError, OSError) as error:
        raise StorageError(f"no answer for {uri}: {' '.join(str(error).split())[:400]}") from error
    except Exception as error:  # edge: the hub's HTTP library has errors of its own, for a network that is not there
        raise StorageError(f"no answer for {uri}: {type(error).__name__}: {error}") from error
