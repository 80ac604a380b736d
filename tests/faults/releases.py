"""Releases made from the embedded one, and a live service that offers them, for tests on a real Ray Serve."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from diagonal.config import Config
from diagonal.files import file_hash
from diagonal.model.base_model import CONFIG, embedded
from diagonal.model.manifest import MANIFEST
from tests.faults.serving import APPLICATION, LiveService


def variant(folder: Path, *settings: str, promoted: bool = True) -> str:
    """The embedded release under another name and other settings."""
    shutil.copytree(embedded("release"), folder)
    Config.load(folder / CONFIG).with_settings(settings).save(folder / CONFIG)
    manifest = json.loads((folder / MANIFEST).read_text()) | {"name": folder.name, "promoted": promoted}
    manifest["files"][CONFIG]["sha256"] = file_hash(folder / CONFIG)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return str(folder)


class ConfiguredService(LiveService):
    """A service of any arguments, deployed as `serve deploy` does."""

    def open(self) -> None:
        """Start Serve, with nothing on it yet."""
        from ray import serve

        serve.start(http_options={"host": "127.0.0.1", "port": self._port, "request_timeout_s": None})

    def configure(self, weights: dict[str, float] | None = None, canary: str = "", **arguments: Any) -> None:
        """Deploy these arguments, or those of before, with other weights; `canary` is the release of `next`."""
        from ray import serve
        from ray.serve.schema import ServeDeploySchema

        if arguments:
            base = {name: self._config["args"][name] for name in ("data", "replica_cpus")}
            self._config["args"] = base | {"drain_s": 30.0} | arguments
        others = {"applications": {"next": "canary"}} if canary else {}
        user_config = {} if weights is None else {"user_config": {"weights": weights, **others}}
        applications = [self._config | {"deployments": [{"name": "Gateway", **user_config}]}]
        if canary:
            own = {"model": "next", "release": canary, "replica_cpus": 0.5}
            about = {"name": "canary", "route_prefix": None, "import_path": "serve.app:build_release"}
            applications.append(about | {"args": own})
        client: Any = serve.context._get_global_client()
        client.deploy_apps(ServeDeploySchema.model_validate({"applications": applications}), _blocking=False)

    def all_parts(self) -> set[str]:
        """The ids of every replica of every deployment."""
        return {name for title in self.details()["deployments"] for name in self.parts(title)}

    def failure(self) -> str:
        """Why the application does not run, once Serve gave up."""
        found = self.details()
        text = json.dumps(found["deployments"], default=str) + found["message"]
        return text if found["status"] == "DEPLOY_FAILED" else ""


__all__ = ["APPLICATION", "ConfiguredService", "variant"]
