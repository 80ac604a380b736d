"""How measured training speed is written: JSON and a Markdown table, with date, device, versions, commit, command."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import diffusers
import torch

import diagonal
from diagonal.config import Config
from diagonal.evaluate.environment import commit
from diagonal.files import write_text
from diagonal.jsonfile import write_json

Row = Mapping[str, Any]


def write_report(
    out: Path, command: str, config: Config, device: torch.device, results: Mapping[str, Sequence[Row]]
) -> str:
    """Write `out` (JSON) and the table beside it as `.md`, whole or not at all; returns the table."""
    found = {**environment(device), "command": command, "preset": config.preset, **results}
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, {**found, "config": config.to_dict()})
    text = markdown(found, config)
    write_text(out.with_suffix(".md"), text)
    return text


def environment(device: torch.device) -> dict[str, str]:
    """What a figure is worth nothing without."""
    cuda = device.type == "cuda"
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if cuda else f"{platform.processor() or platform.machine()} (CPU)",
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
        "diagonal": diagonal.__version__,
        "commit": commit(),
    }


def markdown(found: Mapping[str, Any], config: Config) -> str:
    """The report as a page: how it was measured, then a table of updates and one of attention."""
    schedule, geometry = config.schedule, config.geometry
    head = [
        "# Training speed on one device",
        "",
        f"{found['date']}, {found['device']}, torch {found['torch']}, CUDA {found['cuda']}, diffusers "
        f"{found['diffusers']}, commit {found['commit'][:12]}. Command:",
        "",
        f"    {found['command']}",
        "",
        f"Preset {found['preset']}: {geometry.pixel_width}x{geometry.pixel_height}, {geometry.clip_frames} latent "
        f"frames, schedule {schedule.steps}, context {schedule.resolved_context}, window {config.cache.window_frames}, "
        f"compute {config.model.compute_dtype}. Random weights; one sample an update; sharded over a mesh of one rank "
        "(FSDP's hooks run, nothing is sent). FLOPs are counted without recomputation. Text encoder and codec are not "
        "loaded.",
        "",
    ]
    rows = ["| update | seconds | TFLOP | utilisation | peak GB | estimated GB |", "|---|---|---|---|---|---|"]
    for row in found["updates"]:
        rows.append(
            f"| {row['what']} | {_figure(row, 'update_s', '.3f')} | {_figure(row, 'tflop', '.4g')} | "
            f"{_figure(row, 'utilisation', '.1%')} | {_figure(row, 'peak_bytes', '.1f', 1e9)} | "
            f"{_figure(row, 'estimated_bytes', '.3g', 1e9)} |"
        )
    rows += ["", "| attention of a clip, forward and backward | ms | TFLOP/s |", "|---|---|---|"]
    for row in found["attention"]:
        missing = f" ({row['not_measured']})" if "not_measured" in row else ""
        rows.append(f"| {row['what']}{missing} | {_figure(row, 'ms', '.2f')} | {_figure(row, 'tflops', '.4g')} |")
    return "\n".join([*head, *rows, ""])


def _figure(row: Row, name: str, form: str, unit: float = 1.0) -> str:
    value = row.get(name)
    return "not measured" if value is None else format(value / unit, form)
