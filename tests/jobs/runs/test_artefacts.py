"""What a run publishes: its release with the card, and in it what its maker states."""

from __future__ import annotations

from pathlib import Path

import pytest

from diagonal.errors import FieldError
from diagonal.jsonfile import read_json
from diagonal.model.base_model import LINEAGE, SHA256, embedded, load_causal
from diagonal.model.model_card import author_notes_of
from diagonal.model.release import Release
from jobs.export import export, lineage
from jobs.runs.artefacts import local_copy, publish_release, write_student
from tests.jobs.conftest import OpenRun


def test_a_runs_statement_is_in_the_card_of_its_release(small_run: OpenRun) -> None:
    run = small_run("spoken")
    run.folder.write("statement.md", b"Trained on films of mine.\n")
    publish_release(run, embedded("ode_init"), {"stage2": {"parent": "spoken/stage1"}})
    card = Path(Release.load(str(run.folder / "release")).folder, "README.md").read_text()
    assert author_notes_of(card) == "Trained on films of mine." and "# spoken\n" in card


def test_a_student_that_was_given_is_not_called_the_runs_own_initialisation(small_run: OpenRun) -> None:
    assert set(lineage(small_run("own"))) == {"base", "ode_init"}
    given = lineage(small_run("given", f"distill.init={embedded('ode_init', 'textured')}"))
    told = read_json(embedded("ode_init", "textured") / LINEAGE)
    told.pop(SHA256)  # of files: a card has no use for them
    assert set(given) == {"base", "init"} and given["init"] == told


def test_a_flipped_bit_in_a_students_weights_is_found_before_its_release_is_written(small_run: OpenRun) -> None:
    run = small_run("flipped")
    network = load_causal(embedded("ode_init"), run.config)
    write_student(run, "stage2", network.config, network.state_dict(), {"parent": "flipped/stage1"})
    assert "sha256" not in lineage(run)["stage2"] and local_copy(run, "stage2") == run.folder.path / "stage2"
    weights = run.folder.path / "stage2" / "transformer" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 4
    weights.write_bytes(data)
    with pytest.raises(FieldError, match=r"student = .*diffusion_pytorch_model.safetensors.*sha256.*resume"):
        export(run)
    assert not run.has_release
