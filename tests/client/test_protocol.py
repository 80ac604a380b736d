"""A live session's state without a socket: every chunk once, in order, whole; and what ends it."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import pytest

from diagonal.client import BrokenStreamError, DiagonalError, NoAnswerError, RefusedError, ServerFullError
from diagonal.client.protocol import StreamState, start_fields
from diagonal.media.encode import ChunkEncoder

FPS, FRAMES = 16, (9, 12, 12)


@pytest.fixture(scope="module")
def parts() -> list[bytes]:
    encoder = ChunkEncoder(32, 32, FPS)
    chunks = [encoder.encode_chunk(np.full((frames, 32, 32, 3), 99, dtype=np.uint8)) for frames in FRAMES]
    return [encoder.init_segment(), *chunks]


def started(next_chunk: int = 0, token: str = "t.0", **config: Any) -> str:
    config = {"fps": FPS, "width": 32, "height": 32, "num_frames": sum(FRAMES), "seed": 1} | config
    return json.dumps(
        {
            "type": "video.start",
            "request_id": "video_1",
            "mime": "video/mp4",
            "config": config,
            "next_chunk": next_chunk,
            "resume_token": token,
        }
    )


def give(state: StreamState, parts: list[bytes], index: int, **changes: Any) -> Any:
    """A chunk and its metadata, as the server sends them."""
    media = parts[index + 1]
    data = parts[0] + media if index == 0 else media
    about = {
        "type": "video.chunk_metadata",
        "generation_chunk_index": index,
        "num_frames": FRAMES[index],
        "byte_length": len(data),
        "chunk_sha256": hashlib.sha256(media).hexdigest(),
        "resume_token": f"t.{index + 1}",
    }
    assert state.receive(json.dumps(about | changes)) is None
    return state.receive(data)


@pytest.fixture
def state() -> StreamState:
    state = StreamState(start_fields("a red circle", frames=33))
    state.receive(started())
    return state


def test_chunks_join_to_the_stream_and_say_where_they_stand(state: StreamState, parts: list[bytes]) -> None:
    chunks = [give(state, parts, index) for index in range(3)]
    assert [(chunk.index, chunk.first_frame, chunk.frames) for chunk in chunks] == [(0, 0, 9), (1, 9, 12), (2, 21, 12)]
    assert b"".join(chunk.data for chunk in chunks) == b"".join(parts)
    state.receive(json.dumps({"type": "session.done", "chunks": 3, "stopped": False}))
    assert state.done and state.media_s == 33 / 16
    state.closed(1000)


@pytest.mark.parametrize(
    ("given", "changes", "code"),
    [
        ((0, 2), {}, "chunk_missing"),
        ((0, 0), {}, "chunk_repeated"),
        ((0, 1), {"chunk_sha256": "0" * 64}, "wrong_hash"),
        ((0, 1), {"byte_length": 5}, "wrong_hash"),
        ((0, 1), {"num_frames": 11}, "wrong_place"),
        ((0, 2), {"generation_chunk_index": 1}, "wrong_place"),
    ],
)
def test_a_chunk_that_is_not_the_next_one_whole_and_in_its_place_is_an_error(
    state: StreamState, parts: list[bytes], given: tuple[int, int], changes: dict[str, Any], code: str
) -> None:
    give(state, parts, given[0])
    with pytest.raises(BrokenStreamError) as caught:
        give(state, parts, given[1], **changes)
    assert caught.value.code == code


def test_an_end_before_the_last_frame_is_an_error_unless_it_was_asked_for(
    state: StreamState, parts: list[bytes]
) -> None:
    give(state, parts, 0)
    with pytest.raises(BrokenStreamError, match="9 of 33"):
        state.receive(json.dumps({"type": "session.done", "stopped": False}))
    state.receive(json.dumps({"type": "session.done", "stopped": True}))
    assert state.stopped


def test_after_a_break_the_newest_token_asks_for_the_next_chunk(state: StreamState, parts: list[bytes]) -> None:
    give(state, parts, 0)
    change = state.change({"prompt": "a blue square"})
    state.closed(1006)
    assert json.loads(state.opening()) == {"type": "session.start", "resume_token": "t.1"}
    assert not state.answered
    state.receive(started(1, "u.1"))
    assert state.answered and state.reminders() == [change.message]
    give(state, parts, 1)
    with pytest.raises(BrokenStreamError, match="wanted is 2"):
        state.receive(started(1, "v.1"))


def test_a_viewer_who_comes_back_says_again_how_far_he_has_played(parts: list[bytes]) -> None:
    state = StreamState(start_fields("x", buffer_s=2.0))
    state.receive(started())
    state.position(1.5)
    state.position(1.0)  # late news
    assert json.loads(state.opening())["streaming_buffer_seconds"] == 2.0
    assert [json.loads(message) for message in state.reminders()] == [
        {"type": "session.playback", "position_seconds": 1.5}
    ]


@pytest.mark.parametrize(
    ("close", "error", "goes_on"),
    [
        (1006, None, True),
        (1012, None, True),
        (1001, None, True),
        (1013, "unavailable", True),
        (1008, "stall_timeout", False),
        (4001, "session_taken_over", False),
        (4001, None, False),
        (1011, "generation_failed", False),
    ],
)
def test_what_breaks_is_gone_on_with_and_what_is_over_is_told(
    state: StreamState, close: int, error: str | None, goes_on: bool
) -> None:
    if error:
        state.receive(json.dumps({"type": "error", "code": error, "message": "no", "request_id": "video_1"}))
    if goes_on:
        return state.closed(close)
    with pytest.raises(DiagonalError) as caught:
        state.closed(close)
    assert caught.value.code in (error, "session_taken_over")


def test_a_server_that_drains_is_left_for_another_one(state: StreamState) -> None:
    state.receive(json.dumps({"type": "session.draining"}))
    state.closed(1008)
    state.opening()
    with pytest.raises(RefusedError):
        state.closed(1008)


def test_before_the_session_began_a_broken_connection_is_no_answer() -> None:
    state = StreamState(start_fields("x"))
    state.opening()
    with pytest.raises(NoAnswerError):
        state.closed(1006)


def test_a_full_server_says_when_to_ask_again() -> None:
    state = StreamState(start_fields("x"))
    full = {"type": "error", "code": "server_full", "message": "no room", "retry_after_seconds": 2.5}
    state.receive(json.dumps(full))
    with pytest.raises(ServerFullError) as caught:
        state.closed(1013)
    assert (caught.value.status, caught.value.code, caught.value.retry_after_s) == (429, "server_full", 2.5)


def test_a_change_is_followed_from_the_queue_to_the_screen(state: StreamState, parts: list[bytes]) -> None:
    event = state.change({"prompt": "a blue square"}, 2, "e1").event_id
    assert state.changes[event].status == "sent"
    state.receive(json.dumps({"type": "session.interaction.queued", "event_id": event}))
    assert state.changes[event].status == "queued" and state.reminders() == []
    give(state, parts, 0, started_event_ids=[event], active_event_ids=[event])
    assert (state.changes[event].status, state.changes[event].chunk) == ("started", 0)
    give(state, parts, 1, active_event_ids=[event], completed_event_ids=[event])
    assert state.changes[event].status == "completed"


def test_a_refused_change_leaves_the_stream_alone(state: StreamState, parts: list[bytes]) -> None:
    state.change({"prompt": " "}, event_id="e1")
    refusal = {"type": "error", "code": "prompt_empty", "message": "empty", "param": "prompt", "event_id": "e1"}
    state.receive(json.dumps(refusal))
    error = state.changes["e1"].error
    assert state.changes["e1"].status == "refused" and isinstance(error, RefusedError) and error.param == "prompt"
    assert give(state, parts, 0).index == 0
    state.closed(1006)
