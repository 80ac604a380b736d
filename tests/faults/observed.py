"""A local Ray as `make demo` has it, with a Prometheus beside it, a service under load and a distillation to look at.

Nearly all that is measured happens here for real: viewers who watch, steer, leave, are refused or find no room; a
replica that freezes and one that dies; bad prompts, bad rows, a worker that dies. What has no honest cause on such a
machine within a minute is told by hand through the same backend (`TOLD`).
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import psutil
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from diagonal.files import file_hash
from diagonal.model.base_model import embedded
from infra.local import cluster, observe
from infra.local.ports import choose
from infra.local.run import LocalRun
from infra.local.service import Progress, ServiceError, run_job, wait_until_ready
from tests.faults.nodes import until
from tests.faults.watchers import PROMPT, OverHttp
from tests.serve.sockets import LOCAL_KEY, give_local_key, viewer

ROOT = Path(__file__).resolve().parents[2]
EVERY_S = 1.0  # between two scrapes
POISON, BANNED, CRASH = "triangle", "forbidden", "breakdown"
SLOTS, REPLICAS = 3, 2
FREEZE_S = 4.0  # less than it takes Serve to give a replica up
GOOD = [
    f"a {colour} {shape} moving {way} slowly"
    for colour in ("red", "blue", "green", "yellow")
    for shape in ("circle", "square")
    for way in ("left", "right", "up")
]
BAD = ["a red triangle moving left slowly", "a blue triangle moving up slowly"]
SMALL = {
    "pairs.count": 24,
    "pairs.rows_per_shard": 4,
    "pairs.batch_size": 4,
    "pairs.max_bad_share": 0.9,
    "pairs.solver_steps": 20,
    "ode_init.updates": 80,
    "ode_init.batch_size": 4,
    "ode_init.micro_batch_size": 2,
    "ode_init.checkpoint_every": 10,
    "distill.stage1_updates": 8,
    "distill.stage2_updates": 8,
    "distill.checkpoint_every": 3,
    "distill.batch_size": 4,
    "distill.micro_batch_size": 2,
    "distill.generator_every": 2,
    "distill.ema_start": 2,
    "distill.max_nonfinite": 99,
    "train.workers": 1,
    "train.cpus_per_worker": 1,
    "train.sample_every": 0,
    "prompts.held_out_share": 0.0,
}
POLICY = f'''"""A prompt policy that knows one word and fails at another."""


def judge(prompt: str, account: str) -> bool:
    if "{CRASH}" in prompt:
        raise RuntimeError("the policy is broken")
    return "{BANNED}" not in prompt
'''
TOLD = {  # metric -> labels
    "diagonal_schedules_shortened_total": {},
    "diagonal_session_migrations_total": {"cause": "lost", "outcome": "failed"},
    "diagonal_checkpoints_skipped_total": {"stage": "distill"},
    "diagonal_checkpoints_refused_total": {"stage": "distill"},
    "diagonal_data_quarantined_total": {"stage": "ode_init", "reason": "checksum"},
}
TELLER = '''"""Tells what has no honest cause here, through the backend that jobs have."""
import json, sys, time
import ray
from ray.util.metrics import Counter, Gauge, Histogram
from diagonal.metrics import BY_NAME, FactoryBackend
ray.init(logging_level="ERROR")
metrics = FactoryBackend(Counter, Gauge, Histogram)
for _ in range(int(sys.argv[2])):
    for name, labels in json.loads(sys.argv[1]).items():
        (metrics.inc if BY_NAME[name].kind == "counter" else metrics.set)(name, 0.4, **labels)
    time.sleep(1)
'''


@dataclass
class Scene:
    """The run, the address of its Prometheus, the service's, and when it all began."""

    run: LocalRun
    prometheus: str
    service: str = ""
    began: float = field(default_factory=time.time)

    def ask(self, route: str, **parameters: Any) -> Any:
        """What Prometheus' HTTP API answers; an error of its own fails."""
        found = httpx2.get(f"{self.prometheus}/api/v1/{route}", params=parameters, timeout=30).json()
        assert found["status"] == "success", found
        return found["data"]

    def has(self, expression: str) -> bool:
        """Whether an expression has data now, or had since all began."""
        if self.ask("query", query=expression)["result"]:
            return True
        now = time.time()
        return bool(self.ask("query_range", query=expression, start=self.began, end=now, step=2)["result"])

    def until(self, expression: str, deadline_s: float = 300.0) -> None:
        """Wait until an expression has data."""
        until(expression, lambda: self.has(expression), deadline_s, every_s=0.5)

    def processes(self, title: str) -> list[psutil.Process]:
        """Processes of the run that Ray named so."""
        found = []
        for member in self.run.members:
            try:
                process = psutil.Process(member.pid)
                if process.cmdline()[0].startswith(title):
                    found.append(process)
            except (psutil.Error, IndexError):
                continue
        return found


@contextmanager
def observed(folder: Path) -> Iterator[Scene]:
    """Ray and Prometheus; both have ended afterwards."""
    for name in ("platform", "jobs", "serve", "infra"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "scene_policy.py").write_text(POLICY)
    (folder / "scene_teller.py").write_text(TELLER)
    give_local_key(folder / ".diagonal" / "serve")
    run = cluster.start(folder)
    try:
        yield Scene(run, observe.start(run, EVERY_S))
    finally:
        cluster.stop(folder)


def poisoned(source: Path, target: Path) -> Path:
    """A copy of an embedded model whose text encoder knows one word as NaN, with the checksums that it has then."""
    shutil.copytree(source, target)
    weights = target / "text_encoder" / "model.safetensors"
    tensors = load_file(weights)
    word = AutoTokenizer.from_pretrained(target / "tokenizer").get_vocab()[POISON]
    tensors["shared.weight"][word] = float("nan")
    save_file(tensors, weights, metadata={"format": "pt"})
    if (path := target / "manifest.json").exists():
        manifest = json.loads(path.read_text())
        manifest["files"]["text_encoder/model.safetensors"] = {
            "bytes": weights.stat().st_size,
            "sha256": file_hash(weights),
        }
        path.write_text(json.dumps(manifest))
    return target


def distil(scene: Scene) -> subprocess.Popen[bytes]:
    """Submit a distillation from its pairs on, by the literal line."""
    root = Path(scene.run.root)
    (root / "prompts.txt").write_text("\n".join([*GOOD, *BAD]) + "\n")
    base = poisoned(embedded("base"), root / "base")
    chosen = {
        **SMALL,
        "model.path": base,
        "distill.init": "",
        "distill.prompts": root / "prompts.txt",
        "pairs.prompts": root / "prompts.txt",
        "train.storage": root / "runs",
    }
    line = ["ray", "job", "submit", "--", "python", "jobs/distill.py", "--name", "r"]
    with (root / "distill.log").open("wb") as log:
        return subprocess.Popen(
            [*line, *(f"--set={key}={value}" for key, value in chosen.items())],
            cwd=root,
            env=_environment(scene.run),
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def _environment(run: LocalRun) -> dict[str, str]:
    return {**os.environ, **run.environment(), "RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}


def deploy(scene: Scene) -> None:
    """Two replicas of a release with room for three viewers each, and a policy that can fail."""
    root, port = Path(scene.run.root), choose(8000)
    release = poisoned(embedded("release"), root / "release")
    arguments = {
        "release": str(release),
        "allow_unpromoted": True,
        "data": str(root / "data"),
        "replicas": REPLICAS,
        "max_replicas": REPLICAS + 1,
        "scale_up_delay_s": 3600.0,
        "replica_cpus": 0.5,
        "options": f"max_sessions={SLOTS}",
        "prompt_policy": "scene_policy:judge",
    }
    application = {"name": "diagonal", "route_prefix": "/", "import_path": "serve.app:build", "args": arguments}
    config = {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [application],
    }
    (root / "serve.yaml").write_text(yaml.safe_dump(config))
    progress = Progress()
    run_job(scene.run, f"serve deploy {root / 'serve.yaml'} --address {scene.run.dashboard_url}", 240.0, progress)
    scene.service = f"http://127.0.0.1:{port}"
    for attempt in range(3):  # it gives up by itself after minutes: a busy machine needs more
        try:
            return wait_until_ready(cluster.with_service(scene.run, scene.service), {str(release)}, progress)
        except ServiceError:
            if attempt == 2:
                raise


def watch(scene: Scene) -> None:
    """Viewers, one of whom steers; callers who are wrong, refused or too many; a replica that freezes, and dies."""
    steering = threading.Thread(target=steer, args=(scene,), daemon=True)
    steering.start()
    watchers = [OverHttp(scene.service, 120, seed).start() for seed in range(3)]
    for each in watchers:
        each.reached(2)
    ask_wrongly(scene)
    for replica in scene.processes("ray::ServeReplica:diagonal:Replica"):
        with frozen(replica):
            time.sleep(FREEZE_S)
    scene.until("ray_diagonal_stream_stalls_total")
    held = httpx2.get(f"{scene.service}/v1/videos/{watchers[0].id}", headers=LOCAL_KEY, timeout=30).json()
    assert held["status"] == "in_progress", held
    for replica in scene.processes("ray::ServeReplica:diagonal:Replica")[:1]:
        replica.kill()
    scene.until('ray_diagonal_session_migrations_total{outcome="moved"}')
    steering.join(120)


@contextmanager
def frozen(process: psutil.Process) -> Iterator[None]:
    os.kill(process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process.pid, signal.SIGCONT)


def steer(scene: Scene) -> None:
    """One viewer over a socket, who changes his prompt."""
    with viewer(scene.service, deadline_s=120) as one:
        one.start(prompt=PROMPT, num_frames=321)
        one.read(2)
        change = {"event_id": "e1", "event": {"prompt": "a blue square moving left slowly"}}
        one.say("session.interaction", interaction=change)
        one.read(6)
        one.say("session.stop")


def ask_wrongly(scene: Scene) -> None:
    """Every kind of refusal, and a prompt that makes the model fail."""

    def create(prompt: str, **more: Any) -> httpx2.Response:
        body = {"prompt": prompt, "num_frames": 33, **more}
        return httpx2.post(f"{scene.service}/v1/videos", headers=LOCAL_KEY, json=body, timeout=60)

    assert httpx2.get(f"{scene.service}/v1/videos/video_none", headers=LOCAL_KEY, timeout=60).status_code in (404, 422)
    create(BAD[0])
    for _ in range(3):
        assert create(BANNED).status_code == 422 and create(CRASH).status_code == 503
        full = [create(PROMPT, num_frames=321, extra={"pacing": "realtime"}) for _ in range(SLOTS * REPLICAS + 1)]
        if 429 in {answer.status_code for answer in full}:
            return
    raise AssertionError([answer.text for answer in full])


def train(scene: Scene) -> None:
    """The distillation to its end, once with a worker that dies.

    Ray tells numbers every few seconds: the stage is long enough to be still at work when its first ones are seen.
    """
    job = distil(scene)
    try:
        scene.until('ray_diagonal_updates_total{stage="ode_init"}', 600)
        workers = scene.processes("ray::RayTrainWorker")
        assert workers, "the stage was over before its first numbers were seen"
        for worker in workers:
            worker.kill()
        until("the distillation's end", lambda: job.poll() is not None, 900, every_s=0.5)
        log = (Path(scene.run.root) / "distill.log").read_text(errors="replace")
        assert job.returncode == 0, log[-6000:]
    finally:
        job.kill()


def tell(scene: Scene, seconds: int) -> None:
    """What no honest cause brings."""
    line = ["ray", "job", "submit", "--", "python", "scene_teller.py", json.dumps(TOLD), str(seconds)]
    subprocess.run(line, env=_environment(scene.run), check=True, timeout=300, capture_output=True)


def play(scene: Scene) -> None:
    """All of it: the training beside the service."""
    errors: list[BaseException] = []

    def in_background() -> None:
        try:
            train(scene)
        except BaseException as error:
            errors.append(error)

    training = threading.Thread(target=in_background, daemon=True)
    training.start()
    deploy(scene)
    watch(scene)
    tell(scene, 15)
    training.join(1200)
    assert not training.is_alive() and not errors, errors
