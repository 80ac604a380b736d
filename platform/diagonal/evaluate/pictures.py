"""Pictures of evaluations, as PNG: figures over time, quality against cost, and contact sheets of clips."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from diagonal.errors import require

COLUMNS = 3
GAP_PX = 2


def save_curves(path: Path, times: Sequence[float], series: Mapping[str, Mapping[str, Any]], unit: str = "s") -> None:
    """One panel a figure; in it one line a source with its 95 % band. `series` is by source, then figure, with lists
    `mean`, `low` and `high`."""
    names = list(dict.fromkeys(name for curves in series.values() for name in curves))

    def draw(axes: Any, name: str) -> None:
        for source, curves in series.items():
            if name not in curves:
                continue
            band = [
                [
                    mean if end is None else end
                    for mean, end in zip(curves[name]["mean"], curves[name][key], strict=True)
                ]
                for key in ("low", "high")
            ]
            at = times[: len(curves[name]["mean"])]
            axes.plot(at, curves[name]["mean"], linewidth=1.0, label=source)
            axes.fill_between(at, *band, alpha=0.2)
        axes.set_title(name.replace("_", " "), fontsize=9)
        axes.set_xlabel(unit, fontsize=8)

    _save(path, names, draw)


def save_points(path: Path, points: Mapping[str, tuple[float, float]], best: Sequence[str], cost: str) -> None:
    """Quality over cost, one named point a configuration; those in `best` (the Pareto set) are filled and joined."""

    def draw(axes: Any, _: str) -> None:
        for name, (x, y) in points.items():
            axes.plot([x], [y], "o", color="C0", fillstyle="full" if name in best else "none")
            axes.annotate(name, (x, y), fontsize=6, xytext=(3, 3), textcoords="offset points")
        line = sorted(points[name] for name in best)
        axes.plot([x for x, _ in line], [y for _, y in line], "-", color="C0", linewidth=0.8)
        axes.set_xlabel(cost, fontsize=8)
        axes.set_ylabel("quality", fontsize=8)

    _save(path, ["quality over cost"], draw)


def save_forest(path: Path, series: Mapping[str, Mapping[str, Any]], marks: Mapping[str, Mapping[str, Any]]) -> None:
    """One line a score: each source's difference to the teacher in points with its interval, and where chance and
    ceiling lie. `series` is by source, then score, with `mean`, `low`, `high`; `marks` by score, as levels."""

    def draw(axes: Any, _: str) -> None:
        scores = list(marks)
        for number, (source, found) in enumerate(series.items()):
            places = [at + 0.22 * (number - (len(series) - 1) / 2) for at in range(len(scores))]
            means = [100 * found[score]["mean"] for score in scores]
            ends = [[100 * abs(found[s][end] - found[s]["mean"]) for s in scores] for end in ("low", "high")]
            axes.errorbar(means, places, xerr=ends, fmt="o", markersize=3, linewidth=1, label=source)
        for at, score in enumerate(scores):
            for name, sign in (("chance", "|"), ("ceiling", ">")):
                level = marks[score][name]
                if level is not None:
                    axes.plot([100 * (level - marks[score]["teacher"])], [at], sign, color="grey", markersize=8)
        axes.axvline(0.0, color="black", linewidth=0.8)
        axes.axvspan(-2.0, 0.0, color="C2", alpha=0.15)
        axes.set_xlim(-40, 40)
        axes.set_yticks(range(len(scores)), [score.replace("_", " ") for score in scores], fontsize=7)
        axes.invert_yaxis()
        axes.set_xlabel("points over the teacher; | chance, > ceiling; shaded: 2 points below", fontsize=7)
        axes.legend(fontsize=6)

    _save(path, ["scores"], draw, 5.2)


def save_quarters(path: Path, quarters: Mapping[str, Sequence[float]]) -> None:
    """One line a score over the quarters of a stream."""

    def draw(axes: Any, _: str) -> None:
        for number, (score, levels) in enumerate(quarters.items()):
            style = ("-", "--", ":")[number // 10 % 3]
            axes.plot(range(1, len(levels) + 1), levels, style, linewidth=1.0, label=score.replace("_", " "))
        axes.set_xticks(range(1, 5))
        axes.set_xlabel("quarter of the stream", fontsize=8)
        axes.legend(fontsize=6, loc="center left", bbox_to_anchor=(1.0, 0.5))

    _save(path, ["scores by quarter"], draw, 3.6)


def _save(path: Path, names: Sequence[str], draw: Callable[[Any, str], None], height: float = 2.8) -> None:
    """Panels of a figure, so many inches high, written whole or not at all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(COLUMNS, len(names)) or 1
    rows = -(-len(names) // columns) or 1
    figure = Figure(figsize=(4.5 * columns + (2 if columns == 1 else 0), height * rows), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    for index, name in enumerate(names, 1):
        axes = figure.add_subplot(rows, columns, index)
        draw(axes, name)
        axes.tick_params(labelsize=8)
    if len(names) > 1:
        figure.axes[0].legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    canvas.print_png(str(temporary))
    os.replace(temporary, path)


def contact_sheet(clips: Tensor, columns: int = 9, scale: int = 3) -> Image.Image:
    """Clips `[b, f, h, w, 3]` uint8 as rows of `columns` frames, evenly spaced in time, enlarged `scale` times."""
    require(clips.ndim == 5 and len(clips) > 0, "clips", tuple(clips.shape), "at least one clip, [b, f, h, w, 3]")
    frames = np.linspace(0, clips.shape[1] - 1, columns).round().astype(int)
    picked = clips[:, frames].numpy().repeat(scale, axis=2).repeat(scale, axis=3)
    padded = np.pad(picked, ((0, 0), (0, 0), (0, GAP_PX), (0, GAP_PX), (0, 0)), constant_values=255)
    rows, _, height, width, _ = padded.shape
    return Image.fromarray(padded.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, 3))


def save_png(image: Image.Image, path: Path) -> None:
    """Write a PNG, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    image.save(temporary, format="PNG")
    os.replace(temporary, path)
