"""How long things took on a device, as a simulation needs it: from a bench's JSON, or from a small one by hand."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diagonal.config.parse import build
from diagonal.engine.budget import ChunkKind
from diagonal.errors import FieldError, require
from diagonal.jsonfile import read_json

_P95_SIGMAS = 1.645  # of the normal distribution
_DRAWS = 4096


@dataclass(frozen=True)
class StepTime:
    """One step that makes a chunk for each of `batch` sessions, decoding included, took `seconds` (median)."""

    forwards: int
    context_chunks: int
    batch: int
    seconds: float

    def __post_init__(self) -> None:
        for name, least in (("forwards", 1), ("context_chunks", 0), ("batch", 1)):
            value = getattr(self, name)
            require(value >= least, f"steps.{name}", value, f"a whole number of at least {least}")
        _seconds("steps.seconds", self.seconds, above=True)


@dataclass(frozen=True)
class ChunkTimes:
    """Measured times of one device and release.

    `recache_chunk_s`: writing one kept chunk of a session's cache anew. `rebuild_s`: building a decoder's state after
    a move. `encode_s`: a chunk into video, on one encoder's thread. `hop_s`: a call between two parts of the service.
    `deliver_s`: from a replica's encoded chunk until the gateway sends it, the store's write included.
    `p95_ratio`: the 95th percentile of a step's time over its median.
    """

    device: str
    source: str
    steps: tuple[StepTime, ...]
    recache_chunk_s: float = 0.0
    rebuild_s: float = 0.0
    encode_s: float = 0.0
    hop_s: float = 0.005
    deliver_s: float = 0.02
    p95_ratio: float = 1.0

    def __post_init__(self) -> None:
        require(len(self.steps) > 0, "steps", self.steps, "at least one measured step")
        ones = {(step.forwards, step.context_chunks) for step in self.steps if step.batch == 1}
        require(bool(ones), "steps.batch", [step.batch for step in self.steps], "a step with batch 1 among them")
        for name in ("recache_chunk_s", "rebuild_s", "encode_s", "hop_s", "deliver_s"):
            _seconds(name, getattr(self, name))
        right = math.isfinite(self.p95_ratio) and self.p95_ratio >= 1.0
        require(right, "p95_ratio", self.p95_ratio, "a number of at least 1")

    def step_s(self, kind: ChunkKind, batch: int) -> float:
        """Median seconds of a step: as measured, else between what was measured.

        In the forwards of a chunk along those of other kinds, in the batch along the sizes of the nearest kind; beyond
        what was measured in proportion.
        """
        alone = [step for step in self.steps if step.batch == 1]
        same = [step for step in alone if step.forwards == kind.forwards]
        if same:
            one_s = min(same, key=lambda step: abs(step.context_chunks - kind.context_chunks)).seconds
        else:
            by_forwards = sorted({step.forwards: step.seconds for step in alone}.items())
            fewest, seconds = by_forwards[0]
            below = kind.forwards < fewest
            one_s = seconds * kind.forwards / fewest if below else _between(by_forwards, kind.forwards)
        return one_s * self._growth(kind, batch)

    def _growth(self, kind: ChunkKind, batch: int) -> float:
        """A batch's step over one of a single session, by the nearest kind that was measured in several sizes."""
        rows: dict[tuple[int, int], dict[int, float]] = {}
        for step in self.steps:
            rows.setdefault((step.forwards, step.context_chunks), {})[step.batch] = step.seconds
        known = [(key, sizes) for key, sizes in rows.items() if 1 in sizes and (len(sizes) > 1 or len(rows) == 1)]
        if batch == 1 or not known:
            return float(batch)
        _, sizes = min(known, key=lambda row: abs(row[0][0] - kind.forwards) + abs(row[0][1] - kind.context_chunks))
        return _between(sorted(sizes.items()), batch) / sizes[1]

    @classmethod
    def read(cls, path: str | Path) -> ChunkTimes:
        """Of a file: a bench's JSON (`speed-*.json`), or an object of these fields."""
        found = read_json(path)
        require(isinstance(found, dict), "times", str(path), "a JSON object")
        return cls.of_bench(found, str(path)) if "rates" in found else build(cls, found, "times.")

    @classmethod
    def of_bench(cls, found: Mapping[str, Any], source: str) -> ChunkTimes:
        """Of a bench's findings. A chunk between the first and the settled one is taken by its forwards; encoding is
        what a chunk takes longer to the client; calls between processes are in no bench and keep their defaults."""
        try:
            decoded, dit, steady = found["rates"]["decoded"], found["rates"]["dit"], found["config"]
            steps, limit = str(steady["schedule"]["steps"]), int(steady["serve"]["batch_sessions"])
            window = steady["cache"]["window_frames"] // steady["geometry"]["chunk_frames"]
            forwards = int(steps[-1])
            settled_s = decoded["p50_ms"] / 1000
            rows = [
                StepTime(int(steps[0]), 0, 1, decoded["first_chunk_s"]),
                StepTime(forwards, window - 1, 1, settled_s),
            ]
            if (batching := found.get("batching")) and limit > 1:
                together = limit * batching["one_by_one_fps"] / batching["together_fps"]
                rows.append(StepTime(forwards, window - 1, limit, settled_s * together))
            client = found.get("client") or {}
            encode_s = max(0.0, client.get("p50_ms", decoded["p50_ms"]) / 1000 - settled_s)
            return cls(
                found["device"],
                f"{source}, {found['date']}",
                tuple(rows),
                dit["p50_ms"] / 1000 / forwards,
                settled_s * window,
                encode_s,
                p95_ratio=decoded["p95_ms"] / decoded["p50_ms"],
            )
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, FieldError):
                raise
            raise FieldError("times", source, f"a bench's JSON with rates, batching and config ({error!r})") from error


class Draws:
    """Times as they scatter: log-normal about their medians, the same for one seed."""

    def __init__(self, times: ChunkTimes, seed: int) -> None:
        self.times = times
        sigma, draw = math.log(times.p95_ratio) / _P95_SIGMAS, random.Random(seed)
        self._factors = [draw.lognormvariate(0.0, sigma) if sigma else 1.0 for _ in range(_DRAWS)]
        self._next = 0
        self._known: dict[tuple[ChunkKind, int], float] = {}

    def change(self, times: ChunkTimes) -> None:
        """From now on things take so long."""
        self.times = times
        self._known.clear()

    def step_s(self, kind: ChunkKind, batch: int) -> float:
        """Seconds of one step."""
        self._next = (self._next + 1) % _DRAWS
        return self.median_s(kind, batch) * self._factors[self._next]

    def median_s(self, kind: ChunkKind, batch: int) -> float:
        """As measured."""
        known = self._known.get((kind, batch))
        if known is None:
            known = self._known[kind, batch] = self.times.step_s(kind, batch)
        return known


def _between(points: Sequence[tuple[int, float]], at: int) -> float:
    """On the straight line between the two points around `at`; beyond the last one in proportion to it."""
    for (low, below), (high, above) in zip(points, points[1:], strict=False):
        if low <= at <= high:
            return below + (above - below) * (at - low) / (high - low)
    last, seconds = points[-1]
    return seconds * at / last


def _seconds(name: str, value: float, above: bool = False) -> None:
    right = math.isfinite(value) and (value > 0 if above else value >= 0)
    require(right, name, value, "seconds above 0" if above else "seconds of at least 0")
