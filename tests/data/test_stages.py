"""The data jobs' stages, called as Ray Data calls them: prompts to embeddings to trajectories to shards."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from diagonal.config import Config
from diagonal.data.pair_set import PairPlan, begin, finished, shard_file
from diagonal.data.prompt_set import prepare
from diagonal.data.prompts import prompt_id, samples
from diagonal.data.stages import EncodeText, SolveShard, teacher_id
from diagonal.data.trajectory import about_shard, from_bits, read_row
from diagonal.diffusion.noise import clip_noise, mixed_seed
from diagonal.diffusion.teacher import solve
from diagonal.errors import FieldError
from diagonal.model.base_model import save_base
from diagonal.schedule import raw_level
from diagonal.storage import Folder
from tests.networks import small_codec, small_config, small_text, small_text_model, small_tokenizer, small_wan

PROMPTS = ["a red circle", "a blue square", "moves left"]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A small configuration over a base model on disk; two trajectories are solved at a time."""
    folder = tmp_path_factory.mktemp("base") / "base"
    plain = small_config()
    save_base(folder, plain, small_wan(), small_codec(plain), small_tokenizer(), small_text_model(), {})
    settings = (
        "pairs.count=7",
        "pairs.rows_per_shard=3",
        "pairs.solver_steps=20",
        "pairs.guidance=3.0",
        "pairs.batch_size=2",
        f"model.path={folder}",
    )
    return small_config(*settings)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    folder = Folder(str(tmp_path_factory.mktemp("prompts")))
    prepare(folder, "p.txt", PROMPTS, lambda identity: False)
    return folder


@pytest.fixture(scope="module")
def plan(config: Config) -> PairPlan:
    return PairPlan(config, len(PROMPTS), "hash", "teacher")


@pytest.fixture
def folder(tmp_path: Path, plan: PairPlan) -> Folder:
    """A folder of pairs that was begun."""
    begun = Folder(str(tmp_path / "pairs"))
    begin(begun, plan)
    return begun


@pytest.fixture(scope="module")
def encoded(plan: PairPlan, prompts: Folder) -> dict[str, Any]:
    return EncodeText(plan, prompts)({"shard": np.array([1])})


def rows_of(batch: dict[str, Any]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(str(batch["rows"][0]))
    return rows


@pytest.mark.slow
def test_a_shards_rows_are_a_function_of_the_plan_and_the_prompts(plan: PairPlan, encoded: Any) -> None:
    order = [index for _, index in samples(len(PROMPTS), plan.config.seed, 3, 6)]
    assert rows_of(encoded) == [
        {
            "sample": 3 + place,
            "prompt_id": prompt_id(PROMPTS[index]),
            "prompt": PROMPTS[index],
            "seed": mixed_seed(plan.config.seed, "pairs", 3 + place),
        }
        for place, index in enumerate(order)
    ]


def test_every_prompt_comes_once_in_each_epoch(plan: PairPlan, prompts: Folder) -> None:
    stage = EncodeText(plan, prompts)
    shards = [[row["prompt"] for row in stage.rows(shard)] for shard in plan.shards]
    assert [len(rows) for rows in shards] == [3, 3, 1]
    assert sorted(shards[0]) == sorted(shards[1]) == sorted(PROMPTS)


def test_embeddings_are_the_text_encoders_own(encoded: Any) -> None:
    shown = [row["prompt"] for row in rows_of(encoded)]
    assert torch.equal(from_bits(encoded["text_bf16"][0]), small_text().encode(shown).bfloat16())
    assert torch.equal(from_bits(encoded["negative_bf16"]), small_text().encode([""]).bfloat16())


@pytest.mark.slow
def test_a_shard_holds_the_guided_teachers_solutions_from_each_seeds_noise(
    plan: PairPlan, encoded: Any, folder: Folder
) -> None:
    SolveShard(plan, folder)(encoded)
    table, rows, config = pq.read_table(folder.path / shard_file(1)), rows_of(encoded), plan.config
    negative, shape = small_text().encode([""]).bfloat16().float(), config.geometry.chunk_shape()[1:]
    for place, row in enumerate(rows):
        found = read_row(table, place)
        noise = clip_noise(row["seed"], config.geometry.clip_chunks, shape)
        text = small_text().encode([row["prompt"]]).bfloat16().float()
        states, levels = solve(
            small_wan(), noise[None], text, negative, weight=3.0, steps=20, shift=5.0, kept_raw=config.pairs.kept_raw
        )
        assert torch.equal(found.states[0], noise.bfloat16())
        torch.testing.assert_close(found.states.float(), states[0], rtol=0.01, atol=0.01)
        assert found.levels == levels == tuple(raw_level(r, 5.0) for r in (1000, 750, 500, 250, 100, 0))
        kept = table.slice(place, 1).to_pylist()[0]
        assert {name: kept[name] for name in row} == row


def test_a_shard_names_what_its_rows_have_in_common(plan: PairPlan, encoded: Any, folder: Folder) -> None:
    SolveShard(plan, folder)(encoded)
    about = about_shard(pq.ParquetFile(folder.path / shard_file(1)))
    assert about["teacher_id"] == "teacher" and about["set_id"] == plan.set_id
    assert (about["guidance"], about["solver_steps"], about["shift"]) == (3.0, 20, 5.0)
    assert about["geometry"] == dataclasses.asdict(plan.config.geometry)


def test_the_same_shard_solved_again_has_the_same_bytes(plan: PairPlan, encoded: Any, folder: Folder) -> None:
    first = SolveShard(plan, folder)(encoded)
    data, again = folder.read(shard_file(1)), SolveShard(plan, folder)(encoded)
    said = [{name: column.tolist() for name, column in found.items() if name != "solve_s"} for found in (first, again)]
    assert said[0] == said[1]
    assert folder.read(shard_file(1)) == data and int(first["bytes"][0]) == len(data)


def spoil_states(monkeypatch: pytest.MonkeyPatch, places: list[int], value: float) -> None:
    solved = SolveShard.solve
    bits = int(torch.tensor([value]).bfloat16().view(torch.int16))

    def solve_badly(self: SolveShard, seeds: list[int], *text: torch.Tensor) -> tuple[np.ndarray, list[float]]:
        states, levels = solved(self, seeds, *text)
        states[places, 3, 0, 0, 0, 0] = bits
        return states, levels

    monkeypatch.setattr(SolveShard, "solve", solve_badly)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_rows_that_are_not_finite_are_set_aside_with_a_reason(
    plan: PairPlan, encoded: Any, folder: Folder, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    spoil_states(monkeypatch, [1], value)
    done = SolveShard(plan, folder)(encoded)
    aside = [{"sample": 4, "prompt_id": rows_of(encoded)[1]["prompt_id"], "reason": "not_finite"}]
    assert int(done["rows"][0]) == 2 and json.loads(str(done["quarantined"][0])) == aside
    assert pq.read_table(folder.path / shard_file(1))["sample"].to_pylist() == [3, 5]
    assert folder.read_json("quarantined/pairs-000001.json") == aside
    assert finished(folder, plan)[1].quarantined == tuple(aside)


def test_a_rerun_that_finds_nothing_wrong_takes_back_what_was_set_aside(
    plan: PairPlan, encoded: Any, folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as spoilt:
        spoil_states(spoilt, [0, 1, 2], torch.nan)
        assert int(SolveShard(plan, folder)(encoded)["rows"][0]) == 0
    assert not folder.has(shard_file(1)) and finished(folder, plan)[1].rows == 0
    SolveShard(plan, folder)(encoded)
    assert finished(folder, plan)[1].rows == 3 and not folder.has("quarantined/pairs-000001.json")


def test_a_shard_appears_after_the_list_of_what_it_lacks(
    plan: PairPlan, encoded: Any, folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process may die between the two: then the shard is not there, and is solved again."""
    spoil_states(monkeypatch, [1], torch.nan)
    write = Folder.write

    def die(self: Folder, name: str, data: bytes) -> None:
        if name.endswith(".parquet"):
            raise KeyboardInterrupt
        write(self, name, data)

    monkeypatch.setattr(Folder, "write", die)
    with pytest.raises(KeyboardInterrupt):
        SolveShard(plan, folder)(encoded)
    assert folder.has("quarantined/pairs-000001.json") and finished(folder, plan) == {}


def test_a_node_that_does_not_see_the_jobs_folder_is_refused_before_it_solves(plan: PairPlan, tmp_path: Path) -> None:
    with pytest.raises(FieldError, match="train.storage = .*every node of the cluster sees; plan.json"):
        SolveShard(plan, Folder(str(tmp_path / "elsewhere")))


def test_a_batch_of_more_than_one_shard_is_refused(plan: PairPlan, prompts: Folder) -> None:
    with pytest.raises(FieldError, match="rows of a batch = 2"):
        EncodeText(plan, prompts)({"shard": np.array([0, 1])})


@pytest.mark.slow
def test_a_shard_on_s3_has_the_same_bytes(plan: PairPlan, encoded: Any, folder: Folder, bucket: str) -> None:
    remote = Folder(f"s3://{bucket}/run/pairs")
    begin(remote, plan)
    for place in (folder, remote):
        SolveShard(plan, place)(encoded)
    assert remote.read(shard_file(1)) == folder.read(shard_file(1))


def test_a_teachers_id_is_that_of_its_weights(config: Config, tmp_path: Path) -> None:
    plain, ids = small_config(), []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        network = small_wan(seed)
        save_base(tmp_path / name, plain, network, small_codec(plain), small_tokenizer(), small_text_model(), {})
        ids.append(teacher_id(small_config(f"model.path={tmp_path / name}")))
    assert ids[0] == ids[1] == teacher_id(config) != ids[2] and len(ids[0]) == 16
