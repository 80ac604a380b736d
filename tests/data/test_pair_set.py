"""A folder of pairs: which shards count as finished, what is never mixed, and which rows are never trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diagonal.config import Config
from diagonal.data.pair_set import begin, finish, finished, keep_usable, read_manifest, usable_places, verify
from diagonal.data.stages import ReadPairs
from diagonal.data.trajectory import CorruptRowError, shard_bytes
from diagonal.errors import FieldError
from diagonal.storage import Folder
from tests.data.rows import finished_set, plan_of, row_of, same, spoil, write

FILE = "pairs-000001.parquet"


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(str(tmp_path / "pairs"))


def reasons(bad: list[dict[str, Any]]) -> list[tuple[int, str]]:
    return [(row["sample"], row["reason"]) for row in bad]


def test_whole_shards_are_found_again_with_what_they_lack(folder: Folder) -> None:
    plan = plan_of()
    begin(folder, plan)
    written = [write(folder, plan, 0), write(folder, plan, 1, bad=(4,)), write(folder, plan, 2, bad=(6,))]
    assert finished(folder, plan) == {0: written[0], 1: written[1], 2: written[2]}
    assert (written[2].rows, written[1].quarantined[0]["reason"]) == (0, "not_finite")


@pytest.mark.parametrize("left_bytes", [0, 3, 4, 100, -1])
def test_a_shard_that_was_cut_off_is_removed_with_its_list_and_others_stay(folder: Folder, left_bytes: int) -> None:
    plan = plan_of()
    begin(folder, plan)
    kept, cut = write(folder, plan, 0), write(folder, plan, 1, bad=(4,))
    (folder.path / cut.file).write_bytes((folder.path / cut.file).read_bytes()[:left_bytes])
    assert finished(folder, plan) == {0: kept}
    assert sorted(folder.files()) == [kept.file, "plan.json"]


def test_a_list_of_rows_set_aside_that_no_longer_fits_its_shard_makes_it_unfinished(folder: Folder) -> None:
    plan = plan_of()
    begin(folder, plan)
    write(folder, plan, 1, bad=(4,))
    write(folder, plan, 1)  # a rerun found nothing wrong; the old list is still there
    assert finished(folder, plan) == {} and not folder.has("quarantined/pairs-000001.json")
    write(folder, plan, 1, bad=(4,))
    folder.remove("quarantined/pairs-000001.json")
    assert finished(folder, plan) == {} and not folder.has(FILE)


def test_half_written_files_never_count_and_are_removed(folder: Folder) -> None:
    plan = plan_of()
    begin(folder, plan)
    write(folder, plan, 0)
    left = folder.path / f".{FILE}.1a2b.tmp"
    left.write_bytes(shard_bytes([row_of(3)], plan.about))
    assert list(finished(folder, plan)) == [0]
    begin(folder, plan)
    assert not left.exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seed", 1),
        ("pairs.count", 8),
        ("pairs.guidance", 2.0),
        ("pairs.solver_steps", 40),
        ("pairs.batch_size", 4),
        ("schedule.shift", 3.0),
        ("pairs.rows_per_shard", 4),
        ("geometry.latent_width", 8),
        ("model.text_tokens", 9),
    ],
)
def test_the_pairs_of_another_configuration_are_refused_by_the_field(folder: Folder, field: str, value: Any) -> None:
    plan = plan_of()
    begin(folder, plan)
    other = type(plan)(plan.config.with_settings([f"{field}={value}"]), 10, "hash of prompts", "teacher")
    assert other.set_id != plan.set_id
    with pytest.raises(FieldError, match=f"pairs: {field.split('.')[0 if 'geometry' in field else -1]} = "):
        begin(folder, other)
    begin(folder, plan)


def test_other_prompts_and_another_teacher_are_refused_too(folder: Folder) -> None:
    plan = plan_of()
    begin(folder, plan)
    for prompts, teacher, field in (("other", "teacher", "prompts_sha256"), ("hash of prompts", "u", "teacher_id")):
        with pytest.raises(FieldError, match=f"pairs: {field} = "):
            begin(folder, type(plan)(plan.config, 10, prompts, teacher))


def test_workers_and_places_do_not_make_another_set() -> None:
    plan = plan_of()
    free = ["train.workers=5", "pairs.solver_workers=3", "pairs.text_workers=2", "train.storage=/x", "distill.lr=1"]
    assert type(plan)(plan.config.with_settings(free), 10, "hash of prompts", "teacher").set_id == plan.set_id


def test_a_shard_of_another_set_is_refused_and_not_removed(folder: Folder) -> None:
    plan = plan_of()
    begin(folder, plan)
    write(folder, plan_of(guidance=3.0), 1)
    with pytest.raises(FieldError, match=f"{FILE} set_id = .*of another set"):
        finished(folder, plan)
    assert folder.has(FILE)


def test_too_many_rows_set_aside_fail_the_set_and_are_named(folder: Folder) -> None:
    plan = plan_of(max_bad_share=0.2)
    begin(folder, plan)
    shards = [write(folder, plan, shard, bad=(1, 4)) for shard in plan.shards]
    with pytest.raises(FieldError, match=r"0\.2857: .*share = 0\.2; sample 1, prompt id1: not_finite; sample 4"):
        finish(folder, plan, shards)
    assert not folder.has("manifest.json")


def test_a_manifest_tells_the_set_and_two_equal_sets_have_one_checksum(tmp_path: Path) -> None:
    first, second = (finished_set(Folder(str(tmp_path / name)), plan_of(), bad=(4,)) for name in "ab")
    assert first == second == read_manifest(Folder(str(tmp_path / "a")))
    assert (first["rows"], [entry["rows"] for entry in first["shards"]]) == (6, [3, 2, 1])
    other = finished_set(Folder(str(tmp_path / "c")), plan_of())
    assert other["checksum"] != first["checksum"]


def test_a_folder_without_a_manifest_or_with_another_version_is_refused_by_name(folder: Folder) -> None:
    with pytest.raises(FieldError, match="manifest.json.*exists"):
        read_manifest(folder)
    folder.write_json("manifest.json", {"shards": []})
    with pytest.raises(FieldError, match="manifest.json format_version = None"):
        read_manifest(folder)


def test_a_whole_set_is_usable_in_the_order_of_its_samples(folder: Folder) -> None:
    finished_set(folder, plan_of(), bad=(4,))
    assert verify(folder) == []
    keep_usable(folder, plan_of(), [])
    places = usable_places(folder)
    assert [index for _, index in places] == [0, 1, 2, 0, 1, 0]
    rows = ReadPairs(folder)({"sample": np.arange(6), **columns(places)})
    assert [prompt.split()[-1] for prompt in rows["prompt"]] == ["0", "1", "2", "3", "5", "6"]


def columns(places: list[tuple[str, int]]) -> dict[str, Any]:
    return {"file": np.array([file for file, _ in places]), "index": np.array([index for _, index in places])}


def rewritten(folder: Folder, change: Any) -> None:
    table = pq.read_table(folder.path / FILE)
    pq.write_table(change(table), folder.path / FILE)


def test_a_row_whose_states_changed_is_set_aside_alone(folder: Folder) -> None:
    plan = plan_of()
    finished_set(folder, plan)
    rows = [row_of(sample) for sample in plan.samples(1)]
    rows[1]["states_bf16"] = rows[1]["states_bf16"][::-1].copy()
    folder.write(FILE, shard_bytes(rows, plan.about))
    bad = verify(folder)
    assert bad == [{"file": FILE, "index": 1, "sample": 4, "prompt_id": rows[1]["prompt_id"], "reason": "checksum"}]
    keep_usable(folder, plan, bad)
    assert (FILE, 1) not in usable_places(folder) and len(usable_places(folder)) == 6


@pytest.mark.parametrize(
    ("spoiled", "reason"),
    [
        (lambda folder: (folder.path / FILE).write_bytes((folder.path / FILE).read_bytes()[:-9]), "unreadable"),
        (lambda folder: folder.remove(FILE), "unreadable"),
        (lambda folder: rewritten(folder, lambda t: t.drop_columns(["seed"])), "schema"),
        (lambda folder: rewritten(folder, lambda t: t.replace_schema_metadata({"schema_version": "1"})), "schema"),
        (lambda folder: rewritten(folder, lambda t: t.slice(1)), "schema"),
        (lambda folder: folder.write(FILE, shard_bytes([row_of(s) for s in (3, 4, 5)], {"set_id": "x"})), "schema"),
    ],
    ids=["cut off", "lost", "a column less", "another version", "a row less", "another set"],
)
def test_a_shard_that_cannot_be_read_is_set_aside_with_all_its_samples(
    folder: Folder, spoiled: Any, reason: str
) -> None:
    finished_set(folder, plan_of())
    spoiled(folder)
    assert reasons(verify(folder)) == [(3, reason), (4, reason), (5, reason)]


@pytest.mark.slow
def test_no_flipped_byte_anywhere_is_trained_on(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    from diagonal.data import trajectory

    monkeypatch.setattr(trajectory, "GROUP_BYTES", row_of(0)["states_bf16"].nbytes)  # a group for each row
    finished_set(folder, plan_of())
    whole, seen = (folder.path / FILE).read_bytes(), set()
    for place in np.random.default_rng(0).integers(0, len(whole), 150).tolist():
        spoil(folder, FILE, place)
        bad = verify(folder)
        seen |= {row["reason"] for row in bad}
        for index in {0, 1, 2} - {row["index"] for row in bad}:
            (row,) = read_one(folder, index)
            assert same(row, 3 + index), place
        (folder.path / FILE).write_bytes(whole)
    assert "unreadable" in seen


def read_one(folder: Folder, index: int) -> list[dict[str, Any]]:
    batch = ReadPairs(folder)({"sample": np.array([0]), "file": np.array([FILE]), "index": np.array([index])})
    return [{name: column[0] for name, column in batch.items()}]


def test_the_rows_of_another_group_are_still_read(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    from diagonal.data import trajectory

    monkeypatch.setattr(trajectory, "GROUP_BYTES", row_of(0)["states_bf16"].nbytes)
    finished_set(folder, plan_of())
    column = pq.ParquetFile(folder.path / FILE).metadata.row_group(1).column(5)
    spoil(folder, FILE, column.dictionary_page_offset + column.total_compressed_size // 2)
    assert reasons(verify(folder)) == [(4, "unreadable")]


def test_bad_rows_of_the_solving_and_of_the_reading_count_together(folder: Folder) -> None:
    plan = plan_of(max_bad_share=0.3)
    finished_set(folder, plan, bad=(0,))
    folder.remove("pairs-000002.parquet")
    bad = verify(folder)
    keep_usable(folder, plan, bad)
    assert len(usable_places(folder)) == 5 and folder.read_json("usable.json")["rows"] == 5
    tight = plan_of(max_bad_share=0.2)
    folder.remove("usable.json")
    with pytest.raises(FieldError, match="share of rows quarantined = 0.2857: .*sample 6, prompt None: unreadable"):
        keep_usable(folder, tight, bad)
    assert not folder.has("usable.json")


def test_what_is_usable_of_another_set_is_refused(folder: Folder) -> None:
    finished_set(folder, plan_of())
    folder.write_json("usable.json", {"format_version": 1, "set_id": "x", "rows": 7, "quarantined": []})
    with pytest.raises(FieldError, match="usable.json set_id = 'x'"):
        usable_places(folder)


def test_a_row_that_changes_after_it_was_verified_is_named_and_never_handed_on(folder: Folder) -> None:
    finished_set(folder, plan_of())
    assert same(read_one(folder, 1)[0], 4)
    rows = [row_of(sample) for sample in (3, 4, 5)]
    rows[1]["states_bf16"] = rows[0]["states_bf16"]
    folder.write(FILE, shard_bytes(rows, plan_of().about))
    assert same(read_one(folder, 0)[0], 3)
    with pytest.raises(CorruptRowError, match=rf"{FILE}, row 1, changed.*remove .*usable.json"):
        read_one(folder, 1)


def test_a_reader_that_read_wrongly_reads_once_more(folder: Folder) -> None:
    finished_set(folder, plan_of())
    reader, whole = ReadPairs(folder), (folder.path / FILE).read_bytes()
    asked = {"sample": np.array([0]), "file": np.array([FILE]), "index": np.array([2])}
    read, table = reader._table, []

    def wrong_once(file: str, index: int) -> tuple[pa.Table, int]:
        table.append(index)
        if len(table) == 1:
            raise OSError("a page's checksum differs")
        return read(file, index)

    reader._table = wrong_once  # type: ignore[method-assign]
    assert same({name: column[0] for name, column in reader(asked).items()}, 5)
    assert len(table) == 2 and (folder.path / FILE).read_bytes() == whole


def test_a_reader_holds_some_groups_and_forgets_the_oldest(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    from diagonal.data import stages

    finished_set(folder, plan_of())
    asked = {
        "sample": np.arange(6),
        "file": np.array([f"pairs-00000{s}.parquet" for s in (0, 1, 0, 2, 0, 1)]),
        "index": np.array([0, 1, 2, 0, 1, 2]),
    }
    for held_bytes, groups in ((2**30, 3), (1, 1)):
        monkeypatch.setattr(stages, "HELD_BYTES", held_bytes)
        reader = ReadPairs(folder)
        assert [prompt.split()[-1] for prompt in reader(asked)["prompt"]] == ["0", "4", "2", "6", "1", "5"]
        assert len(reader._groups) == groups


@pytest.mark.slow
def test_a_set_on_s3_is_begun_found_verified_and_read_alike(bucket: str) -> None:
    remote, plan = Folder(f"s3://{bucket}/run/pairs"), plan_of()
    begin(remote, plan)
    written = [write(remote, plan, shard, bad=(4,)) for shard in plan.shards]
    remote.write("pairs-000002.parquet", remote.read("pairs-000002.parquet")[:-20])
    assert finished(remote, plan) == {0: written[0], 1: written[1]}
    write(remote, plan, 2)
    finish(remote, plan, written)
    assert verify(remote) == []
    keep_usable(remote, plan, [])
    rows = ReadPairs(remote)({"sample": np.arange(6), **columns(usable_places(remote))})
    assert [prompt.split()[-1] for prompt in rows["prompt"]] == ["0", "1", "2", "3", "5", "6"]


def test_most_bad_is_the_share_of_the_count() -> None:
    assert [plan_of(count=100, max_bad_share=share).most_bad for share in (0.0, 0.01, 0.29, 1.0)] == [0, 1, 29, 100]
    assert Config.from_preset("tiny").pairs.max_bad_share == 0.01
