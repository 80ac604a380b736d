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
    "judged": True,
    "differences": {
        "teacher": {"mean": found(0.0, -0.019), "saturation": found(-0.009)},
        "self-forcing": {"mean": found(-0.005, -0.019)},
    },
    "seam": found(1.05),
    "motion_ratio": found(0.96),
    "drift": {
        "streams": 16,
        "seconds": 180.0,
        "scores": ["colour", "direction"],
        "teacher": True,
        "change": {"colour": found(-0.049), "direction": found(0.0), "picture_motion": found(-0.5)},
        "quarters": {"direction": [found(0.1), found(0.8)]},
    },
    "turns": {"streams": 16, "obedience": found(-0.049)},
}
BREACHES: list[tuple[tuple[str, ...], object, str]] = [
    (("clips",), 99, "clips = 99"),
    (("differences", "teacher", "mean"), None, "not compared with teacher"),
    (("differences", "self-forcing"), {}, "not compared with self-forcing"),
    (("differences", "self-forcing", "mean"), found(0.0, -0.02), "mean of scores against self-forcing: +0.00 points"),
    (("differences", "teacher", "mean", "low"), None, "mean of scores against teacher"),
    (("differences", "teacher", "saturation"), found(0.011), "saturation against teacher: +1.10 points"),
    (("seam",), None, "seams between chunks were not measured"),
    (("seam",), found(1.06), "seam ratio = 1.060"),
    (("motion_ratio",), None, "motion inside chunks was not compared"),
    (("motion_ratio",), found(1.06), "motion inside chunks = 1.060"),
    (("drift",), None, "drift was not measured"),
    (("drift", "seconds"), 45.0, "drift was not measured"),
    (("drift", "change", "colour"), found(-0.05), "the score that falls most is colour: -5.00 points"),
    (("drift", "quarters", "direction"), [found(0.9), found(0.79)], "direction in the last quarter of 180 s = 0.790"),
    (("turns",), None, "prompt changes were not measured"),
    (("turns", "streams"), 7, "prompt changes were not measured"),
    (("turns", "obedience"), found(-0.05), "over those of an unchanged stream's own: -5.00 points"),
]


def test_a_release_that_holds_every_limit_is_promoted() -> None:
    judged = verdict(GOOD)
    assert judged.promoted and "clips = 2000" in judged.reasons[0] and len(judged.reasons) == 9


@pytest.mark.parametrize(("place", "value", "reason"), BREACHES)
def test_each_missed_limit_alone_refuses_and_is_named(place: tuple[str, ...], value: object, reason: str) -> None:
    report = copy.deepcopy(GOOD)
    node = report
    for key in place[:-1]:
        node = node[key]
    node[place[-1]] = value
    judged = verdict(report)
    assert not judged.promoted and len(judged.reasons) == 1 and reason in judged.reasons[0]


def test_a_model_that_no_oracle_judges_is_held_to_its_pictures_seams_and_drift() -> None:
    drift = {"streams": 8, "seconds": 180.0, "scores": [], "teacher": True, "change": {}, "quarters": {}}
    plain = {key: GOOD[key] for key in ("clips", "seed", "seam", "motion_ratio")}
    suite = {"total": 80.0, "quality": 82.0, "semantic": 70.0}
    beside = {"vbench": suite, "vbench_baseline": {**suite, "total": 81.9}}
    real = {
        **plain,
        "judged": False,
        "differences": {},
        "drift": drift,
        "picture_ratios": {"sharpness": found(1.09)},
        **beside,
    }
    assert verdict(real).promoted
    assert (
        "sharpness = 1.110 of the teacher's"
        in verdict({**real, "picture_ratios": {"sharpness": found(1.11)}}).reasons[0]
    )
    assert "not compared with the teacher's" in verdict({**real, "picture_ratios": None}).reasons[0]
    assert "VBench total: -2.00 points" in verdict({**real, "vbench_baseline": {**suite, "total": 82.0}}).reasons[0]
    assert "VBench total was not compared" in verdict({**real, "vbench_baseline": None}).reasons[0]
