"""One session's failure, wherever it comes from, is its own: the others get their chunks, in order and unharmed."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diagonal.engine.engine import Engine
from diagonal.engine.session import ChunkResult
from diagonal.model.vae import DecoderState, LinearCodec, LinearDecoder
from tests.engine.driving import PROMPT, BreakingDecoder, PoisonedText, engine_of, equal, spec_of, stream
from tests.networks import small_codec, small_release


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


def assert_only_b_failed(engine: Engine, steps: list[list[ChunkResult]], message: str) -> None:
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
    assert_only_b_failed(engine, three(engine, "moves"), "not finite")


class BlindDecoder(LinearDecoder):
    """Of the session whose chunk comes second it makes pixels that are no numbers, of finite latents."""

    def __init__(self, codec: LinearCodec) -> None:
        super().__init__(codec)
        self.calls = 0

    def decode(self, latents: Tensor, state: DecoderState) -> Tensor:
        self.calls += 1
        spoilt = self.calls == 2
        mark, self._codec.centre.data = self._codec.centre.data, self._codec.centre.data.clone()
        if spoilt:
            self._codec.centre.data[5] = float("nan")
        try:
            return super().decode(latents, state)
        finally:
            self._codec.centre.data = mark


def test_pixels_that_are_not_finite_end_their_session_alone() -> None:
    """uint8 no longer tells: the decoder says it beside them."""
    release = small_release()
    release.codec = BlindDecoder(copy.deepcopy(small_codec(release.config)))
    engine = engine_of(release=release)
    assert_only_b_failed(engine, three(engine), "not finite")


def test_a_context_that_is_not_finite_ends_its_session_before_it_is_seen() -> None:
    """The extra pass that writes a context of its own level shows nothing: what it gave is looked at all the same."""
    release = small_release("schedule.context=0.0")

    def spoil(module: Any, inputs: Sequence[Tensor], named: dict[str, Any], output: Tensor) -> Tensor:
        return torch.cat((output[:1], output[1:2] * float("nan"), output[2:])) if named["write"] else output

    hook = release.network.register_forward_hook(spoil, with_kwargs=True)
    engine = engine_of(release=release)
    for name in "abc":
        engine.open(spec_of(name, seed=ord(name)))
        engine.request(name)
    found = {result.session_id: result.code for result in engine.step()}
    assert found == {"a": None, "b": "not_finite", "c": None}
    hook.remove()
    for name in "ac":
        engine.request(name)
    assert [result.code for result in engine.step()] == [None, None]


def test_a_prompt_that_cannot_be_encoded_ends_its_session_alone() -> None:
    release = small_release()
    release.encoder = PoisonedText(release.encoder)
    engine = engine_of(release=release)
    assert_only_b_failed(engine, three(engine, "right"), "the encoder gave up")


def test_a_decoder_that_fails_ends_its_session_alone() -> None:
    release = small_release()
    release.codec = BreakingDecoder(release.codec, fails_on=2)
    engine = engine_of(release=release)
    assert_only_b_failed(engine, three(engine), "the decoder gave up")


def test_a_forward_that_fails_for_the_batch_is_run_again_one_by_one() -> None:
    release = small_release()
    release.encoder = PoisonedText(release.encoder)

    def refuse(module: Any, inputs: Sequence[Any]) -> None:
        if not bool(torch.isfinite(inputs[2].keys[0]).all()):
            raise RuntimeError("the kernel gave up")

    release.network.register_forward_pre_hook(refuse)
    engine = engine_of(release=release)
    assert_only_b_failed(engine, three(engine, "moves"), "the kernel gave up")


def test_a_failed_sessions_pages_serve_the_next_one_unharmed() -> None:
    release = small_release("serve.max_sessions=1")
    release.encoder = PoisonedText(release.encoder)
    engine = engine_of(release=release)
    assert stream(engine, spec_of(prompt="moves"))[0].error is not None
    engine.step()
    assert engine.stats().cache_bytes == 0
    assert equal(stream(engine, spec_of()), stream(engine_of(), spec_of()))
