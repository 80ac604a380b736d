"""The gateway as a Serve deployment; this file imports no torch, so that a gateway's process stays small."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from fastapi import FastAPI
from ray import serve
from ray.serve import metrics as serve_metrics
from ray.serve.handle import DeploymentHandle

from diagonal.errors import FieldError, require
from diagonal.metrics import FactorySink
from serve.fleet import Fleet
from serve.gateway import Gateway
from serve.leaving import is_stopping
from serve.routes import create_app
from serve.settings import ServeSettings

_LOG = logging.getLogger("ray.serve")


@serve.ingress()
class GatewayDeployment:
    """One gateway process; Serve asks it for the application."""

    def __init__(
        self, settings: ServeSettings, store: DeploymentHandle, replicas: Mapping[str, DeploymentHandle]
    ) -> None:
        self._metrics = FactorySink(serve_metrics.Counter, serve_metrics.Gauge, serve_metrics.Histogram)
        if settings.auth == "local":
            _LOG.warning("auth=local: callers on this machine need NO API KEY; everybody else is refused")
        self._fleet, self._configured = Fleet(replicas), False
        self._gateway = Gateway(settings, store, self._fleet, self._metrics, is_stopping)

    def reconfigure(self, user_config: Mapping[str, object]) -> None:
        """Called by Serve with the deployment's `user_config`: `weights` share new videos among the releases.

        Serve replaces no replica for it. Wrong weights are refused by a gateway that starts; one that runs keeps its
        own, as Serve would replace it.
        """
        try:
            require(set(user_config) <= {"weights"}, "user_config", dict(user_config), "weights by release")
            self._fleet.share(user_config.get("weights"))
        except FieldError as error:
            if not self._configured:
                raise
            _LOG.error("the weights stay as they were: %s", error)
        self._configured = True

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self._gateway, self._metrics, names_answers=False)
