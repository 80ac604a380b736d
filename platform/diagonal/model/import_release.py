"""A public student as a release: its weights under a base model's codec and text, sampled by its own recipe."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diagonal.config import Config
from diagonal.config.recipes import Recipe
from diagonal.errors import require
from diagonal.model.base_model import FAST_DECODER, base_folder, lineage_name, load_fast_decoder, save_student
from diagonal.model.import_checkpoints import load_initial_student
from diagonal.model.release import Release, write_release
from diagonal.model.student_files import hashes
from diagonal.model.taehv import write_taehv

IMPORTED = "student"  # the stage of a lineage that others trained


def import_release(
    target: Path,
    student: Path,
    config: Config,
    recipe: Recipe,
    names: Mapping[str, Any],
    adapters: Sequence[Path] = (),
    decoder: Path | None = None,
) -> Release:
    """Write the release of a student that others trained, whole or not at all; nothing is trained.

    `config` names the base model, `decoder` a TAEHV file that becomes the fast decoder; `names` is what the lineage
    says of the student beside its hash and the recipe.
    Errors as `load_initial_student` and `write_release`.
    """
    require(not target.exists(), "--out", str(target), "a folder that does not exist yet")
    base = base_folder(config)
    network = load_initial_student(student, base, config, adapters)
    files = hashes(student) if not (student / "transformer").is_dir() else {}
    for file in (*adapters, *([decoder] if decoder else [])):
        files |= hashes(file)
    lineage = {"parent": lineage_name(base), **names, "sha256": files, "source": recipe.source}
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        folder = Path(scratch) / "student"
        save_student(folder, config, network.config, network.state_dict(), lineage)
        if decoder is not None:
            write_taehv(decoder, folder / FAST_DECODER)
            load_fast_decoder(folder, config)  # refuses one of another geometry
        return write_release(
            target, name=target.name, student=folder, base=base, lineage={IMPORTED: lineage}, scores={}
        )
