"""Runs one row of an experiment: trains its student where it must, makes its clips, keeps the row by its hash."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from diagonal.config import Config
from diagonal.errors import require
from diagonal.evaluate.experiments.short_training import trained_student
from diagonal.evaluate.experiments.table import TEACHER_STEPS, Experiment, Variant, training_config, variant_config
from diagonal.evaluate.pictures import contact_sheet, save_png
from diagonal.evaluate.quality.comparison import FORMAT, Source, digest, run_panel
from diagonal.evaluate.quality.report import drift_report, turns_report
from diagonal.evaluate.quality.sources import (
    CLIPS_PER_BATCH,
    Make,
    Student,
    Teacher,
    clip_seeds,
    codec_maker,
    draw_captions,
    own_world,
)
from diagonal.evaluate.quality.streams import PIECES, clip_part, drift_part, kept_batches, stream_seeds, turn_part
from diagonal.evaluate.quality.worlds import World
from diagonal.files import file_hash
from diagonal.model.base_model import load_causal, load_decoder, load_text
from diagonal.storage import Folder

ROWS, PARTS, STUDENTS, SHEETS = "rows", "parts", "students", "sheets"
SHEET_ROWS = 6
SPEED_ROUNDS = 3
CLIP_SEED = 0  # draws captions and noise: the same for every variant and training seed


@dataclass(frozen=True)
class Plan:
    """Of what and how much: the configuration, the teacher's folder `base`, the shared initialisation `init`, the
    folder of rows and students; updates of a training, of which `stage1_updates` are stage 1 (None: half of them),
    clips a row of a thorough experiment and of another, streams and their length."""

    config: Config
    base: Path
    init: Path
    folder: Path
    updates: int = 360
    clips: int = 2000
    fewer_clips: int = 500
    streams: int = 16
    seconds: float = 180.0
    held_out: bool = False
    stage1_updates: int | None = None

    def __post_init__(self) -> None:
        for name, low in (("updates", 2), ("clips", 2), ("fewer_clips", 2), ("streams", 2)):
            value = getattr(self, name)
            require(low <= value <= 100_000, name, value, f"a whole number from {low} to 100000")
        first = self.stages[0]
        require(0 <= first <= self.updates, "stage1_updates", first, f"a whole number from 0 to {self.updates}")
        require(6.0 <= self.seconds <= 3600.0, "seconds", self.seconds, "seconds from 6 to 3600")

    @property
    def stages(self) -> tuple[int, int]:
        """Updates of stage 1 and of stage 2."""
        first = self.updates // 2 if self.stage1_updates is None else self.stage1_updates
        return first, self.updates - first

    @cached_property
    def base_weights(self) -> dict[str, str]:
        """Hashes of everything that the teacher and the codec are."""
        return _weights_in(self.base)

    @cached_property
    def weights(self) -> dict[str, str]:
        """Hashes of everything that students begin from and are judged through."""
        return {**self.base_weights, **_weights_in(self.init)}

    def clips_of(self, experiment: Experiment) -> int:
        """Clips of each of its rows; where a table has fewer they are the first ones of those that it might have."""
        return self.clips if experiment.thorough else min(self.clips, self.fewer_clips)

    @property
    def world(self) -> World:
        return own_world(self.config)

    @property
    def captions(self) -> Sequence[str]:
        return self.world.captions(self.held_out)


def _weights_in(root: Path) -> dict[str, str]:
    return {f"{root.name}/{path.relative_to(root)}": file_hash(path) for path in sorted(root.rglob("*.safetensors"))}


def row_name(plan: Plan, experiment: Experiment, variant: Variant, seed: int) -> str:
    """The file of a row: everything that decides it, and not what it is called, so tables share rows."""
    clips = plan.clips_of(experiment)
    amounts = {"clips": [clips], "pieces": [PIECES, clips]}
    amount = amounts.get(experiment.measure, [PIECES, plan.streams, plan.seconds])
    made = _how(plan, variant, seed)
    return f"{digest([FORMAT, experiment.measure, amount, plan.held_out, made])}.json"


def _how(plan: Plan, variant: Variant, seed: int) -> list[object]:
    """What decides a variant's clips beside their captions and noise; what is not trained knows no seed."""
    if variant.kind == "initial":
        sampled = _deciding(variant_config(plan.config, variant, 0, plan.stages))
        return [variant.kind, plan.weights, {name: part for name, part in sampled.items() if name != "distill"}]
    if variant.is_fixed:
        tree = plan.config.to_dict()
        return [variant.kind, plan.base_weights, tree["geometry"], tree["pairs"]["guidance"], TEACHER_STEPS]
    made = [_deciding(make(plan.config, variant, seed, plan.stages)) for make in (training_config, variant_config)]
    return ["student", seed, plan.weights, *made]


def _deciding(config: Config) -> dict[str, Any]:
    """What differs from the default configuration, so that a later setting renames no row that was made without it."""
    names = ("preset", "seed", "geometry", "schedule", "cache", "model", "distill")
    return dict(_changed({name: config.to_dict()[name] for name in names}, Config().to_dict()))


def _changed(tree: Mapping[str, Any], default: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield name, dict(_changed(value, default[name]))
        elif value != default[name]:
            yield name, value


def read_row(plan: Plan, experiment: Experiment, variant: Variant, seed: int) -> dict[str, Any] | None:
    """The row, or None where it was not run yet."""
    rows, name = Folder(str(plan.folder / ROWS)), row_name(plan, experiment, variant, seed)
    return dict(rows.read_json(name)) if rows.has(name) else None


def run_row(
    plan: Plan,
    experiment: Experiment,
    variant: Variant,
    seed: int,
    circumstances: Mapping[str, Any],
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """The row, made now unless it is there; what was finished of it before is not made again."""
    found = read_row(plan, experiment, variant, seed)
    if found is not None:
        return found
    clips = plan.clips_of(experiment)
    row = {
        **circumstances,
        "kind": variant.kind,
        "seed": seed,
        "setting": setting(plan, variant, seed),
        "budget": {
            "updates": plan.updates,
            "stage1_updates": plan.stages[0],
            "clips": clips,
            "streams": plan.streams,
            "seconds": plan.seconds,
        },
    }
    if experiment.measure == "clips":
        row |= _clips(plan, variant, seed, clips, say)
    elif experiment.measure == "pieces":
        row |= _pieces(plan, variant, seed, clips, say)
    else:
        row |= _streams(plan, experiment, variant, seed, say)
    Folder(str(plan.folder / ROWS)).write_json(row_name(plan, experiment, variant, seed), row)
    return row


def speed_name(plan: Plan, experiment: Experiment, seed: int) -> str:
    """The file of an experiment's speeds side by side."""
    return f"speed-{digest([FORMAT, [_how(plan, variant, seed) for variant in experiment.variants]])}.json"


def run_speed(
    plan: Plan, experiment: Experiment, seed: int, circumstances: Mapping[str, Any], say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Pixel frames a second of every variant of an experiment, in turns in this one process: the same batch of clips,
    `SPEED_ROUNDS` times, of which the median counts; made anew each time that it is asked for."""
    makers = {variant.name: _maker(plan, variant, seed, say)[0] for variant in experiment.variants}
    captions, seeds = draw_captions(CLIPS_PER_BATCH, CLIP_SEED, plan.captions), clip_seeds(CLIPS_PER_BATCH, CLIP_SEED)
    spent_s: dict[str, list[float]] = {name: [] for name in makers}
    for _ in range(SPEED_ROUNDS):
        for name, make in makers.items():
            began_s = time.perf_counter()
            make(captions, seeds)
            spent_s[name].append(time.perf_counter() - began_s)
    frames = plan.config.geometry.clip_pixel_frames * CLIPS_PER_BATCH
    row = {**circumstances, "fps": {name: round(frames / median(some), 1) for name, some in spent_s.items()}}
    Folder(str(plan.folder / ROWS)).write_json(speed_name(plan, experiment, seed), row)
    return row


def read_speed(plan: Plan, experiment: Experiment, seed: int) -> dict[str, Any] | None:
    """What `run_speed` wrote, or None."""
    rows, name = Folder(str(plan.folder / ROWS)), speed_name(plan, experiment, seed)
    return dict(rows.read_json(name)) if rows.has(name) else None


def setting(plan: Plan, variant: Variant, seed: int) -> dict[str, Any]:
    """What a row is sampled and was trained with, in short."""
    if variant.kind in ("teacher", "codec"):
        return {}
    config, trained = (make(plan.config, variant, seed, plan.stages) for make in (variant_config, training_config))
    return {
        "steps": config.schedule.steps,
        "context": config.schedule.resolved_context,
        "gamma": trained.distill.loss.gamma,
        "trained_steps": trained.schedule.steps,
        "trained_context": trained.schedule.resolved_context,
    }


def student_of(plan: Plan, variant: Variant, seed: int, say: Callable[[str], None]) -> tuple[Student, dict[str, Any]]:
    """A variant's student, trained now unless it is there or is stage 0's, with what its training took."""
    config = variant_config(plan.config, variant, seed, plan.stages)
    folder, more = plan.init, dict[str, Any]()
    if variant.kind != "initial":
        trained = training_config(plan.config, variant, seed, plan.stages)
        folder = plan.folder / STUDENTS / digest([plan.weights, _deciding(trained)])
        lineage = trained_student(trained, plan.base, plan.init, folder, say)
        more = {"training_cpu_s": lineage["cpu_s"], "student": folder.name}
    parts = (load_causal(folder, config).requires_grad_(False), load_text(plan.base, config))
    student = Student(*parts, load_decoder(plan.base, config), config, config.schedule)
    return student, more


def _clips(plan: Plan, variant: Variant, seed: int, clips: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Values of each clip."""
    make, forwards, more = _maker(plan, variant, seed, say)
    captions, seeds = draw_captions(clips, CLIP_SEED, plan.captions), clip_seeds(clips, CLIP_SEED)
    source = Source(variant.name, digest(_how(plan, variant, seed)), forwards, lambda: make)
    sheet = plan.folder / SHEETS / f"{source.identity}.png"

    def seen(name: str, first: int, pixels: torch.Tensor) -> None:
        if first == 0:
            save_png(contact_sheet(pixels[:SHEET_ROWS]), sheet)

    found = run_panel(
        [source],
        captions,
        seeds,
        Folder(str(plan.folder / PARTS)),
        world=plan.world,
        geometry=plan.config.geometry,
        seen=seen,
        say=say,
    )[variant.name]
    return {"forwards": forwards, "fps": round(found.fps, 2), "values": found.values, "sheet": sheet.name, **more}


def _maker(plan: Plan, variant: Variant, seed: int, say: Callable[[str], None]) -> tuple[Make, float, dict[str, Any]]:
    if variant.kind == "teacher":
        teacher = Teacher(plan.base, plan.config, TEACHER_STEPS)
        return teacher.load(), teacher.forwards, {}
    if variant.kind == "codec":
        return codec_maker(plan.base, plan.config, plan.world), 0, {}
    student, more = student_of(plan, variant, seed, say)
    return student, student.forwards, more


def _pieces(plan: Plan, variant: Variant, seed: int, clips: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Figures of the pieces of clips."""
    make, forwards, more = _maker(plan, variant, seed, say)
    captions, seeds = draw_captions(clips, CLIP_SEED, plan.captions), clip_seeds(clips, CLIP_SEED)
    geometry = plan.config.geometry
    parts = kept_batches(
        partial(clip_part, make, geometry, plan.world),
        captions,
        seeds,
        Folder(str(plan.folder / PARTS)),
        ["pieces", _how(plan, variant, seed)],
        say,
    )
    clip_s = geometry.clip_pixel_frames / geometry.pixel_fps
    return {"forwards": forwards, "drift": drift_report(parts, clip_s, plan.world), **more}


def _streams(
    plan: Plan, experiment: Experiment, variant: Variant, seed: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Figures of streams over time, by chunk, or behind a changed prompt."""
    student, more = student_of(plan, variant, seed, say)
    world, geometry = plan.world, student.config.geometry
    clip_s = geometry.clip_pixel_frames / geometry.pixel_fps
    seconds = plan.seconds if experiment.measure == "streams" else clip_s
    makers: dict[str, Callable[..., dict[str, Any]]] = {
        "streams": partial(drift_part, student, world, seconds=seconds),
        "chunks": partial(drift_part, student, world, seconds=seconds, window_chunks=1),
        "turns": partial(turn_part, student, world),
    }
    captions, seeds = draw_captions(plan.streams, CLIP_SEED, plan.captions), stream_seeds(plan.streams, CLIP_SEED)
    parts = kept_batches(
        makers[experiment.measure],
        captions,
        seeds,
        Folder(str(plan.folder / PARTS)),
        [experiment.measure, seconds, _how(plan, variant, seed)],
        say,
    )
    if experiment.measure == "turns":
        return {"forwards": student.forwards, "turns": turns_report(parts), **more}
    return {"forwards": student.forwards, "drift": drift_report(parts, seconds, world), **more}
