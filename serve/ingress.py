"""The gateway as a Serve deployment; this file imports no torch, so that a gateway's process stays small."""

from __future__ import annotations

import logging

from fastapi import FastAPI
from ray import serve
from ray.serve import metrics as serve_metrics
from ray.serve.handle import DeploymentHandle

from diagonal.metrics import FactorySink
from serve.gateway import Gateway
from serve.routes import create_app
from serve.settings import ServeSettings

_LOG = logging.getLogger("ray.serve")


@serve.ingress()
class GatewayDeployment:
    """One gateway process; Serve asks it for the application."""

    def __init__(self, settings: ServeSettings, store: DeploymentHandle, replica: DeploymentHandle) -> None:
        self._metrics = FactorySink(serve_metrics.Counter, serve_metrics.Gauge, serve_metrics.Histogram)
        if settings.auth == "local":
            _LOG.warning("auth=local: callers on this machine need NO API KEY; everybody else is refused")
        self._gateway = Gateway(settings, store, replica, self._metrics)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self._gateway, self._metrics, names_answers=False)
