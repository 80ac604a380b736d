"""Step schedules: the strictly falling noise levels of each chunk, and how its context is written."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final, Literal

from diagonal.errors import require
from diagonal.setting import Allowed, check, setting

Context = Literal["reuse"] | float

RAW_TIMESTEPS: Final = 1000
RAW_STEPS: Final[dict[int, tuple[int, ...]]] = {
    5: (1000, 750, 500, 250, 100),
    4: (1000, 750, 500, 100),
    3: (1000, 750, 100),
    2: (1000, 100),
    1: (1000,),
}
NAMED_STEPS: Final[dict[str, tuple[tuple[int, ...], float]]] = {
    "self-forcing": ((1000, 750, 500, 250), 0.0),
    "causvid": ((1000, 757, 522), 0.0),  # with shift 1: its timesteps are not warped
}
STRING: Final = re.compile(r"[1-5]+(@[1-9][0-9]{0,2})?")
ALLOWED: Final = (
    "a string of digits 1 to 5, one a chunk, such as '4322222', with or without the raw timestep that rows end at "
    f"('4322222@250'), or one of {sorted(NAMED_STEPS)}"
)


def warp(u: float, shift: float) -> float:
    """Noise level of the uniform time `u` in [0, 1]: `shift*u / (1 + (shift-1)*u)` (docs/method.md, warp)."""
    return shift * u / (1.0 + (shift - 1.0) * u)


def raw_level(raw: int, shift: float) -> float:
    """Noise level of a raw timestep 0 to 1000; exact, never a nearest grid entry."""
    require(0 <= raw <= RAW_TIMESTEPS, "raw timestep", raw, f"a whole number from 0 to {RAW_TIMESTEPS}")
    return warp(raw / RAW_TIMESTEPS, shift)


@dataclass(frozen=True)
class StepSchedule:
    """Levels by chunk. `steps` is '4322222' (steps by chunk, the last repeats for ever), the same with the raw timestep
    that rows of two and more steps end at ('4322222@250'; 100 without it), or a named list.

    `context` says how a finished chunk enters the cache: "reuse" keeps the K/V of its last denoising forward;
    a level re-noises the finished chunk to it and spends one further forward; None takes the list's own default.
    `sink_context` is the same for a stream's first chunk alone, which every later chunk attends to: 0 keeps that anchor
    clean for one forward a stream. `clean_newest` writes the newest latent frame of every finished chunk clean, which
    the next chunk follows: a forward of that frame alone, unless the chunk is cached clean as a whole.
    """

    steps: str = setting("4322222", "Denoising steps of each chunk; the last digit stands for all later ones.", ALLOWED)
    shift: float = setting(5.0, "Warp of noise levels.", Allowed("a number of at least 1", lambda shift: shift >= 1.0))
    context: Context | None = setting(
        None,
        "Noise level at which a finished chunk enters the cache; reuse keeps what its last step computed.",
        "null (the schedule's own), 'reuse', or a level in [0, 1]",
    )
    sink_context: float | None = setting(
        None,
        "Noise level at which the first chunk, the attention sink, enters the cache; 0 is a clean anchor.",
        "null (as schedule.context), or a level in [0, 1]",
    )
    clean_newest: bool = setting(
        False, "Cache the newest latent frame of each finished chunk clean, by a forward of that frame alone."
    )

    def __post_init__(self) -> None:
        valid = isinstance(self.steps, str) and (self.steps in NAMED_STEPS or bool(STRING.fullmatch(self.steps)))
        require(valid, "schedule.steps", self.steps, ALLOWED)
        falling = all(a > b for row in self.raw_rows for a, b in zip(row, row[1:], strict=False))
        require(falling, "schedule.steps", self.steps, "a last timestep below the one before it in every row")
        check(self, "schedule")
        require(
            self.context in (None, "reuse") or _is_level(self.context),
            "schedule.context",
            self.context,
            "'reuse' or a level in [0, 1]",
        )
        require(
            self.sink_context is None or _is_level(self.sink_context),
            "schedule.sink_context",
            self.sink_context,
            "null, or a level in [0, 1]",
        )
        reused = self.rows if self.sink_context is None else self.rows[1:] or self.rows
        require(
            self.resolved_context != "reuse" or min(len(row) for row in reused) > 1,
            "schedule.context",
            "reuse",
            f"a level: {self.steps!r} has a one-step row, and reuse would cache pure noise",
        )

    @cached_property
    def raw_rows(self) -> tuple[tuple[int, ...], ...]:
        """Raw timesteps of each listed chunk."""
        if self.steps in NAMED_STEPS:
            return (NAMED_STEPS[self.steps][0],)
        digits, _, last = self.steps.partition("@")
        rows = [RAW_STEPS[int(digit)] for digit in digits]
        return tuple((*row[:-1], int(last)) if last and len(row) > 1 else row for row in rows)

    @cached_property
    def rows(self) -> tuple[tuple[float, ...], ...]:
        """Levels of each listed chunk; the last row stands for every later chunk."""
        return tuple(tuple(raw_level(raw, self.shift) for raw in row) for row in self.raw_rows)

    @property
    def resolved_context(self) -> Context:
        """The context in force: the given one, or the named list's own, or "reuse"."""
        if self.context is not None:
            return self.context
        named = NAMED_STEPS.get(self.steps)
        return named[1] if named else "reuse"

    def with_steps(self, steps: str) -> StepSchedule:
        """Another list of steps under this one's warp and contexts."""
        return replace(self, steps=steps, context=self.resolved_context)

    def context_of(self, chunk: int) -> Context:
        """How that chunk enters the cache: "reuse", or a level."""
        return self.sink_context if chunk == 0 and self.sink_context is not None else self.resolved_context

    def levels(self, chunk: int) -> tuple[float, ...]:
        """Strictly falling levels of that chunk's denoising forwards."""
        require(chunk >= 0, "chunk", chunk, "a whole number of at least 0")
        return self.rows[min(chunk, len(self.rows) - 1)]

    def context_level(self, chunk: int) -> float:
        """Level of the input of the forward that writes that chunk's cached K/V."""
        context = self.context_of(chunk)
        return self.levels(chunk)[-1] if context == "reuse" else float(context)

    def refreshes_newest(self, chunk: int) -> bool:
        """Whether that chunk costs a forward of its newest latent frame beside its own."""
        return self.clean_newest and self.context_level(chunk) > 0.0

    def forwards(self, chunk: int) -> int:
        """Forwards of the whole chunk that it costs: its steps, and one more where the context is a level."""
        return len(self.levels(chunk)) + (self.context_of(chunk) != "reuse")

    def total_forwards(self, chunks: int) -> int:
        """Forwards of that many chunks, context passes included (28 + 7 for 'self-forcing' and 7 chunks)."""
        return sum(self.forwards(chunk) for chunk in range(chunks))

    def total_cost(self, chunks: int, chunk_frames: int) -> float:
        """The same with forwards of a newest frame alone, each as its share of a chunk."""
        newest = sum(map(self.refreshes_newest, range(chunks)))
        return round(self.total_forwards(chunks) + newest / chunk_frames, 2)


def _is_level(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0.0 <= value <= 1.0
