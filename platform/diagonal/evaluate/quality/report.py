"""From clips' and streams' values to a report: means with intervals, differences, drift; as JSON and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diagonal.evaluate.intervals import ONE_SIDED, Interval, difference, interval
from diagonal.evaluate.quality.comparison import Clips, Source
from diagonal.evaluate.quality.features import frechet
from diagonal.evaluate.quality.gate import MEAN
from diagonal.evaluate.quality.sources import summary
from diagonal.evaluate.quality.worlds import World

RESAMPLES = 50
SEAM_RATIO, MOTION = "seam", "motion_inside"
Report = Mapping[str, Any]


def clip_rows(
    sources: Sequence[Source], found: Mapping[str, Clips], world: World | None, reference: str
) -> list[dict[str, Any]]:
    """One row a source: forwards, frames a second, every figure, and the distance to the reference's features."""
    rows = []
    for source in sources:
        clips = found[source.name]
        row = {
            "name": source.name,
            "forwards": source.forwards,
            "clips": clips.count,
            "fps": round(clips.fps, 2),
            "figures": summary(clips.values, world),
        }
        if reference and source.name != reference:
            row["frechet"] = frechet_interval(clips, found[reference]).to_dict()
        rows.append(row)
    return rows


def frechet_interval(ours: Clips, theirs: Clips) -> Interval:
    """Feature-space distance with the spread that resampled clips give; for few clips it is biased upwards, and so is
    its interval."""
    a, b, draw = ours.points, theirs.points, np.random.default_rng(0)
    picks = [(draw.integers(len(a), size=len(a)), draw.integers(len(b), size=len(b))) for _ in range(RESAMPLES)]
    low, high = np.quantile([frechet(a[i], b[j]) for i, j in picks], (0.025, 0.975))
    return Interval(frechet(a, b), float(low), float(high), len(a))


def frechet_floor(clips: Clips) -> float:
    """The distance between two halves of one source's clips: what no source can be expected to fall below by much."""
    return round(frechet(clips.points[::2], clips.points[1::2]), 6) if clips.count >= 4 else 0.0


def score_differences(ours: Clips, theirs: Clips, world: World | None) -> dict[str, Any]:
    """Every score's mean difference with its interval, paired by clip; of the scores' mean with one-sided ends."""
    if world is None:
        return {}
    rates = world.rates
    table = {name: difference(ours.values[name], theirs.values[name], name in rates) for name in world.scores}
    a, b = (mean_of_scores(clips.values, world) for clips in (ours, theirs))
    return {name: found.to_dict() for name, found in {MEAN: difference(a, b, level=ONE_SIDED), **table}.items()}


def mean_of_scores(values: Mapping[str, Sequence[float]], world: World) -> list[float]:
    """Of each clip."""
    return [sum(some) / len(some) for some in zip(*(values[name] for name in world.scores), strict=True)]


def ratio(ours: Clips, theirs: Clips, figure: str) -> dict[str, Any]:
    """Ratio of a figure's means, its interval by the clips' deviations from it."""
    a, b = np.asarray(ours.values[figure]), np.asarray(theirs.values[figure])
    scale = max(float(b.mean()), 1e-9)
    found = float(a.mean()) / scale
    spread = interval(list((a - found * b) / scale))
    return Interval(found, found + spread.low, found + spread.high, len(a)).to_dict()


def drift_report(
    parts: Sequence[Mapping[str, Any]], seconds: float, world: World | None, teacher: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """Every figure over time, and by quarters of the streams; intervals over streams.

    `change` is the last quarter minus the first piece, by stream, and where pieces of the teacher's clips are given
    minus what the teacher's last piece has over its first: a later piece is harder to read in any clip.
    """
    times, values = parts[0]["times_s"], _joined(parts)
    curves = {}
    for name, rows in values.items():
        by_time = [interval(column) for column in zip(*rows, strict=True)]
        curves[name] = {key: [one.to_dict()[key] for one in by_time] for key in ("mean", "low", "high")}
    theirs = {name: _change(rows) for name, rows in _joined(teacher).items()} if teacher else {}
    change = {
        name: interval([one - float(np.mean(theirs.get(name, 0.0))) for one in _change(rows)]).to_dict()
        for name, rows in values.items()
        if not teacher or name in theirs
    }
    return {
        "streams": len(next(iter(values.values()))),
        "seconds": seconds,
        "times_s": times,
        "curves": curves,
        "first": {name: interval([row[0] for row in rows]).to_dict() for name, rows in values.items()},
        "quarters": {name: [interval(some).to_dict() for some in _quarters(rows)] for name, rows in values.items()},
        "change": change,
        "teacher": bool(teacher),
        "scores": list(world.scores if world else ()),
    }


def _joined(parts: Sequence[Mapping[str, Any]]) -> dict[str, list[list[float]]]:
    """By figure and stream the values over time."""
    return {name: [row for part in parts for row in part["values"][name]] for name in parts[0]["values"]}


def _quarters(rows: Sequence[Sequence[float]]) -> list[list[float]]:
    """By quarter of the time the mean of each stream."""
    split = (np.array_split(row, min(4, len(row))) for row in rows)
    return [[float(np.mean(part)) for part in some] for some in zip(*split, strict=True)]


def _change(rows: Sequence[Sequence[float]]) -> list[float]:
    """Of each stream the last quarter's mean minus the first piece; of three pieces the last one is that quarter."""
    return [float(np.mean(np.array_split(row, 4)[-1] if len(row) >= 4 else row[-1:])) - row[0] for row in rows]


# Of streams whose prompt changes: what is told by chunk, and how it is called.
TURNS = {
    "obeyed": "new prompt's attributes shown",
    "forgotten": "old prompt's attributes shown",
    "unturned": "own prompt's attributes shown without a change",
    "recache_db": "re-cache alone, PSNR dB",
    "recovery_db": "recovery, PSNR dB",
}

# And what is told once.
SEAM = {
    "settled": "new prompt's attributes shown from the second chunk on, read as one piece",
    "settled_unturned": "own prompt's without a change, read alike",
    "obedience": "the former minus the latter, by stream",
    "step_ratio": "change of the picture across the seam, over the usual one between frames",
}


def turns_report(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """By chunk behind the change: obeyed, forgotten, and the seams of re-cache and recovery; and once for all of it:
    what is shown from the second chunk on, and the step at the seam."""
    joined = {name: [row for part in parts for row in part[name]] for name in parts[0]}
    pairs = zip(joined["settled"], joined["settled_unturned"], strict=True)
    joined["obedience"] = [new - own for new, own in pairs]
    by_chunk = {name: [interval(column).to_dict() for column in zip(*joined[name], strict=True)] for name in TURNS}
    return {"streams": len(joined["obeyed"]), **{name: interval(joined[name]).to_dict() for name in SEAM}, **by_chunk}


def shown(found: Mapping[str, Any], digits: int = 3, scale: float = 1.0, sign: str = "") -> str:
    """`mean [low, high]`, rounded."""
    ends = [found["low"], found["high"]]
    mean = f"{found['mean'] * scale:{sign}.{digits}f}"
    if None in ends:
        return mean
    return f"{mean} [{', '.join(f'{end * scale:{sign}.{digits}f}' for end in ends)}]"


def markdown(report: Report) -> str:
    """The report as tables, with what is needed to reproduce it."""
    lines = [
        f"# Evaluation of {report['release']}",
        "",
        f"{report['date']}, {report['machine']}, load {report['load']}, torch {report['torch']}. {report['clips']} "
        f"clips a row from equal noise, seed {report['seed']}, {report['prompts']}. Reproduce: "
        f"`{report['command']}`.",
        "",
        f"{report['setting']} Forwards are network calls a clip (the teacher's count both guidance branches). fps: "
        "pixel frames a second of making and decoding clips in batches, in this run. Brackets are 95 % intervals over "
        "clips.",
        "",
    ]
    return (
        "\n".join(
            [
                *lines,
                *_clip_lines(report),
                *_difference_lines(report),
                *_drift_lines(report),
                *_turn_lines(report),
                *_verdict_lines(report),
            ]
        )
        + "\n"
    )


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    return [
        "| " + " | ".join(heads) + " |",
        "|---" * len(heads) + "|",
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
    ]


def _clip_lines(report: Report) -> list[str]:
    names = list(dict.fromkeys(name for row in report["rows"] for name in row["figures"]))
    heads = ["", "forwards", "fps", *(name.replace("_", " ") for name in names), "Frechet to the teacher"]
    rows = [
        [
            row["name"],
            f"{row['forwards']:g}",
            f"{row['fps']:.1f}",
            *(shown(row["figures"][name]) if name in row["figures"] else "" for name in names),
            shown(row["frechet"], 4) if "frechet" in row else "",
        ]
        for row in report["rows"]
    ]
    floor = report.get("frechet_floor")
    note = [f"Frechet distance between two halves of the teacher's clips: {floor:.4f}.", ""] if floor else []
    return [*table(heads, rows), *note]


def _difference_lines(report: Report) -> list[str]:
    found = report["differences"]
    if not any(found.values()):
        return []
    names = list(next(some for some in found.values() if some))
    rows = [
        [f"ours - {against}", *(shown(some[name], 2, 100.0, "+") for name in names)]
        for against, some in found.items()
        if some
    ]
    motion, seam = report.get("motion_ratio"), report.get("seam")
    return [
        "## In points (hundredths), paired by clip",
        "",
        *table(["", *names], rows),
        *([f"Motion inside chunks over the teacher's: {shown(motion)}.", ""] if motion else []),
        *([f"Seam ratio: {shown(seam)} (1 is no seam).", ""] if seam else []),
    ]


def _drift_lines(report: Report) -> list[str]:
    drift = report.get("drift")
    if not drift:
        return ["## Drift", "", "Not measured in this run.", ""]
    names, against = list(drift["change"]), " over the teacher's own" if drift["teacher"] else ""
    count = len(drift["quarters"][names[0]])
    rows = [["first piece", *(shown(drift["first"][name]) for name in names)]]
    rows += [[f"quarter {n + 1}", *(shown(drift["quarters"][name][n]) for name in names)] for n in range(count)]
    rows.append([f"change in points{against}", *(shown(drift["change"][name], 2, 100.0, "+") for name in names)])
    return [
        f"## Drift in {drift['seconds']:g} s, {drift['streams']} streams",
        "",
        *table(["", *(name.replace("_", " ") for name in names)], rows),
    ]


def _turn_lines(report: Report) -> list[str]:
    turns = report.get("turns")
    if not turns:
        return ["## Changed prompts", "", "Not measured in this run.", ""]
    heads = ["", *(f"chunk {n}" for n in range(1, len(turns["obeyed"]) + 1))]
    rows = [[label, *(shown(one, 1 if "db" in name else 3) for one in turns[name])] for name, label in TURNS.items()]
    return [
        f"## Changed prompts, {turns['streams']} streams",
        "",
        *table(heads, rows),
        *(f"- {label}: {shown(turns[name])}" for name, label in SEAM.items()),
        "",
    ]


def _verdict_lines(report: Report) -> list[str]:
    found = report.get("verdict")
    if not found:
        return []
    word = "promoted" if found["promoted"] else "not promoted"
    return [f"## Gate: {word}", "", *(f"- {reason}" for reason in found["reasons"]), ""]
