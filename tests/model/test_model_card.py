"""Every release says what it is, what it comes from, and what its user agrees to."""

from __future__ import annotations

from pathlib import Path

from diagonal.config import Config
from diagonal.jsonfile import write_json
from diagonal.model.model_card import NOTHING_STATED, author_notes_of, write_card
from diagonal.model.release import Release, write_release, write_release_with_decoder


def card(release: Release) -> str:
    return (release.folder / "README.md").read_text()


def test_a_release_carries_its_card_and_the_usage_policy_under_their_hashes(release: Release) -> None:
    assert {"README.md", "USAGE.md"} <= set(release.manifest["files"])
    assert "# r1\n" in card(release) and "| stage2 | base |" in card(release) and "$" not in card(release)
    assert release.config.schedule.steps in card(release) and NOTHING_STATED in card(release)
    policy = (release.folder / "USAGE.md").read_text()
    for asked in ("consent", "minors", "marks of origin", "reported"):
        assert asked in policy


def test_the_shipped_release_has_them_too() -> None:
    shipped = Release.load()
    assert {"README.md", "USAGE.md"} <= set(shipped.manifest["files"])
    assert "32 x 32 pixels at 16 frames a second, 0.75 s of video a chunk" in card(shipped)
    assert author_notes_of(card(shipped)).startswith("Trained on drawings")


def test_what_the_maker_states_is_in_the_card_and_stays_in_that_of_a_copy(base: Path, tmp_path: Path) -> None:
    said = "Trained on $1 films of mine.\n\nWrite to ann@example.org."
    made = write_release(
        tmp_path / "own", name="own", student=base, base=base, lineage={}, scores={}, author_notes=f"{said}\n"
    )
    assert author_notes_of(card(made)) == said and "without a lineage" in card(made)
    decoder = tmp_path / "decoder"
    decoder.mkdir()
    write_json(decoder / "lineage.json", {"updates": 3})
    copied = write_release_with_decoder(tmp_path / "fast", made, decoder, made.config)
    assert author_notes_of(card(copied)) == said and "| decoder |  |  | 3 |  |" in card(copied)


def test_a_maker_who_states_nothing_has_stated_nothing(tmp_path: Path) -> None:
    write_card(tmp_path, "r", Config.from_preset("tiny"), {"stage2": {"parent": "x/y", "updates": 5}}, " \n")
    text = (tmp_path / "README.md").read_text()
    assert author_notes_of(text) == "" and "| stage2 | x/y |  | 5 |  |" in text
