"""The prompts that a run keeps: distinct, split by hash, the same however often they are prepared, read in parts."""

from __future__ import annotations

import pickle
import tracemalloc
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from diagonal.data.prompt_set import HELD_OUT, TRAINING, PromptSet, prepare, read_prompt_manifest
from diagonal.data.prompts import is_held_out, prompt_id
from diagonal.errors import FieldError
from diagonal.storage import Folder

MANY = [f"a prompt of number {number}" for number in range(3000)]


def prepared(folder: Path | str, prompts: Iterable[str], share: float = 0.0, **others: Any) -> dict[str, Any]:
    return prepare(Folder(str(folder)), "p.txt", prompts, partial(is_held_out, share=share), **others)


def test_prompts_are_kept_once_in_their_first_order_without_empty_ones(tmp_path: Path) -> None:
    found = prepared(tmp_path, ["b", " a ", "", "b ", " \n", "a", "c"])
    assert list(PromptSet(Folder(str(tmp_path)))) == ["b", "a", "c"]
    counts = {name: found[name] for name in ("read", "empty", "duplicates", "training", "held_out")}
    assert counts == {"read": 7, "empty": 2, "duplicates": 2, "training": 3, "held_out": 0}
    assert found == read_prompt_manifest(Folder(str(tmp_path))) and found["source"] == "p.txt"


def test_the_split_depends_on_a_prompts_id_alone(tmp_path: Path) -> None:
    prepared(tmp_path / "a", MANY, share=0.2)
    prepared(tmp_path / "b", [f"  {text}" for text in reversed(MANY)] + ["another"], share=0.2)
    parts = [{name: set(PromptSet(Folder(str(tmp_path / run)), name)) for name in (TRAINING, HELD_OUT)} for run in "ab"]
    assert parts[0][HELD_OUT] == parts[1][HELD_OUT] - {"another"} == {p for p in MANY if is_held_out(prompt_id(p), 0.2)}
    assert parts[0][TRAINING] == set(MANY) - parts[0][HELD_OUT]


def test_preparing_again_gives_the_same_bytes_and_other_prompts_another_hash(tmp_path: Path) -> None:
    first, second = prepared(tmp_path / "a", MANY, 0.1), prepared(tmp_path / "b", iter(MANY), 0.1)
    third = prepared(tmp_path / "c", [*MANY[1:], MANY[0]], 0.1)
    assert first == second and first["sha256"] != third["sha256"]
    for name in (TRAINING, HELD_OUT):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_plain_pyarrow_reads_ids_and_prompts(tmp_path: Path) -> None:
    prepared(tmp_path, MANY)
    table = pq.read_table(tmp_path / TRAINING)
    assert table["prompt"].to_pylist() == MANY and table["original"].null_count == len(MANY)
    assert table["prompt_id"].to_pylist() == [prompt_id(prompt) for prompt in MANY]


def test_a_set_is_a_sequence_that_gives_any_row_and_travels_by_name(tmp_path: Path) -> None:
    prepared(tmp_path, MANY)
    found = pickle.loads(pickle.dumps(PromptSet(Folder(str(tmp_path)))))
    assert (len(found), found[0], found[-1], found[1023:1026]) == (3000, MANY[0], MANY[-1], MANY[1023:1026])
    assert found.take([2999, 5, 5]) == [(prompt_id(MANY[i]), MANY[i]) for i in (2999, 5, 5)]
    with pytest.raises(IndexError):
        found[3000]


@pytest.mark.slow
def test_a_set_on_s3_is_the_same(bucket: str, tmp_path: Path) -> None:
    uri = f"s3://{bucket}/run/prompts"
    assert prepared(uri, MANY, 0.1) == prepared(tmp_path, MANY, 0.1)
    assert list(PromptSet(Folder(uri))) == list(PromptSet(Folder(str(tmp_path))))
    assert sorted(Folder(uri).files()) == ["held_out.parquet", "manifest.json", "train.parquet"]


def peak_bytes_of(folder: Path, count: int) -> int:
    tracemalloc.start()
    try:
        prepared(folder, (f"{number} " + "x" * 1000 for number in range(count)), 0.1)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.slow
def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    few, many = peak_bytes_of(tmp_path / "a", 5_000), peak_bytes_of(tmp_path / "b", 30_000)
    assert many < few + 2e6  # for 25 MB of text more


def test_prompts_that_leave_none_for_training_are_refused(tmp_path: Path) -> None:
    for prompts in ([], ["", " "]):
        with pytest.raises(FieldError, match="prompts = 'p.txt': allowed is prompts of which at least one"):
            prepared(tmp_path, prompts)
    with pytest.raises(FieldError, match="held_out': 1"):
        prepare(Folder(str(tmp_path)), "p.txt", ["a"], lambda identity: True)
    assert not (tmp_path / "manifest.json").exists()


def test_a_set_of_another_version_is_refused(tmp_path: Path) -> None:
    prepared(tmp_path, MANY)
    pq.write_table(pq.read_table(tmp_path / TRAINING).replace_schema_metadata({}), tmp_path / TRAINING)
    with pytest.raises(FieldError, match="train.parquet schema_version = 'none'"):
        len(PromptSet(Folder(str(tmp_path))))
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(FieldError, match="manifest.json format_version = None"):
        read_prompt_manifest(Folder(str(tmp_path)))


class Doubling:
    """Extends every prompt but those that end in 7."""

    def __init__(self, count: int) -> None:
        self.count, self.asked = count, 0

    def extend(self, prompts: Any) -> list[str | None]:
        self.asked += len(prompts)
        return [None if text.endswith("7") else f"{text} {text}" for _, text in prompts]

    def summary(self) -> dict[str, Any]:
        return {"asked": self.asked, "of": self.count}


def test_an_extended_prompt_keeps_the_id_the_place_and_the_text_of_its_original(tmp_path: Path) -> None:
    found = prepared(tmp_path / "extended", MANY, 0.1, extender=Doubling)
    prepared(tmp_path / "plain", MANY, 0.1)
    assert found["extension"] == {"asked": 3000, "of": 3000}
    for name in (TRAINING, HELD_OUT):
        extended, plain = (pq.read_table(tmp_path / run / name).to_pylist() for run in ("extended", "plain"))
        for new, old in zip(extended, plain, strict=True):
            failed = old["prompt"].endswith("7")
            assert new["prompt_id"] == old["prompt_id"]
            assert new["prompt"] == (old["prompt"] if failed else f"{old['prompt']} {old['prompt']}")
            assert new["original"] == (None if failed else old["prompt"])
