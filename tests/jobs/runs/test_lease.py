"""The lease on a run: one job at a time, free again as soon as its holder is gone."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from diagonal.errors import FieldError
from diagonal.storage import Folder
from jobs.runs import lease
from jobs.runs.arguments import run_options
from jobs.runs.lease import LEASE, leased
from jobs.runs.run import opened

HOLD = """
import sys, time
from diagonal.storage import Folder
from jobs.runs.lease import leased
with leased(Folder(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "SETTLE_S", 0.01)


@pytest.mark.parametrize("remote", [False, True])
def test_a_second_job_is_refused_while_the_first_works_and_let_in_after_it(
    remote: bool, tmp_path: Path, bucket: str
) -> None:
    folder = Folder(f"s3://{bucket}/run" if remote else str(tmp_path / "run"))
    with leased(folder):
        with pytest.raises(FieldError, match=r"--name = 'run': allowed is a run that no other job is working on: .*"):
            with leased(folder):
                pass
    with leased(folder):
        pass


def test_a_killed_jobs_lease_is_free_at_once(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path / "run"))
    with subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(FieldError, match=f"process {holder.pid} holds it"):
            with leased(folder):
                pass
        holder.kill()
        holder.wait(10)
    with leased(folder):
        pass


@pytest.mark.slow
@pytest.mark.parametrize(
    ("host", "pid", "age_s", "free"),
    [
        ("elsewhere", 1, 1.0, False),
        ("elsewhere", 1, lease.STALE_AFTER_S + 1, True),
        ("", os.getpid(), 1.0, False),
        ("", 2**22 + 1, 1.0, True),
    ],
    ids=["lives elsewhere", "silent elsewhere", "lives here", "dead here"],
)
def test_a_remote_lease_is_taken_over_when_its_process_is_dead_or_silent_for_long(
    host: str, pid: int, age_s: float, free: bool, bucket: str
) -> None:
    folder, named = Folder(f"s3://{bucket}/run"), host or socket.gethostname()
    folder.write_json(LEASE, {"token": "other", "host": named, "pid": pid, "time": time.time() - age_s})
    if not free:
        with pytest.raises(FieldError, match="holds it"):
            with leased(folder):
                pass
        assert folder.read_json(LEASE)["token"] == "other"
        return
    with leased(folder):
        assert folder.read_json(LEASE)["token"] != "other"
    assert not folder.has(LEASE)


def test_a_job_opens_its_run_under_the_lease(tmp_path: Path) -> None:
    arguments = run_options(["--name=a", f"--set=train.storage={tmp_path}"], "")
    again = run_options(["--name=a", "--resume", f"--set=train.storage={tmp_path}"], "")
    with opened(arguments):
        with pytest.raises(FieldError, match="no other job is working on"):
            with opened(again):
                pass
    with opened(again) as run:
        assert run.name == "a"
