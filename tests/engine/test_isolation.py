"""One session's failure, wherever it comes from, is its own: the others get their chunks, in order and unharmed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diagonal.engine.engine import Engine
from diagonal.engine.session import ChunkResult
from tests.engine.driving import PROMPT, BreakingDecoder, engine_of, equal, spec_of, stream
from tests.networks import small_release


class PoisonedText:
    """Encodes the prompt `moves` to numbers that are none, and fails on `right`."""

    def __init__(self, encoder: Any) -> None:
        self.encoder = encoder

    def encode(self, prompts: Sequence[str]) -> Tensor:
        if prompts == ["right"]:
            raise RuntimeError("the encoder gave up")
        found: Tensor = self.encoder.encode(prompts)
        return found * (float("nan") if prompts == ["moves"] else 1.0)


def three(engine: Engine, middle: str = PROMPT) -> list[list[ChunkResult]]:
    """Three sessions side by side, two chunks of each that lives; results by step."""
    for name, prompt in (("a", PROMPT), ("b", middle), ("c", PROMPT)):
        engine.open(spec_of(name, prompt=prompt, seed=ord(name)))
    steps = []
    for names in ("abc", "ac"):
        for name in names:
            engine.request(name)
        steps.append(engine.step())
    return steps


def check_only_b_failed(engine: Engine, steps: list[list[ChunkResult]], message: str) -> None:
    errors = {result.session_id: result.error for results in steps for result in results if result.error}
    assert set(errors) == {"b"} and message in str(errors["b"])
    (failed,) = [result for result in steps[0] if result.session_id == "b"]
    assert failed.last and failed.chunk == 0 and len(failed.pixels) == 0
    for name in "ac":
        mine = [result for results in steps for result in results if result.session_id == name]
        assert [result.chunk for result in mine] == [0, 1] and [len(result.pixels) for result in mine] == [9, 12]
        alone = stream(engine_of(), spec_of(name, seed=ord(name)), 2)
        for result, expected in zip(mine, alone, strict=True):
            assert (result.pixels.int() - expected.pixels.int()).abs().max() <= 1
    stats = engine.stats()
    assert stats.active_sessions == 2 and stats.cache_bytes == stats.cache_capacity_bytes // 4


def test_latents_that_are_not_finite_end_their_session_alone() -> None:
    release = small_release()
    release.encoder = PoisonedText(release.encoder)
    engine = engine_of(release=release)
    check_only_b_failed(engine, three(engine, "moves"), "not finite")


def test_a_prompt_that_cannot_be_encoded_ends_its_session_alone() -> None:
    release = small_release()
    release.encoder = PoisonedText(release.encoder)
    engine = engine_of(release=release)
    check_only_b_failed(engine, three(engine, "right"), "the encoder gave up")


def test_a_decoder_that_fails_ends_its_session_alone() -> None:
    release = small_release()
    release.codec = BreakingDecoder(release.codec, fails_on=2)
    engine = engine_of(release=release)
    check_only_b_failed(engine, three(engine), "the decoder gave up")


def test_a_forward_that_fails_for_the_batch_is_run_again_one_by_one() -> None:
    release = small_release()
    release.encoder = PoisonedText(release.encoder)

    def refuse(module: Any, inputs: Sequence[Tensor]) -> None:
        if not bool(torch.isfinite(inputs[2]).all()):
            raise RuntimeError("the kernel gave up")

    release.network.register_forward_pre_hook(refuse)
    engine = engine_of(release=release)
    check_only_b_failed(engine, three(engine, "moves"), "the kernel gave up")


def test_a_failed_sessions_pages_serve_the_next_one_unharmed() -> None:
    release = small_release("serve.max_sessions=1")
    release.encoder = PoisonedText(release.encoder)
    engine = engine_of(release=release)
    assert stream(engine, spec_of(prompt="moves"))[0].error is not None
    engine.step()
    assert engine.stats().cache_bytes == 0
    assert equal(stream(engine, spec_of()), stream(engine_of(), spec_of()))
