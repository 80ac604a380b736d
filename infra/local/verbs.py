"""What `diagonal up`, `down`, `status`, `env` and `serve` do: a service on this machine, and a release on any Ray."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from diagonal.errors import FieldError
from infra.local import cluster, service
from infra.local.run import LocalRun, load

ADDRESSES = ("RAY_DASHBOARD_ADDRESS", "RAY_API_SERVER_ADDRESS")
NOT_RUNNING = "nothing is running: `diagonal up` or `make demo` starts Ray and the service"


def up(options: argparse.Namespace) -> int:
    """Start Ray where none is running, then deploy the release."""
    try:
        run = service.start_ray(progress := service.Progress(), options.cpus)
        print(describe(service.deploy(run, options.release, progress)))
    except (service.ServiceError, cluster.ClusterError) as error:
        print(f"diagonal: {error}", file=sys.stderr)
        return 1
    return 0


def down(options: argparse.Namespace) -> int:
    """End what runs; nothing is no error."""
    try:
        ended = cluster.stop(keep_logs=options.keep_logs)
    except cluster.ClusterError as error:
        print(f"diagonal: {error}", file=sys.stderr)
        return 1
    print(f"ended {len(ended)} processes" if ended else "nothing was running")
    return 0


def status(options: argparse.Namespace) -> int:
    """Where Ray and the service answer, and what Serve says of its applications."""
    if (run := _running()) is None:
        return 1
    applications = {one["name"]: one["status"] for one in service.applications(run)}
    if options.json:
        print(json.dumps(run.document() | {"applications": applications}, indent=2))
    else:
        print("\n".join([describe(run), *(f"{name:10} {state}" for name, state in applications.items())]))
    return 0


def env(options: argparse.Namespace) -> int:
    """Exports with which `ray`, `serve`, `python jobs/...` and `diagonal` find what runs here."""
    if (run := _running()) is None:
        return 1
    print("\n".join(f"export {name}={shlex.quote(value)}" for name, value in run.shell_environment().items()))
    return 0


def serve(options: argparse.Namespace) -> int:
    """Deploy by `serve deploy` on the Ray that the environment names, or else on the one of this checkout."""
    source = Path(options.config or cluster.REPOSITORY / service.CONFIG)
    config = yaml.safe_load(source.read_text())
    application = config["applications"][0]
    application["args"] = (application.get("args") or {}) | {"release": options.release, **_settings(options.set)}
    _check(application["args"])
    if options.port:
        config["http_options"] = (config.get("http_options") or {}) | {"port": options.port}
    environment = dict(os.environ)
    if not any(environment.get(name) for name in ADDRESSES):
        if (run := _running()) is None:
            return 1
        environment |= run.environment()
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "serve.yaml"
        written.write_text(yaml.safe_dump(config))
        command = [sys.executable, "-m", "ray.serve.scripts", "deploy", str(written)]
        return subprocess.run(command, env=environment, check=False).returncode


def describe(run: LocalRun) -> str:
    """Addresses, one a line."""
    lines = [f"dashboard  {run.dashboard_url} (token in {run.token_path})", f"metrics    {run.metrics_url}"]
    if run.service_url:
        lines.append(f"service    {run.service_page}")
    return "\n".join([*lines, f"logs       {run.logs}"])


def _running() -> LocalRun | None:
    run = load(cluster.REPOSITORY)
    if run is not None and run.members:
        return run
    print(f"diagonal: {NOT_RUNNING}", file=sys.stderr)
    return None


def _settings(texts: list[str]) -> dict[str, Any]:
    pairs = [text.partition("=") for text in texts]
    for name, equals, _ in pairs:
        if not (name and equals):
            raise FieldError("--set", name, "NAME=VALUE")
    return {name: yaml.safe_load(value) for name, _, value in pairs}


def _check(arguments: dict[str, Any]) -> None:
    """`FieldError` for what the service would refuse, before anything is deployed."""
    from serve.settings import ServeSettings

    ServeSettings.from_arguments(arguments)
