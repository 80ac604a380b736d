"""docs/results/quality.md: every experiment as a table from its rows; what was not run yet is said."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from diagonal.evaluate.experiments.runs import Plan, read_row, read_speed
from diagonal.evaluate.experiments.table import FIXED, OURS, Experiment, Variant, experiments
from diagonal.evaluate.intervals import difference_over_seeds, over_seeds
from diagonal.evaluate.quality.comparison import PICTURE
from diagonal.evaluate.quality.gate import Verdict, verdict
from diagonal.evaluate.quality.report import SEAM, TURNS, shown, table
from diagonal.evaluate.quality.worlds import World
from diagonal.model.base_model import lineage_name

NOT_RUN = "not yet run"
COMPARED = ("teacher", "self-forcing")
MOTION = PICTURE + "motion"
Rows = Sequence[Mapping[str, Any]]


def collect(plan: Plan, seeds: Sequence[int], command: str) -> dict[str, Any]:
    """What `page` is made of, as JSON: of each variant the means with intervals over seeds, its rows' circumstances."""
    found = []
    for one in experiments(plan.config.schedule.shift):
        rows = {variant.name: _rows(plan, one, variant, seeds) for variant in one.variants}
        entry = {
            "key": one.key,
            "command": f"{command} run {one.key}",
            "speed": read_speed(plan, one, seeds[0]) if one.measure == "clips" else None,
            "differences": _differences(one, rows, plan.world),
            "variants": [_variant(variant, rows[variant.name], plan.world) for variant in one.variants],
        }
        found.append(entry)
    budget = {
        "init": lineage_name(plan.init),
        "updates": plan.updates,
        "stage1_updates": plan.stages[0],
        "clips": plan.clips,
        "fewer_clips": min(plan.clips, plan.fewer_clips),
        "streams": plan.streams,
        "seconds": plan.seconds,
    }
    return {"experiments": found, "budget": budget, "preset": plan.config.preset}


def _rows(plan: Plan, one: Experiment, variant: Variant, seeds: Sequence[int]) -> Rows:
    """Those that were run; the teacher and the codec, which are trained by no seed, have one."""
    own = seeds[:1] if variant.is_fixed else seeds
    return [row for seed in own if (row := read_row(plan, one, variant, seed))]


def _variant(variant: Variant, rows: Rows, world: World) -> dict[str, Any]:
    """One variant over its seeds: figures of clips, or curves and slopes of streams, or chunks behind a change."""
    entry: dict[str, Any] = {"name": variant.name, "kind": variant.kind, "seeds": [row["seed"] for row in rows]}
    if not rows:
        return entry
    kept = ("date", "machine", "load", "torch", "setting", "forwards", "training_cpu_s", "fps")
    entry["rows"] = [{name: row[name] for name in kept if name in row} for row in rows]
    if "values" in rows[0]:
        entry["figures"] = {
            name: over_seeds(_values(rows, name), name in world.rates).to_dict() for name in rows[0]["values"]
        }
    for name in ("drift", "turns"):
        if name in rows[0]:
            entry[name] = [row[name] for row in rows]
    return entry


def _differences(one: Experiment, rows: Mapping[str, Rows], world: World) -> dict[str, Any]:
    """In every score and in motion: each variant minus teacher and minus self-forcing, paired by clip and by seed."""
    found: dict[str, Any] = {}
    for against in (v for v in one.variants if v.name.startswith(COMPARED) and _has_clips(rows[v.name])):
        for variant in (v for v in one.variants if v is not against and not v.is_fixed):
            ours, theirs = rows[variant.name], rows[against.name]
            if not against.is_fixed:
                ours, theirs = _shared(ours, theirs)
            if _has_clips(ours):
                found[f"{variant.name} - {against.name}"] = {
                    figure: difference_over_seeds(
                        _values(ours, figure), _values(theirs, figure), figure in world.rates
                    ).to_dict()
                    for figure in (*world.scores, MOTION)
                }
    return found


def _values(rows: Rows, figure: str) -> list[list[float]]:
    return [row["values"][figure] for row in rows]


def _has_clips(rows: Rows) -> bool:
    return bool(rows) and "values" in rows[0]


def _shared(ours: Rows, theirs: Rows) -> tuple[Rows, Rows]:
    """The rows of those training seeds that both have."""
    seeds = [row["seed"] for row in ours if row["seed"] in {other["seed"] for other in theirs}]
    return ([row for row in ours if row["seed"] in seeds], [row for row in theirs if row["seed"] in seeds])


def page(found: Mapping[str, Any], shift: float) -> str:
    """The page of what `collect` found."""
    known, budget = {one.key: one for one in experiments(shift)}, found["budget"]
    lines = [
        "# Quality: the paper's claims on the embedded world",
        "",
        f"Generated from quality.json by `python jobs/benchmarks/experiments.py page`; preset {found['preset']}. A "
        f"trained student had {budget['updates']} updates, {budget['stage1_updates']} of them stage 1, from "
        f"{budget['init']}. {budget['clips']} clips a row of Table 1, "
        f"{budget['fewer_clips']} of others, {budget['streams']} streams of "
        f"{budget['seconds']:g} s, the same captions and noise for all. Brackets are 95 % intervals over clips, with "
        "Student's t over training seeds added in squares where there are two or more. "
        "Scores are in [0, 1], higher is better; `chroma` and what begins with `picture` are shown and not judged. "
        "Forwards are network calls a clip, the teacher's with both branches of its guidance. Commands run in the "
        "repository's root, with `PYTHONPATH=platform:.`.",
        "",
    ]
    lines += _verdict_lines(found)
    for entry in found["experiments"]:
        lines += _section(known[entry["key"]], entry)
    return "\n".join(lines) + "\n"


def judged(found: Mapping[str, Any]) -> Verdict:
    """What the gate says of the recipe: by Table 1 against teacher and self-forcing, Fig. 7 and Fig. 9."""
    entries = {entry["key"]: entry for entry in found["experiments"]}
    variants = {key: {one["name"]: one for one in entry["variants"]} for key, entry in entries.items()}
    ours, table1 = OURS.name, entries["table1"]
    differences = {
        against: {
            figure: some
            for figure, some in table1["differences"].get(f"{ours} - {name}", {}).items()
            if figure != MOTION
        }
        for against in COMPARED
        for name in variants["table1"]
        if name.startswith(against)
    }
    motion = [
        one["figures"][MOTION]["mean"]
        for name, one in variants["table1"].items()
        if (name == ours or name.startswith("teacher")) and one["seeds"]
    ]  # the teacher's first
    report = {
        "clips": found["budget"]["clips"],
        "seed": 0,
        "differences": differences,
        "motion_ratio": {"mean": motion[1] / motion[0]} if len(motion) == 2 else None,
        "drift": next(iter(variants["fig7"][ours].get("drift", [])), None),
        "turns": next(iter(variants["fig9"][ours].get("turns", [])), None),
    }
    return verdict(report)


def _verdict_lines(found: Mapping[str, Any]) -> list[str]:
    """What holds and what does not, as the gate of a release would say it."""
    result = judged(found)
    said = "Every target holds:" if result.promoted else "Targets that do not hold, or are not measured yet:"
    return ["## Does the recipe hold what it should?", "", said, "", *(f"- {reason}" for reason in result.reasons), ""]


def _section(one: Experiment, entry: Mapping[str, Any]) -> list[str]:
    kinds = f" {one.kinds[0].upper()}{one.kinds[1:]}." if one.kinds else ""
    lines = [
        f"## {one.paper}: {one.question}",
        "",
        f"`{entry['command']}`.{kinds} Wanted: {one.seeds} seed{'s' if one.seeds > 1 else ''}.",
        "",
    ]
    clip_table = partial(_clip_table, speed=entry.get("speed"))
    tables: dict[str, Callable[..., list[str]]] = {
        "clips": clip_table,
        "streams": _slope_table,
        "chunks": _chunk_table,
        "pieces": _piece_table,
        "turns": _turn_table,
    }
    draw = tables[one.measure]
    lines += draw(entry["variants"])
    if entry["differences"]:
        names = list(next(iter(entry["differences"].values())))
        rows = [
            [name, *(shown(some[figure], 2, 100.0, "+") for figure in names)]
            for name, some in entry["differences"].items()
        ]
        lines += [
            "Differences in points (hundredths), paired by clip and by seed:",
            "",
            *table(["", *(_title(name) for name in names)], rows),
        ]
    return [*lines, *([one.note, ""] if one.note else []), *_circumstances(entry["variants"])]


def _title(name: str) -> str:
    return name.replace("_", " ")


def _clip_table(variants: Sequence[Mapping[str, Any]], speed: Mapping[str, Any] | None) -> list[str]:
    """Scores; fps are those measured side by side, where they were, and else each row's own."""
    names = list(dict.fromkeys(name for variant in variants for name in variant.get("figures", {})))
    rows = []
    for variant in variants:
        if not variant["seeds"]:
            rows.append([variant["name"], NOT_RUN, *[""] * (len(names) + 2)])
            continue
        first = variant["rows"][0]
        own = [row["fps"] for row in variant["rows"]] if speed is None else [speed["fps"][variant["name"]]]
        fps = " / ".join(f"{one:.0f}" for one in own)
        seeds = "" if variant["kind"] in FIXED else _list(variant["seeds"])
        rows.append(
            [variant["name"], seeds, str(first["forwards"]), fps, *(shown(variant["figures"][name]) for name in names)]
        )
    said = (
        []
        if speed is None
        else [f"fps in turns in one process: {speed['date']}, load {speed['load']}, `{speed['command']}`.", ""]
    )
    return [*table(["", "seeds", "forwards", "fps", *map(_title, names)], rows), *said]


def _slope_table(variants: Sequence[Mapping[str, Any]]) -> list[str]:
    """Slopes times 180 s in hundredths, one line a variant, duration and seed."""
    found = [
        (variant, seed, drift)
        for variant in variants
        for seed, drift in zip(variant["seeds"], variant.get("drift", []), strict=True)
    ]
    names = list(found[0][2]["curves"]) if found else []
    rows = [
        [variant["name"], str(seed), f"{until} s", *(shown(some[name], 2, 100.0, "+") for name in names)]
        for variant, seed, drift in found
        for until, some in drift["slopes"].items()
    ]
    rows += [[variant["name"], NOT_RUN, "", *[""] * len(names)] for variant in variants if not variant["seeds"]]
    return table(["slope x 180 s, hundredths", "seed", "over the first", *map(_title, names)], rows)


def _chunk_table(variants: Sequence[Mapping[str, Any]]) -> list[str]:
    found = [(variant, drift) for variant in variants for drift in variant.get("drift", [])[:1]]
    chunks = len(found[0][1]["times_s"]) if found else 0
    rows = [
        [variant["name"], _title(name), *(f"{mean:.3f}" for mean in drift["curves"][name]["mean"])]
        for variant, drift in found
        for name in ("colour", "shape", PICTURE + "sharpness", PICTURE + "saturation")
        if name in drift["curves"]
    ]
    rows += [[variant["name"], NOT_RUN, *[""] * chunks] for variant in variants if not variant["seeds"]]
    return table(["", "figure", *(f"chunk {n}" for n in range(1, chunks + 1))], rows)


def _piece_table(variants: Sequence[Mapping[str, Any]]) -> list[str]:
    """Scores of each piece of a clip, one line a variant and seed."""
    found = [
        (variant, seed, drift)
        for variant in variants
        for seed, drift in zip(variant["seeds"], variant.get("drift", []), strict=True)
    ]
    names = [name for name in found[0][2]["curves"] if name in found[0][2]["scores"]] if found else []
    rows = [
        [
            variant["name"],
            "" if variant["kind"] in FIXED else str(seed),
            *(" ".join(f"{mean:.2f}" for mean in drift["curves"][name]["mean"]) for name in names),
        ]
        for variant, seed, drift in found
    ]
    rows += [[variant["name"], NOT_RUN, *[""] * len(names)] for variant in variants if not variant["seeds"]]
    return table(["in pieces of a clip", "seed", *map(_title, names)], rows)


def _turn_table(variants: Sequence[Mapping[str, Any]]) -> list[str]:
    found = [(variant, turns) for variant in variants for turns in variant.get("turns", [])[:1]]
    chunks = len(found[0][1]["obeyed"]) if found else 0
    rows = [
        [variant["name"], label, *(shown(one, 1 if "db" in name else 3) for one in turns[name])]
        for variant, turns in found
        for name, label in TURNS.items()
    ]
    rows += [
        [variant["name"], label, shown(turns[name]), *[""] * (chunks - 1)]
        for variant, turns in found
        for name, label in SEAM.items()
    ]
    rows += [[variant["name"], NOT_RUN, *[""] * chunks] for variant in variants if not variant["seeds"]]
    return table(["", "behind the change", *(f"chunk {n}" for n in range(1, chunks + 1))], rows)


def _circumstances(variants: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = [row for variant in variants for row in variant.get("rows", [])]
    if not rows:
        return []
    dates = _list(dict.fromkeys(row["date"][:10] for row in rows))
    machines = _list(dict.fromkeys(row["machine"] for row in rows))
    spent = [row["training_cpu_s"] for row in rows if "training_cpu_s" in row]
    cost = f"; a training took {min(spent) / 60:.1f} to {max(spent) / 60:.1f} CPU-minutes" if spent else ""
    return [f"{dates}, {machines}, torch {rows[0]['torch']}{cost}.", ""]


def _list(values: Any) -> str:
    return ", ".join(str(value) for value in values)
