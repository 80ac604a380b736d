"""The gate: from a report's figures to promoted or not, with a reason for every limit that is missed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

POINTS = 100.0


@dataclass(frozen=True)
class Limits:
    """What a release must hold: scores in points (hundredths) against the teacher and `self-forcing`, motion as a share
    of the teacher's, drift in points over 180 s, prompts obeyed within so many chunks."""

    non_inferiority_points: float = 2.0
    motion_share: float = 0.05
    slope_points: float = 2.0
    obeyed: float = 0.9
    obeyed_within_chunks: int = 2
    fewest_clips: int = 100
    fewest_streams: int = 8


@dataclass(frozen=True)
class Verdict:
    """Promoted or not; `reasons` says what was found either way."""

    promoted: bool
    reasons: tuple[str, ...]


def verdict(report: Mapping[str, Any], limits: Limits = Limits()) -> Verdict:  # noqa: B008  # frozen
    """Judge what `jobs/evaluate.py` found; what was not measured is a reason against."""
    against = tuple(_against(report, limits))
    if against:
        return Verdict(False, against)
    return Verdict(
        True,
        (
            f"{report['clips']} clips, seed {report['seed']}: every score's 95 % lower bound against teacher and "
            f"self-forcing above -{limits.non_inferiority_points:g} points",
            f"motion within {limits.motion_share:.0%} of the teacher's, drift below {limits.slope_points:g} points in "
            f"180 s, changed prompts obeyed within {limits.obeyed_within_chunks} chunks at {limits.obeyed:g} or more",
        ),
    )


def _against(report: Mapping[str, Any], limits: Limits) -> Iterator[str]:
    if report["clips"] < limits.fewest_clips:
        yield f"clips = {report['clips']}: too few to judge, at least {limits.fewest_clips}"
    yield from _inferior(report, limits)
    yield from _motion(report, limits)
    yield from _drift(report, limits)
    yield from _obedience(report, limits)


def _inferior(report: Mapping[str, Any], limits: Limits) -> Iterator[str]:
    for against in ("teacher", "self-forcing"):
        table = report["differences"].get(against)
        if not table:
            yield f"not compared with {against}"
        for name, found in (table or {}).items():
            low = found["low"]
            if low is None or POINTS * low <= -limits.non_inferiority_points:
                shown = "unknown" if low is None else f"{POINTS * low:+.2f} points"
                yield (
                    f"{name} against {against}: {POINTS * found['mean']:+.2f} points, lower bound {shown}, allowed "
                    f"is above -{limits.non_inferiority_points:g}"
                )


def _motion(report: Mapping[str, Any], limits: Limits) -> Iterator[str]:
    ratio = report.get("motion_ratio")
    if ratio is None:
        yield "motion not compared with the teacher's"
    elif abs(ratio["mean"] - 1.0) > limits.motion_share:
        yield (
            f"motion = {ratio['mean']:.3f} of the teacher's: allowed is {1 - limits.motion_share:g} to "
            f"{1 + limits.motion_share:g}"
        )


def _drift(report: Mapping[str, Any], limits: Limits) -> Iterator[str]:
    drift = report.get("drift")
    if not drift or drift["streams"] < limits.fewest_streams or drift["seconds"] < 180:
        yield f"drift not measured over 180 s in at least {limits.fewest_streams} streams"
        return
    for name, found in drift["slopes"]["180"].items():
        if name in drift["scores"] and abs(POINTS * found["mean"]) >= limits.slope_points:
            yield (
                f"{name} drifts by {POINTS * found['mean']:+.2f} points in 180 s: allowed is less than "
                f"{limits.slope_points:g} either way"
            )


def _obedience(report: Mapping[str, Any], limits: Limits) -> Iterator[str]:
    turns = report.get("turns")
    if not turns or turns["streams"] < limits.fewest_streams:
        yield f"prompt changes not measured in at least {limits.fewest_streams} streams"
        return
    found = turns["obeyed"][limits.obeyed_within_chunks - 1]["mean"]
    if found < limits.obeyed:
        yield (
            f"changed prompts obeyed at {found:.3f} in chunk {limits.obeyed_within_chunks} behind the change: "
            f"allowed is at least {limits.obeyed:g}"
        )
