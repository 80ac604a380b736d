"""Error answers: RFC 9457 problem details that also carry OpenAI's `error` member; never a traceback."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from http import HTTPStatus
from math import ceil
from typing import Any, cast

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive, Scope, Send

from diagonal.metrics import MetricsBackend
from serve.records import Refused
from serve.rpc import UNAVAILABLE

_LOG = logging.getLogger("ray.serve")
MEDIA_TYPE = "application/problem+json"
_UNAVAILABLE_RETRY_S = 2.0
_SHOWN_VALUE_CHARACTERS = 80
_POLICY_CLOSE = 1008
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_REFUSALS = {"invalid_value": 400, "quota_too_small": 403, "idempotency_conflict": 422}


class Problem(Exception):
    """An error that the caller is told: `code` is for programs, `param` names the field, `detail` what is allowed."""

    def __init__(
        self, status: int, code: str, detail: str, *, param: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(detail)
        self.status, self.code, self.detail, self.param = status, code, detail, param
        self.retry_after_s = retry_after_s
        self.headers: Mapping[str, str] = {}


def wrong_value(status: int, code: str, param: str, value: object, allowed: str) -> Problem:
    """A field with a value that is not allowed."""
    shown = repr(value)
    if len(shown) > _SHOWN_VALUE_CHARACTERS:
        shown = f"{shown[:_SHOWN_VALUE_CHARACTERS]}... ({len(shown)} characters)"
    return Problem(status, code, f"{param} = {shown}: allowed is {allowed}", param=param)


def not_found(video_id: str) -> Problem:
    return Problem(404, "video_not_found", f"there is no video {video_id!r}", param="video_id")


def link_not_found() -> Problem:
    """Of a viewer's link; whether it never was, has expired or was revoked is nobody's to know."""
    return Problem(404, "link_not_found", "this link leads nowhere: there is none, or it is over")


def unavailable() -> Problem:
    message = "a part of the service does not answer; try again"
    return Problem(503, "unavailable", message, retry_after_s=_UNAVAILABLE_RETRY_S)


def refused(refusal: Refused) -> Problem:
    """What a replica or the store refused, as the caller is told."""
    if refusal.retry_after_s is not None:
        return Problem(429, refusal.code, refusal.message, retry_after_s=refusal.retry_after_s)
    return Problem(_REFUSALS.get(refusal.code, 409), refusal.code, refusal.message, param=refusal.param)


def invalid(error: ValidationError | RequestValidationError) -> Problem:
    """The first thing that is wrong with a body or a query; unknown fields all at once."""
    first: dict[str, Any] = dict(error.errors()[0])
    param = _name(first["loc"])
    if first["type"] == "extra_forbidden":
        unknown = ", ".join(_name(one["loc"]) for one in error.errors() if one["type"] == "extra_forbidden")
        return Problem(422, "unknown_field", f"{unknown}: there is no such field", param=param)
    if first["type"] == "missing":
        return Problem(422, "missing_field", f"{param} is missing", param=param)
    allowed = first["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return wrong_value(422, "invalid_value", param, first.get("input"), allowed)


def _name(place: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in place if part not in ("body", "query", "path")) or "body"


def to_response(problem: Problem, request_id: str = "") -> JSONResponse:
    """The response; its media type is application/problem+json."""
    body = {
        "type": f"urn:diagonal:problem:{problem.code}",
        "title": HTTPStatus(problem.status).phrase,
        "status": problem.status,
        "detail": problem.detail,
        "request_id": request_id,
        "error": error_member(problem),
    }
    headers = {"Cache-Control": "no-store"}  # a chunk that is not there yet may be there in a moment
    if problem.retry_after_s is not None:
        headers["Retry-After"] = str(ceil(problem.retry_after_s))
    if problem.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(body, problem.status, headers=headers | dict(problem.headers), media_type=MEDIA_TYPE)


def error_member(problem: Problem) -> dict[str, Any]:
    """OpenAI's `error` object."""
    kind = "server_error" if problem.status >= 500 else _TYPES.get(problem.status, "invalid_request_error")
    return {"message": problem.detail, "type": kind, "param": problem.param, "code": problem.code}


async def reject(problem: Problem, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer a request, or a WebSocket's before it is opened, with a problem."""
    response = to_response(problem, scope.get("state", {}).get("request_id", ""))
    if scope["type"] == "http":
        return await response(scope, receive, send)
    if "websocket.http.response" not in scope.get("extensions", {}):
        return await send({"type": "websocket.close", "code": _POLICY_CLOSE, "reason": problem.code})

    async def as_websocket(message: Message) -> None:
        await send({**message, "type": f"websocket.{message['type']}"})

    await response({**scope, "type": "http"}, receive, as_websocket)


def install(app: FastAPI, metrics: MetricsBackend, methods: Callable[[FastAPI, Scope], str]) -> None:
    """Make every error of `app` such an answer; `methods` says what an address may be asked with."""

    def respond(request: Request, problem: Problem) -> JSONResponse:
        metrics.inc("diagonal_errors_total", code=problem.code)
        return to_response(problem, getattr(request.state, "request_id", ""))

    async def on_problem(request: Request, error: Exception) -> JSONResponse:
        return respond(request, cast(Problem, error))

    async def on_invalid(request: Request, error: Exception) -> JSONResponse:
        return respond(request, invalid(cast(RequestValidationError, error)))

    async def on_http(request: Request, error: Exception) -> JSONResponse:
        error = cast(HTTPException, error)
        phrase = HTTPStatus(error.status_code).phrase
        problem = Problem(error.status_code, phrase.lower().replace(" ", "_"), phrase)
        problem.headers = error.headers or {}
        if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            problem.headers = {"Allow": methods(app, request.scope)}
        return respond(request, problem)

    async def on_silence(request: Request, error: Exception) -> JSONResponse:
        _log(request, error, logging.WARNING)
        return respond(request, unavailable())

    async def on_anything(request: Request, error: Exception) -> JSONResponse:
        _log(request, error, logging.ERROR)
        problem = Problem(500, "internal_error", "something went wrong on the server")
        if request.app.state.names_answers:  # this answer is sent outside of the layer that does it for the others
            problem.headers = {"X-Request-Id": getattr(request.state, "request_id", "")}
        return respond(request, problem)

    app.add_exception_handler(Problem, on_problem)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(HTTPException, on_http)
    for silence in UNAVAILABLE:
        app.add_exception_handler(silence, on_silence)
    app.add_exception_handler(Exception, on_anything)


def _log(request: Request, error: Exception, level: int) -> None:
    """The error's kind and where the request went; its text could hold what a caller wrote."""
    route = getattr(request.scope.get("route"), "path", "")
    request_id = getattr(request.state, "request_id", "")
    _LOG.log(level, "request %s %s %s: %s", request_id, request.method, route, type(error).__name__)
