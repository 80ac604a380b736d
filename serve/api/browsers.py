"""What browsers, caches and proxies need: answers that pages of listed origins may read, HEAD, the whole `Allow`."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.datastructures import MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

METHODS = ("GET", "HEAD", "POST", "DELETE")
ASKED_WITH = (
    "Authorization",
    "Content-Type",
    "Idempotency-Key",
    "If-None-Match",
    "If-Range",
    "Range",
    "Traceparent",
    "X-Request-Id",
)
SHOWN = (
    "Accept-Ranges",
    "Content-Disposition",
    "Content-Length",
    "Content-Range",
    "ETag",
    "RateLimit",
    "RateLimit-Policy",
    "Retry-After",
    "WWW-Authenticate",
    "X-Request-Id",
)
LIVE = {  # for proxies in front: pass each chunk on as it comes, and as it is
    "Cache-Control": "no-store, no-transform",
    "X-Accel-Buffering": "no",
}
KEPT = {"Cache-Control": "private, max-age=3600, immutable"}  # a chunk never changes; whoever shows a key may keep it
_PREFLIGHT_S = 600


class CorsMiddleware:
    """ASGI: answers preflights without a key and lets pages of the listed origins read every answer, errors included.

    Each answer says `Vary: Origin`, also where no origin asked: a cache must not give it to a page.
    """

    def __init__(self, app: ASGIApp, origins: tuple[str, ...]) -> None:
        self._app: ASGIApp = CORSMiddleware(
            app,
            allow_origins=origins,
            allow_methods=METHODS,
            allow_headers=ASKED_WITH,
            expose_headers=SHOWN,
            max_age=_PREFLIGHT_S,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def varied(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                if "origin" not in headers.get("vary", "").lower():
                    headers.add_vary_header("Origin")
            await send(message)

        await self._app(scope, receive, varied if scope["type"] == "http" else send)


class HeadMiddleware:
    """ASGI: HEAD wherever GET is. A route of its own answers it where there is one; the server leaves the body out."""

    def __init__(self, app: ASGIApp, application: FastAPI) -> None:
        self._app, self._application = app, application

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "HEAD":
            routes = [route for route in self._application.routes if isinstance(route, Route)]
            if not any(route.matches(scope)[0] is Match.FULL for route in routes):
                scope = {**scope, "method": "GET"}
        await self._app(scope, receive, send)


def allowed_methods(app: FastAPI, scope: Scope) -> str:
    """Every method of the address, for `Allow`: several routes may share it."""
    routes = [route for route in app.routes if isinstance(route, Route) and route.matches(scope)[0] is not Match.NONE]
    methods = {method for route in routes for method in route.methods or ()}
    return ", ".join(sorted(methods | ({"HEAD"} if "GET" in methods else set())))
