"""Progress for people: the rate of the newest updates, a bar on a terminal and lines elsewhere."""

import os
import pty
import subprocess
import sys
import termios

import pytest

from jobs.runs.console import Pace, Position


def test_the_rate_forgets_the_slow_first_updates_and_what_is_long_ago(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [0.0]
    monkeypatch.setattr("jobs.runs.console.time.monotonic", lambda: now_s[0])

    def updates(pace: Pace, *seconds: float) -> float:
        rate = 0.0
        for one in seconds:
            now_s[0] += one
            rate = pace.update()
        return rate

    pace = Pace(window=4)
    assert updates(pace, 60.0) == pytest.approx(1 / 60)
    assert updates(pace, 30.0, 2.0) == pytest.approx(1 / 2)
    assert updates(pace, 2.0, 2.0, 2.0) == pytest.approx(1 / 2)
    assert updates(pace, *[1.0] * 4) == pytest.approx(1.0), "four of the window, all of a second"


def test_a_position_tells_rate_and_time_left() -> None:
    assert str(Position(30, 300, 0.5, "critic 0.36")) == "update 30/300, 0.5/s, about 9 min left; critic 0.36"


SHOWN = """
from jobs.runs.console import Progress
progress = Progress("pretrain", 3)
for update in (1, 2, 3):
    progress(update, {"loss": 0.5})
"""


def test_a_terminal_gets_a_bar_and_a_pipe_gets_lines() -> None:
    done = subprocess.run([sys.executable, "-c", SHOWN], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.startswith("pretrain: update 3/3") and "|" not in done.stdout + done.stderr
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 120))
    with subprocess.Popen([sys.executable, "-c", SHOWN], stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        seen = b""
        try:
            while part := os.read(ours, 4096):
                seen += part
        except OSError:
            pass  # the other end of the terminal is closed
    os.close(ours)
    assert process.returncode == 0 and b"pretrain 100%|" in seen and b"update 3/3" in seen
