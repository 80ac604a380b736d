"""What a viewer asked for, and when: the session's wish, prompt changes, the timeline of its text, its event log."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from diagonal.errors import require

MAX_SEED = 2**63 - 1
MAX_PENDING = 64  # prompt changes that may wait for one chunk
MAX_EVENTS = 4096  # of a recording; a longer session cannot be replayed
MAX_BLENDS = 32  # prompts that a text may be made of, when each change interrupts the one before it


@dataclass(frozen=True)
class SessionSpec:
    """What was asked for. `pixel_frames` None is an endless stream; `schedule` None is the release's own.

    `paced` sessions are watched while they are made, and admitted by the real-time budget; the others take the time
    that is left. `record` keeps an event log for `engine.replay`: it holds prompts, so only who asked for it gets it.
    """

    session_id: str
    prompt: str
    seed: int
    pixel_frames: int | None
    schedule: str | None = None
    paced: bool = True
    record: bool = False

    def __post_init__(self) -> None:
        require(self.session_id != "", "session_id", self.session_id, "a name that is not empty")
        require(self.prompt.strip() != "", "prompt", self.prompt, "a text that is not empty")
        require(0 <= self.seed <= MAX_SEED, "seed", self.seed, f"a whole number from 0 to {MAX_SEED}")
        require(
            self.pixel_frames is None or self.pixel_frames >= 1,
            "pixel_frames",
            self.pixel_frames,
            "a whole number of at least 1, or null for an endless stream",
        )


@dataclass(frozen=True)
class PromptChange:
    """A new prompt from the next chunk on; `transition_chunks` 0 is a hard switch, n interpolates over n chunks."""

    event_id: str
    prompt: str
    transition_chunks: int = 0

    def __post_init__(self) -> None:
        require(self.prompt.strip() != "", "prompt", self.prompt, "a text that is not empty")
        require(
            0 <= self.transition_chunks <= 64,
            "transition_chunks",
            self.transition_chunks,
            "a whole number from 0 to 64",
        )


@dataclass(frozen=True)
class Event:
    """One entry of the event log: what happened before that chunk was generated.

    Kinds: schedule, prompt, pause, resume, restore, reanchor, recache. `detail` is plain JSON.
    """

    kind: str
    chunk: int
    detail: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Blend:
    """A prompt, and how far the text before it moved towards its embeddings."""

    prompt: str
    weight: float = 1.0


@dataclass(frozen=True)
class Timeline:
    """The text of a session: the blends it is made of, and a change under way, `done` of `total` chunks.

    Prompts instead of embeddings (4 MB at 512 tokens): the same calls give the same bits again elsewhere.
    """

    blends: tuple[Blend, ...]
    target: str | None = None
    done: int = 0
    total: int = 0

    @classmethod
    def of(cls, prompt: str) -> Timeline:
        return cls((Blend(prompt),))

    @property
    def in_transition(self) -> bool:
        """Whether a change is under way."""
        return self.target is not None

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompts that the text is made of now."""
        known = tuple(blend.prompt for blend in self.blends)
        return known if self.target is None else (*known, self.target)

    def change(self, prompt: str, chunks: int) -> Timeline:
        """Begin to move to `prompt` over so many chunks (0 counts as 1), from wherever the text is now."""
        frozen = self.blends
        if self.target is not None and self.done:
            frozen = _bounded((*frozen, Blend(self.target, self.done / self.total)))
        return Timeline(frozen, prompt, 0, max(1, chunks))

    def advance(self) -> Timeline:
        """One chunk further; the last step leaves the target alone."""
        if self.target is None:
            return self
        arrived = self.done + 1 >= self.total
        return Timeline.of(self.target) if arrived else replace(self, done=self.done + 1)

    def text(self, encode: Callable[[str], Tensor]) -> Tensor:
        """Embeddings `[1, l, n]`: from the first prompt's, step by step towards each following one's."""
        text = encode(self.blends[0].prompt)
        for blend in self.blends[1:]:
            text = torch.lerp(text, encode(blend.prompt), blend.weight)
        if self.target is not None and self.done:
            text = torch.lerp(text, encode(self.target), self.done / self.total)
        return text


def _bounded(blends: tuple[Blend, ...]) -> tuple[Blend, ...]:
    """At most `MAX_BLENDS`: the one with the least part in the text goes, which is below 1/MAX_BLENDS of it."""
    if len(blends) <= MAX_BLENDS:
        return blends
    parts, left = [], 1.0
    for blend in reversed(blends[1:]):
        parts.append(left * blend.weight)
        left *= 1.0 - blend.weight
    shares = [left, *reversed(parts)]
    least = shares.index(min(shares))
    kept = (*blends[:least], *blends[least + 1 :])
    return (replace(kept[0], weight=1.0), *kept[1:])
