"""The data jobs' stages, called as Ray Data calls them: prompts to embeddings to trajectories to shards and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diagonal.config import Config
from diagonal.data.prompts import prompt_id
from diagonal.data.stages import (
    EncodeText,
    ReadPairs,
    SolveTrajectory,
    WriteShard,
    read_manifest,
    shard_name,
    teacher_id,
)
from diagonal.data.trajectory import CorruptRowError, from_bits, read_row, read_shard
from diagonal.diffusion.noise import clip_noise
from diagonal.diffusion.teacher import solve
from diagonal.errors import FieldError
from diagonal.model.weights import save_base
from diagonal.schedule import raw_level
from tests.networks import small_codec, small_config, small_text, small_text_model, small_tokenizer, small_wan

PROMPTS = ["a red circle", "a blue square", "moves left"]
SEEDS = [11, 2**62, 13]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A small configuration over a base model on disk; two trajectories are solved at a time."""
    folder = tmp_path_factory.mktemp("base") / "base"
    plain = small_config()
    save_base(folder, plain, small_wan(), small_codec(plain), small_tokenizer(), small_text_model(), {})
    settings = ("pairs.solver_steps=20", "pairs.guidance=3.0", "pairs.batch_size=2", f"model.path={folder}")
    return small_config(*settings)


@pytest.fixture(scope="module")
def solved(config: Config) -> dict[str, Any]:
    batch = {
        "sample": np.arange(3), "prompt": np.array(PROMPTS), "seed": np.array(SEEDS), "shard": np.full(3, 4),
        "shard_rows": np.full(3, 3),
    }
    return SolveTrajectory(config.to_dict())(EncodeText(config.to_dict())(batch))


def test_embeddings_are_the_text_encoders_own(config: Config) -> None:
    found = EncodeText(config.to_dict())({"prompt": np.array(PROMPTS), "other": np.arange(3)})
    assert torch.equal(from_bits(found["text_bf16"]), small_text().encode(PROMPTS).bfloat16())
    assert list(found["other"]) == [0, 1, 2] and list(found["prompt"]) == PROMPTS


def test_trajectories_begin_at_the_noise_that_a_session_of_that_seed_draws(config: Config, solved: Any) -> None:
    states = from_bits(solved["states_bf16"])
    assert states.shape == (3, 6, *config.geometry.clip_shape()[1:])
    for row, seed in enumerate(SEEDS):
        noise = clip_noise(seed, config.geometry.clip_chunks, config.geometry.chunk_shape()[1:])
        assert torch.equal(states[row, 0], noise.bfloat16())
    assert abs(float(states[:, 0].float().std()) - 1.0) < 0.03


def test_trajectories_are_the_guided_teachers_solutions_whatever_the_batch(config: Config, solved: Any) -> None:
    text = small_text()
    shape = config.geometry.chunk_shape()[1:]
    embeddings, negative = text.encode(PROMPTS).bfloat16().float(), text.encode([""])
    for row, seed in enumerate(SEEDS):
        noise = clip_noise(seed, config.geometry.clip_chunks, shape)[None]
        states, levels = solve(
            small_wan(), noise, embeddings[row : row + 1], negative, weight=3.0, steps=20, shift=5.0,
            kept_raw=config.pairs.kept_raw,
        )  # fmt: skip
        torch.testing.assert_close(from_bits(solved["states_bf16"][row]).float(), states[0], rtol=0.01, atol=0.01)
        assert tuple(solved["levels"][row]) == levels == tuple(raw_level(r, 5.0) for r in (1000, 750, 500, 250, 100, 0))
    assert "text_bf16" not in solved and list(solved["seed"]) == SEEDS


def test_a_shard_holds_every_row_with_what_it_came_from(solved: Any, tmp_path: Path) -> None:
    done = WriteShard(str(tmp_path), "teacher")(solved)
    assert {name: int(value[0]) for name, value in done.items()} == {"shard": 4, "rows": 3, "set_aside": 0}
    table = read_shard(tmp_path / f"{shard_name(4)}.parquet")
    assert table["prompt_id"].to_pylist() == [prompt_id(prompt) for prompt in PROMPTS]
    assert table["teacher_id"].to_pylist() == ["teacher"] * 3 and table["seed"].to_pylist() == SEEDS
    row = read_row(table, 1)
    assert torch.equal(row.states, from_bits(solved["states_bf16"][1])) and row.prompt == PROMPTS[1]
    assert not (tmp_path / "set_aside").exists()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_rows_that_are_not_finite_are_set_aside_with_a_reason(solved: Any, value: float, tmp_path: Path) -> None:
    spoilt = {**solved, "states_bf16": solved["states_bf16"].copy()}
    spoilt["states_bf16"][1, 3, 0, 0, 0, 0] = int(torch.tensor([value]).bfloat16().view(torch.int16))
    done = WriteShard(str(tmp_path), "teacher")(spoilt)
    assert (int(done["rows"][0]), int(done["set_aside"][0])) == (2, 1)
    assert read_shard(tmp_path / f"{shard_name(4)}.parquet")["sample"].to_pylist() == [0, 2]
    (aside,) = json.loads((tmp_path / "set_aside" / f"{shard_name(4)}.json").read_text())
    assert aside == {"sample": 1, "prompt_id": prompt_id(PROMPTS[1]), "reason": "states are not finite"}


def test_a_shard_of_nothing_but_bad_rows_is_not_written(solved: Any, tmp_path: Path) -> None:
    nan = int(torch.tensor([torch.nan]).bfloat16().view(torch.int16))
    spoilt = {**solved, "states_bf16": np.full_like(solved["states_bf16"], nan)}
    assert int(WriteShard(str(tmp_path), "teacher")(spoilt)["set_aside"][0]) == 3
    assert list(tmp_path.glob("*.parquet")) == []


def test_a_batch_that_is_not_one_whole_shard_is_refused(solved: Any, tmp_path: Path) -> None:
    part = {name: column[:2] for name, column in solved.items()}
    with pytest.raises(RuntimeError, match="shard 4: 2 rows came as one batch, 3 were expected"):
        WriteShard(str(tmp_path), "teacher")(part)
    with pytest.raises(RuntimeError, match="shard 4"):
        WriteShard(str(tmp_path), "teacher")({**solved, "shard": np.array([4, 4, 5])})
    assert list(tmp_path.iterdir()) == []


def test_pairs_are_read_back_in_the_order_asked_for(solved: Any, tmp_path: Path) -> None:
    WriteShard(str(tmp_path), "teacher")(solved)
    file = f"{shard_name(4)}.parquet"
    asked = {"sample": np.array([70, 71, 72]), "file": np.array([file] * 3), "index": np.array([2, 0, 2])}
    found = ReadPairs(str(tmp_path))(asked)
    assert list(found["sample"]) == [70, 71, 72] and list(found["prompt"]) == [PROMPTS[i] for i in (2, 0, 2)]
    assert np.array_equal(found["states_bf16"], solved["states_bf16"][[2, 0, 2]])
    assert np.array_equal(found["levels"], solved["levels"][[2, 0, 2]])


def test_a_corrupt_pair_is_never_handed_on(solved: Any, tmp_path: Path) -> None:
    writer = WriteShard(str(tmp_path), "teacher")
    row = writer._row(solved, 0)
    row["checksum"] = "0" * 64
    from diagonal.data.trajectory import write_shard

    write_shard(tmp_path / "s.parquet", [row])
    with pytest.raises(CorruptRowError):
        ReadPairs(str(tmp_path))({"sample": np.array([0]), "file": np.array(["s.parquet"]), "index": np.array([0])})


def test_a_teachers_id_is_that_of_its_weights(config: Config, tmp_path: Path) -> None:
    plain, ids = small_config(), []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        network = small_wan(seed)
        save_base(tmp_path / name, plain, network, small_codec(plain), small_tokenizer(), small_text_model(), {})
        ids.append(teacher_id(small_config(f"model.path={tmp_path / name}")))
    assert ids[0] == ids[1] == teacher_id(config) != ids[2] and len(ids[0]) == 16


def test_a_folder_without_a_manifest_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(FieldError, match="manifest.json.*exists"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text('{"shards": []}')
    assert read_manifest(tmp_path) == {"shards": []}
