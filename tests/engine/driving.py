"""Driving an engine by hand: open, pull chunk by chunk, compare; and parts that count or fail on purpose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from diagonal.diffusion.rollout import DenoisedChunk
from diagonal.engine.engine import BudgetError, Engine
from diagonal.engine.model_runner import ModelRunner
from diagonal.engine.session import ChunkResult, Session, SessionSpec
from diagonal.model.vae import Decoder, DecoderState
from tests.networks import SmallRelease, small_release

CLEANER = ("schedule.sink_context=0.0", "schedule.clean_newest=true")  # than what reuse leaves in the cache
PROMPT = "a red circle moves left"
OTHER = "a blue square moves right"


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def engine_of(*settings: str, release: SmallRelease | None = None, **parts: Any) -> Engine:
    """An engine whose clock stands still, unless another is given: nobody is refused because a machine is slow."""
    return Engine(release or small_release(*settings), **{"clock": Clock(), **parts})


def spec_of(
    session_id: str = "s",
    *,
    frames: int | None = 81,
    prompt: str = PROMPT,
    seed: int = 3,
    schedule: str | None = None,
    paced: bool = True,
    record: bool = False,
) -> SessionSpec:
    return SessionSpec(session_id, prompt, seed, frames, schedule, paced, record)


def timed(release: SmallRelease, clock: Clock, forward_s: float, row_s: float = 0.0) -> SmallRelease:
    """From now on a forward takes `forward_s`, and `row_s` more for each row of its batch."""

    def pass_time(module: Any, inputs: Any, output: Any) -> None:
        clock.now_s += forward_s + row_s * len(inputs[0])

    release.network.register_forward_hook(pass_time)
    return release


def runner(engine: Engine) -> ModelRunner:
    """What makes the engine's chunks."""
    assert isinstance(engine.maker, ModelRunner)
    return engine.maker


def meanwhile(engine: Engine, action: Callable[[], object]) -> None:
    """Do something from now on whenever the engine is about to denoise, as another thread would."""
    denoise = engine.maker.denoise

    def act(batch: Sequence[Session]) -> DenoisedChunk:
        action()
        return denoise(batch)

    engine.maker.denoise = act  # type: ignore[method-assign]


def pull(engine: Engine, session_id: str = "s") -> ChunkResult:
    """The session's next chunk."""
    engine.request(session_id)
    (result,) = engine.step()
    assert result.session_id == session_id
    return result


def stream(engine: Engine, spec: SessionSpec, chunks: int | None = None) -> list[ChunkResult]:
    """Open a session and pull that many chunks, or all."""
    engine.open(spec)
    results = [pull(engine, spec.session_id)]
    while not results[-1].last and (chunks is None or len(results) < chunks):
        results.append(pull(engine, spec.session_id))
    return results


def equal(one: Sequence[ChunkResult], other: Sequence[ChunkResult]) -> bool:
    """The same chunks with the same pixels, bit for bit."""
    return [r.chunk for r in one] == [r.chunk for r in other] and all(
        torch.equal(a.pixels, b.pixels) for a, b in zip(one, other, strict=True)
    )


class BreakingDecoder(Decoder):
    """Fails once, on the call of that number."""

    def __init__(self, decoder: Decoder, fails_on: int) -> None:
        self.decoder, self.fails_on, self.calls = decoder, fails_on, 0

    def start(self) -> DecoderState:
        return self.decoder.start()

    def decode(self, latents: Tensor, state: DecoderState) -> Tensor:
        self.calls += 1
        if self.calls == self.fails_on:
            raise RuntimeError("the decoder gave up")
        return self.decoder.decode(latents, state)


class PoisonedText:
    """Encodes the prompt `moves` to numbers that are none, and fails on `right`."""

    def __init__(self, encoder: Any) -> None:
        self.encoder = encoder

    def encode(self, prompts: Sequence[str]) -> Tensor:
        if prompts == ["right"]:
            raise RuntimeError("the encoder gave up")
        found: Tensor = self.encoder.encode(prompts)
        return found * (float("nan") if prompts == ["moves"] else 1.0)


def admitted(engine: Engine, names: str, **wish: object) -> str:
    """Which of the sessions came in."""
    found = ""
    for name in names:
        try:
            engine.open(spec_of(name, **wish))  # type: ignore[arg-type]
            found += name
        except BudgetError:
            pass
    return found
