"""A Prometheus of this machine's own beside the local Ray, with the project's scrape configuration and rules.

    python -m infra.local.observe        # PROMETHEUS=/path/to/prometheus names another binary than the one on PATH

It carries the run's mark, so `make stop` ends it with the rest; what it stored goes with the run's folder.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from infra.local import cluster, ports
from infra.local.run import MARK_NAME, LocalRun, get, load

CONFIGURATION = Path("infra/prometheus/prometheus.yml")
DISCOVERY = "prom_metrics_service_discovery.json"
FOLDER, LOG = "prometheus", "prometheus.log"
PREFERRED_PORT = 9090
READY_S = 60.0
MISSING = "there is no Prometheus: `apt-get install prometheus`, or name a binary by PROMETHEUS=/path/to/prometheus"


class ObserveError(RuntimeError):
    """Prometheus could not be started; the message says what to do."""


def binary() -> str:
    """The Prometheus to start; ObserveError where there is none."""
    found = shutil.which(os.environ.get("PROMETHEUS") or "prometheus")
    if found is None:
        raise ObserveError(MISSING)
    return found


def configuration(run: LocalRun, every_s: float = 0.0) -> dict[str, Any]:
    """The project's configuration, with Ray's list of targets where this run has it; `every_s` other intervals."""
    source = cluster.REPOSITORY / CONFIGURATION
    found: dict[str, Any] = yaml.safe_load(source.read_text())
    found["rule_files"] = [str(source.parent / pattern) for pattern in found["rule_files"]]
    (job,) = found["scrape_configs"]
    (discovery,) = job["file_sd_configs"]
    discovery["files"] = [str(run.ray_folder / DISCOVERY)]
    if every_s:
        each = f"{round(1000 * every_s)}ms"
        found["global"] |= {"scrape_interval": each, "scrape_timeout": each, "evaluation_interval": each}
        discovery["refresh_interval"] = "1s"
    return found


def start(run: LocalRun, every_s: float = 0.0) -> str:
    """Start Prometheus on a free port of 127.0.0.1 and wait until it is ready; gives its address.

    One that runs already for this run is left alone. Raises ObserveError with the place of its log.
    """
    folder = Path(run.folder) / FOLDER
    with contextlib.suppress(OSError):
        if _is_ready(url := (folder / "url").read_text()):
            return url
    folder.mkdir(mode=0o700, exist_ok=True)
    (folder / "prometheus.yml").write_text(yaml.safe_dump(configuration(run, every_s)))
    url = f"http://127.0.0.1:{ports.choose(PREFERRED_PORT)}"
    with open(folder / LOG, "w") as log:
        process = subprocess.Popen(
            _command(folder, url),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, MARK_NAME: run.mark},
            start_new_session=True,
        )
    deadline = time.monotonic() + READY_S
    while not _is_ready(url):
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise ObserveError(f"Prometheus did not become ready: {_tail(folder / LOG)}")
        time.sleep(0.2)
    (folder / "url").write_text(url)
    return url


def _command(folder: Path, url: str) -> list[str]:
    flags = {
        "config.file": folder / "prometheus.yml",
        "storage.tsdb.path": folder / "data",
        "storage.tsdb.retention.time": "7d",
        "web.listen-address": url.removeprefix("http://"),
        "web.external-url": url,
        "log.level": "warn",
    }
    return [binary(), *(f"--{name}={value}" for name, value in flags.items())]


def _is_ready(url: str) -> bool:
    return get(f"{url}/-/ready") is not None


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-5:])


def _told(url: str, run: LocalRun) -> Iterator[str]:
    yield f"  targets     {url}/targets"
    yield f"  rules       {url}/rules"
    yield f"  alerts      {url}/alerts"
    yield f"  metrics     {run.metrics_url}"
    yield f"  dashboards  with Docker: PROMETHEUS_URL={url} docker compose -f infra/grafana/compose.yaml up"
    yield "  end it all  make stop"


def main() -> int:
    """Start it beside the run of this repository; 1 with a message where there is none."""
    run = load(cluster.REPOSITORY)
    if run is None or not run.members:
        print("nothing to observe: `make demo` starts Ray and the service", file=sys.stderr)
        return 1
    try:
        url = start(run)
    except ObserveError as error:
        print(error, file=sys.stderr)
        return 1
    print("\n".join(_told(url, run)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
