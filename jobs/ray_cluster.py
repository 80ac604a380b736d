"""A job's connection to Ray, and how storage credentials reach the processes that Ray starts for it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Mapping

import ray

LOCAL_CPUS = 8  # logical: with fewer, Ray Data waits for ever behind Ray Train's workers
PASSED_ON = ("AWS_", "HF_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE")  # where S3 and the hub are, and credentials
SET = {
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",  # a stalled worker does not answer; Ray's own limit is 30 s
}


def connect() -> None:
    """Join the cluster of RAY_ADDRESS, or start a local one without dashboard and end it with the process."""
    for name, value in SET.items():
        os.environ.setdefault(name, value)
    if ray.is_initialized():
        return
    on_stop = signal.getsignal(signal.SIGTERM)
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=True, runtime_env={"worker_process_setup_hook": passing_on(os.environ)})
    else:
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # else Ray writes a token file for the whole account
        ray.init(
            "local",
            num_cpus=max(LOCAL_CPUS, os.cpu_count() or 1),
            include_dashboard=False,
            runtime_env={"worker_process_setup_hook": passing_on({})},
        )
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_stop)  # Ray sets its own


def passing_on(environment: Mapping[str, str]) -> Callable[[], None]:
    """A setup hook of Ray: every process of the job gets this one's settings of S3 and the hub, and `SET`.

    A hook and not `env_vars`: Ray writes those, secrets and all, into its log and shows them in its dashboard. What a
    node has of its own stands. One actor of Ray Train's, which asks a dashboard that may not be there, is silenced.
    """
    noisy = "ray.train.v2._internal.execution.controller.placement_group_cleaner"
    found = {name: value for name, value in environment.items() if name.startswith(PASSED_ON) or name in SET}

    def set_missing() -> None:
        import logging
        import os

        logging.getLogger(noisy).setLevel(logging.CRITICAL)
        for name, value in found.items():
            os.environ.setdefault(name, value)

    return set_missing
