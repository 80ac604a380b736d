"""What one local Ray run is: ports, private folder, the variables that reach it; kept in .diagonal/run.json."""

import http.client
import json
import os
import sys
import urllib.error
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from infra.local import ports, processes

MARK_NAME = "DIAGONAL_LOCAL_RUN"
METRIC_PORTS = {"autoscaler_metrics": "AUTOSCALER_METRIC_PORT", "dashboard_metrics": "DASHBOARD_METRIC_PORT"}


@dataclass(frozen=True)
class Ports:
    """TCP ports of one local cluster."""

    gcs: int
    dashboard: int
    client: int
    agent: int
    metrics: int
    autoscaler_metrics: int
    dashboard_metrics: int
    first_worker: int
    last_worker: int

    @classmethod
    def choose(cls) -> "Ports":
        """Free ports, each as near above its preferred number as possible."""
        first, last = ports.choose_block()
        # Ray's own numbers where they lie below 32768; from there on Linux takes ports for outgoing connections.
        preferred = {"gcs": 6379, "dashboard": 8265, "client": 10001, "agent": 12365, "metrics": 8080}
        preferred |= {"autoscaler_metrics": 14217, "dashboard_metrics": 14227}
        chosen: dict[str, int] = {}
        for name, number in preferred.items():
            chosen[name] = ports.choose(number, chosen.values())
        return cls(**chosen, first_worker=first, last_worker=last)


@dataclass(frozen=True)
class LocalRun:
    """One started cluster: what is needed to use it and to end it."""

    root: str
    folder: str
    mark: str
    ports: Ports
    service_url: str | None = None

    @property
    def token_path(self) -> Path:
        return Path(self.folder) / "token"

    @property
    def service_key_path(self) -> Path:
        """The key that callers of a service with `auth: local` show."""
        return Path(self.root) / ".diagonal" / "serve" / "local_key"

    @property
    def service_key(self) -> str:
        return self.service_key_path.read_text().strip()

    @property
    def service_page(self) -> str:
        """The service's page, opened with that key; what stands behind # reaches no server and no log."""
        return f"{self.service_url}/" + (f"#key={self.service_key}" if self.service_key_path.is_file() else "")

    @property
    def ray_folder(self) -> Path:
        return Path(self.folder) / "r"

    @property
    def logs(self) -> Path:
        return self.ray_folder / "session_latest" / "logs"

    @property
    def dashboard_url(self) -> str:
        return f"http://127.0.0.1:{self.ports.dashboard}"

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.ports.gcs}"

    @property
    def metrics_url(self) -> str:
        return f"http://127.0.0.1:{self.ports.metrics}/metrics"

    @property
    def members(self) -> set[psutil.Process]:
        return processes.marked(MARK_NAME, self.mark)

    def environment(self) -> dict[str, str]:
        """The variables with which `ray job submit`, `serve deploy` and `ray.init()` find this cluster."""
        root = Path(self.root)
        return {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
            "PYTHONPATH": f"{root / 'platform'}{os.pathsep}{root}",
            "RAY_ADDRESS": self.address,
            "RAY_API_SERVER_ADDRESS": self.dashboard_url,
            "RAY_DASHBOARD_ADDRESS": self.dashboard_url,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token_path),
            "RAY_USAGE_STATS_ENABLED": "0",
        }

    def shell_environment(self) -> dict[str, str]:
        """`environment`, and the service's address and key for `diagonal`."""
        names = {"DIAGONAL_URL": self.service_url} if self.service_url else {}
        if self.service_key_path.is_file():
            names["DIAGONAL_API_KEY"] = self.service_key_path.read_text().strip()
        return self.environment() | names

    def document(self) -> dict[str, Any]:
        """What .diagonal/run.json says."""
        names = ("dashboard_url", "metrics_url", "token_path", "service_key_path", "logs")
        pids = sorted(process.pid for process in self.members)
        return asdict(self) | {name: str(getattr(self, name)) for name in names} | {"pids": pids}

    def save(self) -> None:
        """Write .diagonal/run.json (mode 0600) under the root."""
        path, document = state_path(self.root), self.document()
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            json.dump(document, file, indent=2)
        os.replace(temporary, path)


def state_path(root: str | Path) -> Path:
    return Path(root) / ".diagonal" / "run.json"


def load(root: str | Path) -> LocalRun | None:
    """The run that .diagonal/run.json describes, alive or not; None where there is none."""
    try:
        document = json.loads(state_path(root).read_text())
    except FileNotFoundError:
        return None
    fields = {name: document[name] for name in ("root", "folder", "mark", "service_url")}
    return LocalRun(ports=Ports(**document["ports"]), **fields)


def get(url: str, token: str = "") -> bytes | None:
    """The body that an address of this machine answers with 200, asked through no proxy; None where there is none."""
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=5) as response:
            return bytes(response.read()) if response.status == 200 else None
    except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException):
        return None
