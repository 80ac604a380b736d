"""What a panel and a dashboard are here, and their JSON for Grafana by its own builder library."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.builders.dashboard import (
    Dashboard,
    DatasourceVariable,
    QueryVariable,
    Row,
    ThresholdsConfig,
)
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import GraphThresholdsStyleMode, LegendPlacement, VisibilityMode
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DashboardLinkType,
    DataSourceRef,
    Threshold,
    ThresholdsMode,
    VariableRefresh,
    VariableSort,
)

from diagonal.errors import require

# Grafana's own names of the units that panels here use.
UNITS = frozenset({"s", "bytes", "percentunit", "short", "none", "ops", "FLOPS", "fps"})
SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
WIDTH = 24  # columns of Grafana's grid
GOOD, WORSE, BAD = "green", "orange", "red"


@dataclass(frozen=True)
class Query:
    """One PromQL expression and the legend of its series."""

    expression: str
    legend: str


def lately(counter: str, window: str = "10m") -> str:
    """What a counter counted within `window`, a series that began in it from zero on.

    Ray shows a counter from its first event, which is therefore no increase(); and each process has series of its own,
    so that none is ever set back.
    """
    return f"({counter} - ({counter} offset {window} or 0 * {counter}))"


def quantiles(histogram: str, by: str, legend: str, *shares: float) -> tuple[Query, ...]:
    """Bounds under which these shares of what a histogram saw lately lie; for what comes too rarely for a rate."""
    seen = f"sum by ({by}) {lately(histogram)}"
    return tuple(Query(f"histogram_quantile({share}, {seen})", f"{legend}{100 * share:g} %") for share in shares)


def rate_quantiles(histogram: str, by: str, legend: str, *shares: float) -> tuple[Query, ...]:
    """The same of a histogram that counts all the time."""
    seen = f"sum by ({by}) (rate({histogram}[$__rate_interval]))"
    return tuple(Query(f"histogram_quantile({share}, {seen})", f"{legend}{100 * share:g} %") for share in shares)


@dataclass(frozen=True)
class Panel:
    """One question. `title` asks it; `advice` says what to do when the answer looks bad.

    `limits` are (value, colour) from which the colour holds; `big` shows the newest number instead of a curve.
    """

    title: str
    advice: str
    unit: str
    queries: tuple[Query, ...]
    limits: tuple[tuple[float, str], ...] = ()
    big: bool = False
    width: int = 8
    top: float | None = None

    def __post_init__(self) -> None:
        require(self.title.endswith("?"), "panel.title", self.title, "a question")
        require(self.unit in UNITS, f"unit of {self.title!r}", self.unit, f"one of {sorted(UNITS)}")
        require(len(self.advice) > 40, f"advice of {self.title!r}", self.advice, "a sentence that says what to do")
        require(bool(self.queries), f"queries of {self.title!r}", self.queries, "at least one")


@dataclass(frozen=True)
class Section:
    """Panels under one heading."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Variable:
    """A choice at the top of a dashboard: the values of a label of a metric."""

    name: str
    title: str
    metric: str
    matchers: str = ""

    @property
    def query(self) -> str:
        return f"label_values({self.metric}{self.matchers}, {self.name})"


@dataclass(frozen=True)
class Board:
    """One dashboard; `name` is its file and the end of its uid. `shorthands` are replaced in every expression."""

    name: str
    title: str
    purpose: str
    variables: tuple[Variable, ...]
    sections: tuple[Section, ...]
    shorthands: Mapping[str, str]
    since: str = "now-1h"

    @property
    def panels(self) -> list[Panel]:
        return [panel for section in self.sections for panel in section.panels]


def expanded(expression: str, shorthands: Mapping[str, str]) -> str:
    """The expression with each `{NAME...` of `shorthands` replaced by its matchers; ValueError where one is unknown."""
    for name, matchers in shorthands.items():
        expression = re.sub(rf"\{{{name}\b", f"{{{matchers}", expression)
    left = re.findall(r"\{[A-Z]+\b", expression)
    require(not left, "shorthands", left, f"those of {sorted(shorthands)}")
    return " ".join(expression.split())


def to_json(board: Board, others: Sequence[Board] = ()) -> str:
    """The dashboard as Grafana's JSON, with links to `others`; the same text every time."""
    made = Dashboard(board.title).uid(f"diagonal-{board.name}").description(board.purpose).tags(["diagonal"])
    made = made.time(board.since, "now").refresh("30s").readonly().tooltip(DashboardCursorSync.CROSSHAIR)
    made = made.with_variable(DatasourceVariable("datasource").type("prometheus").label("Prometheus"))
    for variable in board.variables:
        made = made.with_variable(_variable(variable))
    for other in others:
        if other.name != board.name:
            link = dashboard.DashboardLink(other.title).type(DashboardLinkType.LINK).url(f"/d/diagonal-{other.name}")
            made = made.link(link.keep_time(True).include_vars(False))
    number = 0
    for section in board.sections:
        number += 1
        made = made.with_row(Row(section.title).id(number))
        for panel in section.panels:
            number += 1
            made = made.with_panel(_panel(panel, board.shorthands, number))
    return JSONEncoder(sort_keys=True, indent=2).encode(made.build()) + "\n"


def _variable(variable: Variable) -> QueryVariable:
    made = QueryVariable(variable.name).label(variable.title).query(variable.query).datasource(SOURCE)
    made = made.multi(True).include_all(True).all_value(".*").sort(VariableSort.ALPHABETICAL_ASC)
    return made.refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)


def _panel(panel: Panel, shorthands: Mapping[str, str], number: int) -> Any:
    made: Any = stat.Panel() if panel.big else _curves(panel)
    made = made.id(number).title(panel.title).description(panel.advice).unit(panel.unit).datasource(SOURCE)
    made = made.span(panel.width).height(5 if panel.big else 8).min(0).no_value("none so far")
    for place, query in enumerate(panel.queries):
        expression = expanded(query.expression, shorthands)
        target = prometheus.Dataquery().expr(expression).legend_format(query.legend).ref_id(chr(ord("A") + place))
        made = made.with_target(target.datasource(SOURCE))
    steps = [Threshold(color=GOOD, value=None), *(Threshold(color=colour, value=at) for at, colour in panel.limits)]
    if panel.top is not None:
        made = made.max(panel.top)
    return made.thresholds(ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps))


def _curves(panel: Panel) -> timeseries.Panel:
    legend = common.VizLegendOptions().placement(LegendPlacement.BOTTOM).show_legend(True).calcs(["lastNotNull"])
    made = timeseries.Panel().legend(legend).fill_opacity(8).show_points(VisibilityMode.NEVER)
    if panel.limits:
        made = made.thresholds_style(common.GraphThresholdsStyleConfig().mode(GraphThresholdsStyleMode.DASHED))
    return made
