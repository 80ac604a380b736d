"""A cluster of several nodes on this machine distils and serves at once, loses a node, and recovers.

`make cluster-smoke` runs it: a head and three nodes with token auth, the service on two of them and a distillation on
the same two, viewers who watch; then one of the two is lost. It says what it does and when, ends every process by id,
and returns 0 when all went on.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from diagonal.client import DiagonalClient, DiagonalError
from infra.local import cluster
from infra.local.demo import decode
from infra.local.nodes import Node, Nodes
from infra.local.run import LocalRun
from infra.local.service import Progress, ServiceError, applications, deploy

T = TypeVar("T")
PARTS = ("platform", "jobs", "serve")  # of the repository, that jobs and service run
RELEASE = "platform/diagonal/assets/tiny/release"
FRONT, WORK = "front", "work"
NODE_CPUS = 4  # a replica and one of two training workers, with one left for data
RUN, UPDATES, LOST_AFTER = "smoke", 24, 4  # updates in all, and when the node is lost: a checkpoint is whole after 3
SETTINGS = {
    "distill.stage1_updates": UPDATES // 2,
    "distill.stage2_updates": UPDATES // 2,
    "distill.checkpoint_every": 3,
    "distill.batch_size": 4,
    "distill.micro_batch_size": 2,
    "distill.generator_every": 2,
    "distill.ema_start": 2,
    "train.workers": 2,
    "train.cpus_per_worker": 2,
    "train.sample_every": 0,
    "train.pool": WORK,
}
SERVICE = {"replicas": 2, "replica_pool": WORK, "gateway_pool": FRONT, "replica_cpus": 1}
PROMPT, FPS, FRAMES = "a red circle moving right slowly", 16, 960
# Limits for a machine that does other things too; on a calm one with two cores all of it takes under four minutes.
JOB_S, STREAM_S, REPLICA_S, READY_S = 600.0, 300.0, 300.0, 600.0


class SmokeError(RuntimeError):
    """What did not recover, or did not come up."""


@dataclass
class Watched:
    """A viewer in a thread of its own, who watches at the speed of playback."""

    url: str
    key: str
    file: Path
    seed: int
    parts: int = 0
    error: BaseException | None = None
    thread: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            with DiagonalClient(self.url, api_key=self.key) as client, self.file.open("wb") as out:
                video = client.create(PROMPT, frames=FRAMES, seed=self.seed, pacing="realtime")
                for part in client.stream(video.id):
                    out.write(part)
                    self.parts += 1
        except (DiagonalError, OSError) as error:
            self.error = error

    def finish(self) -> None:
        """Wait for the end; every frame must have come."""
        self.thread.join(STREAM_S)
        if self.thread.is_alive() or self.error is not None:
            raise SmokeError(f"a stream broke after {self.parts} parts: {self.error or 'it did not end'}")
        frames, _ = decode(self.file)
        if len(frames) != FRAMES:
            raise SmokeError(f"a stream has {len(frames)} frames: allowed is {FRAMES}")


def until(what: str, found: Callable[[], T], deadline_s: float) -> T:
    """The first true answer; SmokeError names what did not come."""
    end_s = time.monotonic() + deadline_s
    while not (answer := found()):
        if time.monotonic() > end_s:
            raise SmokeError(f"{what}: not within {deadline_s:.0f} s")
        time.sleep(0.2)
    return answer


@contextmanager
def started(progress: Progress) -> Iterator[tuple[LocalRun, Nodes]]:
    """A head in a folder that looks like the repository, so that a demo that is up is left alone; ended at the end."""
    with tempfile.TemporaryDirectory(prefix="diagonal-smoke-") as name:
        root = Path(name)
        for part in PARTS:
            (root / part).symlink_to(cluster.REPOSITORY / part)
        try:
            run = cluster.start(root, cpus=2)
            progress.say(f"head up: {run.dashboard_url}")
            yield run, Nodes(run)
        finally:
            progress.say(f"ended {len(cluster.stop(root))} processes")


def refuses_strangers(run: LocalRun) -> None:
    """Nobody submits a job, or sees one, without the token."""
    for body in (None, b'{"entrypoint": "id"}'):
        request = urllib.request.Request(f"{run.dashboard_url}/api/jobs/", data=body)
        request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=20) as response:
                raise SmokeError(f"the job API answered {response.status} to somebody without a token")
        except urllib.error.HTTPError as error:
            if error.code not in (401, 403):
                raise SmokeError(f"the job API answered {error.code} without a token: allowed are 401, 403") from error


def submit(run: LocalRun, log: Path) -> subprocess.Popen[bytes]:
    """The literal line, with a small run's settings."""
    line = ["ray", "job", "submit", "--", "python", "jobs/distill.py", "--name", RUN]
    line += [word for name, value in SETTINGS.items() for word in ("--set", f"{name}={value}")]
    with log.open("wb") as out:
        return subprocess.Popen(
            line,
            cwd=run.root,
            env=os.environ | run.environment(),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
        )


def updates(run: LocalRun) -> int:
    """Lines of the run's journal."""
    with suppress(FileNotFoundError):
        return len((Path(run.root) / "runs" / RUN / "train" / "distill" / "updates.jsonl").read_text().splitlines())
    return 0


def replicas(run: LocalRun) -> set[str]:
    """The nodes on which a replica of the engine runs."""
    parts = [one["deployments"].get("Replica", {}).get("replicas", []) for one in applications(run)]
    return {one["node_id"] for part in parts for one in part if one["state"] == "RUNNING"}


def journey(progress: Progress) -> None:
    """All steps; SmokeError, or what the parts raise, when one does not hold."""
    with started(progress) as (run, nodes):
        refuses_strangers(run)
        progress.say("without the token the job API refuses")
        nodes.add(FRONT, 2)
        work = [nodes.add(WORK, NODE_CPUS) for _ in range(2)]
        progress.say("three nodes joined: one for gateways and store, two for replicas and training")
        release = Path(run.root) / RELEASE
        spread = [{"name": "Replica", "max_replicas_per_node": 1}]
        served = deploy(run, release, progress, SERVICE, spread, READY_S)
        until("a replica on each node", lambda: len(replicas(served)) == 2, REPLICA_S)
        log = Path(run.folder) / "job.log"
        job = submit(run, log)
        try:
            recover(served, nodes, work, job, progress)
        except SmokeError as error:
            raise SmokeError(f"{error}\n{log.read_text(errors='replace')[-4000:]}") from error
        finally:
            job.kill()
            job.wait(20)


def recover(run: LocalRun, nodes: Nodes, work: list[Node], job: subprocess.Popen[bytes], progress: Progress) -> None:
    """While two stream and one distils a node goes; all three come to their ends, and another node takes its place."""

    def reached(count: int) -> bool:
        if job.poll() is not None:
            raise SmokeError(f"the job ended with {job.returncode} after {updates(run)} updates")
        return updates(run) >= count

    until("the first update", lambda: reached(1), JOB_S)
    progress.say("the job trains")
    service = (run.service_url or "", run.service_key)
    viewers = [Watched(*service, Path(run.folder) / f"{seed}.mp4", seed) for seed in range(2)]
    until("both streams", lambda: all(viewer.parts >= 3 for viewer in viewers), STREAM_S)
    until(f"update {LOST_AFTER}", lambda: reached(LOST_AFTER), JOB_S)
    progress.say(f"two viewers watch, {updates(run)} of {UPDATES} updates are done: a node is lost")
    if updates(run) >= UPDATES:
        raise SmokeError("the job was through before a node was lost: nothing was tried")
    before = [viewer.parts for viewer in viewers]
    nodes.lose(work[0])
    until("both streams going on", lambda: all(v.parts > n + 1 for v, n in zip(viewers, before, strict=True)), STREAM_S)
    progress.say("both streams go on, from the replica that is left")
    nodes.add(WORK, NODE_CPUS)
    progress.say("another node joined, as an autoscaler would bring it")
    for viewer in viewers:
        viewer.finish()
    progress.say(f"both streams ended with all {FRAMES} frames")
    until("two replicas again", lambda: len(replicas(run)) == 2, REPLICA_S)
    progress.say("two replicas again")
    if until("the job's end", lambda: job.poll() is not None, JOB_S) and job.returncode != 0:
        raise SmokeError(f"the job ended with {job.returncode}")
    if not (Path(run.root) / "runs" / RUN / "release" / "manifest.json").is_file():
        raise SmokeError("the job made no release")
    progress.say("the job went on from its checkpoint and made its release")


def main() -> int:
    """Run it; 0 when all recovered, 1 otherwise."""
    progress = Progress()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that everything is ended then too
    try:
        journey(progress)
    except (SmokeError, ServiceError, cluster.ClusterError, OSError) as error:
        progress.say(f"FAILED: {error}")
        return 1
    progress.say("done: the cluster recovered")
    return 0


if __name__ == "__main__":
    sys.exit(main())
