"""The page of the last fault tests says what their JUnit files say."""

from pathlib import Path

import pytest

from tests.faults.page import page

REPORT = """<testsuites><testsuite time="90" timestamp="2026-11-30T23:59:01.5+00:00">
<testcase classname="tests.faults.test_lost_workers" name="test_a_killed_worker_changes_no_bit" time="61.6">
<properties><property name="longest gap" value="2.1 s"/></properties></testcase>
<testcase classname="tests.faults.test_stops" name="test_sigterm_ends_a_run" time="2"><failure message="no"/></testcase>
</testsuite></testsuites>"""


def test_every_test_is_a_row_with_its_result_and_figures(tmp_path: Path) -> None:
    (tmp_path / "alone.xml").write_text(REPORT)
    text = page(tmp_path, "c0ffee", "a machine")
    assert "2026-11-30 23:59, commit c0ffee, a machine: 1 of 2 passed, 2 minutes." in text
    assert "| lost workers | a killed worker changes no bit | passed | 62 | longest gap: 2.1 s |" in text
    assert "| stops | sigterm ends a run | **failed** | 2 |  |" in text


def test_a_folder_without_reports_is_no_page(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="make test-faults REPORTS="):
        page(tmp_path, "c0ffee", "a machine")
