"""Prompts: one form for one prompt, read from any of three kinds of file, seen in an order of (seed, epoch)."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diagonal.data.prompts import distinct, epoch_order, load_prompts, normalise, prompt_id, samples
from diagonal.errors import FieldError


def test_white_space_and_composition_do_not_make_another_prompt() -> None:
    assert normalise("  a\tred \n café ") == "a red café" == normalise("a red cafe\u0301")
    assert prompt_id("a  red café") == prompt_id(" a red cafe\u0301") != prompt_id("a red cafe")
    assert len(prompt_id("a")) == 16


def test_an_id_never_changes() -> None:
    assert prompt_id("a red circle") == "a1e4a280d27cad5b"


def test_distinct_keeps_the_first_order_and_drops_empty_prompts() -> None:
    assert distinct(["b", " a ", "", "b ", " \n", "a", "c"]) == ["b", "a", "c"]


def write(folder: Path, suffix: str, prompts: list[str]) -> str:
    path = folder / f"prompts{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.table({"id": list(range(len(prompts))), "prompt": prompts}), path)
    elif suffix == ".jsonl":
        path.write_text("\n".join(json.dumps({"prompt": p, "x": 1}, ensure_ascii=False) for p in prompts) + "\n\n")
    else:
        path.write_text("\n".join(prompts) + "\n")
    return str(path)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_any_kind_of_file_gives_its_distinct_prompts(suffix: str, tmp_path: Path) -> None:
    uri = write(tmp_path, suffix, ["a  red circle", "ein blaues Dreieck", "a red circle", "一个红色的圆"])
    assert load_prompts(uri) == ["a red circle", "ein blaues Dreieck", "一个红色的圆"]
    assert load_prompts(f"file://{uri}") == load_prompts(uri)


def test_a_line_separator_inside_a_json_text_does_not_end_the_line(tmp_path: Path) -> None:
    assert load_prompts(write(tmp_path, ".jsonl", ["a\u2028red\u0085circle", "b"])) == ["a red circle", "b"]


def test_a_byte_order_mark_and_windows_line_ends_are_no_part_of_a_prompt(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes(b"\xef\xbb\xbfa red circle\r\na blue square\r\n")
    assert load_prompts(str(tmp_path / "p.txt")) == ["a red circle", "a blue square"]


@pytest.mark.parametrize(
    ("line", "place"), [("{", "line 2"), ('{"text": "a"}', "line 2"), ('"a"', "line 2"), ('{"prompt": null}', "line 2"),
                        ('{"prompt": 5}', "line 2")],
)  # fmt: skip
def test_a_line_that_holds_no_prompt_is_refused_by_its_number(line: str, place: str, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n' + line + "\n")
    with pytest.raises(FieldError, match=f"p.jsonl, {place} = "):
        load_prompts(str(tmp_path / "p.jsonl"))


def test_a_table_without_prompts_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "p.parquet")
    with pytest.raises(FieldError, match='p.parquet.*column "prompt"'):
        load_prompts(str(tmp_path / "p.parquet"))
    (tmp_path / "p.parquet").write_bytes(b"text")
    with pytest.raises(FieldError, match="p.parquet.*a Parquet file"):
        load_prompts(str(tmp_path / "p.parquet"))
    pq.write_table(pa.table({"prompt": ["a", None]}), tmp_path / "p.parquet")
    with pytest.raises(FieldError, match="p.parquet, row 1 = None"):
        load_prompts(str(tmp_path / "p.parquet"))


def test_a_missing_an_empty_and_an_unknown_file_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(FieldError, match="prompts = .*nowhere.txt': allowed is a file that exists"):
        load_prompts(str(tmp_path / "nowhere.txt"))
    with pytest.raises(FieldError, match="at least one prompt"):
        load_prompts(write(tmp_path, ".txt", ["", "  "]))
    (tmp_path / "p.txt").write_bytes(b"caf\xe9")
    with pytest.raises(FieldError, match="p.txt.*a text in UTF-8"):
        load_prompts(str(tmp_path / "p.txt"))
    with pytest.raises(FieldError, match=r"prompts = 'p.csv': allowed is a file ending in one of"):
        load_prompts("p.csv")


def test_an_epoch_is_a_permutation_of_seed_and_epoch_alone() -> None:
    assert sorted(epoch_order(50, 1, 0)) == list(range(50))
    assert epoch_order(50, 1, 0) == epoch_order(50, 1, 0)
    assert len({tuple(epoch_order(50, seed, epoch)) for seed in (1, 2) for epoch in (0, 1)}) == 4


def test_samples_may_be_taken_up_anywhere() -> None:
    whole = list(samples(7, 3, 0, 30))
    assert [sample for sample, _ in whole] == list(range(30))
    assert [index for _, index in whole[7:14]] == epoch_order(7, 3, 1)
    for start in (1, 6, 7, 20):
        assert list(samples(7, 3, start, 30)) == whole[start:]
    assert list(samples(7, 3, 5, 5)) == []
