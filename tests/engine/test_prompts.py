"""Prompts are encoded beside the engine's step, once each; who waits for one keeps nobody else waiting."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from diagonal.engine.prompts import Prompts, asked
from diagonal.engine.session import PromptChange
from tests.engine.driving import OTHER, PROMPT, engine_of, equal, pull, spec_of, stream
from tests.networks import SmallRelease, small_release

DEADLINE_S = 30.0
CPU = torch.device("cpu")


class Gate:
    """An encoder that lets one prompt through only when `opened`, and counts."""

    def __init__(self, release: SmallRelease, held: str) -> None:
        self.plain, self.held, self.opened = release.encoder, held, threading.Event()
        self.seen: list[tuple[str, str]] = []

    def encode(self, prompts: Sequence[str]) -> Tensor:
        self.seen.append((prompts[0], threading.current_thread().name))
        if prompts[0] == self.held:
            assert self.opened.wait(DEADLINE_S)
        found: Tensor = self.plain.encode(prompts)
        return found


def gated(held: str) -> tuple[SmallRelease, Gate]:
    release = small_release()
    gate = release.encoder = Gate(release, held)
    return release, gate


def test_a_prompt_that_takes_long_to_encode_keeps_no_other_session_waiting() -> None:
    release, gate = gated(OTHER)
    engine = engine_of(release=release, encode_prompts_async=True)
    for name, prompt in (("a", PROMPT), ("slow", OTHER)):
        engine.open(spec_of(name, prompt=prompt))
        engine.request(name)
    made = engine.step()
    for _ in range(3):
        engine.request("a")
        made += engine.step()
    assert [(result.session_id, result.chunk) for result in made] == [("a", chunk) for chunk in range(4)]
    gate.opened.set()
    (first,) = engine.step()
    assert (first.session_id, first.chunk, first.error) == ("slow", 0, None)
    assert all(thread != threading.current_thread().name for _, thread in gate.seen)


def test_a_changed_prompt_is_encoded_beside_other_chunks_and_shows_in_the_next() -> None:
    release, gate = gated(OTHER)
    engine = engine_of(release=release, encode_prompts_async=True)
    for name in "ab":
        stream(engine, spec_of(name), 1)
    engine.interact("b", PromptChange("e", OTHER))
    for name in "abab":
        engine.request(name)
    assert [result.session_id for result in engine.step()] == ["a"]
    gate.opened.set()
    (changed,) = engine.step()
    assert (changed.session_id, changed.chunk, changed.applied_event_ids) == ("b", 1, ("e",))


def test_an_idle_engine_takes_a_request_at_once_while_a_prompt_is_encoded() -> None:
    """The step that waits for the prompt is woken by the request of a session whose text is there."""
    release, gate = gated(OTHER)
    engine = engine_of(release=release, encode_prompts_async=True)
    stream(engine, spec_of("a"), 1)
    engine.open(spec_of("slow", prompt=OTHER))
    engine.request("slow")
    later = threading.Timer(0.1, engine.request, ("a",))
    later.start()
    made = engine.step()
    later.join(DEADLINE_S)
    assert [result.session_id for result in made] == ["a"]
    gate.opened.set()


def test_a_prompt_is_encoded_once_for_all_its_sessions_and_changes_nothing_they_show() -> None:
    release, gate = gated("nobody's")
    engine = engine_of(release=release)
    found = stream(engine, spec_of("a"), 2)
    stream(engine, spec_of("b", seed=9), 2)
    assert [prompt for prompt, _ in gate.seen] == [PROMPT]
    engine.interact("b", PromptChange("e", OTHER, 3))
    for _ in range(4):
        pull(engine, "b")
    assert [prompt for prompt, _ in gate.seen] == [PROMPT, OTHER], "once for all chunks of the transition"
    assert equal(found, stream(engine_of(), spec_of("a"), 2))


def test_a_change_that_comes_while_another_is_taken_in_does_not_disturb_it() -> None:
    engine = engine_of(release=(release := small_release()))
    stream(engine, spec_of("a"), 1)
    engine.interact("a", PromptChange("one", OTHER))
    expected = release.network.project_text(release.encoder.encode([OTHER]))  # type: ignore[operator]
    session = engine.table["a"]
    begin_chunk = session.begin_chunk

    def interrupted(changes: Sequence[PromptChange]) -> bool:
        engine.interact("a", PromptChange("two", "red"))
        return begin_chunk(changes)

    session.begin_chunk = interrupted  # type: ignore[method-assign]
    result = pull(engine, "a")
    assert result.error is None and result.applied_event_ids == ("one",)
    assert torch.equal(session.prompt.text.keys[1], expected.keys[1])  # type: ignore[union-attr]


def test_a_prompt_that_failed_is_tried_anew_and_old_ones_are_let_go() -> None:
    calls: list[str] = []

    def encode(prompt: str) -> Tensor:
        calls.append(prompt)
        if calls.count("bad") == 1 and prompt == "bad":
            raise RuntimeError("once")
        return torch.zeros(1)

    prompts = Prompts(encode, CPU, kept=2)
    with pytest.raises(RuntimeError, match="once"):
        prompts.ask("bad").result(DEADLINE_S)
    assert torch.equal(prompts.ask("bad").result(DEADLINE_S), torch.zeros(1))
    held = asked(prompts, ["bad"], {})
    for name in "xyz":
        prompts.ask(name).result(DEADLINE_S)
    assert asked(prompts, ["bad"], held)["bad"] is held["bad"] and calls.count("bad") == 2
    prompts.ask("bad").result(DEADLINE_S)
    prompts.ask("bad").result(DEADLINE_S)
    assert calls.count("bad") == 3
