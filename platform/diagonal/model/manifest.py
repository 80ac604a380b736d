"""A release's manifest: what it says of the folder it lies in, and whether the folder is as it says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from diagonal.errors import FieldError
from diagonal.files import file_hash
from diagonal.jsonfile import read_json

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SAFE_SUFFIXES = (".safetensors", ".json", ".txt", ".model", ".md")  # of a release's files: none of them runs code
PIPELINE = "pipeline.py"  # the one file of code that a release may hold, with this very text
PIPELINE_CODE = "from diagonal.pipeline import DiagonalPipeline as DiagonalPipeline\n"


class ReleaseError(RuntimeError):
    """A release that must not be served: files missing or changed, of another format, or not promoted."""


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a release folder; `ReleaseError` when there is none that can be served."""
    try:
        manifest = read_json(folder / MANIFEST)
    except FieldError as error:
        raise ReleaseError(f"release {folder}: {error}; jobs/export.py writes one") from error
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise ReleaseError(f"release {folder}: format_version = {version!r}, allowed is {FORMAT_VERSION}")
    missing = [name for name in ("name", "files", "scores") if name not in manifest]
    if missing:
        raise ReleaseError(f"release {folder}: {MANIFEST} has no {missing}; allowed is one that jobs/export.py wrote")
    return dict(manifest)


def check_files(folder: Path, files: Mapping[str, Any]) -> None:
    """`ReleaseError` unless a folder holds these files, unchanged by hash, and no others but its manifest.

    None may lie outside of it, whatever name or link says so, and each is of a kind that runs no code: no pickles.
    The one exception is `pipeline.py` with the line that `write_pipeline_index` writes.
    """
    there = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() or path.is_symlink()}
    hidden = {name for name in there if PurePosixPath(name).name.startswith(".")}
    for name in sorted({*there, *files} - hidden - {MANIFEST}):
        if not name.endswith(SAFE_SUFFIXES) and not _is_pipeline(folder, name):
            raise ReleaseError(f"release {folder}: {name!r} could run code: allowed are {', '.join(SAFE_SUFFIXES)}")
        if name not in files:
            raise ReleaseError(f"release {folder}: {name!r} is not in {MANIFEST}")
    roots = _roots(folder.resolve())
    for name, expected in files.items():
        path = folder / name
        if ".." in PurePosixPath(name).parts or not any(map(path.resolve().is_relative_to, roots)):
            raise ReleaseError(f"release {folder}: {name!r} lies outside of it")
        if not path.is_file() or file_hash(path) != expected["sha256"]:
            raise ReleaseError(f"release {folder}: {name} is missing or differs from its sha256 in {MANIFEST}")


def _roots(folder: Path) -> list[Path]:
    """Where a release's files may lie: in its folder; of a snapshot of the hub, also in its repository's own cache."""
    snapshot = next((path for path in (folder, *folder.parents) if path.parent.name == "snapshots"), None)
    return [folder, *([snapshot.parent.parent / "blobs"] if snapshot else [])]


def _is_pipeline(folder: Path, name: str) -> bool:
    return name == PIPELINE and (folder / name).is_file() and (folder / name).read_bytes() == PIPELINE_CODE.encode()


def check_promoted(manifest: Mapping[str, Any], where: str) -> None:
    """`ReleaseError`, with the reasons that a release's manifest gives, unless it says that it was promoted."""
    if manifest.get("promoted") is True:
        return
    judged = "it was judged and not promoted" if manifest.get("promoted") is False else "nobody judged it"
    reasons = "; ".join(str(reason) for reason in manifest.get("promotion_reasons", ()))
    raise ReleaseError(
        f"release {manifest['name']} in {where} is not promoted: {reasons or judged}. Promote it with `python -m "
        "jobs.promote RELEASE --reason ...`, or serve it all the same with allow_unpromoted: true"
    )
