"""The service on a real Ray Serve, deployed as `serve deploy` does, and the processes that a fault test ends."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any, TypeVar

import httpx2
import psutil

from tests.faults.nodes import until
from tests.serve.sockets import give_local_key

T = TypeVar("T")
APPLICATION = "diagonal"
PATIENCE_S = 300.0  # of a busy machine, for what must come but has promised no time
CONTROLLER, PROXY = "ray::ServeController", "ray::ProxyActor"


class LiveService:
    """Two gateways in front of two replicas of the embedded release; `deploy` changes what runs."""

    def __init__(self, data: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = int(free.getsockname()[1])
        self.url = f"http://127.0.0.1:{self._port}"
        give_local_key(Path(data))
        arguments = {"data": data, "replica_cpus": 0.5, "drain_s": 60.0, "resume_window_s": 90.0}
        self._config: dict[str, Any] = {
            "name": APPLICATION,
            "route_prefix": "/",
            "import_path": "serve.app:build",
            "args": arguments,
        }
        self._number = 0

    def start(self, replicas: int = 2, gateways: int = 2) -> None:
        from ray import serve

        serve.start(http_options={"host": "127.0.0.1", "port": self._port, "request_timeout_s": None})
        self.deploy(replicas, gateways)

    def close(self) -> None:
        from ray import serve

        serve.shutdown()

    def deploy(
        self,
        replicas: int = 2,
        gateways: int = 2,
        wait: bool = True,
        new: bool = False,
        cpus: float = 0.5,
        **arguments: Any,
    ) -> None:
        """Change how many there are; replace all replicas where `new` or `cpus`, all parts where `arguments` changed.

        With more `cpus` than there are, the replicas' successors never come.
        """
        from ray import serve
        from ray.serve.schema import ServeDeploySchema

        self._config["args"].update(arguments)
        self._number += new
        actor = {"num_cpus": cpus + 0.001 * self._number}  # another number alone makes Serve replace every replica
        config = deepcopy(self._config)
        config["deployments"] = [
            {"name": "Replica", "num_replicas": replicas, "ray_actor_options": actor},
            {"name": "Gateway", "num_replicas": gateways},
        ]
        schema = ServeDeploySchema.model_validate({"applications": [config]})
        client: Any = serve.context._get_global_client()
        client.deploy_apps(schema, _blocking=False)
        if wait:
            self.settle()

    def settle(self) -> None:
        """Wait until all that is wanted runs, and what is to end has ended."""
        self.until("Serve has done what it was told", self._settled)
        self.until("the service is ready", self.ready)

    def ready(self) -> bool:
        try:
            return httpx2.get(f"{self.url}/health/ready", timeout=10).status_code == 200
        except httpx2.HTTPError:
            return False

    def _settled(self) -> bool:
        found = self.details()
        states = [one["state"] for part in found["deployments"].values() for one in part["replicas"]]
        assert found["status"] != "DEPLOY_FAILED", found["message"]
        return found["status"] == "RUNNING" and set(states) == {"RUNNING"}

    def details(self) -> dict[str, Any]:
        """What Serve says of the application."""
        from ray import serve

        client: Any = serve.context._get_global_client()
        return dict(client.get_serve_details()["applications"][APPLICATION])

    def parts(self, deployment: str) -> dict[str, int]:
        """Process ids of a deployment's running replicas, by the name that the store knows."""
        running = [one for one in self.details()["deployments"][deployment]["replicas"] if one["state"] == "RUNNING"]
        return {one["replica_id"]: one["pid"] for one in running}

    def holder(self, video: str) -> str:
        """The replica that holds a session."""
        return str(self.record(video).replica)

    def record(self, video: str) -> Any:
        from ray import serve

        store = serve.get_deployment_handle("Store", APPLICATION)
        return store.get.remote(video).result(timeout_s=30)

    def kill(self, process_id: int) -> None:
        """SIGKILL."""
        os.kill(process_id, signal.SIGKILL)

    def process(self, title: str) -> int:
        """The process id of the only actor of that title on this cluster."""
        import ray

        node: Any = ray._private.worker._global_node
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        return next(int(one.pid) for one in raylet.children(recursive=True) if is_called(one, title))

    def until(self, what: str, found: Callable[[], T], deadline_s: float = PATIENCE_S, every_s: float = 0.2) -> T:
        """The first true answer; `TimeoutError` names what did not come."""
        return until(what, found, deadline_s, every_s)


def is_called(process: psutil.Process, title: str) -> bool:
    """Whether Ray gave a process that name; what it does just now may follow."""
    try:
        return str(process.cmdline()[0]).startswith(title)
    except (psutil.Error, IndexError):
        return False
