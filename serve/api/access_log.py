"""The outermost layer of a gateway: names each request, logs it in one line, and tells nothing of what it said."""

from __future__ import annotations

import json
import logging
import re
import secrets
import time

from starlette._utils import get_route_path
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_LOG = logging.getLogger("ray.serve")
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
_QUIET = ("/health/live", "/health/ready")


class AccessLogMiddleware:
    """ASGI middleware. `names_answers` is False behind Serve's proxy, which sets X-Request-Id on answers itself."""

    def __init__(self, app: ASGIApp, names_answers: bool) -> None:
        self._app, self._names_answers = app, names_answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        request_id = request_id_of(Headers(scope=scope).get("x-request-id"))
        scope.setdefault("state", {})["request_id"] = request_id
        started_s, status = time.monotonic(), 0

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] in ("http.response.start", "websocket.http.response.start"):
                status = message["status"]
                if self._names_answers:
                    MutableHeaders(scope=message)["X-Request-Id"] = request_id
            elif message["type"] == "websocket.accept":
                status = 101
            await send(message)

        try:
            await self._app(scope, receive, named)
        finally:
            _log(scope, request_id, status, time.monotonic() - started_s)


def request_id_of(given: str | None) -> str:
    """The caller's own name for his request if it is a decent one, else a new one."""
    return given if given is not None and _REQUEST_ID.fullmatch(given) else secrets.token_hex(16)


def _log(scope: Scope, request_id: str, status: int, duration_s: float) -> None:
    """One line; the route's pattern, not the address, and the public id of the key or of the viewer's token."""
    route, caller, guest = scope.get("route"), scope["state"].get("caller"), scope["state"].get("guest")
    if get_route_path(scope) in _QUIET:
        return
    line = {
        "request_id": request_id,
        "method": scope.get("method", "WS"),
        "route": getattr(route, "path", None),
        "status": status,
        "duration_s": round(duration_s, 4),
        "key": caller.key_id if caller else None,
        "viewer": guest.viewer.id if guest else None,
    }
    _LOG.info("request %s", json.dumps(line))
