"""A job's connection to Ray, and how storage credentials reach the processes that Ray starts for it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

import ray

LOCAL_CPUS = 8  # logical: with fewer, Ray Data waits for ever behind Ray Train's workers
PASSED_ON = "AWS_"  # S3's address, region and credentials


def connect() -> None:
    """Join the cluster of RAY_ADDRESS, or start a local one without dashboard and end it with the process."""
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    if ray.is_initialized():
        return
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=True, runtime_env={"worker_process_setup_hook": passing_on(os.environ)})
        return
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # else Ray writes a token file for the whole account
    ray.init(num_cpus=max(LOCAL_CPUS, os.cpu_count() or 1), include_dashboard=False)


def passing_on(environment: Mapping[str, str]) -> Callable[[], None]:
    """A runtime environment's setup hook that gives every process of the job this process's S3 settings.

    A hook and not `env_vars`: Ray writes those, secrets and all, into its log and shows them in its dashboard. What a
    node has of its own stands.
    """
    found = {name: value for name, value in environment.items() if name.startswith(PASSED_ON)}

    def set_missing() -> None:
        import os

        for name, value in found.items():
            os.environ.setdefault(name, value)

    return set_missing
