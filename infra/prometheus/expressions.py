"""Every PromQL expression of the dashboards and the rules, read from their files, and what an expression names."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

INFRA = Path(__file__).resolve().parents[1]
DASHBOARDS, RULES = INFRA / "grafana" / "dashboards", INFRA / "prometheus" / "rules"
RATE_INTERVAL = "1m"  # what stands for Grafana's $__rate_interval where no Grafana replaces it
_WORDS = frozenset("and or unless by without on ignoring group_left group_right bool offset inf nan".split())
_NUMBER = r"[0-9][0-9.e+-]*"
_COMPARISON = re.compile(rf"(==|!=|>=|<=|>|<)\s*(bool\s+)?({_NUMBER}(\s*[*/]\s*{_NUMBER})*|\({_NUMBER}[^()]*\))")


@dataclass(frozen=True)
class Expression:
    """One expression: where it stands, what it asks, and `kind` panel, record or alert."""

    place: str
    text: str
    kind: str

    @property
    def metrics(self) -> set[str]:
        return metrics_of(self.text)

    @property
    def measured(self) -> str:
        """The expression without what makes it empty in good times: comparisons with numbers, and `absent`."""
        return _COMPARISON.sub("", self.text).replace("absent(", "(") if self.kind == "alert" else self.text


def metrics_of(text: str) -> set[str]:
    """Names of the metrics in an expression."""
    text = re.sub(r'"(\\.|[^"\\])*"', '""', text)
    text = re.sub(r"\{[^{}]*\}|\[[^\[\]]*\]", " ", text)
    text = re.sub(r"\b(by|without|on|ignoring|group_left|group_right)\s*\([^()]*\)", " ", text)
    names = re.findall(r"(?<![\w.:])([A-Za-z_:][\w:]*)(?!\s*\()(?![\w:])", text)
    return {name for name in names if name.lower() not in _WORDS}


def panels(folder: Path = DASHBOARDS) -> Iterator[tuple[str, dict[str, Any]]]:
    """(dashboard, panel) of every panel of the committed JSON, without headings."""
    for path in sorted(folder.glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            if panel["type"] != "row":
                yield path.stem, panel


def panel_expressions(folder: Path = DASHBOARDS, interval: str = RATE_INTERVAL) -> list[Expression]:
    """Expressions of all panels, with every variable at `All`."""
    found = []
    for board, panel in panels(folder):
        for target in panel["targets"]:
            place = f"{board}: {panel['title']} {target['refId']}"
            found.append(Expression(place, filled(target["expr"], interval), "panel"))
    return found


def filled(text: str, interval: str = RATE_INTERVAL) -> str:
    """An expression as Grafana sends it: every variable at `All`."""
    return re.sub(r"\$\w+", ".*", text.replace("$__rate_interval", interval))


def rules(folder: Path = RULES) -> list[dict[str, Any]]:
    """Every rule of every group."""
    files = [yaml.safe_load(path.read_text()) for path in sorted(folder.glob("*.yml"))]
    return [rule for file in files for group in file["groups"] for rule in group["rules"]]


def rule_expressions(folder: Path = RULES) -> list[Expression]:
    """Expressions of all rules."""
    kinds = ("record", "alert")
    return [
        Expression(f"{kind}: {rule[kind]}", " ".join(rule["expr"].split()), kind)
        for rule in rules(folder)
        for kind in kinds
        if kind in rule
    ]


def every_expression() -> list[Expression]:
    return [*panel_expressions(), *rule_expressions()]
