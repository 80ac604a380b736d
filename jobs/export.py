"""Export: a run's distilled student, its base model's codec and text, and their scores become a Release."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from diagonal.errors import require
from diagonal.evaluate.quality import score_release
from diagonal.model.weights import LINEAGE, MANIFEST, Release, write_release
from diagonal.tree import write_json
from jobs.run import Run, main, open_run, parser, say


def export(run: Run) -> Path:
    """Write `release/` unless the run has one; returns its folder."""
    target, student = run.folder / "release", run.folder / "stage2"
    if not (target / MANIFEST).exists():
        require((student / LINEAGE).exists(), "run", run.name, "a run whose stage 2 is done (jobs/distill.py)")
        stages = {"base": run.base, "ode_init": run.initial_student, "stage1": run.folder / "stage1", "stage2": student}
        lineage = {
            stage: json.loads((folder / LINEAGE).read_text())
            for stage, folder in stages.items() if (folder / LINEAGE).exists()
        }
        write_release(target, name=run.name, student=student, base=run.base, lineage=lineage, scores={})
    if run.config.preset == "tiny":
        _score(target)
    return target


def _score(target: Path, clips: int = 48) -> None:
    """Add the oracle's scores to the manifest: a first look; jobs/evaluate.py measures in full."""
    release = Release.load(target)
    if release.manifest["scores"]:
        return
    scores = score_release(release, clips=clips, seed=release.config.seed)
    write_json(target / MANIFEST, {**release.manifest, "scores": scores})
    shown = (f"{name} {value['mean']:.3f}±{value['half_width']:.3f}" for name, value in scores.items())
    say("scores " + ", ".join(shown))


def work(argv: Sequence[str]) -> None:
    arguments = parser(__doc__ or "").parse_args(argv)
    require(bool(arguments.name), "--name", arguments.name, "the name of a run")
    say(f"release {export(open_run(arguments))}")


if __name__ == "__main__":
    main("jobs.export")
