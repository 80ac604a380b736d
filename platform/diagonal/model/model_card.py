"""The model card and the usage policy that every release carries: the paper's ethics statement asks for both."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

import diagonal
from diagonal.config import Config

CARD, POLICY = "README.md", "USAGE.md"
NOTHING_STATED = (
    "Nothing yet: training data and the rights in it, for whom this release is meant, who answers for it. What a run's "
    "folder holds as `statement.md` is put here when the release is written."
)
_TEMPLATES = Path(diagonal.__file__).parent / "assets" / "release"


def write_card(
    folder: Path, name: str, config: Config, lineage: Mapping[str, Mapping[str, Any]], author_notes: str = ""
) -> None:
    """Write `README.md`, filled in from a release's configuration and lineage, and `USAGE.md` into its folder.

    `author_notes` is Markdown: what its maker says of training data, audience and responsibility.
    """
    geometry = config.geometry
    text = Template((_TEMPLATES / CARD).read_text()).substitute(
        name=name,
        origin=_origin(lineage),
        width=geometry.pixel_width,
        height=geometry.pixel_height,
        fps=geometry.pixel_fps,
        chunk_s=f"{geometry.chunk_media_s(1):g}",
        steps=config.schedule.steps,
        window=config.cache.window_frames,
        lineage=_lineage(lineage),
        statement=author_notes.strip() or NOTHING_STATED,
    )
    (folder / CARD).write_text(text)
    (folder / POLICY).write_text((_TEMPLATES / POLICY).read_text())


def _origin(lineage: Mapping[str, Mapping[str, Any]]) -> str:
    """How the weights came to be: trained here, or by others."""
    imported = lineage.get("student")
    if imported is None:
        return "distilled by Diagonal Distillation"
    return (
        f"trained by others and imported as it is (`{imported['student']}`, sampled by the recipe {imported['recipe']})"
    )


def author_notes_of(card: str) -> str:
    """What a card's maker stated in it; empty where that is nothing."""
    said = card.partition("## What its maker states\n")[2].strip()
    return "" if said == NOTHING_STATED else said


def _lineage(stages: Mapping[str, Mapping[str, Any]]) -> str:
    """A table of stages: what each started from, its teacher, updates, seed."""
    rows = ["| stage | from | teacher | updates | seed |", "|---|---|---|---|---|"]
    for stage, says in stages.items():
        cells = [str(says.get(key, "")) for key in ("parent", "teacher", "updates", "seed")]
        rows.append(f"| {stage} | {' | '.join(cells)} |")
    return "\n".join(rows) if stages else "Not known: it was written without a lineage."
