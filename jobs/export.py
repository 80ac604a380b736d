"""Export: a run's distilled student, its base model's codec and text, and their scores become a Release."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below, which take seconds
    from runs.start import start

    start(__file__, __doc__)

from collections.abc import Sequence

from diagonal.errors import require
from diagonal.evaluate.quality.report import shown
from diagonal.evaluate.quality.sources import ScoreTable, score_release
from diagonal.model.base_model import LINEAGE, SHA256, base_uri
from diagonal.model.manifest import MANIFEST
from diagonal.model.release import Release
from diagonal.storage import Folder
from jobs.runs import arguments
from jobs.runs.artefacts import local_copy, publish_release
from jobs.runs.run import Run, opened, say


def export(run: Run) -> Folder:
    """Write `release/` unless the run has one; returns its folder."""
    target = run.folder / "release"
    if not run.has_release:
        require(run.has_student("stage2"), "run", run.name, "a run whose stage 2 is done (jobs/distill.py)")
        publish_release(run, local_copy(run, "stage2"), lineage(run))
    if run.config.is_embedded:
        _score(run, target)
    return target


def lineage(run: Run) -> dict[str, dict[str, object]]:
    """What each stage says of where it comes from, a given initial student as `init`; what was given without a lineage
    is left out."""
    stages = {
        "base": Folder(base_uri(run.config)),
        "init" if run.config.distill.init else "ode_init": Folder(run.initial_student),
        "stage1": run.folder / "stage1",
        "stage2": run.folder / "stage2",
    }
    found = {stage: folder.read_json(LINEAGE) for stage, folder in stages.items() if folder.has(LINEAGE)}
    return {stage: {key: value for key, value in says.items() if key != SHA256} for stage, says in found.items()}


def _score(run: Run, target: Folder, clips: int = 48) -> None:
    """Add the oracle's scores to the manifest: a first look; jobs/evaluate.py measures in full."""
    manifest = target.read_json(MANIFEST)
    if manifest["scores"]:
        return
    release = Release.load(local_copy(run, "release", MANIFEST))
    scores = score_release(release, clips=clips, seed=release.config.seed)
    target.write_json(MANIFEST, {**manifest, "scores": scores})
    say(f"scores {listed(scores)}")


def listed(scores: ScoreTable) -> str:
    """Scores on one line."""
    return ", ".join(f"{name} {shown(value)}" for name, value in scores.items())


def work(argv: Sequence[str]) -> None:
    with opened(arguments.run_options([*argv, "--resume"], __doc__ or "")) as run:
        say(f"release {export(run)}")
