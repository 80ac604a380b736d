"""docs/results/quality.md: what holds, three pictures and one table; all else that was measured is in its JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diagonal.evaluate.experiments.runs import Plan, read_row, read_speed
from diagonal.evaluate.experiments.table import (
    CODEC,
    FIXED,
    INITIAL,
    OURS,
    SELF_FORCING,
    STAGE1,
    TEACHER,
    Experiment,
    Variant,
    experiments,
)
from diagonal.evaluate.intervals import ONE_SIDED, difference_over_seeds, interval, over_seeds
from diagonal.evaluate.pictures import save_forest, save_points, save_quarters
from diagonal.evaluate.quality.gate import LATE, MEAN, POINTS, Finding, findings
from diagonal.evaluate.quality.report import MOTION, SEAM_RATIO, shown, table
from diagonal.evaluate.quality.worlds import World
from diagonal.model.base_model import lineage_name

NOT_RUN = "not yet run"
COMPARED = (TEACHER, SELF_FORCING, STAGE1, INITIAL)  # with which every other variant is
Rows = Sequence[Mapping[str, Any]]
Found = Mapping[str, Any]


def collect(plan: Plan, held_out: Plan, seeds: Sequence[int], command: str) -> dict[str, Any]:
    """All that the page is made of, as JSON: of each variant the means with intervals over its trainings, and what its
    rows were made with. `held_out` is the same plan over captions that no training clip shows."""
    entries = []
    for one in experiments(plan.config.schedule.shift):
        rows = {variant.name: _rows(plan, one, variant, seeds) for variant in one.variants}
        unseen = {variant.name: _rows(held_out, one, variant, seeds) for variant in one.variants}
        entries.append(
            {
                "key": one.key,
                "command": f"{command} run {one.key}",
                "speed": read_speed(plan, one, seeds[0]) if one.measure == "clips" else None,
                "differences": _differences(one, rows, plan.world),
                "variants": [_variant(v, rows[v.name], unseen[v.name], plan.world) for v in one.variants],
            }
        )
    world, table1 = plan.world, plan.captions
    budget = {
        "init": lineage_name(plan.init),
        "updates": plan.updates,
        "stage1_updates": plan.stages[0],
        "clips": plan.clips,
        "fewer_clips": min(plan.clips, plan.fewer_clips),
        "streams": plan.streams,
        "seconds": plan.seconds,
        "captions": len(table1),
    }
    told = {"scores": list(world.scores), "chance": dict(world.chance), "schedule": _schedule(plan)}
    return {"experiments": entries, "budget": budget, "preset": plan.config.preset, **told}


def _schedule(plan: Plan) -> dict[str, Any]:
    schedule, cache = plan.config.schedule, plan.config.cache
    return {
        "steps": schedule.steps,
        "context": schedule.resolved_context,
        "sink_context": schedule.sink_context,
        "clean_newest": schedule.clean_newest,
        "window_frames": cache.window_frames,
    }


def _rows(plan: Plan, one: Experiment, variant: Variant, seeds: Sequence[int]) -> Rows:
    """Those that were run; what no seed trains has one."""
    own = seeds[:1] if variant.is_fixed else seeds
    return [row for seed in own if (row := read_row(plan, one, variant, seed))]


def _variant(variant: Variant, rows: Rows, unseen: Rows, world: World) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": variant.name, "kind": variant.kind, "seeds": [row["seed"] for row in rows]}
    if not rows:
        return entry
    kept = ("date", "machine", "load", "torch", "setting", "forwards", "training_cpu_s", "fps")
    entry["rows"] = [{name: row[name] for name in kept if name in row} for row in rows]
    for name, some in (("figures", rows), ("held_out", unseen)):
        if some and "values" in some[0]:
            figures = [MEAN, *some[0]["values"]]
            entry[name] = {one: over_seeds(_values(some, one, world), one in world.rates).to_dict() for one in figures}
    for name in ("drift", "turns"):
        if name in rows[0]:
            entry[name] = [row[name] for row in rows]
    return entry


def _differences(one: Experiment, rows: Mapping[str, Rows], world: World) -> dict[str, Any]:
    """Each variant minus those that all are compared with, in every score and their mean, paired by clip and by seed;
    the mean's ends are one-sided bounds."""
    found: dict[str, Any] = {}
    clips = {variant.name: rows[variant.name] for variant in one.variants if _has_clips(rows[variant.name])}
    for against in (v for v in COMPARED if v.name in clips):
        for variant in (v for v in one.variants if v.name in clips and v is not against and v is not CODEC):
            ours, theirs = clips[variant.name], clips[against.name]
            if not against.is_fixed and not variant.is_fixed:
                ours, theirs = _shared(ours, theirs)
            if ours and theirs and not (variant.is_fixed and not against.is_fixed):
                found[f"{variant.name} - {against.name}"] = {
                    figure: difference_over_seeds(
                        _values(ours, figure, world),
                        _values(theirs, figure, world),
                        figure in world.rates,
                        **({"level": ONE_SIDED} if figure == MEAN else {}),
                    ).to_dict()
                    for figure in (MEAN, *world.scores)
                }
    return found


def _values(rows: Rows, figure: str, world: World) -> list[list[float]]:
    """By row and clip."""
    if figure != MEAN:
        return [row["values"][figure] for row in rows]
    clips = [zip(*(row["values"][name] for name in world.scores), strict=True) for row in rows]
    return [[sum(scores) / len(scores) for scores in some] for some in clips]


def _has_clips(rows: Rows) -> bool:
    return bool(rows) and "values" in rows[0]


def _shared(ours: Rows, theirs: Rows) -> tuple[Rows, Rows]:
    """The rows of those training seeds that both have."""
    seeds = [row["seed"] for row in ours if row["seed"] in {other["seed"] for other in theirs}]
    return ([row for row in ours if row["seed"] in seeds], [row for row in theirs if row["seed"] in seeds])


def page(found: Found, name: str) -> str:
    """The page of what `collect` found; its pictures are called after `name`."""
    parts = (_head(found), _conclusions(found), _pictures(found, name), _table(found), _tail(found))
    return "\n".join(line for part in parts for line in part) + "\n"


def _head(found: Found) -> list[str]:
    budget, schedule = found["budget"], found["schedule"]
    how = [f"steps {schedule['steps']}", f"context {schedule['context']}"]
    if schedule["sink_context"] is not None:
        how.append(f"first chunk cached at level {schedule['sink_context']:g}")
    if schedule["clean_newest"]:
        how.append("newest frame of each chunk cached clean")
    trainings = len(_of(found, "table1", OURS.name)["seeds"])
    return [
        "# Quality: does the recipe hold on the embedded world?",
        "",
        f"The preset `{found['preset']}`: {', '.join(how)}, window {schedule['window_frames']} latent frames. Each "
        f"training is stages 1 and 2 in one run of {budget['updates']} updates, {budget['stage1_updates']} of them "
        f"stage 1, from one student of stage 0 ({budget['init']}) that all trainings share. There are {trainings} "
        f"trainings of ours, each judged on {budget['clips']} clips; captions and noise are the same for all. Self "
        "Forcing has a stage 1 and a context of its own.",
        "",
        "The oracle's scores are in [0, 1]; points are hundredths. Brackets are 95 % intervals over clips, with "
        "Student's t over trainings added in squares; those of the mean of scores are one-sided bounds of 95 %.",
        "",
    ]


def _of(found: Found, key: str, name: str) -> dict[str, Any]:
    entry = next(entry for entry in found["experiments"] if entry["key"] == key)
    return dict(next(variant for variant in entry["variants"] if variant["name"] == name))


def _differences_of(found: Found, ours: str, against: Variant) -> dict[str, Any]:
    entry = next(entry for entry in found["experiments"] if entry["key"] == "table1")
    return dict(entry["differences"].get(f"{ours} - {against.name}", {}))


def judged(found: Found) -> list[Finding]:
    """The end points: what the gate would ask of a release, of all trainings, and what stage 2 brings."""
    ours, teacher = _of(found, "table1", OURS.name), _of(found, "table1", TEACHER.name)
    drifts, turns = _of(found, "fig7", OURS.name).get("drift", []), _of(found, "fig9", OURS.name).get("turns", [])
    figures, theirs = ours.get("figures"), teacher.get("figures")
    report = {
        "clips": found["budget"]["clips"] * len(ours["seeds"]),
        "judged": True,
        "differences": {
            "teacher": _differences_of(found, OURS.name, TEACHER),
            "self-forcing": _differences_of(found, OURS.name, SELF_FORCING),
        },
        "seam": figures[SEAM_RATIO] if figures else None,
        "motion_ratio": {"mean": figures[MOTION]["mean"] / theirs[MOTION]["mean"]} if figures and theirs else None,
        "drift": _mean_drift(drifts, found["scores"], _of(found, "pieces", TEACHER.name).get("drift", [])),
        "turns": turns[0] if turns else None,
    }
    return [*findings(report), *(_helps(found, against) for against in (STAGE1, INITIAL))]


def _helps(found: Found, against: Variant) -> Finding:
    difference = _differences_of(found, OURS.name, against).get(MEAN)
    what = f"mean of scores over {against.name}"
    if not difference:
        return Finding(False, f"{what}: not measured")
    low, high = (POINTS * difference[end] for end in ("low", "high"))
    mean = POINTS * difference["mean"]
    return Finding(low > 0, f"{what}: {mean:+.2f} points [{low:+.2f}, {high:+.2f}], allowed is a lower bound above 0")


def _mean_drift(drifts: Rows, scores: Sequence[str], teacher: Rows) -> dict[str, Any] | None:
    """Of all trainings' streams: means of their means; intervals over trainings."""
    if not drifts:
        return None
    own = {name: _teacher_change(teacher[0], name) if teacher else 0.0 for name in scores}
    change = {
        name: interval([drift["change"][name]["mean"] - own[name] for drift in drifts]).to_dict()
        for name in scores
        if name in drifts[0]["change"]
    }
    quarters = {
        name: [
            {"mean": sum(drift["quarters"][name][n]["mean"] for drift in drifts) / len(drifts)}
            for n in range(len(drifts[0]["quarters"][name]))
        ]
        for name in change
    }
    streams = sum(drift["streams"] for drift in drifts)
    common = {"seconds": drifts[0]["seconds"], "scores": list(change), "teacher": bool(teacher)}
    return {"streams": streams, "change": change, "quarters": quarters, **common}


def _teacher_change(drift: Found, name: str) -> float:
    """Of the teacher's clips: the last piece minus the first."""
    curve = drift["curves"].get(name)
    return float(curve["mean"][-1] - curve["mean"][0]) if curve else 0.0


def _conclusions(found: Found) -> list[str]:
    lines = []
    for holds, head in ((True, "What holds"), (False, "What does not hold, or was not measured")):
        said = [f"- {one.text}" for one in judged(found) if one.holds == holds]
        lines += [f"## {head}", "", *(said or ["Nothing."]), ""]
    return lines


def claim(found: Found) -> str:
    """The one sentence that may be said elsewhere: the primary end point, with its bounds."""
    ours = _of(found, "table1", OURS.name)
    if "figures" not in ours:
        return "Quality on the embedded world was not measured yet."
    said = []
    for against in (TEACHER, SELF_FORCING):
        difference, row = _differences_of(found, OURS.name, against).get(MEAN), _of(found, "table1", against.name)
        if difference:
            mean, low, high = (POINTS * difference[name] for name in ("mean", "low", "high"))
            forwards = row["rows"][0]["forwards"]
            name = "the teacher" if against is TEACHER else "Self Forcing"
            said.append(f"{mean:+.1f} points [{low:+.1f}, {high:+.1f}] against {name} at {forwards:g}")
    row, mean = ours["rows"][0], ours["figures"][MEAN]["mean"]
    return (
        f"On the embedded textured world, {len(ours['seeds'])} trainings of the recipe, at {row['forwards']:g} "
        f"forwards a clip, have a mean of {len(found['scores'])} scores of {mean:.3f}: {', and '.join(said)} "
        "(one-sided 95 % bounds)."
    )


def save_pictures(found: Found, folder: Path, name: str) -> None:
    """`NAME-scores.png`, `NAME-cost.png` and, where streams were run, `NAME-streams.png`."""
    ours, teacher = _differences_of(found, OURS.name, TEACHER), _of(found, "table1", TEACHER.name).get("figures")
    ceiling = _of(found, "table1", CODEC.name).get("figures")
    if not ours or not teacher or not ceiling:
        return
    series = {v.name: _differences_of(found, v.name, TEACHER) for v in (OURS, SELF_FORCING, STAGE1)}
    known = {"ceiling": ceiling, "teacher": teacher}
    marks = {
        score: {"chance": found["chance"].get(score), **{name: levels[score]["mean"] for name, levels in known.items()}}
        for score in found["scores"]
    }
    save_forest(folder / f"{name}-scores.png", {key: some for key, some in series.items() if some}, marks)
    points = {row["name"]: (row["cost"], row["figures"][MEAN]["mean"]) for row in _measured(found)}
    best = [n for n, (cost, mean) in points.items() if not any(c <= cost and m > mean for c, m in points.values())]
    save_points(folder / f"{name}-cost.png", points, best, "forwards of a chunk's size, a clip")
    drift = _mean_drift(_of(found, "fig7", OURS.name).get("drift", []), found["scores"], [])
    if drift:
        levels = {score: [quarter["mean"] for quarter in drift["quarters"][score]] for score in drift["scores"]}
        save_quarters(folder / f"{name}-streams.png", levels)


def _measured(found: Found) -> list[dict[str, Any]]:
    """Variants of Table 1 and beside it that have clips, with what they cost."""
    rows: dict[str, dict[str, Any]] = {}
    for key in ("table1", "others"):
        entry = next(entry for entry in found["experiments"] if entry["key"] == key)
        for variant in entry["variants"]:
            if "figures" in variant and variant["name"] not in rows and variant["kind"] != "codec":
                rows[variant["name"]] = {**variant, "cost": variant["rows"][0]["forwards"], "speed": entry["speed"]}
    return list(rows.values())


def _pictures(found: Found, name: str) -> list[str]:
    lines = [
        f"![Each score against the teacher's, with chance and ceiling]({name}-scores.png)",
        "",
        f"![Mean of scores over forwards]({name}-cost.png)",
        "",
    ]
    if _of(found, "fig7", OURS.name).get("drift"):
        lines += [f"![Scores by quarter of {found['budget']['seconds']:g} s]({name}-streams.png)", ""]
        lines += [f"Chance shows {' and '.join(LATE)} of a late piece in half of all streams.", ""]
    return lines


def _table(found: Found) -> list[str]:
    """Seven columns: the rest is in the JSON."""
    teacher = _of(found, "table1", TEACHER.name).get("figures", {}).get(MOTION)
    rows = []
    for row in _measured(found):
        seen, unseen = row["figures"], row.get("held_out")
        against = _differences_of(found, row["name"], TEACHER).get(MEAN)
        fps = (row["speed"] or {}).get("fps", {}).get(row["name"])
        rows.append(
            [
                row["name"],
                "" if row["kind"] in FIXED else str(len(row["seeds"])),
                f"{row['cost']:g}" + (f" ({fps:.0f} fps)" if fps else ""),
                shown(seen[MEAN]),
                shown(unseen[MEAN]) if unseen else NOT_RUN,
                shown(against, 2, POINTS, "+") if against else "",
                f"{seen[SEAM_RATIO]['mean']:.3f}",
                f"{seen[MOTION]['mean'] / teacher['mean']:.3f}" if teacher else "",
            ]
        )
    heads = [
        "",
        "trainings",
        "forwards",
        "mean of scores",
        "held-out captions",
        "points over teacher",
        "seam",
        "motion",
    ]
    return [
        "## Every recipe",
        "",
        *table(heads, rows),
        "Forwards are of a whole chunk's size, a clip; that of a frame alone counts a third; the teacher's count both "
        "branches of its guidance. Seam: change of luma where a chunk begins over that inside chunks. Motion: change "
        "between frames inside chunks over the teacher's.",
        "",
    ]


def _tail(found: Found) -> list[str]:
    rows = [row for entry in found["experiments"] for v in entry["variants"] for row in v.get("rows", [])]
    if not rows:
        return ["Nothing was run yet."]
    dates = ", ".join(dict.fromkeys(row["date"][:10] for row in rows))
    machines = ", ".join(dict.fromkeys(row["machine"] for row in rows))
    spent = [row["training_cpu_s"] for row in rows if "training_cpu_s" in row]
    cost = f"; a training took {min(spent) / 60:.1f} to {max(spent) / 60:.1f} CPU-minutes" if spent else ""
    commands = [f"- `{e['command']}`" for e in found["experiments"] if any(v["seeds"] for v in e["variants"])]
    made = f"{dates}, {machines}, torch {rows[0]['torch']}{cost}. In the repository's root:"
    return ["## How", "", made, "", *commands, ""]
