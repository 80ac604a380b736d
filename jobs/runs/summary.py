"""What a finished run came to: stages, updates, times, losses, faults that were overcome, scores, and the release."""

from __future__ import annotations

from typing import Any

from diagonal.evaluate.quality.report import shown
from diagonal.model.manifest import MANIFEST
from jobs.runs.console import duration
from jobs.runs.run import SUMMARY, Run, say
from jobs.runs.update_log import NOT_CURVES, UPDATES, Record, read_journal

RECENT = 20


def summarise(run: Run) -> dict[str, Any]:
    """Write the run's summary and print it; the run then counts as finished."""
    stages = {name: _stage(run, name) for name in ("ode_init", "distill")}
    manifest = run.folder.read_json(f"release/{MANIFEST}")
    found = {
        "name": run.name,
        "release": str(run.folder / "release"),
        "scores": manifest["scores"],
        "lineage": manifest["lineage"],
        "stages": {name: stage for name, stage in stages.items() if stage},
    }
    run.folder.write_json(SUMMARY, found)
    for line in told(found):
        say(line)
    run.note("finished")
    return found


def told(summary: dict[str, Any]) -> list[str]:
    """The summary in lines."""
    lines = [f"run {summary['name']} is finished"]
    for name, stage in summary["stages"].items():
        losses = ", ".join(f"{loss} {value:.4g}" for loss, value in stage["losses"].items())
        lines.append(
            f"  {name}: {stage['updates']} updates in {duration(stage['seconds'])} of training, "
            f"{stage['skipped']} skipped, {stage['restarts']} restarts, {stage['refused_checkpoints']} checkpoints "
            f"refused; mean of the last {RECENT}: {losses}"
        )
    scores = ", ".join(f"{name} {shown(value)}" for name, value in summary["scores"].items())
    return [*lines, *([f"  scores: {scores}"] if scores else []), f"  release: {summary['release']}"]


def _stage(run: Run, name: str) -> dict[str, Any]:
    folder = run.folder / "train" / name
    if not folder.has(UPDATES):
        return {}
    record = read_journal(folder.read(UPDATES).decode().splitlines())
    return {
        "updates": len(record.updates),
        "seconds": round(record.seconds, 3),
        "skipped": record.skipped,
        "restarts": record.restarts,
        "refused_checkpoints": record.refused,
        "losses": _losses(record),
        "world_sizes": [start["world_size"] for start in record.starts],
    }


def _losses(record: Record) -> dict[str, float]:
    """Mean of each figure over the last updates that have it."""
    values: dict[str, list[float]] = {}
    for entry in record.updates[-RECENT:]:
        for name, value in entry.items():
            if name not in NOT_CURVES and not isinstance(value, list):
                values.setdefault(name, []).append(value)
    return {name: sum(found) / len(found) for name, found in sorted(values.items())}
