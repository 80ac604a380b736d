"""The drift monitor: what left the first chunks and by how much, and when a stream is anchored anew."""

from __future__ import annotations

import numpy as np
import pytest

from diagonal.engine.drift import MEASURES, REFERENCE_CHUNKS, DriftMonitor, ReanchorPolicy
from diagonal.errors import FieldError
from diagonal.media.measures import Pixels
from tests.networks import small_config


def picture(strength: float = 1.0, size: int = 32) -> Pixels:
    """Twelve frames of a coloured square that moves over grey, its colour and contrast so strong."""
    pixels = np.full((12, size, size, 3), 90.0)
    for frame in range(12):
        pixels[frame, 8:16, 4 + frame : 12 + frame] += strength * np.array([80.0, 60.0, -60.0])
    return pixels.clip(0, 255).astype(np.uint8)


def monitor_of(*strengths: float) -> DriftMonitor:
    monitor = DriftMonitor()
    for strength in strengths:
        monitor.observe(picture(strength))
    return monitor


def test_a_stream_like_its_first_chunks_has_not_drifted() -> None:
    monitor = monitor_of(*[1.0] * 4)
    assert monitor.ratios == {} and monitor.drift == 0.0
    ratios = monitor.observe(picture())
    assert set(ratios) == set(MEASURES) and monitor.drift == pytest.approx(0.0, abs=1e-9)
    assert ratios == pytest.approx(dict.fromkeys(MEASURES, 1.0))


def test_what_grows_shows_in_its_own_measure_and_in_the_drift() -> None:
    monitor = monitor_of(*[1.0] * 4, *[1.6] * 30)
    ratios = monitor.ratios
    assert ratios["sharpness"] == pytest.approx(1.6, rel=0.03) and ratios["motion"] == pytest.approx(1.6, rel=0.03)
    assert ratios["saturation"] > 1.2 and ratios["brightness"] == pytest.approx(1.0, abs=0.05)
    assert monitor.drift == max(ratios["sharpness"], ratios["saturation"]) - 1.0


def test_what_fades_is_drift_too() -> None:
    assert monitor_of(*[1.0] * 4, *[0.5] * 30).drift == pytest.approx(1.0, rel=0.1)


def test_motion_is_reported_and_moves_no_drift() -> None:
    monitor = monitor_of(*[1.0] * 4)
    still = np.repeat(picture()[:1], 12, axis=0)
    for _ in range(30):
        monitor.observe(still)
    assert monitor.ratios["motion"] < 0.5 and monitor.drift < 0.05


def test_the_reference_is_the_mean_of_the_first_chunks_after_each_change() -> None:
    monitor = monitor_of(0.8, 1.2, 0.8, 1.2)
    assert monitor.reference["sharpness"] == pytest.approx(monitor_of(1.0).reference["sharpness"], rel=0.02)
    monitor = monitor_of(*[1.0] * 4, *[2.0] * 10)
    assert monitor.drift > 0.5
    monitor.restart()
    assert monitor.drift == 0.0
    for _ in range(REFERENCE_CHUNKS + 3):
        monitor.observe(picture(2.0))
    assert monitor.drift == pytest.approx(0.0, abs=1e-9)


def test_a_black_picture_is_nothing_to_compare_with_and_no_error() -> None:
    monitor = DriftMonitor()
    for _ in range(6):
        monitor.observe(np.zeros((12, 8, 8, 3), np.uint8))
    assert monitor.drift == 0.0


def test_one_frame_is_enough() -> None:
    monitor = DriftMonitor()
    for _ in range(6):
        monitor.observe(picture()[:1])
    assert monitor.ratios["motion"] == 1.0


def test_a_large_picture_is_measured_on_a_grid() -> None:
    large = picture(size=32).repeat(15, axis=1).repeat(15, axis=2)
    seen: list[tuple[int, ...]] = []
    monitor = DriftMonitor()
    monitor.observe(large)
    seen.append(large[:, ::8, ::8].shape)
    assert seen == [(12, 60, 60, 3)] and monitor.reference["brightness"] == pytest.approx(0.36, abs=0.03)


def test_a_monitor_is_handed_over_whole_and_nothing_else_is_taken_for_one() -> None:
    monitor = monitor_of(*[1.0] * 4, 1.3, 1.4)
    assert DriftMonitor.from_dict(monitor.to_dict()) == monitor
    for wrong in (
        {},
        {**monitor.to_dict(), "x": 1},
        {**monitor.to_dict(), "chunks": "3"},
        {**monitor.to_dict(), "reference": {"prompt": 1.0}},
    ):
        with pytest.raises(FieldError, match="drift"):
            DriftMonitor.from_dict(wrong)


def test_by_default_nothing_is_anchored_anew() -> None:
    policy = ReanchorPolicy.of(small_config().serve, 4)
    assert policy == ReanchorPolicy(0.0, 0, 4)
    drifted = monitor_of(*[1.0] * 4, *[9.0] * 9)
    assert drifted.drift > 1 and all(policy.cause(drifted, chunk, 0) is None for chunk in range(99))


def test_it_is_reanchored_by_count_or_drift_once_the_window_is_full_again() -> None:
    calm, drifted = monitor_of(*[1.0] * 5), monitor_of(*[1.0] * 4, *[2.0] * 20)
    every = ReanchorPolicy(every_chunks=5)
    assert [every.cause(calm, chunk, 10) for chunk in (11, 14, 15)] == [None, None, "interval"]
    by_drift = ReanchorPolicy(drift=0.4, rest_chunks=4)
    assert [by_drift.cause(drifted, chunk, 10) for chunk in (13, 14)] == [None, "drift"]
    assert by_drift.cause(calm, 99, 10) is None
