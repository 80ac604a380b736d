"""Replay: the chunks of a recorded session once more, through the same engine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diagonal.engine.drift import ReanchorPolicy
from diagonal.engine.engine import Engine
from diagonal.engine.model_runner import Servable
from diagonal.engine.recording import Recording
from diagonal.engine.specs import Event, PromptChange


@dataclass(frozen=True)
class ReplayedChunk:
    """Clean latents `[c, f, h, w]` and pixels `[f, h, w, 3]` uint8 of one chunk."""

    chunk: int
    clean: Tensor
    pixels: Tensor


def replay(release: Servable, recording: Recording, device: torch.device | str = "cpu") -> Iterator[ReplayedChunk]:
    """Make the recorded chunks again, alone: bit-equal where they were made alone on the same type of device, and
    within rounding of another batch size else. `SnapshotError` when release or configuration are others."""
    engine = Engine(release, device=device, reanchor=ReanchorPolicy())  # what was anchored anew is in the log
    engine.identity.check(recording.identity, "recording.identity")
    session_id = recording.spec.session_id
    engine.open(replace(recording.spec, schedule=recording.schedule.steps))
    for chunk in range(recording.chunks):
        for event in recording.before(chunk):
            _do(engine, session_id, event)
        engine.request(session_id)
        (result,) = engine.step()
        if result.error is not None:
            raise RuntimeError(f"chunk {chunk} of the replay failed: {result.error}")
        yield ReplayedChunk(chunk, engine.latents(session_id)[:, -engine.geometry.chunk_frames :], result.pixels)


def _do(engine: Engine, session_id: str, event: Event) -> None:
    """What happened before a chunk; a session that moved here is one that was paused and resumed."""
    if event.kind == "prompt":
        ids, detail = event.detail["event_ids"], event.detail
        engine.interact(session_id, PromptChange(ids[-1], detail["prompt"], detail["transition_chunks"]))
    elif event.kind == "reanchor":
        engine.reanchor(session_id)
    elif event.kind in ("resume", "restore"):
        engine.pause(session_id)
        engine.step()
        engine.resume(session_id)
