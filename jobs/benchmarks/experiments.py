"""The experiments of docs/results/quality.md: run some, one seed after another; time one's variants side by side;
collect what was run into the page's JSON; write the page of that.

    python jobs/benchmarks/experiments.py list
    python jobs/benchmarks/experiments.py run table1 --seeds 0 1 2
    python jobs/benchmarks/experiments.py run all --clips 24 --updates 10 --streams 2 --seconds 8 --folder runs/trial
    python jobs/benchmarks/experiments.py speed table1
    python jobs/benchmarks/experiments.py collect --seeds 0 1 2
    python jobs/benchmarks/experiments.py page
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from diagonal.config import Config
from diagonal.errors import require
from diagonal.evaluate.environment import system_description
from diagonal.evaluate.experiments.page import claim, collect, page, save_pictures
from diagonal.evaluate.experiments.runs import Plan, run_row, run_speed
from diagonal.evaluate.experiments.table import Experiment, experiment, experiments
from diagonal.files import write_text
from diagonal.jsonfile import read_json, write_json
from diagonal.model.base_model import base_folder, embedded
from diagonal.storage.fetch import fetch
from jobs.runs.run import main, say

CLAIM = ("<!-- the quality page's claim -->", "<!-- end of it -->")


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("list", "run", "speed", "collect", "page"))
    parser.add_argument("keys", nargs="*", help="with run and speed: experiments by key, or all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="training seeds; clips are the same for all")
    parser.add_argument("--only", default="", help="with run: only variants whose name holds this")
    parser.add_argument("--preset", default="tiny-textured")
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="KEY=VALUE")
    parser.add_argument("--init", default="", help="the shared initialised student (default: the embedded one)")
    parser.add_argument(
        "--updates",
        type=int,
        default=360,
        help="of each training (360, half of them stage 1, took about 5 CPU-minutes on the first world)",
    )
    parser.add_argument("--stage1-updates", type=int, help="how many of them are stage 1 (default: half)")
    parser.add_argument("--clips", type=int, default=2000, help="clips of a row of Table 1")
    parser.add_argument("--fewer-clips", type=int, default=500, help="of any other row, at most --clips")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=180.0)
    parser.add_argument("--held-out", action="store_true")
    parser.add_argument("--folder", default="runs/quality", help="rows, parts, students and contact sheets")
    parser.add_argument(
        "--out", default="docs/results/quality", help="collect writes OUT.json, page OUT.md and OUT-*.png of it"
    )
    parser.add_argument("--readme", default="", help="with page: a file whose sentence between its marks is the page's")
    found = parser.parse_args(argv)
    require(all(seed >= 0 for seed in found.seeds), "--seeds", found.seeds, "whole numbers of at least 0")
    needs = found.what in ("run", "speed")
    require(not needs or bool(found.keys), "experiment", "", f"with {found.what}: keys of experiments, or all")
    return found


def plan_of(options: argparse.Namespace) -> Plan:
    """What the arguments ask for."""
    config = Config.from_preset(options.preset, options.settings)
    init = fetch(options.init) if options.init else embedded("ode_init", config.embedded_model)
    return Plan(
        config,
        base_folder(config),
        init,
        Path(options.folder),
        options.updates,
        options.clips,
        options.fewer_clips,
        options.streams,
        options.seconds,
        options.held_out,
        options.stage1_updates,
    )


def chosen(keys: Sequence[str], shift: float) -> list[Experiment]:
    """The experiments of these keys."""
    return list(experiments(shift)) if "all" in keys else [experiment(key, shift) for key in keys]


def run(options: argparse.Namespace, command: str) -> None:
    """Every row that is asked for and not there yet; each is kept at once, so a run that is cut off goes on."""
    plan = plan_of(options)
    for one in chosen(options.keys, plan.config.schedule.shift):
        for seed in options.seeds:
            for variant in (v for v in one.variants if options.only in v.name):
                say(f"{one.key}: {variant.name}, seed {seed}")
                run_row(plan, one, variant, seed, system_description(command), say)


def speed(options: argparse.Namespace, command: str) -> None:
    """The variants of experiments in turns; students that are not there are trained."""
    plan = plan_of(options)
    for one in (one for one in chosen(options.keys, plan.config.schedule.shift) if one.measure == "clips"):
        found = run_speed(plan, one, options.seeds[0], system_description(command), say)
        say("\n".join(f"{one.key}: {name}: {fps:.0f} fps" for name, fps in found["fps"].items()))


def budget_arguments(options: argparse.Namespace) -> str:
    """The arguments that decide what a row is, for the page's commands."""
    parts = [
        f"--updates {options.updates}",
        f"--clips {options.clips}",
        f"--fewer-clips {options.fewer_clips}",
        f"--streams {options.streams}",
        f"--seconds {options.seconds:g}",
        "--seeds",
        *(str(seed) for seed in options.seeds),
    ]
    parts += [] if options.stage1_updates is None else [f"--stage1-updates {options.stage1_updates}"]
    parts += ["--held-out"] if options.held_out else []
    parts += [f"--preset {options.preset}"] if options.preset != "tiny-textured" else []
    parts += [f"--set {setting}" for setting in options.settings]
    parts += [f"--init {options.init}"] if options.init else []
    return " ".join(parts)


def with_claim(text: str, sentence: str) -> str:
    """A text with that sentence between the two marks of `CLAIM`."""
    before, _, rest = text.partition(CLAIM[0])
    _, found, after = rest.partition(CLAIM[1])
    require(bool(found), "--readme", CLAIM, "a file that holds both marks")
    return f"{before}{CLAIM[0]}\n{sentence}\n{CLAIM[1]}{after}"


def collected(options: argparse.Namespace) -> dict[str, Any]:
    """What was run, with the commands that make it again."""
    plan = plan_of(options)
    found = collect(plan, replace(plan, held_out=True), options.seeds, "python jobs/benchmarks/experiments.py")
    for entry in found["experiments"]:
        entry["command"] = f"{entry['command']} {budget_arguments(options)}"
    return found


def work(argv: Sequence[str]) -> None:
    options = arguments(argv)
    shift = Config.from_preset(options.preset, options.settings).schedule.shift
    if options.what == "list":
        for one in experiments(shift):
            say(f"{one.key}: {one.paper}, {len(one.variants)} variants, {one.seeds} seeds. {one.question}")
    elif options.what in ("run", "speed"):
        (run if options.what == "run" else speed)(options, " ".join(["python jobs/benchmarks/experiments.py", *argv]))
    else:
        out = Path(options.out)
        if options.what == "collect":
            write_json(out.with_suffix(".json"), collected(options))
        found = read_json(out.with_suffix(".json"))
        save_pictures(found, out.parent, out.name)
        write_text(out.with_suffix(".md"), page(found, out.name))
        say(f"page {out}.md")
        if options.readme:
            readme = Path(options.readme)
            write_text(readme, with_claim(readme.read_text(), claim(found)))


if __name__ == "__main__":
    main("jobs.benchmarks.experiments")
