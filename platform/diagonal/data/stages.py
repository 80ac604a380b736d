"""Stages of the data jobs: callables over batches of columns, that Ray Data maps and tests call directly."""

from __future__ import annotations

import json
import time
from collections import OrderedDict
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from diagonal.config import Config
from diagonal.data.pair_set import NOT_FINITE, PLAN, USABLE, PairPlan, aside_file, rows_checksum, shard_file
from diagonal.data.prompt_set import PromptSet
from diagonal.data.prompts import Order
from diagonal.data.trajectory import (
    CorruptRowError,
    checksum,
    from_bits,
    groups_of,
    open_shard,
    read_row,
    shard_bytes,
    to_bits,
)
from diagonal.diffusion.noise import Salt, clip_noise, mixed_seed
from diagonal.diffusion.teacher import Trajectory, solve
from diagonal.errors import require
from diagonal.files import file_hash
from diagonal.model.base_model import base_folder, load_teacher, load_text
from diagonal.storage import Folder

Columns = dict[str, Any]
Row = dict[str, Any]
HELD_BYTES = 512 * 2**20  # of row groups that a reader of pairs holds


class EncodeText:
    """Columns with one `shard` number, to which it adds `rows`, the shard's samples as JSON, and their embeddings.

    `text_bf16` `[1, n, l, d]` holds those of its n prompts, `negative_bf16` `[1, l, d]` that of the negative prompt, as
    int16 bits: the solvers need no text encoder. `encode_s` is the time that it took. The rows are a function of the
    plan and of the prompts in the folder `prompts`, so nobody holds them all.
    """

    def __init__(self, plan: PairPlan, prompts: Folder, device: str = "cpu") -> None:
        config = plan.config
        self._plan, self._prompts = plan, PromptSet(prompts)
        self._order = Order(len(self._prompts), config.seed)
        dtype = getattr(torch, config.model.compute_dtype)
        self._text = load_text(base_folder(config), config, dtype).to(device)
        self._negative = to_bits(self._text.encode([config.model.negative_prompt]))

    def __call__(self, batch: Columns) -> Columns:
        began_s, rows = time.monotonic(), self.rows(_only(batch["shard"]))
        text = to_bits(self._text.encode([row["prompt"] for row in rows]))
        return {
            "shard": batch["shard"],
            "rows": np.array([json.dumps(rows)]),
            "text_bf16": text[None],
            "negative_bf16": self._negative,
            "encode_s": np.array([time.monotonic() - began_s]),
        }

    def rows(self, shard: int) -> list[Row]:
        """The samples of a shard: number, prompt_id, prompt, seed."""
        samples = self._plan.samples(shard)
        prompts = self._prompts.take([self._order[sample] for sample in samples])
        return [
            {
                "sample": sample,
                "prompt_id": identity,
                "prompt": prompt,
                "seed": mixed_seed(self._plan.config.seed, Salt.PAIRS, sample),
            }
            for sample, (identity, prompt) in zip(samples, prompts, strict=True)
        ]


class SolveShard:
    """Solves the guided teacher's ODE for one shard's rows and writes the shard: whole, or not at all.

    Takes what `EncodeText` gives; returns one row of plain columns: see `diagonal.data.pair_set.Shard`, and the time of
    both steps. Rows that are not finite are set aside with a reason. A folder without the plan that the job wrote, as
    it is where a node does not share the job's disk, is refused before anything is solved.
    """

    def __init__(self, plan: PairPlan, folder: Folder, device: str = "cpu") -> None:
        seen_by_all = f"a folder that every node of the cluster sees; {PLAN}, which the job wrote, is not there"
        require(folder.has(PLAN), "train.storage", str(folder), seen_by_all)
        self._plan, self._config, self._folder, self._device = plan, plan.config, folder, device
        dtype = getattr(torch, plan.config.model.compute_dtype)
        self._teacher = load_teacher(base_folder(plan.config), plan.config, dtype).to(device)

    def __call__(self, batch: Columns) -> Columns:
        began_s, shard, rows = time.monotonic(), _only(batch["shard"]), json.loads(str(_only(batch["rows"])))
        text, negative = (from_bits(batch[name][0]).float() for name in ("text_bf16", "negative_bf16"))
        states, levels = self.solve([row["seed"] for row in rows], text, negative)
        solved = [
            {**row, "levels": levels, "states_bf16": bits, "checksum": checksum(bits)}
            for row, bits in zip(rows, states, strict=True)
        ]
        good = [row for row in solved if bool(torch.isfinite(from_bits(row["states_bf16"])).all())]
        kept = {row["sample"] for row in good}
        bad = [
            {"sample": row["sample"], "prompt_id": row["prompt_id"], "reason": NOT_FINITE}
            for row in rows
            if row["sample"] not in kept
        ]
        written = self._write(shard, good, bad)
        digest = rows_checksum((row["sample"], row["checksum"]) for row in good) if good else ""
        return {
            name: np.array([value])
            for name, value in (
                ("shard", shard),
                ("rows", len(good)),
                ("bytes", written),
                ("checksum", digest),
                ("quarantined", json.dumps(bad)),
                ("encode_s", _only(batch["encode_s"])),
                ("solve_s", time.monotonic() - began_s),
            )
        }

    def solve(self, seeds: list[int], text: Tensor, negative: Tensor) -> tuple[np.ndarray, list[float]]:
        """States as int16 bits `[n, s, c, f, h, w]` from seeded noise, and their levels.

        Embeddings `text` are `[n, l, d]`, `negative` is `[l, d]`.
        """
        pairs, geometry = self._config.pairs, self._config.geometry
        shape, text, negative = geometry.chunk_shape()[1:], text.to(self._device), negative.to(self._device)
        parts: list[np.ndarray] = []
        levels: tuple[float, ...] = ()
        for part in torch.arange(len(seeds)).split(pairs.batch_size):
            noise = torch.stack([clip_noise(seeds[index], geometry.clip_chunks, shape) for index in part.tolist()])
            states, levels = solve(
                self._teacher,
                noise.to(self._device),
                text[part],
                negative.expand(len(part), -1, -1),
                weight=pairs.guidance,
                steps=pairs.solver_steps,
                shift=self._config.schedule.shift,
                kept_raw=pairs.kept_raw,
            )
            parts.append(to_bits(states))
        return np.concatenate(parts), list(levels)

    def _write(self, shard: int, good: list[Row], bad: list[Row]) -> int:
        """Write the shard after the list of what it lacks, so that a shard which is there is told whole; its bytes."""
        if bad:
            self._folder.write_json(aside_file(shard), bad)
        else:
            self._folder.remove(aside_file(shard))
        if not good:
            return 0
        data = shard_bytes(good, self._plan.about)
        self._folder.write(shard_file(shard), data)
        return len(data)


class ReadPairs:
    """Reads the trajectory that each row's `file` and `index` name; adds `states_bf16`, `levels` and `prompt`.

    A row whose bytes changed since the set was verified is read once more, then `CorruptRowError` names it.
    """

    def __init__(self, folder: Folder | str) -> None:
        self._folder = folder if isinstance(folder, Folder) else Folder(folder)
        self._groups: OrderedDict[tuple[str, int], pa.Table] = OrderedDict()
        self._places: dict[str, list[tuple[int, int]]] = {}

    def __call__(self, batch: Columns) -> Columns:
        asked = zip(batch["file"], batch["index"], strict=True)
        found = [self._row(str(file), int(index)) for file, index in asked]
        return {
            "sample": batch["sample"],
            "prompt": np.array([trajectory.prompt for trajectory in found]),
            "levels": np.array([trajectory.levels for trajectory in found]),
            "states_bf16": np.stack([to_bits(trajectory.states) for trajectory in found]),
        }

    def _row(self, file: str, index: int) -> Trajectory:
        try:
            return read_row(*self._table(file, index))
        except (CorruptRowError, pa.ArrowException, OSError):
            self._groups.clear()  # what was read may be wrong, and not what is stored
        try:
            return read_row(*self._table(file, index))
        except (CorruptRowError, pa.ArrowException, OSError) as error:
            raise CorruptRowError(
                f"{self._folder / file}, row {index}, changed after the set was verified ({error}); remove "
                f"{self._folder / USABLE} and go on: the set is then verified again"
            ) from error

    def _table(self, file: str, index: int) -> tuple[pa.Table, int]:
        """The row group that holds a row, and its place in it; the newest groups are held."""
        group, place = self._places[file][index] if file in self._places else (-1, 0)
        if (file, group) in self._groups:
            self._groups.move_to_end((file, group))
            return self._groups[file, group], place
        with self._folder.open(file) as source:
            shard = open_shard(source, file)
            group, place = self._places.setdefault(file, list(groups_of(shard)))[index]
            self._groups[file, group] = table = shard.read_row_group(group)
        while len(self._groups) > 1 and sum(held.nbytes for held in self._groups.values()) > HELD_BYTES:
            self._groups.popitem(last=False)
        return table, place


def _only(column: Any) -> Any:
    """The one item of a column."""
    require(len(column) == 1, "rows of a batch", len(column), "1: one shard at a time")
    return column[0].item() if isinstance(column[0], np.generic) else column[0]


def teacher_id(config: Config) -> str:
    """First 16 hexadecimal digits over the teacher's weight files."""
    files = sorted((base_folder(config) / "transformer").glob("*.safetensors"))
    return checksum(np.frombuffer("".join(file_hash(file) for file in files).encode(), dtype=np.uint8))[:16]
