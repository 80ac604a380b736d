"""Laws of checkpoints: a resumed run is the uninterrupted one, bit for bit; a broken checkpoint is never used."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from diagonal.storage import Folder, StorageError
from diagonal.training import checkpoint_manifest
from diagonal.training.checkpoint import Restored
from diagonal.training.checkpoint_manifest import CheckpointError, checkpoints
from diagonal.training.state import TrainState
from tests.training.networks import Network
from tests.training.ranks import Ranks
from tests.training.states import (
    advance,
    contents,
    cut_manifest,
    edit_manifest,
    flip,
    folder_of,
    fresh,
    keeper,
    lose_a_rank,
    other_version,
    remove_manifest,
    remove_metadata,
    same,
    saved,
    truncate,
)

HALF = 2  # the generator steps first at update 3, so its optimizer is saved before its first step


def uninterrupted_and_resumed(rank: int, world_size: int, root: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    torch.manual_seed(10 + rank)
    whole = fresh(0, world_size)
    advance(whole, 2 * HALF)
    torch.manual_seed(10 + rank)
    first = fresh(0, world_size)
    advance(first, HALF)
    keeper(root).save(first, wait=True)
    torch.manual_seed(99)
    second = fresh(50, world_size)
    assert keeper(root).restore(second) is not None
    advance(second, HALF)
    return contents(whole), contents(second)


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit_at_one_rank(tmp_path: Path) -> None:
    whole, resumed = uninterrupted_and_resumed(0, 1, str(tmp_path))
    assert same(whole, resumed)
    assert whole["progress"].tolist() == [1, 4, 1, 8]
    assert whole["ema/started"].item() == 1
    assert len([key for key in whole if key.endswith("/exp_avg")]) == 2 * len([*Network().parameters()])


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit_at_two_ranks(two_ranks: Ranks, tmp_path: Path) -> None:
    answers = two_ranks.run(uninterrupted_and_resumed, 2, str(tmp_path))
    assert all(same(whole, resumed) for whole, resumed in answers)
    weights = [{k: v for k, v in whole.items() if k.startswith(("networks", "optimizers"))} for whole, _ in answers]
    assert same(weights[0], weights[1])


def test_a_state_is_taken_over_in_memory_as_well() -> None:
    state, other = fresh(0, 1), fresh(50, 1)
    advance(state, 4)
    other.load_state_dict(contents(state))
    assert same(contents(state), contents(other))


def test_saving_changes_nothing(tmp_path: Path) -> None:
    torch.manual_seed(1)
    state = fresh(0, 1)
    before = contents(state)
    saved(state, tmp_path)
    assert same(before, contents(state))


def save_two(rank: int, root: str) -> dict[str, Tensor]:
    torch.manual_seed(rank)
    state = fresh(0, 2)
    advance(state, 4)
    saved(state, root)
    return contents(state)


def load_two(rank: int, root: str) -> dict[str, Tensor]:
    state = fresh(70, 2)
    keeper(root).restore(state)
    return contents(state)


def test_a_checkpoint_of_two_ranks_loads_at_one_and_that_one_loads_at_two(two_ranks: Ranks, tmp_path: Path) -> None:
    before = two_ranks.run(save_two, str(tmp_path / "two"))[0]
    one = fresh(30, 1)
    assert keeper(tmp_path / "two").restore(one) is not None
    assert same(before, contents(one), ignoring="rng")
    saved(one, tmp_path / "one")
    for two in two_ranks.run(load_two, str(tmp_path / "one")):
        assert same(before, two, ignoring="rng")


def save_copies(rank: int, root: str) -> dict[str, Tensor]:
    """Two ranks that hold a whole copy each."""
    torch.manual_seed(rank)
    state = fresh(0, 2, shard_group=1)
    advance(state, 4)
    saved(state, root)
    return contents(state)


def test_copies_beyond_a_shard_group_are_saved_once_and_load_at_one_rank(two_ranks: Ranks, tmp_path: Path) -> None:
    before = two_ranks.run(save_copies, str(tmp_path))[0]
    one = fresh(30, 1)
    assert keeper(tmp_path).restore(one) is not None
    assert same(before, contents(one), ignoring="rng")
    written = dcp.FileSystemReader(folder_of(tmp_path, 4)).read_metadata().storage_data
    assert sorted(index.fqn for index in written) == sorted(before.keys() | {"rng/rank01/cpu"})


def away(rank: int, root: str) -> str:
    broken = mock.patch.object(checkpoint_manifest, "scan", side_effect=StorageError("no answer"))
    with broken, pytest.raises(StorageError) as told:
        keeper(root).restore(fresh(0, 2))
    return str(told.value)


def test_a_storage_that_does_not_answer_rank_0_ends_all_ranks(two_ranks: Ranks, tmp_path: Path) -> None:
    assert two_ranks.run(away, str(tmp_path)) == ["no answer"] * 2


def test_a_resume_goes_on_with_the_saved_moments_and_the_new_rate(tmp_path: Path) -> None:
    state, other = fresh(0, 1), fresh(50, 1)
    advance(state, 4)
    saved(state, tmp_path)
    for optimizer in other.optimizers.values():
        optimizer.param_groups[0]["lr"] = 0.125
    keeper(tmp_path).restore(other)
    assert same(contents(state), contents(other))
    assert [optimizer.param_groups[0]["lr"] for optimizer in other.optimizers.values()] == [0.125, 0.125]


def test_the_manifest_lists_every_file_and_says_where_the_run_stands(tmp_path: Path) -> None:
    state = fresh(0, 1)
    advance(state, 3)
    (folder,) = saved(state, tmp_path)
    (listed,) = checkpoints(Folder(str(tmp_path)))
    assert listed.progress == {"stage": 1, "update": 3, "epoch": 1, "samples_seen": 6}
    assert (listed.update, listed.world_size, listed.folder.path) == (3, 1, folder)
    assert 0.0 <= listed.age_s < 60.0
    files = {path.name: path.stat().st_size for path in folder.iterdir() if path.name != checkpoint_manifest.name_of(0)}
    assert files == {name: entry["bytes"] for name, entry in listed.files.items()} and len(files) == 2
    assert listed.size_bytes == sum(files.values())


FAULTS: dict[Callable[[Path], None], str] = {
    truncate: "bytes instead of",
    flip: "is altered",
    remove_metadata: ".metadata is missing",
    remove_manifest: "manifest.rank00.json is missing or unreadable",
    cut_manifest: "manifest.rank00.json is missing or unreadable",
    other_version: "format_version = 3: allowed is 2",
    lose_a_rank: "manifest.rank01.json is missing or unreadable",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_checkpoint_is_refused_with_its_reason_and_the_one_before_it_is_taken(
    tmp_path: Path, fault: Callable[[Path], None]
) -> None:
    state = fresh(0, 1)
    saved(state, tmp_path, 5, 7, 9)
    fault(folder_of(tmp_path, 9))
    listed = [found.update for found in checkpoints(Folder(str(tmp_path)))]
    assert listed == ([9, 7, 5] if fault is flip else [7, 5])  # hashes are looked at by who loads it
    restored = keeper(tmp_path).restore(state)
    assert restored is not None and (restored.folder.path, restored.update) == (folder_of(tmp_path, 7), 7)
    assert state.update == 7
    (refused,) = restored.refused
    assert refused.folder == str(folder_of(tmp_path, 9)) and FAULTS[fault] in refused.reason


@pytest.mark.parametrize("fault", [truncate, flip, other_version])
def test_a_run_whose_every_checkpoint_is_altered_does_not_begin_anew_in_silence(
    tmp_path: Path, fault: Callable[[Path], None]
) -> None:
    state = fresh(0, 1)
    for folder in saved(state, tmp_path, 5, 7):
        fault(folder)
    with pytest.raises(CheckpointError, match="none of 2 can be used, remove them to begin anew") as caught:
        keeper(tmp_path).restore(state)
    assert "update-00000005" in str(caught.value) and "update-00000007" in str(caught.value)


@pytest.mark.parametrize("fault", [remove_manifest, cut_manifest, lose_a_rank])
def test_a_run_that_was_cut_off_in_its_first_save_begins_anew(tmp_path: Path, fault: Callable[[Path], None]) -> None:
    state = fresh(0, 1)
    fault(saved(state, tmp_path)[0])
    assert keeper(tmp_path).restore(state) is None
    assert keeper(tmp_path / "nowhere").restore(state) is None


def test_parts_of_two_saves_are_not_taken_for_one(tmp_path: Path) -> None:
    state = fresh(0, 1)
    folder, other = saved(state, tmp_path, 5, 7)
    edit_manifest(folder, world_size=2)
    shutil.copy(other / checkpoint_manifest.name_of(0), folder / checkpoint_manifest.name_of(1))
    whole, broken = checkpoint_manifest.scan(Folder(str(tmp_path)))
    assert [found.update for found in whole] == [7]
    assert "of another save" in broken[0].reason


def altered_by_two(rank: int, root: str) -> tuple[Restored | None, int]:
    state = fresh(0, 2)
    return keeper(root).restore(state), state.update


def test_every_rank_refuses_what_one_rank_finds_altered_and_takes_the_same_one(
    two_ranks: Ranks, tmp_path: Path
) -> None:
    two_ranks.run(save_two, str(tmp_path))
    older = folder_of(tmp_path, 4)
    shutil.copytree(older, newer := older.with_name("update-00000009-copy"))
    for path in newer.glob("manifest.*"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"update": 9}))
    content = bytearray((newer / "__1_0.distcp").read_bytes())
    content[-1] ^= 1
    (newer / "__1_0.distcp").write_bytes(content)
    answers = two_ranks.run(altered_by_two, str(tmp_path))
    for restored, update in answers:
        assert restored is not None and restored.folder.path == older and update == 4
        assert "__1_0.distcp is altered" in restored.refused[0].reason


def test_a_checkpoint_of_another_geometry_is_refused_by_name_and_shapes(tmp_path: Path) -> None:
    saved(fresh(0, 1), tmp_path)
    with pytest.raises(ValueError, match=r"checkpoint.networks/generator/inward.weight = \(6, 6\): .*\(8, 8\)"):
        keeper(tmp_path).restore(fresh(0, 1, width=8))


def test_a_checkpoint_of_other_networks_is_refused_by_name_and_nothing_is_read(tmp_path: Path) -> None:
    state = fresh(0, 1)
    advance(state, 1)
    saved(state, tmp_path)
    alone = fresh(4, 1)
    del alone.networks["critic"], alone.optimizers["critic"]
    before = contents(alone)
    with pytest.raises(ValueError, match="checkpoint.names.*networks/critic/"):
        keeper(tmp_path).restore(alone)
    untrained = fresh(4, 1)
    del untrained.optimizers["critic"]
    with pytest.raises(ValueError, match="checkpoint.optimizers/critic/"):
        keeper(tmp_path).restore(untrained)
    assert same(before, contents(alone))


def test_an_optimizer_that_had_not_stepped_forgets_its_moments_when_restored(tmp_path: Path) -> None:
    state = fresh(0, 1)
    saved(state, tmp_path)
    advance(state, 4)
    keeper(tmp_path).restore(state)
    assert not any(optimizer.state for optimizer in state.optimizers.values())


def test_an_optimizer_of_no_network_is_refused() -> None:
    with pytest.raises(ValueError, match="optimizers = 'head'"):
        TrainState(1, {"generator": Network()}, {"head": torch.optim.SGD([torch.zeros(1)], lr=1.0)})
