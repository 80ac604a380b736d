"""A sweep over step schedules, context levels and motion weights: rows that accumulate, the Pareto set, a profile.

    python jobs/search.py --steps 4322222 4222222 self-forcing --contexts reuse 0 0.101 --clips 288
    python jobs/search.py --steps 4322222 --gammas 0 0.5 1 2 --updates 360      trains a student for each weight

Without --gammas the release's own student is sampled; with them each configuration has a student of its own, trained
at the budget of --updates from the shared initialisation, with the steps and context that it is sampled with.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below, which take seconds
    from runs.start import start

    start(__file__, __doc__)

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diagonal.config import Config
from diagonal.evaluate.environment import system_description, write_report
from diagonal.evaluate.experiments.runs import PARTS, Plan, student_of
from diagonal.evaluate.experiments.search import Point, clip_ms, grid, pareto, parse_context, profile, worth
from diagonal.evaluate.intervals import interval
from diagonal.evaluate.pictures import save_points
from diagonal.evaluate.quality.comparison import FORMAT, Source, digest, identity, run_panel
from diagonal.evaluate.quality.report import shown, table
from diagonal.evaluate.quality.sources import Student, clip_seeds, draw_captions, own_world, summary
from diagonal.model.base_model import base_folder, embedded
from diagonal.model.release import Release
from diagonal.storage import Folder
from jobs.runs import arguments
from jobs.runs.run import say

COSTS = ("clip_ms", "forwards")


def search(options: argparse.Namespace) -> tuple[Release, dict[str, Point], dict[str, dict[str, Any]]]:
    """The row of every configuration; one that a former run finished is read from its file."""
    release = Release.load(options.release or None)
    points = grid(release.config, options.steps, [parse_context(text) for text in options.contexts], options.gammas)
    init = embedded("ode_init", release.config.embedded_model)
    plan = Plan(release.config, base_folder(release.config), init, Path(options.folder), options.updates, options.clips)
    rows = {}
    for number, point in enumerate(points, 1):
        row = rows[point.name] = row_of(plan, release, point, options)
        say(
            f"{number} of {len(points)}: {point.name}: quality {shown(interval(row['quality']).to_dict())}, "
            f"{row['forwards']} forwards, {row['clip_ms']:.0f} ms"
        )
    return release, {point.name: point for point in points}, rows


def row_of(plan: Plan, release: Release, point: Point, options: argparse.Namespace) -> dict[str, Any]:
    """One configuration's row, made now unless its file is there."""
    config = release.config.with_settings(point.settings)
    weights = plan.weights if point.gamma is not None else identity(release.folder, config)
    budget = options.updates if point.gamma is not None else 0
    key = digest([FORMAT, point.settings, weights, budget, options.clips, options.seed])
    rows = Folder(str(plan.folder / "rows"))
    if not rows.has(f"{key}.json"):
        rows.write_json(f"{key}.json", _measure(plan, release, point, config, options, key))
    return dict(rows.read_json(f"{key}.json"))


def _measure(
    plan: Plan, release: Release, point: Point, config: Config, options: argparse.Namespace, key: str
) -> dict[str, Any]:
    world = own_world(config)
    if point.gamma is None:
        student = Student.of(release.with_settings(point.settings))
    else:
        student, _ = student_of(plan, point.variant(), options.seed, say)
    captions = draw_captions(options.clips, options.seed, world.captions())
    seeds = clip_seeds(options.clips, options.seed)
    found = run_panel(
        [Source(point.name, key, student.forwards, lambda: student)],
        captions,
        seeds,
        Folder(str(plan.folder / PARTS)),
        world=world,
        say=say,
    )[point.name]
    return {
        **system_description(""),
        "name": point.name,
        "settings": list(point.settings),
        "forwards": student.forwards,
        "clip_ms": clip_ms(student, captions[0]),
        "quality": worth(found.values, world.scores),
        "figures": summary(found.values, world),
    }


def markdown(report: dict[str, Any]) -> str:
    """The rows as a table, the Pareto set first."""
    names = list(report["rows"][0]["figures"])
    rows = [
        [
            "yes" if row["name"] in report["pareto"] else "",
            row["name"],
            str(row["forwards"]),
            f"{row['clip_ms']:.0f}",
            shown(row["quality"]),
            *(shown(row["figures"][name]) for name in names),
        ]
        for row in report["rows"]
    ]
    chosen = report["profile"]
    return (
        "\n".join(
            [
                f"# Search over {report['release']}",
                "",
                f"{report['date']}, {report['machine']}, load {report['load']}. {report['clips']} clips a row "
                f"from equal noise, seed {report['seed']}. Reproduce: `{report['command']}`. Quality is the mean of "
                f"the scores; brackets are 95 % intervals over clips. The Pareto set is over {report['cost']}.",
                "",
                *table(
                    ["Pareto", "", "forwards", "clip ms", "quality", *(name.replace("_", " ") for name in names)], rows
                ),
                f"Profile: `{' '.join(chosen['settings'])}`, for serving's `options`: "
                f"`{chosen['options'] or 'nothing'}`.",
            ]
        )
        + "\n"
    )


def work(argv: Sequence[str]) -> None:
    options = arguments.search(argv, __doc__ or "")
    release, points, rows = search(options)
    qualities = {name: interval(row["quality"]).mean for name, row in rows.items()}
    costs = {name: float(row[options.cost]) for name, row in rows.items()}
    front = pareto(costs, qualities)
    told = sorted(rows.values(), key=lambda row: costs[row["name"]])
    chosen = profile(release.name, points, rows, options.cost, options.margin)
    report = {
        **system_description(" ".join(["python jobs/search.py", *argv])),
        "release": release.name,
        "clips": options.clips,
        "seed": options.seed,
        "cost": options.cost,
        "pareto": front,
        "profile": chosen,
        "rows": [{**row, "quality": interval(row["quality"]).to_dict()} for row in told],
    }
    save_points(Path(f"{options.out}.png"), {n: (costs[n], qualities[n]) for n in rows}, front, options.cost)
    Folder(str(Path(options.out).absolute().parent)).write_json(f"{Path(options.out).name}-profile.json", chosen)
    write_report(options.out, report, markdown(report))
    say(f"report {options.out}.md")
    for name in front:
        say(f"Pareto: {name}: {options.cost} {costs[name]:g}, quality {qualities[name]:.4f}")
