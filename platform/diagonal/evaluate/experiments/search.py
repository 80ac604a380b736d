"""A sweep's configurations, what each costs and is worth, the Pareto set, and the serving profile that follows."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from diagonal.config import Config
from diagonal.errors import require
from diagonal.evaluate.experiments.table import Variant
from diagonal.evaluate.intervals import difference, interval
from diagonal.evaluate.quality.sources import Student
from diagonal.evaluate.quality.streams import stream
from diagonal.schedule import Context

POINTS = 100.0
TIMED_ROUNDS = 3


@dataclass(frozen=True)
class Point:
    """One configuration: steps by chunk, context (reuse or a level), and the motion weight that its student is trained
    with; None takes a student that is there already and changes its sampling alone."""

    steps: str
    context: Context
    gamma: float | None = None

    @property
    def name(self) -> str:
        context = self.context if self.context == "reuse" else f"{float(self.context):.3f}"
        return f"{self.steps}, {context}" + ("" if self.gamma is None else f", gamma {self.gamma:g}")

    @property
    def settings(self) -> tuple[str, ...]:
        """What it sets in a configuration."""
        found = (f"schedule.steps={self.steps}", f"schedule.context={self.context}")
        return found if self.gamma is None else (*found, f"distill.loss.gamma={self.gamma}")

    def variant(self) -> Variant:
        """As a variant whose student is trained."""
        return Variant(self.name, "trained", self.settings)


def parse_context(text: str) -> Context:
    """`reuse` or a level in [0, 1]; `FieldError` else."""
    if text == "reuse":
        return "reuse"
    try:
        level = float(text)
    except ValueError:
        level = -1.0
    require(0.0 <= level <= 1.0, "--contexts", text, "'reuse' or a level in [0, 1]")
    return level


def grid(base: Config, steps: Sequence[str], contexts: Sequence[Context], gammas: Sequence[float]) -> list[Point]:
    """Every combination that a schedule allows: reuse and a one-step row exclude one another. `FieldError` for a value
    that none allows."""
    found = []
    for some, context, gamma in itertools.product(steps, contexts, gammas or (None,)):
        point = Point(some, context, gamma)
        one_step = context == "reuse" and "1" in some
        if not one_step:
            base.with_settings(point.settings)
            found.append(point)
    require(bool(found), "--steps", list(steps), "steps of which at least one combination is allowed")
    return found


def clip_ms(student: Student, caption: str) -> float:
    """Milliseconds to make and decode one clip alone: of each chunk the least of several rounds, which a busy machine
    lengthens least, added up."""
    rounds = []
    for seed in range(TIMED_ROUNDS):
        began_s, times = time.perf_counter(), list[float]()
        for _ in stream(student, [caption], [seed], student.config.geometry.clip_chunks):
            times.append(time.perf_counter() - began_s)
            began_s = time.perf_counter()
        rounds.append(times)
    return round(1000 * sum(min(times) for times in zip(*rounds, strict=True)), 3)


def worth(values: Mapping[str, Sequence[float]], scores: Sequence[str]) -> list[float]:
    """A clip's quality: the mean of its scores."""
    return [float(value) for value in np.mean([values[name] for name in scores], axis=0)]


def pareto(costs: Mapping[str, float], qualities: Mapping[str, float]) -> list[str]:
    """Names that no other one beats in both, cheapest first."""
    best: list[str] = []
    for name in sorted(costs, key=lambda one: (costs[one], -qualities[one])):
        if not best or qualities[name] > qualities[best[-1]]:
            best.append(name)
    return best


def profile(
    release: str, points: Mapping[str, Point], rows: Mapping[str, Mapping[str, Any]], cost: str, margin_points: float
) -> dict[str, Any]:
    """The cheapest configuration whose quality is not inferior to the best one's by `margin_points`, as `settings` for
    `jobs/distill.py --set` and `Release.with_settings`; and as `options` of `ServeSettings` the steps that an
    overloaded engine may take: the cheapest of the Pareto set under the same context and weights."""
    costs = {name: float(row[cost]) for name, row in rows.items()}
    means = {name: interval(row["quality"]).mean for name, row in rows.items()}
    front = pareto(costs, means)
    best = front[-1]
    good = [
        name
        for name in front
        if name == best or POINTS * difference(rows[name]["quality"], rows[best]["quality"]).low > -margin_points
    ]
    chosen = points[good[0]]
    alike = [
        points[name] for name in front if (points[name].context, points[name].gamma) == (chosen.context, chosen.gamma)
    ]
    less = [point for point in alike if costs[point.name] < costs[chosen.name]]
    return {
        "format_version": 1,
        "release": release,
        "settings": list(chosen.settings),
        "options": f"degraded_steps={less[0].steps}" if less else "",
        "evidence": {
            "chosen": chosen.name,
            "best": best,
            "cost": cost,
            "margin_points": margin_points,
            "pareto": [
                {"name": name, cost: costs[name], "quality": interval(rows[name]["quality"]).to_dict()}
                for name in front
            ],
        },
    }
