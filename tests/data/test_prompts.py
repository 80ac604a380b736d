"""Prompts: one form for one prompt, read from any of three kinds of file, seen in an order of (seed, epoch)."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diagonal.data.prompt_files import PIECE_BYTES, SetAside, read_prompts
from diagonal.data.prompts import SeenIds, epoch_order, is_held_out, prompt_id, samples
from diagonal.errors import FieldError
from diagonal.model.text import clean_prompt
from tests.hub import SmallHub


def test_white_space_and_composition_do_not_make_another_prompt() -> None:
    assert clean_prompt("  a\tred \n café ") == "a red café" == clean_prompt("a red cafe\u0301")
    assert prompt_id("a  red café") == prompt_id(" a red cafe\u0301") != prompt_id("a red cafe")
    assert len(prompt_id("a")) == 16


def test_an_id_never_changes() -> None:
    assert prompt_id("a red circle") == "a1e4a280d27cad5b"


def read(uri: str) -> list[str]:
    return list(read_prompts(uri))


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
def test_any_kind_of_file_gives_its_prompts(suffix: str, tmp_path: Path) -> None:
    prompts = ["a  red circle", "ein blaues Dreieck", "a red circle", "一个红色的圆"]
    uri = write(tmp_path, suffix, prompts)
    assert [prompt for prompt in read(uri) if prompt] == prompts
    assert read(f"file://{uri}") == read(uri)


def test_a_folder_is_read_file_by_file_in_the_order_of_names(tmp_path: Path) -> None:
    for name, prompt in (("b.txt", "second"), ("a.jsonl", json.dumps({"prompt": "first"})), ("c.md", "not read")):
        (tmp_path / name).write_text(prompt)
    assert read(str(tmp_path)) == ["first", "second"]
    (tmp_path / "a.jsonl").write_text("[")
    with pytest.raises(FieldError, match=f"{tmp_path}/a.jsonl, line 1 = "):
        read(str(tmp_path))


@pytest.mark.slow
def test_a_file_on_s3_is_read_in_pieces(bucket: str, s3_server: Any, tmp_path: Path) -> None:
    lines = [f"{number} " + "x" * 1000 for number in range(2 * PIECE_BYTES // 1000)]
    s3_server.client().upload_file(write(tmp_path, ".txt", lines), bucket, "deep/p.txt")
    s3_server.client().upload_file(write(tmp_path, ".parquet", lines), bucket, "deep/p.parquet")
    assert read(f"s3://{bucket}/deep/p.txt") == lines == read(f"s3://{bucket}/deep/p.parquet")
    with pytest.raises(FieldError, match="prompts = 's3://.*/none.txt': allowed is a file that exists"):
        read(f"s3://{bucket}/deep/none.txt")


def test_prompts_of_any_number_are_read_in_the_memory_of_a_piece(tmp_path: Path) -> None:
    path, line = tmp_path / "p.txt", b"x" * 999 + b"\n"
    path.write_bytes(line * 60_000)
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_prompts(str(path))) == 60_000
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 8 * PIECE_BYTES < path.stat().st_size / 6


def test_lines_are_whole_wherever_a_piece_ends(tmp_path: Path) -> None:
    lines = ["é" * (PIECE_BYTES // 4 - 3), "b", "一" * (PIECE_BYTES // 4), "", "c"]
    (tmp_path / "p.txt").write_text("\n".join(lines))
    assert read(str(tmp_path / "p.txt")) == lines


def test_a_line_without_end_is_refused_by_its_number(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes(b"a\n" + b"x" * (3 * PIECE_BYTES))
    with pytest.raises(FieldError, match=r"p.txt, line 2 = .*at most 1048576 bytes"):
        read(str(tmp_path / "p.txt"))


def test_a_line_separator_inside_a_json_text_does_not_end_the_line(tmp_path: Path) -> None:
    found = read(write(tmp_path, ".jsonl", ["a\u2028red circle", "b"]))
    assert [clean_prompt(prompt) for prompt in found if prompt] == ["a red circle", "b"]


def test_a_byte_order_mark_and_windows_line_ends_are_no_part_of_a_prompt(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes(b"\xef\xbb\xbfa red circle\r\na blue square\r\n")
    found = read(str(tmp_path / "p.txt"))
    assert [clean_prompt(prompt) for prompt in found if prompt] == ["a red circle", "a blue square"]


@pytest.mark.parametrize(
    ("line", "place"),
    [
        ("{", "line 2"),
        ('{"other": "a"}', "line 2"),
        ('{"prompt": null}', "line 2"),
        ('{"prompt": 5}', "line 2"),
        ('{"prompt": "\\ud800"}', "line 2"),
    ],
)
def test_a_line_that_holds_no_prompt_is_refused_by_its_number(line: str, place: str, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n' + line + "\n")
    with pytest.raises(FieldError, match=f"p.jsonl, {place} = "):
        read(str(tmp_path / "p.jsonl"))


def test_a_table_without_prompts_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"other": ["a"]}), tmp_path / "p.parquet")
    with pytest.raises(FieldError, match=r"p.parquet.*a column prompt.*there are \['other'\] \(prompts.field\)"):
        read(str(tmp_path / "p.parquet"))
    (tmp_path / "p.parquet").write_bytes(b"text")
    with pytest.raises(FieldError, match="p.parquet.*a Parquet file that can be read"):
        read(str(tmp_path / "p.parquet"))
    pq.write_table(pa.table({"prompt": ["a", None]}), tmp_path / "p.parquet")
    with pytest.raises(FieldError, match="p.parquet, row 1 = None"):
        read(str(tmp_path / "p.parquet"))


def test_a_missing_an_empty_and_an_unknown_file_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(FieldError, match="prompts = .*nowhere.txt': allowed is a file that exists"):
        read(str(tmp_path / "nowhere.txt"))
    with pytest.raises(FieldError, match="prompts = '': allowed is a file that exists"):
        read("")
    (tmp_path / "p.txt").write_bytes(b"a\ncaf\xe9")
    with pytest.raises(FieldError, match="p.txt, line 2 = .*a text in UTF-8"):
        read(str(tmp_path / "p.txt"))
    (tmp_path / "p.md").write_text("a")
    with pytest.raises(FieldError, match=r"prompts = .*p.md': allowed is a file ending in one of"):
        read(str(tmp_path / "p.md"))


VIDPROM = 'uuid,prompt,time,toxicity\nu1,"a red, round\ncircle",2023,0.1\nu2,"say ""hi""",2023,0.2\n'
LAYOUTS = {
    "vidprom.csv": (VIDPROM.encode(), ["a red, round\ncircle", 'say "hi"']),
    "vidprom.txt": (b'uuid\tprompt\ttime\nu1\ta red "circle\t2023\nu2\tb\t2023\n', ['a red "circle', "b"]),
    "list.TXT.gz": (gzip.compress(b"a\nb\n", mtime=0) + gzip.compress(b"c\n"), ["a", "b", "c"]),
    "list.jsonl.gz": (gzip.compress(b'{"caption": "a"}\n"b"\n', mtime=0), ["a", "b"]),
    "wide.txt": ("a café\nb\n".encode("utf-16"), ["a café", "b"]),
    "wide.csv": ("prompt,x\na,1\n".encode("utf-16"), ["a"]),
    "object.json": (b'{"version": 1, "prompts": ["a", {"prompt": "b"}]}', ["a", "b"]),
    "named.json": (b'{"items": [{"caption": "a"}]}', ["a"]),
    "array.json": (b'[\n"a",\n"b"\n]', ["a", "b"]),
    "caption.jsonl": (b'{"caption": "a", "id": 1}\n', ["a"]),
    "brackets.txt": (b"[wide shot] a cat\n{red} dog\n", ["[wide shot] a cat", "{red} dog"]),
    "tabs.txt": (b"a cat\tsits\n", ["a cat\tsits"]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_prompts_are_read_as_they_lie_about(name: str, tmp_path: Path) -> None:
    data, prompts = LAYOUTS[name]
    (tmp_path / name).write_bytes(data)
    assert [prompt for prompt in read(str(tmp_path / name)) if prompt] == prompts


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_the_field_of_prompts_may_be_named(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"p{suffix}"
    rows = {"prompt": ["wrong"], "long_caption": ["right"]}
    if suffix == ".parquet":
        pq.write_table(pa.table(rows), path)
    else:
        path.write_text(
            "prompt,long_caption\nwrong,right\n" if suffix == ".csv" else json.dumps({k: v[0] for k, v in rows.items()})
        )
    assert list(read_prompts(str(path), named="long_caption")) == ["right"]
    with pytest.raises(FieldError, match=r"absent.*(there are|long_caption)|long_caption.*absent"):
        list(read_prompts(str(path), named="absent"))


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("p.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n", "a Git LFS pointer"),
        ("p.csv", b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n", "a Git LFS pointer"),
        ("p.txt", b"<!DOCTYPE html>\n<html><body>404</body></html>", "a page of HTML"),
        ("p.txt", b"PK\x03\x04 and more", "a zip archive"),
        ("p.txt", gzip.compress(b"a", mtime=0), "gzipped: its name ends in .gz"),
        ("p.txt", b"../data/vidprom_filtered_extended.txt", "the text of a link"),
        ("p.txt", b"/mnt/data/prompts", "the text of a link"),
        ("p.txt", b'{\n  "prompts": ["a"]\n}', "JSON"),
        ("p.txt", b'{"prompt": "a"}\n{"prompt": "b"}\n', "JSON"),
        ("p.txt", b"a\0b\0", "no text"),
        ("p.txt.gz", gzip.compress(b"a" * 99999, mtime=0)[:60], "a file that can be read"),
        ("p.json", b'{"a": 1}', "a list of prompts"),
        ("p.json", b'["a",', "JSON"),
    ],
)
def test_what_is_no_list_of_prompts_is_refused_by_name(name: str, data: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(FieldError, match=f"{name}.*{said}"):
        read(str(tmp_path / name))


def test_bad_rows_are_set_aside_up_to_a_share(tmp_path: Path) -> None:
    lines = [json.dumps({"prompt": f"prompt {number}"}) for number in range(98)]
    (tmp_path / "p.jsonl").write_text("\n".join([*lines[:50], '{"prompt": null}', "{", *lines[50:]]))
    aside = SetAside(0.02)
    assert len(list(read_prompts(str(tmp_path / "p.jsonl"), aside=aside))) == 98
    assert (aside.read, aside.count) == (100, 2) and "p.jsonl, line 51 = None" in aside.first[0]
    with pytest.raises(FieldError, match=r"rows without a prompt = 2: .*0.01 of the rows.*line 51.*line 52"):
        list(read_prompts(str(tmp_path / "p.jsonl"), aside=SetAside(0.01)))


def test_a_data_set_of_the_hub_is_read_by_its_id(hub: SmallHub) -> None:
    hub.add("datasets/org/prompts", {"a.csv": b"prompt\na\n", "README.md": b"# card"})
    assert read("org/prompts") == read("hf://datasets/org/prompts/a.csv") == ["a"]


def test_an_epoch_is_a_permutation_of_seed_and_epoch_alone() -> None:
    assert sorted(epoch_order(50, 1, 0).tolist()) == list(range(50))
    assert epoch_order(50, 1, 0).tolist() == epoch_order(50, 1, 0).tolist()
    assert len({tuple(epoch_order(50, seed, epoch).tolist()) for seed in (1, 2) for epoch in (0, 1)}) == 4


def test_samples_may_be_taken_up_anywhere() -> None:
    whole = list(samples(7, 3, 0, 30))
    assert [sample for sample, _ in whole] == list(range(30))
    assert [index for _, index in whole[7:14]] == epoch_order(7, 3, 1).tolist()
    for start in (1, 6, 7, 20):
        assert list(samples(7, 3, start, 30)) == whole[start:]
    assert list(samples(7, 3, 5, 5)) == []


def test_a_prompt_is_held_out_by_its_id_alone_and_stays_so_in_a_larger_share() -> None:
    ids = [prompt_id(str(number)) for number in range(20_000)]
    few, more = ({i for i in ids if is_held_out(i, share)} for share in (0.01, 0.1))
    assert few < more
    assert abs(len(few) / len(ids) - 0.01) < 0.003 and abs(len(more) / len(ids) - 0.1) < 0.01
    assert not any(is_held_out(i, 0.0) for i in [*ids, "0" * 16])
    assert is_held_out("0" * 16, 0.01) and not is_held_out("f" * 16, 0.99)


def test_an_id_is_new_once(tmp_path: Path) -> None:
    drawn = np.random.default_rng(0).integers(0, 5000, 20_000).astype(np.uint64)
    seen, fresh = SeenIds(), []
    for part in np.array_split(drawn, 37):
        fresh += seen.add(part).tolist()
    known: set[int] = set()
    expected = [not (number in known or known.add(number)) for number in drawn.tolist()]  # type: ignore[func-returns-value]
    assert fresh == expected
    assert seen.add(np.array([], dtype=np.uint64)).tolist() == []
