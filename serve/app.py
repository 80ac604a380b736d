"""The service as a Ray Serve application: gateways in front of one store and sticky engine replicas.

`serve run serve.app:build release=runs/release data=runs/serve`, or `serve deploy serve/config.yaml`.
"""

from __future__ import annotations

from typing import Any

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from diagonal.errors import require
from serve.api.deployment import GatewayDeployment
from serve.policies.autoscaling import connection_scaling, session_scaling
from serve.policies.routing import SessionRouter
from serve.replica.replica import Replica
from serve.settings import ServeSettings
from serve.store.store import Store

_CALLS = 10_000  # most of them wait for a chunk; sessions are bounded by the engine, not by this
_STREAMS = 1_000
_DRAIN_S = 20.0  # of parts whose calls are all short: what they hold is elsewhere by then
_DRAIN_LOOK_S = 0.5
_HEALTH_S = 12.0  # three checks in a row without an answer end a process: one may stand still for half a minute


def build(arguments: dict[str, Any]) -> serve.Application:
    """The application; `arguments` are the fields of `ServeSettings`, wrong ones raise `FieldError`."""
    settings = ServeSettings.from_arguments(arguments)
    front = _in_pool(settings.gateway_pool)
    store = _deployment(Store, "Store", _CALLS, settings, num_cpus=settings.store_cpus, **front)
    store = store.options(max_surge_percent=100)  # for seconds two share the database: nobody waits for the next one
    gateway = _deployment(GatewayDeployment, "Gateway", _STREAMS, settings, num_cpus=settings.gateway_cpus, **front)
    # Of gateways the next ones are there before the old ones drain: viewers go on through them at once.
    gateway = gateway.options(
        **_gateways(settings), max_surge_percent=100, graceful_shutdown_timeout_s=settings.drain_s
    )
    replicas = {name: _replica(name, one) for name, one in settings.served().items()}
    return gateway.bind(settings, store.bind(settings), replicas)


def build_release(arguments: dict[str, Any]) -> serve.Application:
    """The replicas of one more release, `model`, as an application of its own: it comes and goes while others run.

    The service's gateways reach it when their `user_config` names it (`GatewayDeployment.reconfigure`).
    """
    settings = ServeSettings.from_arguments(arguments)
    require(bool(settings.model), "model", settings.model, "the name by which callers ask for the release")
    entry = _deployment(Entry, "Entry", 1, settings, num_cpus=0.0)
    return entry.bind(_replica(settings.model, settings))


class Entry:
    """Where Serve enters an application that only gateways call: it leads nowhere."""

    def __init__(self, replicas: DeploymentHandle) -> None:
        self._replicas = replicas


def _replica(name: str, settings: ServeSettings) -> Any:
    """The replicas of one release, as many and as large as its settings say."""
    title = f"Replica-{name}" if name else "Replica"
    resources = {"num_cpus": settings.replica_cpus, "num_gpus": settings.replica_gpus}
    replica = _deployment(Replica, title, _CALLS, settings, **resources, **_in_pool(settings.replica_pool))
    return replica.options(
        **_replicas(settings),
        max_surge_percent=settings.surge_percent,
        health_check_period_s=1.0,
        health_check_timeout_s=_HEALTH_S,
        request_router_config={"request_router_class": SessionRouter, "request_routing_stats_period_s": 1.0},
    ).bind(settings)


def _in_pool(name: str) -> dict[str, Any]:
    """On nodes of that pool alone; '' is any."""
    return {"label_selector": {"pool": name}} if name else {}


def _replicas(settings: ServeSettings) -> dict[str, Any]:
    """How many of them, or between which numbers."""
    if not settings.max_replicas:
        return {"num_replicas": settings.replicas}
    delays_s = (settings.scale_up_delay_s, settings.scale_down_delay_s)
    scaling = session_scaling(settings.replicas, settings.max_replicas, *delays_s, settings.headroom)
    return {"autoscaling_config": scaling}


def _gateways(settings: ServeSettings) -> dict[str, Any]:
    if not settings.max_gateways:
        return {"num_replicas": settings.gateways}
    delays_s = (settings.scale_up_delay_s, settings.scale_down_delay_s)
    connections = settings.gateway_connections
    scaling = connection_scaling(settings.gateways, settings.max_gateways, *delays_s, connections)
    return {"autoscaling_config": scaling}


def _deployment(kind: type, name: str, calls: int, settings: ServeSettings, **resources: Any) -> Any:
    """One part; calls between parts are many and short, so that Serve's threads and lines for each would cost most.

    Only a replica's own code, which loads and warms up a model, runs apart from the loop that Serve answers on.
    Serve gives the application's `runtime_env` to deployments without one of their own alone: it is put into each.
    """
    decorate: Any = serve.deployment
    on_one_loop = {"RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0"}
    if kind is not Replica:
        on_one_loop["RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD"] = "0"
    application = dict(ray.get_runtime_context().runtime_env) if ray.is_initialized() else {}
    environment = application | {"env_vars": application.get("env_vars", {}) | on_one_loop}
    options = resources | {"runtime_env": environment}
    drain = {"graceful_shutdown_timeout_s": _DRAIN_S, "graceful_shutdown_wait_loop_s": _DRAIN_LOOK_S}
    encoding = "JSON" if settings.log_format == "json" else "TEXT"
    logs = {"enable_access_log": False, "encoding": encoding}  # the gateway writes a line for each request itself
    limits = drain | {"max_ongoing_requests": calls}
    return decorate(kind, name=name, ray_actor_options=options, logging_config=logs, **limits)
