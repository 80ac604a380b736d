"""Laws of checkpoints: a resumed run is the uninterrupted one, bit for bit; a broken checkpoint is never used."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from diagonal.training import checkpoint, manifest
from diagonal.training.checkpoint import TrainState, folder_name, latest, load, retain, save
from diagonal.training.ema import Ema
from diagonal.training.manifest import CheckpointError
from diagonal.training.parallel import (
    ParallelPlan,
    Precision,
    clip_gradients,
    device_mesh,
    finish_gradients,
    full_tensors,
    parallelize,
    rollout_scope,
)
from tests.training.networks import Network, rollout
from tests.training.ranks import Ranks

NARROW = ParallelPlan(Precision(param="bfloat16"), checkpoint_blocks=True)
HALF = 2  # the generator steps first at update 3, so its optimizer is saved before its first step
PROGRESS = ("stage", "update", "epoch", "samples_seen")


def fresh(seed: int, world_size: int, plan: ParallelPlan = NARROW, width: int = 6) -> TrainState:
    """A run's objects as a new process makes them."""
    mesh = device_mesh(world_size, "cpu")
    networks = {}
    for number, name in enumerate(("generator", "critic")):
        network = Network(width=width, seed=seed + number)
        networks[name] = parallelize(network, network.blocks, mesh, plan, trainable=True)
    optimizers: dict[str, torch.optim.Optimizer] = {
        name: torch.optim.AdamW(network.parameters(), lr=0.01, betas=(0.5, 0.9)) for name, network in networks.items()
    }
    ema = Ema(networks["generator"].named_parameters(), decay=0.5, start_update=3)
    return TrainState(stage=1, networks={**networks}, optimizers=optimizers, ema=ema)


def advance(state: TrainState, updates: int) -> None:
    """Updates whose noise comes from the global generator: the critic always, the generator at 3, 5, 7 ..."""
    for _ in range(updates):
        names = ["critic"] if state.update < 3 or state.update % 2 == 0 else ["critic", "generator"]
        for name in names:
            noise = torch.randn(2, 6)
            with rollout_scope(state.networks[name]):
                rollout(state.networks[name], noise).square().mean().backward()
                finish_gradients(state.networks[name])
            clip_gradients(state.networks[name].parameters(), max_norm=1.0)
            state.optimizers[name].step()
            state.optimizers[name].zero_grad()
        if "generator" in names and state.ema is not None:
            state.ema.update(state.update)
        state.update, state.samples_seen = state.update + 1, state.samples_seen + 2
        state.epoch = state.samples_seen // 5


def contents(state: TrainState) -> dict[str, Tensor]:
    """Everything in a state, whole."""
    return full_tensors(state.state_dict())


def same(left: dict[str, Tensor], right: dict[str, Tensor], ignoring: str = "nothing") -> bool:
    left, right = ({k: v for k, v in side.items() if not k.startswith(ignoring)} for side in (left, right))
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def uninterrupted_and_resumed(rank: int, world_size: int, root: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    torch.manual_seed(10 + rank)
    whole = fresh(0, world_size)
    advance(whole, 2 * HALF)
    torch.manual_seed(10 + rank)
    first = fresh(0, world_size)
    advance(first, HALF)
    folder = save(first, Path(root) / folder_name(first.update))
    torch.manual_seed(99)
    second = fresh(50, world_size)
    load(second, folder)
    advance(second, HALF)
    return contents(whole), contents(second)


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit_at_one_rank(tmp_path: Path) -> None:
    whole, resumed = uninterrupted_and_resumed(0, 1, str(tmp_path))
    assert same(whole, resumed)
    assert whole["progress"].tolist() == [1, 4, 1, 8]
    assert whole["ema/started"].item() == 1
    assert len([key for key in whole if key.endswith("/exp_avg")]) == 2 * len([*Network().parameters()])


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit_at_two_ranks(two_ranks: Ranks, tmp_path: Path) -> None:
    answers = two_ranks.run(uninterrupted_and_resumed, 2, str(tmp_path))
    assert all(same(whole, resumed) for whole, resumed in answers)
    weights = [{k: v for k, v in whole.items() if k.startswith(("networks", "optimizers"))} for whole, _ in answers]
    assert same(weights[0], weights[1])


def test_a_state_is_taken_over_in_memory_as_well(tmp_path: Path) -> None:
    state, other = fresh(0, 1), fresh(50, 1)
    advance(state, 4)
    other.load_state_dict(contents(state))
    assert same(contents(state), contents(other))


def test_saving_changes_nothing(tmp_path: Path) -> None:
    torch.manual_seed(1)
    state = fresh(0, 1)
    before = contents(state)
    save(state, tmp_path / "a")
    assert same(before, contents(state))


def save_two(rank: int, root: str, shared: bool) -> dict[str, Tensor]:
    """Two ranks save; unless `shared`, each into a folder of its own."""
    torch.manual_seed(rank)
    state = fresh(0, 2)
    advance(state, 4)
    save(state, Path(root) / ("both" if shared else f"rank{rank}"), shared=shared)
    return contents(state)


def load_two(rank: int, folder: str) -> dict[str, Tensor]:
    state = fresh(70, 2)
    load(state, folder)
    return contents(state)


@pytest.mark.parametrize("shared", [True, False])
def test_a_checkpoint_of_two_ranks_loads_at_one_and_that_one_loads_at_two(
    two_ranks: Ranks, tmp_path: Path, shared: bool
) -> None:
    saved = two_ranks.run(save_two, str(tmp_path), shared)[0]
    if not shared:
        for rank in range(2):
            shutil.copytree(tmp_path / f"rank{rank}", tmp_path / "both", dirs_exist_ok=True)
    one = fresh(30, 1)
    load(one, tmp_path / "both")
    assert same(saved, contents(one), ignoring="rng")
    save(one, tmp_path / "one")
    for two in two_ranks.run(load_two, str(tmp_path / "one")):
        assert same(saved, two, ignoring="rng")


def test_the_manifest_lists_every_file_and_says_where_the_run_stands(tmp_path: Path) -> None:
    state = fresh(0, 1)
    advance(state, 3)
    folder = save(state, tmp_path / "a")
    told = json.loads((folder / manifest.name_of(0)).read_text())
    assert {name: told[name] for name in PROGRESS} == {"stage": 1, "update": 3, "epoch": 1, "samples_seen": 6}
    assert (told["format_version"], told["rank"], told["world_size"]) == (1, 0, 1)
    listed = {*told["files"], manifest.name_of(0)}
    assert {path.name for path in folder.iterdir()} == listed and ".metadata" in listed and len(listed) == 3
    assert all((folder / name).stat().st_size == entry["bytes"] for name, entry in told["files"].items())


def truncate(folder: Path) -> None:
    path = next(folder.glob("*.distcp"))
    os.truncate(path, path.stat().st_size - 1)


def flip(folder: Path) -> None:
    path = next(folder.glob("*.distcp"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def remove_metadata(folder: Path) -> None:
    (folder / ".metadata").unlink()


def remove_manifest(folder: Path) -> None:
    (folder / manifest.name_of(0)).unlink()


def cut_manifest(folder: Path) -> None:
    os.truncate(folder / manifest.name_of(0), 20)


def edit_manifest(folder: Path, **changes: object) -> None:
    path = folder / manifest.name_of(0)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def other_version(folder: Path) -> None:
    edit_manifest(folder, format_version=2)


def lose_a_rank(folder: Path) -> None:
    edit_manifest(folder, world_size=2)


FAULTS: dict[Callable[[Path], None], str] = {
    truncate: "bytes instead of",
    flip: "is altered",
    remove_metadata: ".metadata is missing",
    remove_manifest: "manifest.rank00.json is missing or unreadable",
    cut_manifest: "manifest.rank00.json is missing or unreadable",
    other_version: "format_version = 2: allowed is 1",
    lose_a_rank: "manifest.rank01.json is missing or unreadable",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_checkpoint_is_refused_by_name_and_the_newest_whole_one_is_found(
    tmp_path: Path, fault: Callable[[Path], None]
) -> None:
    state = fresh(0, 1)
    for update in (5, 7, 9):
        state.update = update
        save(state, tmp_path / folder_name(update))
    assert latest(tmp_path) == tmp_path / folder_name(9)
    fault(tmp_path / folder_name(9))
    with pytest.raises(CheckpointError, match=FAULTS[fault]):
        load(state, tmp_path / folder_name(9))
    assert latest(tmp_path) == tmp_path / folder_name(7)


def test_parts_of_two_saves_are_not_taken_for_one(tmp_path: Path) -> None:
    state = fresh(0, 1)
    folder, other = save(state, tmp_path / "a"), save(state, tmp_path / "b")
    edit_manifest(folder, world_size=2)
    shutil.copy(other / manifest.name_of(0), folder / manifest.name_of(1))
    with pytest.raises(CheckpointError, match="of another save"):
        load(state, folder)


def refused_on(rank: int, folder: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(fresh(0, 2), folder)
    return caught.value.reason


def test_every_rank_refuses_what_one_rank_finds_broken(two_ranks: Ranks, tmp_path: Path) -> None:
    two_ranks.run(save_two, str(tmp_path), True)
    path = tmp_path / "both" / "__1_0.distcp"
    path.write_bytes(path.read_bytes()[:-1])
    reasons = two_ranks.run(refused_on, str(tmp_path / "both"))
    assert "another rank" in reasons[0] and "__1_0.distcp" in reasons[1]


def latest_of(rank: int, root: str) -> Path | None:
    return latest(root if rank == 0 else "/nowhere")


def test_all_ranks_follow_the_checkpoint_that_rank_0_finds(two_ranks: Ranks, tmp_path: Path) -> None:
    assert two_ranks.run(latest_of, str(tmp_path)) == [None, None]
    folder = save(fresh(0, 1), tmp_path / "a")
    assert two_ranks.run(latest_of, str(tmp_path)) == [folder, folder]


def test_a_save_that_fails_leaves_nothing_and_the_next_one_of_that_name_succeeds(tmp_path: Path) -> None:
    state = fresh(0, 1)
    kept = save(state, tmp_path / "a")
    state.update = 1
    for place, name in ((dcp, "save"), (manifest, "write"), (checkpoint.os, "replace")):
        failing = mock.patch.object(place, name, side_effect=OSError("disk full"))
        with failing, pytest.raises(OSError, match="disk full"):
            save(state, tmp_path / "b")
        assert not (tmp_path / "b").exists()
        assert latest(tmp_path) == kept
    assert latest(tmp_path) != save(state, tmp_path / "b") == latest(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}


def test_a_save_replaces_an_older_folder_of_its_name(tmp_path: Path) -> None:
    state = fresh(0, 1)
    truncate(save(state, tmp_path / "a"))
    (tmp_path / "a" / "leftover").touch()
    state.samples_seen = 42
    load(restored := fresh(8, 1), save(state, tmp_path / "a"))
    assert restored.samples_seen == 42
    assert not (tmp_path / "a" / "leftover").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_only_the_newest_checkpoints_are_retained(tmp_path: Path) -> None:
    state = fresh(0, 1)
    for update in (3, 12, 7):
        state.update = update
        save(state, tmp_path / folder_name(update))
    (tmp_path / "notes").mkdir()
    assert retain(tmp_path, keep=2) == [tmp_path / folder_name(3)]
    assert {path.name for path in tmp_path.iterdir()} == {"notes", folder_name(7), folder_name(12)}
    assert retain(tmp_path, keep=2) == []
    with pytest.raises(ValueError, match="keep_checkpoints = 0"):
        retain(tmp_path, keep=0)


def test_a_checkpoint_of_another_geometry_is_refused_by_name_and_shapes(tmp_path: Path) -> None:
    folder = save(fresh(0, 1), tmp_path / "a")
    with pytest.raises(ValueError, match=r"checkpoint.networks/generator/inward.weight = \(6, 6\): .*\(8, 8\)"):
        load(fresh(0, 1, width=8), folder)


def test_a_checkpoint_of_other_networks_is_refused_by_name_and_nothing_is_read(tmp_path: Path) -> None:
    state = fresh(0, 1)
    advance(state, 1)
    folder = save(state, tmp_path / "a")
    alone = fresh(4, 1)
    del alone.networks["critic"], alone.optimizers["critic"]
    before = contents(alone)
    with pytest.raises(ValueError, match="checkpoint.names.*networks/critic/"):
        load(alone, folder)
    untrained = fresh(4, 1)
    del untrained.optimizers["critic"]
    with pytest.raises(ValueError, match="checkpoint.optimizers/critic/"):
        load(untrained, folder)
    assert same(before, contents(alone))


def test_an_optimizer_that_had_not_stepped_forgets_its_moments_when_loaded(tmp_path: Path) -> None:
    state = fresh(0, 1)
    folder = save(state, tmp_path / "a")
    advance(state, 4)
    load(state, folder)
    assert not any(optimizer.state for optimizer in state.optimizers.values())


def test_an_optimizer_of_no_network_is_refused() -> None:
    with pytest.raises(ValueError, match="optimizers = 'head'"):
        TrainState(1, {"generator": Network()}, {"head": torch.optim.SGD([torch.zeros(1)], lr=1.0)})
