"""Evaluation of a Release: clips and streams against teacher, self-forcing and codec; and figures of any videos.

python jobs/evaluate.py --clips 288                                    the embedded release
python jobs/evaluate.py --release s3://models/r1 --clips 2000 --streams 16 --turns 64 --gate
python jobs/evaluate.py --videos FOLDER --vbench                       model-free figures of files
python jobs/evaluate.py --release r1 --vbench-suite DIR                VBench's suite; its results once it ran over DIR
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below, which take seconds
    from runs.start import start

    start(__file__, __doc__)

import argparse
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from torch import Tensor

from diagonal.data.prompt_files import read_prompts
from diagonal.errors import require
from diagonal.evaluate.environment import system_description, write_report
from diagonal.evaluate.intervals import interval
from diagonal.evaluate.pictures import contact_sheet, save_curves, save_png
from diagonal.evaluate.quality import gate, report, vbench, vbench_suite, videos
from diagonal.evaluate.quality.comparison import PICTURE, Clips, Source, identity, run_panel
from diagonal.evaluate.quality.sources import Student, Teacher, clip_seeds, codec_maker, draw_captions
from diagonal.evaluate.quality.streams import clip_part, drift_part, kept_batches, stream_seeds, turn_part
from diagonal.evaluate.quality.worlds import World, world_for
from diagonal.model.base_model import base_folder
from diagonal.model.release import Release
from diagonal.schedule import StepSchedule
from diagonal.storage import Folder
from jobs.runs import arguments
from jobs.runs.artefacts import promote
from jobs.runs.run import say

ROWS_ON_SHEET, SHEET_SIDE_PX, TEACHER_PIECES = 6, 128, 96
OURS, TEACHER, SELF_FORCING = "ours", "teacher", "self-forcing"


def evaluate(options: argparse.Namespace, command: str) -> dict[str, Any]:
    """The whole report of a release; finished batches of a former run are not made again."""
    release = Release.load(options.release or None)
    world, parts = world_for(release.config), Folder(options.parts)
    known, label = known_prompts(options, world)
    ours = Student.of(release, device=options.device)
    sources = sources_of(options, release, ours, world)
    captions, seeds = draw_captions(options.clips, options.seed, known), clip_seeds(options.clips, options.seed)
    reference = "" if options.no_teacher else TEACHER
    found = run_panel(
        sources,
        captions,
        seeds,
        parts,
        world=world,
        geometry=release.config.geometry,
        reference=reference,
        say=say,
        seen=partial(_keep_sheet, options.out),
    )
    if options.vbench_suite:
        prompts, suite = vbench_suite.suite_prompts(options.vbench_info), Path(options.vbench_suite)
        vbench_suite.write_suite(ours, prompts, suite, options.vbench_samples, options.seed, say)
    baselines = [name for name in (TEACHER, SELF_FORCING) if name in found]
    schedule, cache = release.config.schedule, release.config.cache
    return {
        **system_description(command),
        "clips": options.clips,
        "seed": options.seed,
        "prompts": label,
        "release": release.name,
        "lineage": release.manifest.get("lineage", {}),
        "captions": captions[:ROWS_ON_SHEET],
        "rows": report.clip_rows(sources, found, world, reference),
        "setting": f"Schedule {schedule.steps}, context {schedule.resolved_context}, window {cache.window_frames}, "
        f"sink {cache.sink_frames} latent frames, decoder {release.config.serve.decoder}, {options.device}, eager.",
        "differences": {name: report.score_differences(found[OURS], found[name], world) for name in baselines},
        "judged": world is not None,
        "seam": interval(found[OURS].values[report.SEAM_RATIO]).to_dict(),
        "motion_ratio": report.ratio(found[OURS], found[TEACHER], report.MOTION) if reference else None,
        "picture_ratios": _picture_ratios(found) if reference else None,
        "frechet_floor": report.frechet_floor(found[TEACHER]) if reference else None,
        **_vbench(options),
        "drift": _drift(options, ours, release, world, known, parts),
        "turns": _turns(options, ours, release, world, known, parts),
    }


def known_prompts(options: argparse.Namespace, world: World | None) -> tuple[list[str], str]:
    """The prompts to draw from, and how the report names them."""
    if options.prompts:
        given = list(read_prompts(options.prompts))
        for prompt in given if world else ():
            world.check(prompt)  # type: ignore[union-attr]
        return given, f"prompts of {options.prompts.rstrip('/').rsplit('/', 1)[-1]}"
    require(world is not None, "--prompts", "", "a prompt file: only an embedded world has prompts of its own")
    assert world is not None
    return list(world.captions(options.held_out)), "held-out captions" if options.held_out else "all captions"


def sources_of(options: argparse.Namespace, release: Release, ours: Student, world: World | None) -> list[Source]:
    """What is compared: the codec alone, the teacher, the release by its schedule, and self-forcing."""
    config, base = release.config, base_folder(release.config)
    found = []
    if world is not None:
        ceiling = partial(codec_maker, base, config, world)
        found.append(Source("codec alone (ceiling)", identity(base, config), 0, ceiling))
    if not options.no_teacher:
        teacher = Teacher(base, config, config.pairs.solver_steps, options.device)
        key = identity(base, config, config.pairs.solver_steps, config.pairs.guidance)
        found.append(Source(TEACHER, key, teacher.forwards, teacher.load))
    found.append(Source(OURS, identity(release.folder, config), ours.forwards, lambda: ours))
    plain = StepSchedule(SELF_FORCING, config.schedule.shift)
    other = Release.load(options.baseline) if options.baseline else release
    trained = other.config.schedule.steps
    allowed = f"a release that was trained with schedule.steps={SELF_FORCING}"
    require(not options.gate or trained == SELF_FORCING, "--baseline", f"{options.baseline} ({trained})", allowed)
    forwards = plain.total_forwards(config.geometry.clip_chunks)
    key = identity(other.folder, other.config, SELF_FORCING)
    found.append(Source(SELF_FORCING, key, forwards, lambda: Student.of(other, plain, options.device)))
    return found


def _drift(
    options: argparse.Namespace,
    ours: Student,
    release: Release,
    world: World | None,
    known: Sequence[str],
    parts: Folder,
) -> dict[str, Any] | None:
    """Figures of long streams over time, with their plot; None where none was asked for."""
    if not options.streams:
        return None
    captions, seeds = draw_captions(options.streams, options.seed, known), stream_seeds(options.streams, options.seed)
    key = ["streams", options.seconds, identity(release.folder, release.config)]
    found = kept_batches(partial(drift_part, ours, world, seconds=options.seconds), captions, seeds, parts, key, say)
    drift = report.drift_report(found, options.seconds, world, _teacher_pieces(options, release, world, known, parts))
    save_curves(Path(f"{options.out}-drift.png"), drift["times_s"], {OURS: drift["curves"]})
    return drift


def _teacher_pieces(
    options: argparse.Namespace, release: Release, world: World | None, known: Sequence[str], parts: Folder
) -> list[dict[str, Any]]:
    """Figures of the pieces of the teacher's clips, beside which drift is told."""
    if options.no_teacher:
        return []
    config, base = release.config, base_folder(release.config)
    teacher = Teacher(base, config, config.pairs.solver_steps, options.device)
    count = min(options.clips, TEACHER_PIECES)
    captions, seeds = draw_captions(count, options.seed, known), clip_seeds(count, options.seed)
    loaded = lru_cache(1)(teacher.load)  # not at all where every part is kept
    make = partial(clip_part, lambda captions, seeds: loaded()(captions, seeds), config.geometry, world)
    key = ["teacher's pieces", identity(base, config, config.pairs.solver_steps, config.pairs.guidance)]
    return kept_batches(make, captions, seeds, parts, key, say)


def _vbench(options: argparse.Namespace) -> dict[str, Any]:
    """What VBench itself found of the suite, and of the baseline's."""
    given = {"vbench": options.vbench_suite, "vbench_baseline": options.vbench_baseline}
    return {name: vbench_suite.read_results(Path(folder)) for name, folder in given.items() if folder}


def _picture_ratios(found: Mapping[str, Clips]) -> dict[str, Any]:
    names = (name for name in found[OURS].values if name.startswith(PICTURE))
    return {name: report.ratio(found[OURS], found[TEACHER], name) for name in names}


def _turns(
    options: argparse.Namespace,
    ours: Student,
    release: Release,
    world: World | None,
    known: Sequence[str],
    parts: Folder,
) -> dict[str, Any] | None:
    """What streams show behind a changed prompt; None where none was asked for, or nobody can judge it."""
    if world is None or not options.turns:
        return None
    captions, seeds = draw_captions(options.turns, options.seed, known), stream_seeds(options.turns, options.seed)
    key = ["turns", identity(release.folder, release.config)]
    return report.turns_report(kept_batches(partial(turn_part, ours, world), captions, seeds, parts, key, say))


def _keep_sheet(out: str, name: str, first: int, pixels: Tensor) -> None:
    if first == 0:
        reduced = max(1, pixels.shape[3] // SHEET_SIDE_PX)
        sheet = contact_sheet(pixels[:ROWS_ON_SHEET, :, ::reduced, ::reduced])
        save_png(sheet, Path(f"{out}-{name.split()[0]}.png"))


def work(argv: Sequence[str]) -> None:
    options = arguments.evaluate(argv, __doc__ or "")
    command = " ".join(["python jobs/evaluate.py", *argv])
    if options.videos:
        found = {**system_description(command), **videos.measure_all(options.videos, say)}
        if options.vbench:
            found["vbench"] = vbench.evaluate(options.videos, options.device, say)
        write_report(options.out, found, videos.markdown(found))
        say(f"report {options.out}.md")
        return
    found = json.loads(json.dumps(evaluate(options, command)))
    if options.gate:
        judged = gate.verdict(found)
        found["verdict"] = {"promoted": judged.promoted, "reasons": list(judged.reasons)}
        ours = next(row for row in found["rows"] if row["name"] == OURS)
        promote(options.release, judged.reasons, judged.promoted, ours["figures"])
        say(f"release {options.release} is {'' if judged.promoted else 'not '}promoted: {'; '.join(judged.reasons)}")
    write_report(options.out, found, report.markdown(found) + vbench_suite.markdown(found))
    say(f"report {options.out}.md")
