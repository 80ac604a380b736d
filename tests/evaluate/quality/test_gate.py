"""The gate promotes what holds every limit, and names each limit that is missed."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from diagonal.evaluate.quality.gate import verdict


def found(mean: float, low: float | None = None) -> dict[str, Any]:
    return {"mean": mean, "low": mean if low is None else low, "high": mean}


GOOD: dict[str, Any] = {
    "clips": 2000,
    "seed": 1,
    "differences": {
        name: {"colour": found(0.0, -0.01), "smoothness": found(-0.005, -0.019)} for name in ("teacher", "self-forcing")
    },
    "motion_ratio": found(0.96),
    "drift": {
        "streams": 16,
        "seconds": 180.0,
        "scores": ["colour"],
        "slopes": {"180": {"colour": found(-0.019), "picture_motion": found(0.5)}},
    },
    "turns": {"streams": 16, "obeyed": [found(0.5), found(0.9), found(1.0)]},
}
BREACHES: list[tuple[tuple[str, ...], object, str]] = [
    (("clips",), 99, "clips = 99"),
    (("differences", "teacher"), {}, "not compared with teacher"),
    (("differences", "self-forcing", "colour"), found(0.0, -0.02), "colour against self-forcing"),
    (("differences", "teacher", "smoothness", "low"), None, "smoothness against teacher"),
    (("motion_ratio",), None, "motion not compared"),
    (("motion_ratio",), found(1.06), "motion = 1.060"),
    (("drift",), None, "drift not measured"),
    (("drift", "seconds"), 45.0, "drift not measured"),
    (("drift", "slopes", "180", "colour"), found(0.02), "colour drifts by"),
    (("turns",), None, "prompt changes not measured"),
    (("turns", "streams"), 7, "prompt changes not measured"),
    (("turns", "obeyed"), [found(1.0), found(0.89)], "obeyed at 0.890"),
]


def test_a_release_that_holds_every_limit_is_promoted() -> None:
    judged = verdict(GOOD)
    assert judged.promoted and "2000 clips" in judged.reasons[0]


@pytest.mark.parametrize(("place", "value", "reason"), BREACHES)
def test_each_missed_limit_alone_refuses_and_is_named(place: tuple[str, ...], value: object, reason: str) -> None:
    report = copy.deepcopy(GOOD)
    node = report
    for key in place[:-1]:
        node = node[key]
    node[place[-1]] = value
    judged = verdict(report)
    assert not judged.promoted and len(judged.reasons) == 1 and reason in judged.reasons[0]
