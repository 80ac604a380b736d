"""The gateway as a Serve deployment; this file imports no torch, so that a gateway's process stays small."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from diagonal.errors import FieldError
from serve.actors import remote_store
from serve.api.routes import create_app
from serve.gateway.fleet import Fleet
from serve.gateway.gateway import Gateway
from serve.gateway.shutdown import is_stopping
from serve.policies.traffic import Canaries
from serve.ray_metrics import serve_metrics
from serve.settings import ServeSettings

_LOG = logging.getLogger("ray.serve")


@serve.ingress()
class GatewayDeployment:
    """One gateway process; Serve asks it for the application."""

    def __init__(
        self, settings: ServeSettings, store: DeploymentHandle, replicas: Mapping[str, DeploymentHandle]
    ) -> None:
        self._metrics = serve_metrics()
        if settings.auth == "local":
            _LOG.warning(
                "auth=local: everybody shows the key in %s, which its owner alone can read", settings.local_key
            )
        self._fleet, self._configured = Fleet(replicas), False
        self._others: dict[tuple[str, str], DeploymentHandle] = {}
        self._gateway = Gateway(settings, remote_store(store), self._fleet, self._metrics, is_stopping)

    def reconfigure(self, user_config: Mapping[str, object]) -> None:
        """Called by Serve with the deployment's `user_config`: `weights` share new videos among the releases, and
        `applications` names those that other Serve applications hold (`serve.app:build_release`).

        Serve replaces no replica for it. What is wrong is refused by a gateway that starts; one that runs stays as it
        is, as Serve would replace it.
        """
        try:
            wanted = Canaries.parse(user_config)
            self._fleet.share(wanted.weights, {name: self._other(name, at) for name, at in wanted.applications.items()})
        except FieldError as error:
            if not self._configured:
                raise
            _LOG.error("the releases and their weights stay as they were: %s", error)
        self._configured = True

    def _other(self, name: str, application: str) -> DeploymentHandle:
        """The replicas of a release in another application, which need not be there yet."""
        at = (name, application)
        if at not in self._others:
            self._others[at] = serve.get_deployment_handle(f"Replica-{name}", application, _check_exists=False)
        return self._others[at]

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self._gateway, self._metrics, names_answers=False)
