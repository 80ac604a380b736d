"""Calls between the processes of the service: each ends in time, and a store that restarts is waited for."""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

T = TypeVar("T")
UNAVAILABLE = (RayError, RayServeException, TimeoutError)  # the other process does not answer
CALL_TIMEOUT_S = 30.0
PATIENCE_S = 20.0  # longer than Serve needs to replace a process that died
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.1, 2.0


async def call(response: Awaitable[T], timeout_s: float = CALL_TIMEOUT_S) -> T:
    """The answer of another process; `TimeoutError` when there is none in time."""
    async with asyncio.timeout(timeout_s):  # not wait_for: on Python 3.11 it may keep a cancellation to itself
        return await response


async def call_with_retry(
    make: Callable[[], Awaitable[T]], timeout_s: float = CALL_TIMEOUT_S, patience_s: float = PATIENCE_S
) -> T:
    """As `call`, repeated while the other process is away. Only for calls that may happen twice."""
    give_up_s, wait_s = time.monotonic() + patience_s, _FIRST_WAIT_S
    while True:
        try:
            return await call(make(), timeout_s)
        except UNAVAILABLE:
            if time.monotonic() + wait_s > give_up_s:
                raise
        await asyncio.sleep(wait_s)
        wait_s = min(2 * wait_s, _LONGEST_WAIT_S)


def detached(work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """Work that outlives the request that began it: Serve cancels a request's own calls when its caller goes away."""
    return asyncio.get_running_loop().create_task(work, context=contextvars.Context())
