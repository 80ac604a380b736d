"""The playback clock: how far generation may run ahead, and when a viewer had to wait."""

from __future__ import annotations

import math

from serve.policies.pacing import PlaybackClock


class Watch:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.s = 100.0

    def __call__(self) -> float:
        return self.s


def running(lead_s: float = 1.0) -> tuple[PlaybackClock, Watch]:
    watch = Watch()
    clock = PlaybackClock(lead_s, watch)
    clock.start()
    return clock, watch


def test_a_chunk_may_be_made_while_the_media_before_it_is_under_the_lead() -> None:
    clock, _ = running()
    assert [clock.wait_s(media_s) for media_s in (0.0, 0.5625, 0.99)] == [0.0, 0.0, 0.0]
    assert clock.wait_s(1.3125) == 0.3125


def test_time_that_passes_lets_the_next_chunk_in() -> None:
    clock, watch = running()
    watch.s += 0.4
    assert clock.wait_s(1.3125) == 0.0


def test_with_no_viewer_the_lead_is_made_and_no_more() -> None:
    watch = Watch()
    clock = PlaybackClock(1.0, watch)
    watch.s += 60
    assert clock.wait_s(0.5625) == 0.0 and math.isinf(clock.wait_s(1.3125))


def test_the_clock_starts_with_the_first_viewer_and_only_once() -> None:
    clock, watch = running()
    watch.s += 1
    clock.start()
    assert clock.position_s() == 1.0


def test_a_late_chunk_is_a_stall_and_playback_waits_for_it() -> None:
    clock, watch = running()
    watch.s += 3.0
    assert clock.arrived(2.0) == 1.0
    assert (clock.stalls, clock.stall_s, clock.position_s()) == (1, 1.0, 2.0)


def test_a_chunk_in_time_and_the_first_one_are_no_stall() -> None:
    clock, watch = running()
    watch.s += 0.5
    assert clock.arrived(0.0) == 0.0 and clock.arrived(0.5625) == 0.0 and clock.stalls == 0


def test_a_paused_viewer_stands_still_and_goes_on_from_there() -> None:
    clock, watch = running()
    watch.s += 0.5
    clock.pause()
    watch.s += 100
    clock.pause()
    assert clock.position_s() == 0.5 and clock.arrived(0.75) == 0.0 and clock.stalls == 0
    clock.resume()
    watch.s += 0.25
    assert clock.position_s() == 0.75
    clock.resume()
    assert clock.position_s() == 0.75


def test_a_pause_before_the_first_viewer_is_nothing() -> None:
    watch = Watch()
    clock = PlaybackClock(1.0, watch)
    clock.pause()
    watch.s += 5
    clock.resume()
    clock.start()
    assert clock.position_s() == 0.0
