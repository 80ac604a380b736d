"""Stages of the data jobs: callables over batches of columns, that Ray Data maps and tests call directly."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from diagonal.config import Config
from diagonal.data.prompts import prompt_id
from diagonal.data.trajectory import checksum, from_bits, read_row, read_shard, to_bits, write_shard
from diagonal.diffusion.noise import clip_noise
from diagonal.diffusion.teacher import solve
from diagonal.model.weights import base_folder, file_hash, load_teacher, load_text
from diagonal.tree import read_json, write_json

Columns = dict[str, Any]


class EncodeText:
    """Adds `text_bf16`, the prompts' embeddings as int16 bits `[n, l, d]`, to columns with `prompt`."""

    def __init__(self, config: Mapping[str, Any], device: str = "cpu") -> None:
        self._config = Config.from_dict(config)
        dtype = getattr(torch, self._config.model.compute_dtype)
        self._text = load_text(base_folder(self._config), self._config, dtype).to(device)

    def __call__(self, batch: Columns) -> Columns:
        return {**batch, "text_bf16": to_bits(self._text.encode([str(prompt) for prompt in batch["prompt"]]))}


class SolveTrajectory:
    """Adds `states_bf16` `[n, s, c, f, h, w]` and `levels`: the guided teacher's ODE solutions from seeded noise."""

    def __init__(self, config: Mapping[str, Any], device: str = "cpu") -> None:
        self._config, self._device = Config.from_dict(config), device
        folder = base_folder(self._config)
        dtype = getattr(torch, self._config.model.compute_dtype)
        self._teacher = load_teacher(folder, self._config, dtype).to(device)
        text = load_text(folder, self._config, dtype)
        self._negative = text.encode([self._config.model.negative_prompt]).to(device)

    def __call__(self, batch: Columns) -> Columns:
        pairs, geometry = self._config.pairs, self._config.geometry
        text = from_bits(batch["text_bf16"]).float().to(self._device)
        shape = geometry.chunk_shape()[1:]
        noise = torch.stack([clip_noise(int(seed), geometry.clip_chunks, shape) for seed in batch["seed"]])
        parts = []
        for part in torch.arange(len(noise)).split(pairs.batch_size):
            states, levels = solve(
                self._teacher, noise[part].to(self._device), text[part], self._negative.expand(len(part), -1, -1),
                weight=pairs.guidance, steps=pairs.solver_steps, shift=self._config.schedule.shift,
                kept_raw=pairs.kept_raw,
            )
            parts.append(to_bits(states))
        kept = {name: column for name, column in batch.items() if name != "text_bf16"}
        rows = len(noise)
        return {**kept, "states_bf16": np.concatenate(parts), "levels": np.tile(np.array(levels), (rows, 1))}


class WriteShard:
    """Checks the rows of one shard and writes it; rows that are not finite are set aside with a reason.

    Returns one row: shard number, rows written, rows set aside. The batch must be exactly one shard.
    """

    def __init__(self, folder: str, teacher_id: str) -> None:
        self._folder, self._teacher_id = Path(folder), teacher_id

    def __call__(self, batch: Columns) -> Columns:
        shard, size = int(batch["shard"][0]), int(batch["shard_rows"][0])
        if len(batch["shard"]) != size or len(set(batch["shard"].tolist())) != 1:
            raise RuntimeError(f"shard {shard}: {len(batch['shard'])} rows came as one batch, {size} were expected")
        rows = [self._row(batch, index) for index in range(size)]
        finite = [bool(torch.isfinite(from_bits(row["states_bf16"])).all()) for row in rows]
        good = [row for row, kept in zip(rows, finite, strict=True) if kept]
        bad = [{"sample": row["sample"], "prompt_id": row["prompt_id"], "reason": "states are not finite"}
               for row, kept in zip(rows, finite, strict=True) if not kept]
        if bad:
            write_json(self._folder / "set_aside" / f"{shard_name(shard)}.json", bad)
        if good:
            write_shard(self._folder / f"{shard_name(shard)}.parquet", good)
        return {"shard": np.array([shard]), "rows": np.array([len(good)]), "set_aside": np.array([len(bad)])}

    def _row(self, batch: Columns, index: int) -> Columns:
        bits, prompt = batch["states_bf16"][index], str(batch["prompt"][index])
        return {
            "sample": int(batch["sample"][index]), "prompt_id": prompt_id(prompt), "prompt": prompt,
            "seed": int(batch["seed"][index]), "levels": [float(level) for level in batch["levels"][index]],
            "states_bf16": bits, "checksum": checksum(bits), "teacher_id": self._teacher_id,
        }


class ReadPairs:
    """Reads the trajectory that each row's `file` and `index` name; adds `states_bf16`, `levels` and `prompt`."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)
        self._table = lru_cache(maxsize=8)(self._read)

    def _read(self, name: str) -> pa.Table:
        return read_shard(self._folder / name)

    def __call__(self, batch: Columns) -> Columns:
        found = [read_row(self._table(str(f)), int(i)) for f, i in zip(batch["file"], batch["index"], strict=True)]
        return {
            "sample": batch["sample"],
            "prompt": np.array([trajectory.prompt for trajectory in found]),
            "levels": np.array([trajectory.levels for trajectory in found]),
            "states_bf16": np.stack([to_bits(trajectory.states) for trajectory in found]),
        }


def shard_name(shard: int) -> str:
    """Base name of a shard's files."""
    return f"pairs-{shard:06d}"


def teacher_id(config: Config) -> str:
    """First 16 hexadecimal digits over the teacher's weight files."""
    files = sorted((base_folder(config) / "transformer").glob("*.safetensors"))
    return checksum(np.frombuffer("".join(file_hash(file) for file in files).encode(), dtype=np.uint8))[:16]


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished pairs folder."""
    manifest: dict[str, Any] = read_json(folder / "manifest.json")
    return manifest
