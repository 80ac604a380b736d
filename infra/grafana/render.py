"""Draws the dashboards from a running Prometheus: `python -m infra.grafana.render --prometheus URL --out docs/images`.

Grafana draws them better; this asks the same queries of the same panels and plots the answers with matplotlib, so that
documents show real data where no Grafana runs.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import textwrap
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from infra.prometheus.expressions import DASHBOARDS, filled

POINTS, COLUMNS, ROW_INCHES = 240, 24, 0.36
MOST_SERIES = 12
SCALES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class Window:
    """What to draw: a Prometheus, and seconds since 1970."""

    url: str
    start: float
    end: float

    @property
    def step(self) -> float:
        return max(1.0, (self.end - self.start) / POINTS)

    def curves(self, expression: str, interval: str) -> list[dict[str, Any]]:
        """One answer of /api/v1/query_range for each series."""
        asked = {"query": filled(expression, interval), "start": self.start, "end": self.end, "step": self.step}
        question = f"{self.url}/api/v1/query_range?{urllib.parse.urlencode(asked)}"
        with urllib.request.urlopen(question, timeout=60) as answer:
            return list(json.load(answer)["data"]["result"])


def shown(value: float, unit: str) -> str:
    """A number as a panel writes it."""
    if math.isnan(value):
        return "none so far"
    if unit == "percentunit":
        return f"{100 * value:.3g} %"
    if unit == "s":
        return f"{1000 * value:.3g} ms" if 0 < value < 1 else f"{value:.3g} s"
    suffix = {"bytes": "B", "ops": "/s", "fps": "fps", "FLOPS": "FLOP/s"}.get(unit, "")
    for scale, letter in SCALES:
        if abs(value) >= scale:
            return f"{value / scale:.3g} {letter}{suffix}"
    return f"{value:.3g} {suffix}".strip()


def named(legend: str, labels: dict[str, str]) -> str:
    """A legend with its labels filled in."""
    return re.sub(r"\{\{(\w+)\}\}", lambda found: labels.get(found[1], ""), legend).strip()


def draw(board: dict[str, Any], window: Window, interval: str) -> Figure:
    """One dashboard, panels where Grafana puts them."""
    panels = board["panels"]
    height = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
    figure = Figure(figsize=(17, ROW_INCHES * (height + 2)), facecolor="white", dpi=80)
    title = f"{board['title']} - {board['description']}"
    figure.suptitle(title, x=0.012, y=0.995, ha="left", fontsize=15, weight="bold")
    for panel in panels:
        place = panel["gridPos"]
        top, tall = 1 - (place["y"] + 1.4) / (height + 2), place["h"] / (height + 2)
        left, wide = place["x"] / COLUMNS, place["w"] / COLUMNS
        if panel["type"] == "row":
            figure.text(0.012, top - tall, panel["title"], fontsize=12, weight="bold", color="0.35")
            continue
        axes = figure.add_axes((left + 0.04, top - 0.8 * tall, wide - 0.053, 0.6 * tall))
        wrapped = textwrap.shorten(panel["title"], 9 * place["w"], placeholder="...")
        axes.set_title(wrapped, fontsize=10, loc="left")
        (_big if panel["type"] == "stat" else _curves)(axes, panel, window, interval)
    return figure


def _answers(panel: dict[str, Any], window: Window, interval: str) -> list[tuple[str, list[tuple[float, float]]]]:
    found = []
    for target in panel["targets"]:
        for series in window.curves(target["expr"], interval):
            points = [((float(at) - window.start) / 60, float(value)) for at, value in series["values"]]
            found.append((named(target["legendFormat"], series["metric"]), points))
    return found[:MOST_SERIES]


def _broken(points: list[tuple[float, float]], gap: float) -> Iterator[tuple[float, float]]:
    """The points, with a break in the line where nothing was measured."""
    for (before, _), point in zip([points[0], *points], points, strict=False):
        if point[0] - before > gap:
            yield (before + point[0]) / 2, math.nan
        yield point


def _big(axes: Axes, panel: dict[str, Any], window: Window, interval: str) -> None:
    axes.set_axis_off()
    found, unit = _answers(panel, window, interval), panel["fieldConfig"]["defaults"]["unit"]
    texts = [(shown(points[-1][1], unit), name) for name, points in found] or [("none so far", "")]
    for number, (value, name) in enumerate(texts):
        x = (number + 0.5) / len(texts)
        axes.text(x, 0.55, value, ha="center", va="center", fontsize=max(9, 22 - 4 * len(texts)), weight="bold")
        axes.text(x, 0.05, name.replace(": ", "\n"), ha="center", va="center", fontsize=8, color="0.4")


def _curves(axes: Axes, panel: dict[str, Any], window: Window, interval: str) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    for name, points in _answers(panel, window, interval):
        times, values = zip(*_broken(points, 3 * window.step / 60), strict=True)
        axes.plot(times, values, label=name, linewidth=1.3, marker=".", markersize=2)
    if axes.lines:
        axes.legend(fontsize=7, loc="upper left", frameon=False, ncols=2)
    else:
        axes.text(0.5, 0.5, "none so far", ha="center", transform=axes.transAxes, color="0.5")
    for step in defaults["thresholds"]["steps"][1:]:
        if axes.get_ylim()[1] >= 0.5 * step["value"] > 0:
            axes.axhline(step["value"], color=step["color"], linestyle="--", linewidth=0.8)
    axes.set_xlim(0, (window.end - window.start) / 60)
    axes.set_ylim(bottom=0, top=1.25 * max(axes.get_ylim()[1], 1e-9))
    axes.yaxis.set_major_formatter(lambda value, _: shown(value, defaults["unit"]))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g} min")
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.25)


def main(arguments: list[str] | None = None) -> int:
    """Draw every dashboard into its own PNG."""
    parser = argparse.ArgumentParser(prog="python -m infra.grafana.render", description=__doc__)
    parser.add_argument("--prometheus", default="http://127.0.0.1:9090", help="its address")
    parser.add_argument("--minutes", type=float, default=15.0, help="how far back")
    parser.add_argument("--until", type=float, default=0.0, help="seconds since 1970; default now")
    parser.add_argument("--interval", default="1m", help="what stands for $__rate_interval")
    parser.add_argument("--out", type=Path, default=Path("docs/images"), help="folder of the pictures")
    options = parser.parse_args(arguments)
    matplotlib.use("agg")
    end = options.until or time.time()
    window = Window(options.prometheus, end - 60 * options.minutes, end)
    options.out.mkdir(parents=True, exist_ok=True)
    for path in sorted(DASHBOARDS.glob("*.json")):
        picture = options.out / f"dashboard-{path.stem}.png"
        draw(json.loads(path.read_text()), window, options.interval).savefig(picture)
        print(picture)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
