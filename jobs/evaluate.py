"""Evaluation on the embedded world: teacher, initialised and distilled student by the exact oracle, side by side."""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

import diagonal
from diagonal.config import Config
from diagonal.data.world import Scene, held_out_scenes
from diagonal.errors import require
from diagonal.evaluate.quality import ScoreTable, codec_clips, draw_scenes, judge, student_clips, teacher_clips
from diagonal.evaluate.sheet import contact_sheet, save_png
from diagonal.model.weights import Release, base_folder, embedded, load_causal, load_decoder, load_text
from diagonal.schedule import StepSchedule
from diagonal.tree import write_json
from jobs.run import main, say

ROWS_ON_SHEET = 6
MEASURES = ("colour", "shape", "direction", "speed", "steadiness", "smoothness", "saturation")


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--release", help="a release folder or s3:// URI (default: the embedded one)")
    parser.add_argument("--init", help="the initialised student's folder (default: the embedded one)")
    parser.add_argument("--clips", type=int, default=288, help="clips a row (default: 288, every scene twice)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--held-out", action="store_true", help="only the scenes that no training clip showed")
    parser.add_argument("--out", default="docs/results/tiny", help="writes OUT.json, OUT.md and OUT.png")
    found = parser.parse_args(argv)
    require(1 <= found.clips <= 100_000, "--clips", found.clips, "a whole number from 1 to 100000")
    return found


def evaluate(options: argparse.Namespace) -> dict[str, object]:
    """Every row's scores, forwards and seconds; the release's own clips make the picture."""
    release = Release.load(options.release)
    config, base = release.config, base_folder(release.config)
    scenes = draw_scenes(options.clips, options.seed, held_out_scenes() if options.held_out else None)
    init = Path(options.init) if options.init else embedded("ode_init")
    sources = _sources(release, base, init, scenes, options.seed)
    rows = []
    for name, forwards, make in sources:
        started_s = time.perf_counter()
        clips = make()
        seconds = (time.perf_counter() - started_s) / len(scenes)
        scores = judge(clips, scenes, config)
        rows.append({"name": name, "forwards": forwards, "seconds_per_clip": round(seconds, 4), "scores": scores})
        say(f"{name}: " + _shown(scores))
        if name == "distilled student, own schedule":
            save_png(contact_sheet(clips[:ROWS_ON_SHEET]), Path(f"{options.out}.png"))
    return {
        "date": datetime.now(UTC).date().isoformat(), "machine": f"{platform.machine()}, CPU, "
        f"{torch.get_num_threads()} thread(s)", "torch": torch.__version__, "diagonal": diagonal.__version__,
        "command": _command(options), "clips": options.clips, "seed": options.seed, "release": release.name,
        "lineage": release.manifest["lineage"], "captions": [scene.caption for scene in scenes[:ROWS_ON_SHEET]],
        "rows": rows,
    }


def _sources(
    release: Release, base: Path, init: Path, scenes: Sequence[Scene], seed: int
) -> list[tuple[str, int, Callable[[], Tensor]]]:
    config = release.config
    text, decoder = load_text(base, config), load_decoder(base, config)
    steps, chunks = config.pairs.solver_steps, config.geometry.clip_chunks
    found: list[tuple[str, int, Callable[[], Tensor]]] = [
        ("codec alone (ceiling)", 0, lambda: codec_clips(base, config, scenes, seed)),
        (f"teacher, {steps} steps, guided", 2 * steps, lambda: teacher_clips(base, config, scenes, seed)),
    ]
    students = {"initialised student": load_causal(init, config), "distilled student": release.generator()}
    for name, network in students.items():
        for schedule in (config.schedule, StepSchedule("self-forcing", config.schedule.shift)):
            label = "own schedule" if schedule is config.schedule else "self-forcing"
            found.append((
                f"{name}, {label}", schedule.total_forwards(chunks),
                lambda network=network, schedule=schedule: student_clips(  # type: ignore[misc]
                    network, text, decoder, config, scenes, seed, schedule
                ),
            ))
    return found


def _shown(scores: ScoreTable) -> str:
    return ", ".join(f"{name} {scores[name]['mean']:.3f}" for name in MEASURES)


def _command(options: argparse.Namespace) -> str:
    parts = ["python jobs/evaluate.py", f"--clips {options.clips}", f"--seed {options.seed}"]
    parts += [f"--release {options.release}"] if options.release else []
    parts += ["--held-out"] if options.held_out else []
    return " ".join([*parts, f"--out {options.out}"])


def markdown(report: dict[str, object], config: Config) -> str:
    """The report as a table, with what is needed to reproduce it."""
    rows = report["rows"]
    assert isinstance(rows, list)
    lines = [
        "# The embedded model, by its oracle", "",
        f"{report['date']}, {report['machine']}, torch {report['torch']}; release `{report['release']}`, "
        f"{report['clips']} clips a row, seed {report['seed']}. Reproduce: `{report['command']}`.", "",
        f"Schedule {config.schedule.steps}, context {config.schedule.resolved_context}, window "
        f"{config.cache.window_frames}, sink {config.cache.sink_frames} latent frames. Forwards are real network "
        "calls a clip; the teacher's count both guidance branches. ± is the 95 % half-width.", "",
        "| | forwards | s a clip (batched) | " + " | ".join(MEASURES) + " |",
        "|---" * (len(MEASURES) + 3) + "|",
    ]
    for row in rows:
        cells = [f"{row['scores'][m]['mean']:.3f} ±{row['scores'][m]['half_width']:.3f}" for m in MEASURES]
        cost = [str(row["forwards"]), f"{row['seconds_per_clip']:.3f}"]
        lines.append("| " + " | ".join([str(row["name"]), *cost, *cells]) + " |")
    return "\n".join(lines) + "\n"


def work(argv: Sequence[str]) -> None:
    options = arguments(argv)
    report = evaluate(options)
    write_json(f"{options.out}.json", report)
    text = markdown(json.loads(json.dumps(report)), Release.load(options.release).config)
    Path(f"{options.out}.md").write_text(text)
    say(f"report {options.out}.md")


if __name__ == "__main__":
    main("jobs.evaluate")
