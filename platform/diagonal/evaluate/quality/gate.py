"""The gate: from a report's figures to what holds of a release and what does not, each with its figure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

POINTS = 100.0
AGAINST = ("teacher", "self-forcing")
MEAN = "mean"  # of all scores: the primary end point
LATE = ("direction", "speed")  # late in a stream chance shows half of both


@dataclass(frozen=True)
class Limits:
    """What a release must hold. Points are hundredths of a score, of VBench percent of its range.

    The mean of scores is not worse than the teacher's and Self Forcing's by `mean_points`, with one-sided 95 %
    confidence. `picture_share` is what the pictures of a model without an oracle may differ by from the teacher's.
    """

    mean_points: float = 2.0
    saturation_points: float = 1.0
    seam: float = 1.05
    motion_share: float = 0.05
    picture_share: float = 0.1
    drift_points: float = 5.0
    late: float = 0.8
    obedience_points: float = 5.0
    vbench_points: float = 2.0
    fewest_clips: int = 100
    fewest_streams: int = 8


@dataclass(frozen=True)
class Finding:
    """One limit: whether it holds, and what was found. What was not measured does not hold."""

    holds: bool
    text: str


@dataclass(frozen=True)
class Verdict:
    """Promoted or not; `reasons` says what was found either way."""

    promoted: bool
    reasons: tuple[str, ...]


def verdict(report: Mapping[str, Any], limits: Limits = Limits()) -> Verdict:  # noqa: B008  # frozen
    """Judge what `jobs/evaluate.py` found; what was not measured is a reason against."""
    found = list(findings(report, limits))
    against = tuple(one.text for one in found if not one.holds)
    return Verdict(not against, against or tuple(one.text for one in found))


def findings(report: Mapping[str, Any], limits: Limits = Limits()) -> Iterator[Finding]:  # noqa: B008  # frozen
    """Every limit with what was found; of a model that no oracle judges, those of its pictures alone."""
    enough = report["clips"] >= limits.fewest_clips
    yield Finding(enough, f"clips = {report['clips']}: at least {limits.fewest_clips} are needed to judge")
    if report["judged"]:
        yield from _mean_of_scores(report, limits)
        yield from _saturation(report, limits)
    else:
        yield from _pictures(report, limits)
        yield from _vbench(report, limits)
    yield from _chunks(report, limits)
    yield from _drift(report, limits)
    if report["judged"]:
        yield from _obedience(report, limits)


def _mean_of_scores(report: Mapping[str, Any], limits: Limits) -> Iterator[Finding]:
    for against in AGAINST:
        found = report["differences"].get(against, {}).get(MEAN)
        if not found:
            yield Finding(False, f"the mean of scores was not compared with {against}")
            continue
        holds = found["low"] is not None and POINTS * found["low"] > -limits.mean_points
        yield Finding(
            holds,
            f"mean of scores against {against}: {_points(found)}, allowed is a lower bound above "
            f"-{limits.mean_points:g}",
        )


def _saturation(report: Mapping[str, Any], limits: Limits) -> Iterator[Finding]:
    found = report["differences"].get("teacher", {}).get("saturation")
    if not found:
        yield Finding(False, "saturation was not compared with the teacher's")
        return
    holds = POINTS * abs(found["mean"]) <= limits.saturation_points
    allowed = f"allowed is within {limits.saturation_points:g}"
    yield Finding(holds, f"saturation against teacher: {_points(found)}, {allowed}")


def _pictures(report: Mapping[str, Any], limits: Limits) -> Iterator[Finding]:
    ratios = report.get("picture_ratios") or {}
    if not ratios:
        yield Finding(False, "the pictures were not compared with the teacher's")
    for name, ratio in ratios.items():
        holds = abs(ratio["mean"] - 1.0) <= limits.picture_share
        allowed = f"{1 - limits.picture_share:g} to {1 + limits.picture_share:g}"
        yield Finding(holds, f"{name} = {ratio['mean']:.3f} of the teacher's, allowed is {allowed}")


def _vbench(report: Mapping[str, Any], limits: Limits) -> Iterator[Finding]:
    """Total, quality and semantic against a baseline's, which is the teacher's or another student's of its own."""
    ours, theirs = report.get("vbench"), report.get("vbench_baseline")
    for name in ("total", "quality", "semantic"):
        mine, other = (found.get(name) if found else None for found in (ours, theirs))
        if mine is None or other is None:
            yield Finding(False, f"VBench {name} was not compared with a baseline's")
            continue
        allowed = f"allowed is above -{limits.vbench_points:g}"
        yield Finding(mine - other > -limits.vbench_points, f"VBench {name}: {mine - other:+.2f} points, {allowed}")


def _chunks(report: Mapping[str, Any], limits: Limits) -> Iterator[Finding]:
    seam, motion = report.get("seam"), report.get("motion_ratio")
    if seam is None:
        yield Finding(False, "seams between chunks were not measured")
    else:
        yield Finding(seam["mean"] <= limits.seam, f"seam ratio = {seam['mean']:.3f}, allowed is up to {limits.seam:g}")
    if motion is None:
        yield Finding(False, "motion inside chunks was not compared with the teacher's")
    else:
        allowed = f"{1 - limits.motion_share:g} to {1 + limits.motion_share:g}"
        holds = abs(motion["mean"] - 1.0) <= limits.motion_share
        yield Finding(holds, f"motion inside chunks = {motion['mean']:.3f} of the teacher's, allowed is {allowed}")


def _drift(report: Mapping[str, Any], limits: Limits) -> Iterator[Finding]:
    drift = report.get("drift")
    if not drift or drift["streams"] < limits.fewest_streams or drift["seconds"] < 180:
        yield Finding(False, f"drift was not measured over 180 s in at least {limits.fewest_streams} streams")
        return
    worst = {name: drift["change"][name] for name in drift["scores"] if name in drift["change"]}
    if worst:
        name = min(worst, key=lambda one: worst[one]["mean"])
        against = " against the teacher's own" if drift["teacher"] else ""
        yield Finding(
            all(POINTS * found["mean"] > -limits.drift_points for found in worst.values()),
            f"from the first piece of 180 s to the last quarter{against}, the score that falls most is {name}: "
            f"{_points(worst[name])}, allowed is above -{limits.drift_points:g}",
        )
    for name in (name for name in LATE if name in worst):
        level = drift["quarters"][name][-1]["mean"]
        yield Finding(
            level >= limits.late,
            f"{name} in the last quarter of 180 s = {level:.3f} (chance .5), allowed is at least {limits.late:g}",
        )


def _obedience(report: Mapping[str, Any], limits: Limits) -> Iterator[Finding]:
    turns = report.get("turns")
    if not turns or turns["streams"] < limits.fewest_streams:
        yield Finding(False, f"prompt changes were not measured in at least {limits.fewest_streams} streams")
        return
    found = turns["obedience"]
    yield Finding(
        POINTS * found["mean"] > -limits.obedience_points,
        f"a changed prompt's attributes from the second chunk on, over those of an unchanged stream's own: "
        f"{_points(found)}, allowed is above -{limits.obedience_points:g}",
    )


def _points(found: Mapping[str, Any]) -> str:
    """`+1.2 points [-0.3, +2.7]`."""
    ends = [found["low"], found["high"]]
    shown = "" if None in ends else f" [{', '.join(f'{POINTS * end:+.2f}' for end in ends)}]"
    return f"{POINTS * found['mean']:+.2f} points{shown}"
