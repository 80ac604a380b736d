"""What a job will do, before it does it: what is done already and what remains, its sizes and costs, and all checks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import torch

from diagonal.config import Config
from diagonal.data.prompt_files import SetAside, read_prompts
from diagonal.errors import FieldError, require
from diagonal.model.architecture import TransformerLayout
from diagonal.model.flops import clip_flops, update_flops
from diagonal.model.manifest import MANIFEST
from diagonal.model.text import clean_prompt, token_counts
from diagonal.storage import Folder
from diagonal.storage.remote import meaning
from diagonal.training import memory
from diagonal.training.checkpoint_manifest import checkpoints
from diagonal.training.distill import stage_schedule
from jobs.runs.arguments import run_options
from jobs.runs.console import duration
from jobs.runs.layouts import Layouts, StoredBase, check_stored_weights, read_layouts
from jobs.runs.run import Run, opened, say
from jobs.runs.trackers import check_trackers
from jobs.runs.update_log import UPDATES, Record, read_journal

STAGES = ("pairs", "ode_init", "stage1", "stage2", "release")
OWN_STAGES = ("pairs", "ode_init")
PEAK_FLOPS, REACHED = 790e12, 0.4  # dense bfloat16 of an H100 or H200, and the share of it that is assumed
RECENT = 20
# Prompts whose lengths are told, of those the ones that are shown, and how many characters of each.
MEASURED, SHOWN, WIDTH = 1000, 3, 80


def run_job(argv: Sequence[str], description: str, last: str, body: Callable[[Run], None]) -> None:
    """What a job's `work` does: open the run, check everything, show the plan up to stage `last`, and run `body`.

    With --dry-run it ends after the plan, having written nothing, started no Ray and needed no GPU.
    """
    arguments = run_options(argv, description)
    with opened(arguments) as run:
        for line in plan(run, last, count_prompts=arguments.dry_run):
            say(line)
        if arguments.dry_run:
            say("dry run: everything checked, nothing written")
        else:
            body(run)


def plan(run: Run, last: str = "release", *, count_prompts: bool = False) -> list[str]:
    """Check what can be checked without a GPU, and describe the run up to stage `last`.

    `FieldError` names the setting, path or permission that is wrong.
    """
    _check_writable(run.folder)
    layouts = read_layouts(run)
    base = check_stored_weights(run)
    _check_batches(run)
    check_trackers(run.config.train.trackers)
    wanted = _wanted(run, last)
    lines = [f"run {run.name} in {run.folder}", *_names(run.config), *_shape_lines(run.config, layouts)]
    if base and base.stray_files:
        lines.append(f"  left out of the release: {', '.join(base.stray_files)}")
    if count_prompts:
        lines += _prompt_lines(run, base)
    times: list[float | None] = []
    lines += _stage_lines(run, layouts, wanted, times)
    lines.append(_total(times))
    lines += _storage_lines(run, layouts, wanted)
    return [*lines, *_memory_lines(run, layouts, wanted)]


def _wanted(run: Run, last: str) -> tuple[str, ...]:
    """The stages up to `last`: pairs and stage 0 where the student is the run's own, or where they are asked for."""
    own = run.makes_student or last in OWN_STAGES
    return tuple(stage for stage in STAGES[: STAGES.index(last) + 1] if own or stage not in OWN_STAGES)


def _check_writable(folder: Folder) -> None:
    """A probe in the folder, or in the nearest one above it that exists: a plan makes none."""
    found = folder.parent
    while found.is_local and not found.exists() and found.parent.uri != found.uri:
        found = found.parent
    try:
        found.check_writable()
    except FieldError as error:
        raise FieldError("train.storage", error.value, error.allowed) from error


def _check_batches(run: Run) -> None:
    workers = run.config.train.workers
    stages = {"ode_init": run.config.ode_init.batch_size} if run.makes_student else {}
    for stage, size in {**stages, "distill": run.config.distill.batch_size}.items():
        require(size >= workers, f"{stage}.batch_size", size, f"at least train.workers = {workers}")
    group, least = run.config.train.shard_group, run.config.train.workers
    require(not group or least % group == 0, "train.shard_group", group, f"0 or a divisor of train.workers = {least}")


def _prompt_lines(run: Run, base: StoredBase | None) -> Iterator[str]:
    """Each prompt file, read to its end; nothing of prompts that are prepared already."""
    config = run.config
    for field, uri in (("pairs.prompts", config.pairs.prompts), ("distill.prompts", config.distill.prompts)):
        if uri and not run.folder.has("prompts/manifest.json"):
            aside = SetAside(config.prompts.max_bad_share)
            rows = read_prompts(uri, config.train.storage_patience_s, config.prompts.field, aside)
            prompts = (prompt for prompt in rows if prompt.strip())
            first = list(islice(prompts, MEASURED))
            read = len(first) + sum(1 for _ in prompts)
            require(read > 0, field, uri, "a file with at least one prompt")
            yield f"  {field}: {read} prompts in {uri}"
            if aside.count:
                yield f"    {aside.count} rows without a prompt are left out; the first: {'; '.join(aside.first)}"
            if base is not None:
                yield from _length_lines(first, token_counts(base.tokenizer, first), config.model.text_tokens)
            if read < config.distill.batch_size:
                yield f"    warning: fewer than the {config.distill.batch_size} of a batch: some come twice in one"
    own = config.is_embedded or not run.makes_student
    require(
        bool(config.pairs.prompts) or own,
        "pairs.prompts",
        config.pairs.prompts,
        "a prompt file (embedded presets have their own)",
    )


def _length_lines(prompts: Sequence[str], tokens: Sequence[int], read: int) -> Iterator[str]:
    """The first prompts with their lengths, and how many of all these are longer than the text encoder reads."""
    for prompt, length in islice(zip(prompts, tokens, strict=True), SHOWN):
        text = clean_prompt(prompt)
        yield f"    {length} tokens: {text[:WIDTH]}{'...' if len(text) > WIDTH else ''}"
    cut = sum(length > read for length in tokens)
    yield (
        f"    the first {len(prompts)}: {min(tokens)} to {max(tokens)} tokens; {cut} are longer than the {read} that "
        f"the text encoder reads{', and are cut' if cut else ''}"
    )


def _names(config: Config) -> Iterator[str]:
    """Which of path, S3 and hub is meant by what the configuration names."""
    models = {
        "model.path": config.model.path,
        "distill.teacher": config.distill.teacher,
        "distill.init": config.distill.init,
    }
    prompts = {"pairs.prompts": config.pairs.prompts, "distill.prompts": config.distill.prompts}
    yield from (f"  {field}: {meaning(name)}" for field, name in models.items() if name)
    yield from (f"  {field}: {meaning(name, 'datasets')}" for field, name in prompts.items() if name)


def _shape_lines(config: Config, layouts: Layouts) -> Iterator[str]:
    geometry, schedule = config.geometry, config.schedule
    layout = TransformerLayout.of(layouts.student)
    tokens = geometry.clip_chunks * geometry.chunk_tokens
    yield (
        f"  clips: {geometry.pixel_width}x{geometry.pixel_height}, {geometry.clip_pixel_frames} pixel frames; "
        f"latents {geometry.clip_shape()[1:]}, {tokens} tokens in {geometry.clip_chunks} chunks of "
        f"{geometry.chunk_tokens}"
    )
    rows = [", ".join(f"{level:.4g}" for level in schedule.levels(chunk)) for chunk in range(geometry.clip_chunks)]
    forwards = schedule.total_forwards(geometry.clip_chunks)
    yield (
        f"  schedule {schedule.steps}, context {schedule.resolved_context}: {forwards} forwards a clip; "
        "levels by chunk:"
    )
    yield from (f"    {chunk}: {row}" for chunk, row in enumerate(rows))
    teacher = TransformerLayout.of(layouts.teacher)
    yield (
        f"  parameters: generator and critic {layout.parameters / 1e6:,.1f} M each, "
        f"teacher {teacher.parameters / 1e6:,.1f} M"
    )


def _total(times: Sequence[float | None]) -> str:
    known = [seconds for seconds in times if seconds is not None]
    missing = "" if len(known) == len(times) else ", without the stages whose time is unknown"
    return f"  in all: {duration(sum(known))} of the estimates above{missing}" if known else "  in all: time unknown"


def _stage_lines(run: Run, layouts: Layouts, wanted: Sequence[str], times: list[float | None]) -> Iterator[str]:
    """A line for each stage; `times` gets the seconds of each that remains, None where they are unknown."""
    config = run.config
    if run.from_scratch:
        yield _line("base", run.folder.has("base/scores.json"), "to train: codec, text encoder and teacher")
    if "pairs" in wanted:
        yield _pairs_line(run, layouts, times)
    else:
        yield f"  ode_init: given, {run.initial_student}"
    if "ode_init" in wanted:
        done = run.has_student("ode_init")
        yield _line("ode_init", done, "" if done else _updates(run, layouts, times, 0, 0, config.ode_init.updates))
    first, both = config.distill.stage1_updates, config.distill.stage1_updates + config.distill.stage2_updates
    for stage, start, end in ((1, 0, first), (2, first, both)):
        if f"stage{stage}" in wanted:
            done = run.has_student(f"stage{stage}")
            yield _line(f"stage{stage}", done, "" if done else _updates(run, layouts, times, stage, start, end))
    if "release" in wanted:
        yield _line("release", run.has_release, "to export and score")


def _line(stage: str, done: bool, remains: str) -> str:
    return f"  {stage}: {'done' if done else remains}"


def _pairs_line(run: Run, layouts: Layouts, times: list[float | None]) -> str:
    pairs, folder = run.config.pairs, run.folder / "pairs"
    if folder.has(MANIFEST):
        return _line("pairs", True, "")
    shards = -(-pairs.count // pairs.rows_per_shard)
    there = sum(name.startswith("pairs-") and name.endswith(".parquet") for name in folder.children())
    each = 2 * pairs.solver_steps * clip_flops(TransformerLayout.of(layouts.student), run.config)
    left = max(0, pairs.count - there * pairs.rows_per_shard)
    workers = pairs.solver_workers or run.config.train.workers
    seconds, time = _assumed(run, each, left, workers, "a trajectory")
    times.append(seconds)
    return (
        f"  pairs: {pairs.count} trajectories in {shards} shards, {there} there; {pairs.solver_steps} steps, "
        f"{2 * pairs.solver_steps} forwards and {each / 1e15:.3g} PFLOP each; {time}"
    )


def _updates(run: Run, layouts: Layouts, times: list[float | None], stage: int, start: int, end: int) -> str:
    """What remains of a stage: its updates, their forwards and operations, and the time they take where it is known."""
    config, folder = run.config, run.folder / "train" / ("distill" if stage else "ode_init")
    whole = checkpoints(folder / "checkpoints")
    done = min(max(whole[0].update if whole else 0, start), end)
    batch = config.distill.batch_size if stage else config.ode_init.batch_size
    flops = update_flops(config, TransformerLayout.of(layouts.student), TransformerLayout.of(layouts.teacher), stage)
    each = flops.mean * batch
    rolled = stage_schedule(config, stage).total_forwards(config.geometry.clip_chunks) if stage else 0
    forwards = f", {rolled} forwards a rollout" if rolled else ""
    seconds, time = _time(run, each, end - done, _record(folder))
    times.append(seconds)
    went = f"resumes after update {done}: " if done > start else ""
    return (
        f"{went}{end - done} updates of {batch} samples{forwards}; {each / 1e15:.3g} PFLOP an update on average; {time}"
    )


def _record(folder: Folder) -> Record:
    lines = folder.read(UPDATES).decode().splitlines() if folder.has(UPDATES) else []
    return read_journal(lines)


def _time(run: Run, flops: float, updates: int, record: Record) -> tuple[float | None, str]:
    """Seconds of what remains, and in words, with where the figure comes from."""
    recent = record.updates[-RECENT:]
    if recent:
        each_s = sum(entry["update_s"] + entry["data_wait_s"] for entry in recent) / len(recent)
        told = f"about {duration(updates * each_s)}, by this run's last {len(recent)} updates ({each_s:.3g} s each)"
        return updates * each_s, told
    return _assumed(run, flops, updates, run.config.train.workers, "an update")


def _assumed(run: Run, flops: float, count: int, workers: int, unit: str) -> tuple[float | None, str]:
    """The time of `count` units of so many operations, if GPUs reach a share of their peak; unknown on CPUs."""
    gpus = workers * run.config.train.gpus_per_worker
    if gpus == 0:
        return None, f"time unknown until the first {unit.split()[-1]}"
    each_s = flops / (gpus * PEAK_FLOPS * REACHED)
    return count * each_s, (
        f"about {duration(count * each_s)} if {gpus:g} GPUs reach {REACHED:.0%} of "
        f"{PEAK_FLOPS / 1e12:.0f} TFLOP/s each: an assumption, {each_s:.3g} s {unit}"
    )


def _storage_lines(run: Run, layouts: Layouts, wanted: Sequence[str]) -> Iterator[str]:
    config, parameters = run.config, TransformerLayout.of(layouts.student).parameters
    pairs = 2 * len(config.pairs.kept_raw) * math.prod(config.geometry.clip_shape()) * config.pairs.count
    keep = config.distill.keep_checkpoints
    needs: dict[str, float] = {}
    if "pairs" in wanted:
        needs[f"pairs ({config.pairs.count})"] = pairs
    if "ode_init" in wanted:
        needs[f"ode_init's checkpoints ({keep})"] = 16 * parameters * keep
    if "stage1" in wanted:  # weights and two moments of two networks, and the average, in float32
        needs |= {f"distill's checkpoints ({keep})": 28 * parameters * keep, "students and release": 8 * parameters}
    shown = ", ".join(f"{name} {size / 1e9:.3g} GB" for name, size in needs.items())
    yield f"  storage: about {sum(needs.values()) / 1e9:.3g} GB: {shown}"


def _memory_lines(run: Run, layouts: Layouts, wanted: Sequence[str]) -> Iterator[str]:
    """Each stage's peak on each GPU; refused where this machine's GPU is too small for it."""
    config = run.config
    if config.train.gpus_per_worker == 0:
        yield "  memory: on CPU, not estimated"
        return
    stages = [0] if "ode_init" in wanted else []
    for stage in [*stages, *([1, 2] if "stage1" in wanted else [])]:
        found = estimate(config, layouts, stage)
        named = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in found.largest(4))
        yield f"  memory of stage {stage}: {found.total_bytes / 1e9:.1f} GB on each GPU ({found.phase}: {named})"
        if torch.cuda.is_available():
            memory.check(found, torch.cuda.get_device_properties(0).total_memory)


def estimate(config: Config, layouts: Layouts, stage: int, workers: int = 0) -> memory.MemoryEstimate:
    """The peak of a stage on each GPU of so many workers; by default of the fewest that it may go on with."""
    return memory.estimate(
        config,
        layouts.student,
        layouts.teacher,
        workers or config.train.fewest_workers,
        stage,
        text_layout=layouts.text,
        codec_layout=layouts.codec,
    )
