"""What routes are given: the gateway, and whom `AuthMiddleware` let in."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request
from fastapi.requests import HTTPConnection

from serve.gateway.gateway import Gateway
from serve.records import Caller, Guest
from serve.wire.problems import Problem, link_not_found


def gateway_of(request: Request) -> Gateway:
    gateway: Gateway = request.app.state.gateway
    return gateway


def caller_of(connection: HTTPConnection) -> Caller:
    """The caller. A request that was not asked for a key is refused here."""
    caller: Caller | None = getattr(connection.state, "caller", None)
    if caller is None:
        raise Problem(401, "missing_api_key", "give an API key as `Authorization: Bearer ...`")
    return caller


def guest_of(token: str, request: Request) -> Guest:
    """Who came by a viewer's link. `token` is in the path for the description alone: it was looked up before."""
    guest: Guest | None = getattr(request.state, "guest", None)
    if guest is None:
        raise link_not_found()
    return guest


Via = Annotated[Gateway, Depends(gateway_of)]
By = Annotated[Caller, Depends(caller_of)]
ByLink = Annotated[Guest, Depends(guest_of)]
