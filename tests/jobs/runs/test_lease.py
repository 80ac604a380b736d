"""The lease on a run: one job at a time, free again as soon as its holder is gone."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from diagonal.errors import FieldError
from diagonal.storage import Folder, StorageError, VersionChanged
from jobs.runs import lease
from jobs.runs.arguments import run_options
from jobs.runs.lease import LEASE, RemoteLease, leased
from jobs.runs.run import opened
from tests.s3 import FaultyProxy, S3Server

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
    monkeypatch.setattr(lease, "STALE_AFTER_S", 0.5)
    monkeypatch.setattr(lease, "LOOK_EVERY_S", 0.1)
    monkeypatch.setattr(lease, "RENEW_EVERY_S", 0.1)


@pytest.mark.parametrize("remote", [False, True])
def test_a_second_job_is_refused_while_the_first_works_and_let_in_after_it(
    remote: bool, tmp_path: Path, bucket: str
) -> None:
    folder = Folder(f"s3://{bucket}/run" if remote else str(tmp_path / "run"))
    with leased(folder) as check:
        with pytest.raises(FieldError, match=r"--name = 'run': allowed is a run that no other job is working on: .*"):
            with leased(folder):
                pass
        check()
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


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP])
def test_a_file_system_without_locks_is_refused_with_the_way_out(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(file: object, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(FieldError, match=r"train.storage = .*on a file system with locks .*; with train.lease=none"):
        with leased(Folder(str(tmp_path / "run"))):
            pass
    with leased(Folder(str(tmp_path / "run")), "none") as check:
        check()


@pytest.mark.parametrize(
    ("host", "pid", "renewed", "waits"),
    [
        ("elsewhere", 1, False, True),
        ("elsewhere", 1, True, True),
        ("", os.getpid(), True, True),
        ("", 2**22 + 1, False, False),
    ],
    ids=["silent elsewhere", "lives elsewhere", "lives here", "dead here"],
)
def test_a_lease_on_s3_is_taken_over_when_its_process_is_dead_or_silent_for_long(
    host: str, pid: int, renewed: bool, waits: bool, bucket: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Folder(f"s3://{bucket}/run")
    other = {"token": "other", "number": 7, "free": False, "host": host or socket.gethostname(), "pid": pid}
    folder.write_json(LEASE, {**other, "beat": 1})
    if renewed:
        again = threading.Timer(0.25, lambda: folder.write_json(LEASE, {**other, "beat": 2}))
        again.start()
        with pytest.raises(FieldError, match=f"{other['host']}, process {pid} holds it"):
            with leased(folder):
                pass
        again.join()
        assert folder.read_json(LEASE)["token"] == "other"
        return
    with leased(folder):
        held = folder.read_json(LEASE)
        assert held["token"] != "other" and held["number"] == 8
    assert folder.read_json(LEASE)["free"]
    assert ("is the job that holds it alive?" in capsys.readouterr().out) == waits


def test_of_two_that_begin_at_once_one_gets_it_however_late_the_others_request_arrives(
    faulty_s3: FaultyProxy, bucket: str
) -> None:
    """The write of the first is held back until the second has the lease; it used to count when it came 1.5 s late."""
    first, second = RemoteLease(Folder(f"s3://{bucket}/run")), RemoteLease(Folder(f"s3://{bucket}/run"))
    faulty_s3.slow(2.0, method="PUT", key=LEASE, times=1)
    refusals: list[FieldError] = []

    def begin() -> None:
        try:
            first.acquire()
        except FieldError as error:
            refusals.append(error)

    late = threading.Thread(target=begin)
    late.start()
    while not faulty_s3.held:
        threading.Event().wait(0.01)
    second.acquire()
    faulty_s3.mend()
    renewal = threading.Timer(0.2, second.check)
    renewal.start()
    late.join()
    renewal.join()
    assert len(refusals) == 1
    second.check()


def test_a_job_whose_lease_was_taken_over_publishes_nothing(bucket: str, s3_server: S3Server) -> None:
    folder = Folder(f"s3://{bucket}/run")
    former, new = RemoteLease(folder), RemoteLease(folder)
    former.acquire()
    new.acquire()  # silent for STALE_AFTER_S
    with pytest.raises(FieldError, match="which took it over, holds it"):
        with (folder / "stage1").replaced(last="lineage.json", check=former.check) as new_files:
            (new_files / "lineage.json").write_text("{}")
    assert not (folder / "stage1").has("lineage.json")


def test_a_folder_that_another_job_finished_meanwhile_is_not_overwritten(bucket: str) -> None:
    folder = Folder(f"s3://{bucket}/run/stage1")
    with pytest.raises(FieldError, match="a folder that one job writes at a time"):
        with folder.replaced(last="lineage.json", check=lambda: folder.write("lineage.json", b"others")) as files:
            (files / "lineage.json").write_text("mine")
    assert folder.read("lineage.json") == b"others"


def test_a_store_that_ignores_or_refuses_conditions_is_refused_with_the_way_out(
    bucket: str, faulty_s3: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Folder(f"s3://{bucket}/run")
    faulty_s3.fail(501, "NotImplemented", method="PUT", times=1)
    with pytest.raises(FieldError, match=r"train.storage = .*conditional writes .* with train.lease=none"):
        with leased(folder):
            pass
    plain = type(folder._remote).write
    monkeypatch.setattr(
        type(folder._remote), "write_version", lambda self, name, data, over: plain(self, name, data) or "version"
    )
    with pytest.raises(FieldError, match=r"train.storage = .*conditional writes .* with train.lease=none"):
        with leased(folder):
            pass
    with leased(folder, "none") as check:
        check()


def test_a_job_opens_its_run_under_the_lease(tmp_path: Path) -> None:
    arguments = run_options(["--name=a", f"--set=train.storage={tmp_path}"], "")
    again = run_options(["--name=a", "--resume", f"--set=train.storage={tmp_path}"], "")
    with opened(arguments):
        with pytest.raises(FieldError, match="no other job is working on"):
            with opened(again):
                pass
    with opened(again) as run:
        assert run.name == "a"
    with opened(run_options(["--name=a", "--resume", f"--set=train.storage={tmp_path}", "--set=train.lease=none"], "")):
        pass


@dataclass
class Store:
    """Files with versions as S3 keeps them, behind a network that loses answers and delivers requests late."""

    name: str = "run"
    data: bytes = b""
    version: int = 0
    late: list[tuple[bytes, str]] = field(default_factory=list)
    fate: str = "answered"

    def read_version(self, name: str) -> tuple[bytes, str]:
        if not self.version:
            raise FileNotFoundError(name)
        return self.data, str(self.version)

    def write_version(self, name: str, data: bytes, over: str) -> str:
        if self.fate == "late":
            self.late.append((data, over))
            raise StorageError("no answer")
        version = self.apply(data, over)
        if self.fate == "answer lost":  # the client library asks again
            self.apply(data, over)
        return version

    def apply(self, data: bytes, over: str) -> str:
        if over != (str(self.version) if self.version else ""):
            raise VersionChanged
        self.data, self.version = data, self.version + 1
        return str(self.version)


JOBS = st.integers(0, 2)
FATES = st.sampled_from(["answered", "answer lost", "late"])


class ThreeJobs(RuleBasedStateMachine):
    """Three jobs that take, renew and return the lease of one run in any order; requests are lost, repeated, late."""

    @initialize()
    def begin(self) -> None:
        self.store = Store()
        self.jobs = [RemoteLease(self.store, token=str(job)) for job in range(3)]
        self.holds = [False] * 3
        self.newest = 0

    def write(self, job: int, fate: str, free: bool = False) -> bool | None:
        self.store.fate = fate
        try:
            return self.jobs[job].write(free)
        except StorageError:
            return None

    @rule(job=JOBS, fate=FATES)
    def take(self, job: int, fate: str) -> None:
        """As `acquire` does after it waited: whoever holds it now is taken for dead."""
        one = self.jobs[job]
        if self.holds[job]:
            return
        holder, one.version = one.read()
        one.number = holder.get("number", 0) + 1
        if self.write(job, fate):
            assert one.number > self.newest, "a number is given once"
            self.newest = one.number
            self.holds[job] = True

    @rule(job=JOBS, fate=FATES, free=st.booleans())
    def renew(self, job: int, fate: str, free: bool) -> None:
        if self.holds[job] and (answer := self.write(job, fate, free)) is not None:
            assert answer == (self.jobs[job].number == self.newest), "the newest holder alone may go on"
            self.holds[job] = answer and not free

    @rule(data=st.data())
    def deliver(self, data: Any) -> None:
        if self.store.late:
            written, over = self.store.late.pop(data.draw(st.integers(0, len(self.store.late) - 1)))
            try:
                self.store.apply(written, over)
            except VersionChanged:
                return
            late = RemoteLease(self.store).read()[0]
            self.newest = max(self.newest, late["number"])

    @invariant()
    def at_most_one_can_write(self) -> None:
        able = [job for job, one in enumerate(self.jobs) if self.holds[job] and one.version == str(self.store.version)]
        assert len(able) <= 1


TestThreeJobs = pytest.mark.slow(ThreeJobs.TestCase)
TestThreeJobs.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
