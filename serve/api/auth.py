"""Who may come in: every route but a few asks for a key, WebSocket upgrades included, in this application itself.

A proxy in front can be bypassed, so none is relied on, and no address of a caller is trusted: on this machine too,
everybody shows a key (`auth: local` keeps one in a file that only its owner can read). Keys come in the `Authorization`
header alone; a browser, which cannot set it on a WebSocket, shows a one-time client secret as a subprotocol.
Below `/v1/shared/` a viewer's token of one video stands in the path: native players send no header.
"""

from __future__ import annotations

from collections import Counter
from ipaddress import ip_address
from typing import Protocol
from urllib.parse import SplitResult, urlsplit

from starlette._utils import get_route_path  # what the router matches: any other reading of the path would be a hole
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from serve.records import LOCAL, Caller, Guest
from serve.rpc import UNAVAILABLE
from serve.tokens import CLIENT_SECRET, KEY, VIEWER, Secret, parse_secret
from serve.wire import problems
from serve.wire.problems import Problem

PUBLIC = frozenset({"/", "/health/live", "/health/ready", "/openapi.json"})
SOCKET = "/v1/realtime/video"
PUBLIC_FOLDERS = ("/viewer/", "/watch/")  # the pages alone, which ask for what they show
SHARED_FOLDER = "/v1/shared/"
SUBPROTOCOL = "realtime"
_SECRET_PROTOCOLS = ("diagonal-client-secret.", "openai-insecure-api-key.")
_LOCAL_KEY = ": that of this service is in the file `local_key` of its `data` folder"
_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
REQUESTS_AT_ONCE = 200  # of one key, at one gateway: a stream and a socket are one as long as they are open
_VIEWERS_OF = "viewers of "


class Keyring(Protocol):
    """What the middleware asks of the gateway."""

    async def caller(self, shown: Secret) -> Caller | None: ...

    async def redeem(self, shown: Secret) -> Caller | None: ...

    async def guest(self, shown: Secret) -> Guest | None: ...


class AuthMiddleware:
    """ASGI: puts the caller into the request's state, None on a public route, or answers 401, 403 or 429.

    On a viewer's link it puts the guest there and no caller, or answers 404.
    """

    def __init__(self, app: ASGIApp, keyring: Keyring, local: bool, origins: tuple[str, ...]) -> None:
        self._app, self._keyring, self._local, self._origins = app, keyring, local, origins
        self._open: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        caller, guest = None, None
        try:
            self._check_origin(scope, headers)
            _check_upgrade(scope)
            if _is_shared(scope):
                guest = await self._guest(scope)
            elif not _is_public(scope):
                caller = await self._caller(scope, headers)
            name = _counted_as(caller, guest)
            self._check_room(name)
            if "\0" in scope["path"]:
                raise Problem(404, "not_found", "Not Found")  # no name has one, and not every database takes it
        except Problem as problem:
            return await problems.reject(problem, scope, receive, send)
        except UNAVAILABLE:
            return await problems.reject(problems.unavailable(), scope, receive, send)
        scope.setdefault("state", {}).update(caller=caller, guest=guest)
        self._open[name] += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._open[name] -= 1
            self._open += Counter()  # keeps what is above 0

    def _check_room(self, name: str) -> None:
        """Neither one key nor the viewers of one video can take all the connections that a gateway has."""
        if name and self._open[name] >= REQUESTS_AT_ONCE:
            whose = "the viewers of this video have" if name.startswith(_VIEWERS_OF) else "this key has"
            message = f"{whose} {REQUESTS_AT_ONCE} requests open here, which is the limit"
            raise Problem(429, "too_many_requests", message, retry_after_s=1.0)

    async def _guest(self, scope: Scope) -> Guest:
        shown = parse_secret(VIEWER, get_route_path(scope).removeprefix(SHARED_FOLDER).partition("/")[0])
        guest = None if shown is None else await self._keyring.guest(shown)
        if guest is None:
            raise problems.link_not_found()
        return guest

    async def _caller(self, scope: Scope, headers: Headers) -> Caller:
        key = parse_secret(KEY, _bearer(headers))
        if key is not None:
            caller = await self._keyring.caller(key)
        elif scope["type"] == "websocket" and (secret := _client_secret(headers)) is not None:
            caller = await self._keyring.redeem(secret)
        elif "authorization" not in headers:
            where = _LOCAL_KEY if self._local else ""
            raise Problem(401, "missing_api_key", f"give an API key as `Authorization: Bearer ...`{where}")
        else:
            caller = None
        if caller is None:
            where = _LOCAL_KEY if self._local else ""
            raise Problem(401, "invalid_api_key", f"this key is not known, was revoked, or is used up{where}")
        if caller.key_id == LOCAL and not _names_this_machine(headers):
            raise Problem(403, "foreign_host", "with auth=local the service answers to localhost and its address alone")
        return caller

    def _check_origin(self, scope: Scope, headers: Headers) -> None:
        """A page of another site may not change anything here, even where the server trusts its own machine."""
        if scope["type"] == "http" and scope["method"] in _SAFE_METHODS:
            return
        origin = headers.get("origin")
        if origin is None or origin.lower() in self._origins:
            return
        host = headers.get("host", "").lower()
        if not host or _split(origin).netloc.lower() != host:
            raise Problem(403, "foreign_origin", "a page of another origin may not do this")


def _check_upgrade(scope: Scope) -> None:
    """A plain request for the WebSocket lost its upgrade on the way; a browser could show no key with it."""
    if scope["type"] == "http" and scope["method"] == "GET" and get_route_path(scope) == SOCKET:
        message = "this is a WebSocket: a proxy in front has to pass on the headers Upgrade and Connection"
        problem = Problem(426, "upgrade_required", message)
        problem.headers = {"Upgrade": "websocket", "Connection": "Upgrade"}
        raise problem


def _is_public(scope: Scope) -> bool:
    path = get_route_path(scope) or "/"
    return scope["type"] == "http" and (path in PUBLIC or path.startswith(PUBLIC_FOLDERS))


def _is_shared(scope: Scope) -> bool:
    return scope["type"] == "http" and get_route_path(scope).startswith(SHARED_FOLDER)


def _counted_as(caller: Caller | None, guest: Guest | None) -> str:
    """Whose open requests are counted together; '' is without a limit."""
    if guest is not None:
        return f"{_VIEWERS_OF}{guest.viewer.video_id}"
    return "" if caller is None or caller.key_id == LOCAL else caller.key_id


def _bearer(headers: Headers) -> str:
    kind, _, text = headers.get("authorization", "").partition(" ")
    return text.strip() if kind.lower() == "bearer" else ""


def _client_secret(headers: Headers) -> Secret | None:
    offered = [protocol.strip() for protocol in headers.get("sec-websocket-protocol", "").split(",")]
    shown = [_bearer(headers)]
    shown += [text.removeprefix(kind) for text in offered for kind in _SECRET_PROTOCOLS if text.startswith(kind)]
    return next((secret for text in shown if (secret := parse_secret(CLIENT_SECRET, text)) is not None), None)


def _names_this_machine(headers: Headers) -> bool:
    host = _split(f"//{headers.get('host', '')}").hostname or ""
    return host == "localhost" or _is_loopback(host)


def _split(address: str) -> SplitResult:
    """An address' parts; those of '' where it is none."""
    try:
        return urlsplit(address)
    except ValueError:
        return urlsplit("")


def _is_loopback(address: str) -> bool:
    try:
        return ip_address(address).is_loopback
    except ValueError:
        return False
