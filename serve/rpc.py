"""Calls from one part of the service to another: none waits for ever, and a store that restarts is waited for."""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

T = TypeVar("T")
UNAVAILABLE = (RayError, RayServeException, TimeoutError)  # a part of the service that does not answer
CALL_TIMEOUT_S = 30.0
PATIENCE_S = 20.0  # longer than Serve needs to put a part that died up again
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.1, 2.0


async def answer(response: Any, timeout_s: float = CALL_TIMEOUT_S) -> Any:
    """What the other part answers; `TimeoutError` when it does not."""
    async with asyncio.timeout(timeout_s):  # not wait_for: on Python 3.11 it may keep a cancellation to itself
        return await response


async def patient(call: Callable[[], Any], timeout_s: float = CALL_TIMEOUT_S, patience_s: float = PATIENCE_S) -> Any:
    """As `answer`, called again while the part is away. Only for calls that may happen twice."""
    give_up_s, wait_s = time.monotonic() + patience_s, _FIRST_WAIT_S
    while True:
        try:
            return await answer(call(), timeout_s)
        except UNAVAILABLE:
            if time.monotonic() + wait_s > give_up_s:
                raise
        await asyncio.sleep(wait_s)
        wait_s = min(2 * wait_s, _LONGEST_WAIT_S)


def apart(work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """Work that outlives the request that began it: Serve cancels a request's own calls when its caller goes away."""
    return asyncio.get_running_loop().create_task(work, context=contextvars.Context())
