"""A session: its state machine, its slack, its size, and what it keeps of the past."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from diagonal.diffusion.rollout import KeptChunk
from diagonal.engine.budget import RECACHE_ONCE
from diagonal.engine.session import IllegalMoveError, PromptChange, Session, SessionSpec, SessionState, decoder_bytes
from diagonal.engine.snapshot import Identity
from diagonal.errors import FieldError
from diagonal.model.cache import KVPool, new_cache
from diagonal.model.vae import DecoderState
from diagonal.schedule import StepSchedule
from tests.networks import draw, small_config

CONFIG = small_config()
GEOMETRY = CONFIG.geometry
S = SessionState
LEGAL = {
    (S.QUEUED, S.RUNNING),
    (S.QUEUED, S.PAUSED),
    (S.QUEUED, S.CANCELLED),
    (S.QUEUED, S.FAILED),
    (S.RUNNING, S.PAUSED),
    (S.RUNNING, S.DONE),
    (S.RUNNING, S.CANCELLED),
    (S.RUNNING, S.FAILED),
    (S.PAUSED, S.QUEUED),
    (S.PAUSED, S.RUNNING),
    (S.PAUSED, S.CANCELLED),
    (S.PAUSED, S.FAILED),
}


def session_of(pixel_frames: int | None = 81, history_frames: int = 24) -> Session:
    pool = KVPool(layers=1, heads=1, head_dim=2, page_tokens=GEOMETRY.chunk_tokens, pages=4)
    spec = SessionSpec("s", "a red circle", 0, pixel_frames)
    identity = Identity("small", "", "")
    return Session(spec, StepSchedule(), new_cache(CONFIG, pool), DecoderState(), history_frames, identity)


@pytest.mark.parametrize(("before", "after"), list(itertools.product(S, S)))
def test_a_move_is_allowed_or_raises_naming_both_states_and_changes_nothing(
    before: SessionState, after: SessionState
) -> None:
    session = session_of()
    session.state = before
    if (before, after) in LEGAL:
        session.move(after)
        assert session.state == after
    else:
        with pytest.raises(IllegalMoveError, match=f"session s: {before} -> {after} is not allowed"):
            session.move(after)
        assert session.state == before


def test_a_session_ends_done_cancelled_or_failed() -> None:
    session, ended = session_of(), []
    for session.state in S:
        if session.ended:
            ended.append(session.state)
    assert ended == [S.DONE, S.CANCELLED, S.FAILED]


def test_only_a_paused_session_holds_no_slot_and_only_a_watched_one_budget() -> None:
    session = session_of()
    found = {}
    for session.state in S:
        found[session.state] = (session.live, session.playing)
    assert found == {
        S.QUEUED: (True, True),
        S.RUNNING: (True, True),
        S.PAUSED: (False, False),
        S.DONE: (True, False),
        S.CANCELLED: (True, False),
        S.FAILED: (True, False),
    }


@pytest.mark.parametrize(
    ("field", "value"), [("session_id", ""), ("prompt", " \n"), ("seed", -1), ("seed", 2**63), ("pixel_frames", 0)]
)
def test_a_wrong_wish_is_refused_by_name(field: str, value: Any) -> None:
    wish: dict[str, Any] = {"session_id": "s", "prompt": "a", "seed": 0, "pixel_frames": 81, field: value}
    with pytest.raises(FieldError) as refused:
        SessionSpec(**wish)
    assert (refused.value.field, refused.value.value) == (field, value)


@pytest.mark.parametrize(("field", "value"), [("prompt", ""), ("transition_chunks", -1), ("transition_chunks", 65)])
def test_a_wrong_prompt_change_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(FieldError, match=field):
        PromptChange(**{"event_id": "e", "prompt": "a", field: value})


@pytest.mark.parametrize("wanted", [1, 8, 9, 10, 20, 21, 81, 82, 1000])
def test_the_shown_frames_of_all_chunks_are_the_wanted_ones(wanted: int) -> None:
    session = session_of(wanted)
    chunks = session.total_chunks(GEOMETRY)
    assert chunks is not None
    shown = [session.shown_pixel_frames(GEOMETRY, chunk) for chunk in range(chunks)]
    assert sum(shown) == wanted and min(shown) > 0
    assert shown[:-1] == [GEOMETRY.chunk_pixel_frames(chunk) for chunk in range(chunks - 1)]


def test_an_endless_stream_has_no_last_chunk_and_shows_every_frame() -> None:
    session = session_of(None)
    assert session.total_chunks(GEOMETRY) is None
    assert [session.shown_pixel_frames(GEOMETRY, chunk) for chunk in (0, 1, 10**6)] == [9, 12, 12]


def test_slack_is_the_media_made_less_the_time_gone_by() -> None:
    session = session_of()
    assert session.slack_s(GEOMETRY, 100.0) == float("-inf")
    session.playback.zero_s, session.progress.next_chunk = 10.0, 3
    assert session.slack_s(GEOMETRY, 12.0) == 33 / 16 - 2.0
    session.progress.next_chunk = 4
    assert session.slack_s(GEOMETRY, 12.0) == 45 / 16 - 2.0


def test_a_session_set_to_play_has_so_much_slack_then_on_whatever_clock() -> None:
    session = session_of()
    session.progress.next_chunk = 5
    session.playback.begin(50.0, session.media_s(GEOMETRY), None)
    assert session.playback.zero_s is None
    session.playback.begin(7000.0, session.media_s(GEOMETRY), 0.8125)
    assert session.slack_s(GEOMETRY, 7000.0) == 0.8125 and session.slack_s(GEOMETRY, 7001.0) == -0.1875


def test_a_session_ends_when_its_frames_are_made_and_what_is_ahead_is_played() -> None:
    session = session_of(81)
    assert session.demand_progress(GEOMETRY, 0.0).remaining_s == 81 / 16
    session.progress.next_chunk = 5
    session.playback.begin(10.0, session.media_s(GEOMETRY), 0.5)
    assert session.demand_progress(GEOMETRY, 10.0).remaining_s == (81 - 57) / 16 + 0.5
    assert session_of(None).demand_progress(GEOMETRY, 0.0).remaining_s == float("inf")


def test_a_session_recaches_each_chunk_of_a_transition_once_for_a_switch() -> None:
    def recaches(session: Session) -> float:
        return session.demand_progress(GEOMETRY, 0.0).recaches

    session = session_of()
    assert recaches(session) == 0.0
    session.rebuild.reason = "resume"
    assert recaches(session) == RECACHE_ONCE
    session.rebuild.reason = ""
    session.prompt.pending.append(PromptChange("e", "a", 1))
    assert recaches(session) == RECACHE_ONCE
    session.prompt.pending.append(PromptChange("e", "a", 2))
    assert recaches(session) == 1.0
    session.prompt.pending.clear()
    session.prompt.timeline = session.prompt.timeline.change("b", 3).advance()
    assert recaches(session) == 1.0


def test_what_is_kept_is_the_window_without_the_chunk_in_progress_and_the_newest_latents() -> None:
    session = session_of(history_frames=7)
    parts = [draw(4, 3, 4, 6, seed=chunk) for chunk in range(9)]
    for chunk, part in enumerate(parts):
        session.latents.add(KeptChunk(chunk, part, 0.5), part, session.cache, session.history_frames)
        assert [item.chunk for item in session.latents.window] == [0, *range(max(1, chunk - 1), chunk + 1)][: chunk + 1]
    assert session.latents.history is not None
    assert torch.equal(session.latents.history, torch.cat(parts, dim=1)[:, -7:])
    assert session.latents.history.untyped_storage().nbytes() == session.latents.history.nbytes, (
        "no older frame hides behind it"
    )
    assert session.latents.bytes == (3 * 3 + 7) * 4 * 4 * 6 * 4


def test_the_decoders_bytes_are_those_of_its_tensors() -> None:
    assert decoder_bytes(DecoderState(3, [None, "Rep", draw(2, 3), draw(5, dtype=torch.bfloat16)])) == 6 * 4 + 5 * 2
