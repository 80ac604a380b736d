"""How a part of the service learns that Serve is about to end its process; Serve 2.60 has no hook for it.

A replica that Serve stops goes on with the calls that it has until `graceful_shutdown_timeout_s`, and then is cut. All
that tells so inside of it is a flag of Serve's own, set when the controller asks for the stop; nothing but this file
knows of it, and `tests/faults` hold it against a real Serve.
"""

from __future__ import annotations

import logging

import ray

_LOG = logging.getLogger("ray.serve")


def is_stopping() -> bool:
    """Whether Serve has begun to stop the replica that this process is; never outside of one."""
    worker = ray._private.worker.global_worker
    actor = worker.actors.get(worker.actor_id)
    return bool(getattr(getattr(actor, "_replica_impl", None), "_shutting_down", False))
