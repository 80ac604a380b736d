"""Small shards for the tests of the data: rows of drawn states, and a folder that holds a finished set of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from diagonal.config import Config
from diagonal.data.pair_set import PairPlan, Shard, aside_file, begin, finish, rows_checksum, shard_file
from diagonal.data.prompts import prompt_id
from diagonal.data.trajectory import checksum, shard_bytes, to_bits
from diagonal.storage import Folder
from tests.networks import draw

SHAPE = (6, 4, 3, 2, 2)
LEVELS = [1.0, 0.9375, 0.5 / 1.4, 0.0]


def row_of(sample: int) -> dict[str, Any]:
    """A row whose states are drawn from its sample number."""
    bits = to_bits(draw(*SHAPE, seed=sample))
    prompt = f"a circle {sample}"
    return {
        "sample": sample,
        "prompt_id": prompt_id(prompt),
        "prompt": prompt,
        "seed": 2**62 + sample,
        "levels": LEVELS,
        "states_bf16": bits,
        "checksum": checksum(bits),
    }


def plan_of(**pairs: Any) -> PairPlan:
    """A plan of seven rows in shards of three."""
    settings = {"count": 7, "rows_per_shard": 3, "max_bad_share": 0.5, **pairs}
    config = Config.from_preset("tiny", [f"pairs.{name}={value}" for name, value in settings.items()])
    return PairPlan(config, 10, "hash of prompts", "teacher")


def write(folder: Folder, plan: PairPlan, shard: int, bad: tuple[int, ...] = ()) -> Shard:
    """Write a shard as the job does, with some samples set aside."""
    rows = [row_of(sample) for sample in plan.samples(shard) if sample not in bad]
    aside = tuple({"sample": s, "prompt_id": f"id{s}", "reason": "not_finite"} for s in plan.samples(shard) if s in bad)
    if aside:
        folder.write_json(aside_file(shard), aside)
    data = shard_bytes(rows, plan.about) if rows else b""
    if rows:
        folder.write(shard_file(shard), data)
    return Shard(shard, len(rows), len(data), digest_of(rows), aside)


def digest_of(rows: list[dict[str, Any]]) -> str:
    return rows_checksum((row["sample"], row["checksum"]) for row in rows) if rows else ""


def finished_set(folder: Folder, plan: PairPlan, bad: tuple[int, ...] = ()) -> Mapping[str, Any]:
    """A whole set; returns its manifest."""
    begin(folder, plan)
    return finish(folder, plan, [write(folder, plan, shard, bad) for shard in plan.shards])


def spoil(folder: Folder, name: str, place: int, value: int | None = None) -> None:
    """Change one byte of a file (by default every bit of it), or cut the file off there."""
    data = bytearray((folder.path / name).read_bytes())
    data[place] = data[place] ^ 0xFF if value is None else value
    (folder.path / name).write_bytes(bytes(data))


def same(row: Mapping[str, Any], sample: int) -> bool:
    """Whether a row as read is the one that was written."""
    expected = row_of(sample)
    return all(np.array_equal(row[name], expected[name]) for name in ("states_bf16", "prompt", "levels"))
