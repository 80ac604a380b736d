"""`python -m tests.faults.page REPORTS`: docs/results/faults.md from the JUnit files of a run."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

from diagonal.evaluate.environment import commit, processor

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "results" / "faults.md"
RESULTS = {"failure": "**failed**", "error": "**error**", "skipped": "skipped"}
HEAD = """# Faults: the last run

Written by `python -m tests.faults.page REPORTS` from what `make test-faults REPORTS=REPORTS` left: the fifty tests, or
with `CHOICE=ci` the seven that CI runs. Each test ends, freezes or damages a part on purpose, on one machine, while the
embedded model trains or streams; figures are of that machine.
"""


def page(reports: Path, revision: str, machine: str) -> str:
    """The page: when and where it ran, then each test with its result, its time and its figures."""
    suites = [suite for file in sorted(reports.glob("*.xml")) for suite in ET.parse(file).getroot().iter("testsuite")]
    cases = [case for suite in suites for case in suite.iter("testcase")]
    if not cases:
        raise SystemExit(f"no JUnit file in {reports} has a test: run `make test-faults REPORTS={reports}` first")
    passed = sum(result(case) == "passed" for case in cases)
    took_s = sum(float(suite.get("time", 0)) for suite in suites)
    began = min(suite.get("timestamp", "") for suite in suites)[:16].replace("T", " ")
    about = f"{began}, commit {revision}, {machine}: {passed} of {len(cases)} passed, {took_s / 60:.0f} minutes."
    lines = ["| file | what holds | result | s | figures |", "|---|---|---|---|---|"]
    return "\n".join([HEAD, about, "", *lines, *(row(case) for case in cases), ""])


def result(case: ET.Element) -> str:
    return next((RESULTS[part.tag] for part in case if part.tag in RESULTS), "passed")


def row(case: ET.Element) -> str:
    module = case.get("classname", "").rpartition(".")[2].removeprefix("test_").replace("_", " ")
    sentence = case.get("name", "").removeprefix("test_").replace("_", " ")
    figures = "; ".join(f"{one.get('name')}: {one.get('value')}" for one in case.iter("property"))
    return f"| {module} | {sentence} | {result(case)} | {float(case.get('time', 0)):.0f} | {figures} |"


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m tests.faults.page REPORTS")
    dirty = subprocess.run(["git", "diff", "--quiet", "HEAD"], cwd=ROOT).returncode != 0
    revision = f"{commit()[:12]}{' with changes' if dirty else ''}"
    PAGE.write_text(page(Path(sys.argv[1]), revision, processor()))


if __name__ == "__main__":
    main()
