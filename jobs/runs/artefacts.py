"""Students and releases in a run's folder: written whole, read back through a local copy where the run is remote."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from diagonal.errors import require
from diagonal.files import one_process
from diagonal.model.base_model import LINEAGE, base_uri, check_student, save_student
from diagonal.model.manifest import MANIFEST
from diagonal.model.release import Release, write_release
from diagonal.storage import Folder
from diagonal.storage.fetch import STUDENT_FILES, fetch, fetch_file
from diagonal.storage.remote import HUB, location
from jobs.runs.run import Run

STATEMENT = "statement.md"
STAGE1_STATE = "stage1-state"  # beside a run's stage1/: all that stage 2 inherits


def lineage_of(uri: str) -> str:
    """How lineage names a folder: by its parent and itself (`tiny/base`, `RUN/stage1`), wherever it lies."""
    whole = uri if "://" in uri else str(Path(uri).absolute())
    return "/".join(whole.rstrip("/").split("/")[-2:])


def base_lineage(run: Run) -> str:
    """How lineage names the run's base model."""
    return lineage_of(base_uri(run.config))


def write_student(
    run: Run, stage: str, layout: Mapping[str, Any], weights: Mapping[str, Tensor], lineage: Mapping[str, Any]
) -> None:
    """Write the student of a stage, whole or not at all, with where it comes from."""
    with (run.folder / stage).replaced(last=LINEAGE, check=run.check_lease) as folder:
        save_student(folder, run.config, layout, weights, {"stage": stage, "seed": run.config.seed, **lineage})


def publish_release(run: Run, student: Path, lineage: Mapping[str, Any]) -> None:
    """Write `release/` from a local student folder, whole or not at all; the manifest comes last.

    What its maker states in the run's `statement.md`, if there is one, goes into its card.
    """
    author_notes = run.folder.read(STATEMENT).decode() if run.folder.has(STATEMENT) else ""
    with (run.folder / "release").replaced(last=MANIFEST, check=run.check_lease) as folder:
        folder.rmdir()  # `write_release` makes it
        write_release(
            folder, name=run.name, student=student, base=run.base, lineage=lineage, scores={}, author_notes=author_notes
        )


def promote(
    uri: str, reasons: Sequence[str], promoted: bool = True, scores: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Write the judgement into the manifest of a whole release, and return it; nothing else changes but its scores,
    where new ones are given."""
    Release.load(uri)
    folder = Folder(uri)
    manifest = {**folder.read_json(MANIFEST), "promoted": promoted, "promotion_reasons": list(reasons)}
    manifest = {**manifest, "scores": dict(scores)} if scores else manifest
    folder.write_json(MANIFEST, manifest)
    return manifest


def initial_student(run: Run) -> Path:
    """What stage 1 starts from: a local folder that holds `transformer/`, or a local `.pt`."""
    if run.makes_student:
        return local_copy(run, "ode_init")
    given = run.initial_student
    return fetch_file(given) if given.endswith(".pt") else fetch(given, patterns=STUDENT_FILES)


def inherited_state(run: Run) -> Folder | None:
    """Where the state lies that the run's first student was left with: beside another run's `stage1/`, or nowhere."""
    given = location(run.config.distill.init)
    if not given or given.startswith(HUB) or Folder(given).name != "stage1":
        return None
    folder = Folder(given).parent / STAGE1_STATE
    return folder if folder.children() else None


def local_copy(run: Run, name: str, last: str = LINEAGE) -> Path:
    """A local folder with the run's finished folder `name`, the file `last` of which says that it is whole.

    Itself where the run is local; else downloaded once on each machine. `FieldError` where a student's weights differ
    from the hashes in its lineage. A finished folder never changes, and the copy
    is named after the run's identity, so a later run of the same name has its own.
    """
    folder = run.folder / name
    if folder.is_local:
        check_student(folder.path)
        return folder.path
    require(folder.has(last), "folder", str(folder), f"one that is finished: it holds {last}")
    key = hashlib.sha256(f"{folder} {run.identity}".encode()).hexdigest()[:16]
    target = _cache() / f"{run.name}-{name}-{key}"
    with one_process(target.with_name(f"{target.name}.lock")):
        if not (target / last).is_file():
            files = [file for file in folder.files() if file != last]
            for file in [*files, last]:
                folder.get(file, target / file)
    check_student(target)
    return target


def _cache() -> Path:
    return Path(os.environ.get("DIAGONAL_CACHE") or Path.home() / ".cache" / "diagonal") / "runs"
