"""The service on the local Ray: deployed from serve/config.yaml, one release or several side by side, waited for."""

import json
import os
import re
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from infra.local import cluster, ports
from infra.local.run import LocalRun, get

CONFIG = "serve/config.yaml"
READY_ROUTE = "/health/ready"
PREFERRED_HTTP_PORT = 8000
READY_LIMIT_S = 240.0
HEARTBEAT_S = 10.0
COLOUR = re.compile(r"\x1b\[[0-9;]*m")  # Ray colours its lines for pipes too


class ServiceError(RuntimeError):
    """A step failed; the message says which and how."""


@dataclass
class Progress:
    """Says what happens, and how long after the start."""

    started_s: float = field(default_factory=time.monotonic)

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.started_s:6.1f} s] {text}", flush=True)


def start_ray(progress: Progress, cpus: int = 0) -> LocalRun:
    """A local Ray: the one that is running, or a new one."""
    progress.say("starting Ray on this machine")
    try:
        run = cluster.start(cpus=cpus)
    except cluster.AlreadyRunningError as error:
        if not cluster.answers(error.run):
            raise ServiceError(f"{error}, and it does not answer: end it first") from error
        progress.say(f"one is running already: {error.run.dashboard_url}")
        return error.run
    progress.say(f"dashboard {run.dashboard_url} (token in {run.token_path}), metrics {run.metrics_url}")
    return run


def run_job(run: LocalRun, line: str, limit_s: float, progress: Progress) -> None:
    """Run one command line in the repository's root and show its output; ServiceError if it fails."""
    progress.say(f"$ {line}")
    job = subprocess.Popen(
        line.split(),
        cwd=run.root,
        env=os.environ | run.environment() | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    late = threading.Timer(limit_s, job.kill)
    late.start()
    try:
        assert job.stdout is not None
        for output in job.stdout:
            print(f"    {COLOUR.sub('', output)}", end="", flush=True)
        status = job.wait()
    finally:
        late.cancel()
        job.kill()
    if status != 0:  # the timer alone sends a signal
        raise ServiceError(f"`{line}` " + (f"ended with {status}" if status > 0 else f"took more than {limit_s:g} s"))


def deploy(
    run: LocalRun,
    release: str | Path,
    progress: Progress,
    arguments: Mapping[str, Any] | None = None,
    deployments: Sequence[Mapping[str, Any]] = (),
    patience_s: float = READY_LIMIT_S,
    beside: Mapping[str, str | Path] | None = None,
) -> LocalRun:
    """Deploy the release with Ray Serve on a free port of 127.0.0.1, and wait until it is ready.

    `arguments` and `deployments` are added to those of the application in serve/config.yaml. `beside` are more
    releases by the names under which callers ask for them.
    """
    port = int(run.service_url.rpartition(":")[2]) if run.service_url else ports.choose(PREFERRED_HTTP_PORT)
    config = yaml.safe_load((Path(run.root) / CONFIG).read_text())
    config["http_options"] = (config.get("http_options") or {}) | {"host": "127.0.0.1", "port": port}
    (application,) = config["applications"]
    # Nobody judged this release yet; here it is shown all the same.
    settings = (
        (application.get("args") or {}) | {"release": str(release), "allow_unpromoted": True} | {**(arguments or {})}
    )
    application |= {"args": settings, "deployments": [dict(one) for one in deployments]}
    for model, folder in (beside or {}).items():
        fresh = {"model": model, "release": str(folder), "allow_unpromoted": True}
        more = {"name": model, "route_prefix": None, "import_path": "serve.app:build_release", "args": fresh}
        config["applications"].append(more)
    if beside:
        reached = {"applications": {model: model for model in beside}}
        application["deployments"].append({"name": "Gateway", "user_config": reached})
    written = Path(run.folder) / "serve.yaml"
    written.write_text(yaml.safe_dump(config))
    progress.say(f"deploying {[str(one) for one in (beside or {}).values()] or release or 'the embedded release'}")
    run_job(run, f"serve deploy {written} --address {run.dashboard_url}", 120.0, progress)
    served = cluster.with_service(run, f"http://127.0.0.1:{port}")
    releases = {str(release), *map(str, (beside or {}).values())}
    wait_until_ready(served, releases, progress, patience_s)
    return served


def wait_until_ready(run: LocalRun, releases: set[str], progress: Progress, patience_s: float = READY_LIMIT_S) -> None:
    """Wait until Serve runs these releases (earlier ones may still answer) and a gateway says that it is ready."""
    begun = reported = time.monotonic()
    while True:
        all_of_them = applications(run)
        running = {
            (one["deployed_app_config"] or {}).get("args", {}).get("release")
            for one in all_of_them
            if one["status"] == "RUNNING"
        }
        state = "; ".join(f"{a['name']} {a['status']} {a['message']}".strip() for a in all_of_them) or "no answer"
        if running == releases and get(f"{run.service_url}{READY_ROUTE}") is not None:
            break
        now = time.monotonic()
        if "DEPLOY_FAILED" in state or now - begun > patience_s:
            raise ServiceError(f"the service did not become ready in {now - begun:.0f} s: {state}")
        if now - reported > HEARTBEAT_S:
            progress.say(f"waiting for the service: {state}")
            reported = now
        time.sleep(0.5)
    progress.say(f"ready after {time.monotonic() - begun:.1f} s")


def applications(run: LocalRun) -> list[dict[str, Any]]:
    """What Serve says of its applications; empty where it does not answer."""
    body = get(f"{run.dashboard_url}/api/serve/applications/", run.token_path.read_text())
    return list(json.loads(body)["applications"].values()) if body else []
