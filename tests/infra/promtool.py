"""promtool's unit tests of alert rules, written from cases: which series, and whether the alert fires at a time."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class Case:
    """`bad` and `good`: values of each series, a sample a minute in promtool's notation; at `minute` it fires, or not.

    What stands in `base` is there in both.
    """

    alert: str
    minute: int
    bad: dict[str, str]
    good: dict[str, str]
    base: dict[str, str] = field(default_factory=dict)

    def tests(self) -> list[dict[str, Any]]:
        return [self._test("fires", self.bad, 1), self._test("stays quiet", self.good, 0)]

    def _test(self, what: str, series: dict[str, str], firing: int) -> dict[str, Any]:
        expression = f'count by (alertname) (ALERTS{{alertname="{self.alert}",alertstate="firing"}})'
        expected = [{"labels": f'{{alertname="{self.alert}"}}', "value": 1}] if firing else []
        return {
            "name": f"{self.alert} {what}",
            "interval": "1m",
            "input_series": [{"series": name, "values": values} for name, values in (self.base | series).items()],
            "promql_expr_test": [{"expr": expression, "eval_time": f"{self.minute}m", "exp_samples": expected}],
        }


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """promtool's answer."""
    return subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True, timeout=120)


def try_rules(folder: Path, rules: list[Path], cases: list[Case]) -> subprocess.CompletedProcess[str]:
    """`promtool test rules` over the cases."""
    tests = [test for case in cases for test in case.tests()]
    document = {"rule_files": [str(path) for path in rules], "evaluation_interval": "1m", "tests": tests}
    path = folder / "cases.yml"
    path.write_text(yaml.safe_dump(document))
    return run("test", "rules", path)
