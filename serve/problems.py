"""Error answers: RFC 9457 problem details that also carry OpenAI's `error` member; never a traceback."""

from __future__ import annotations

import logging
from http import HTTPStatus
from math import ceil
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from starlette.exceptions import HTTPException

from diagonal.metrics import MetricSink
from serve.records import Refused

_LOG = logging.getLogger("ray.serve")
MEDIA_TYPE = "application/problem+json"
_UNAVAILABLE_RETRY_S = 2.0
_SHOWN_VALUE_CHARACTERS = 80


class Problem(Exception):
    """An error that the caller is told: `code` is for programs, `param` names the field, `detail` what is allowed."""

    def __init__(
        self, status: int, code: str, detail: str, *, param: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(detail)
        self.status, self.code, self.detail, self.param = status, code, detail, param
        self.retry_after_s = retry_after_s


def wrong_value(status: int, code: str, param: str, value: object, allowed: str) -> Problem:
    """A field with a value that is not allowed."""
    shown = repr(value)
    if len(shown) > _SHOWN_VALUE_CHARACTERS:
        shown = f"{shown[:_SHOWN_VALUE_CHARACTERS]}... ({len(shown)} characters)"
    return Problem(status, code, f"{param} = {shown}: allowed is {allowed}", param=param)


def not_found(video_id: str) -> Problem:
    return Problem(404, "video_not_found", f"there is no video {video_id!r}", param="video_id")


def unavailable() -> Problem:
    message = "a part of the service does not answer; try again"
    return Problem(503, "unavailable", message, retry_after_s=_UNAVAILABLE_RETRY_S)


def refused(answer: Refused) -> Problem:
    """What a replica refused, as the caller is told."""
    if answer.retry_after_s is not None:
        return Problem(429, answer.code, answer.message, retry_after_s=answer.retry_after_s)
    if answer.code == "invalid_value":
        return Problem(400, answer.code, answer.message, param=answer.param)
    return Problem(409, answer.code, answer.message, param=answer.param)


def invalid(error: ValidationError | RequestValidationError) -> Problem:
    """The first thing that is wrong with a body or a query."""
    first: dict[str, Any] = dict(error.errors()[0])
    param = ".".join(str(part) for part in first["loc"] if part not in ("body", "query", "path")) or "body"
    if first["type"] == "extra_forbidden":
        return Problem(422, "unknown_field", f"{param}: there is no such field", param=param)
    if first["type"] == "missing":
        return Problem(422, "missing_field", f"{param} is missing", param=param)
    allowed = first["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return wrong_value(422, "invalid_value", param, first.get("input"), allowed)


def answer(problem: Problem) -> JSONResponse:
    """The response; its media type is application/problem+json."""
    kind = "rate_limit_error" if problem.status == 429 else "invalid_request_error"
    error = {
        "message": problem.detail,
        "type": "server_error" if problem.status >= 500 else kind,
        "param": problem.param,
        "code": problem.code,
    }
    body = {
        "type": f"urn:diagonal:problem:{problem.code}",
        "title": HTTPStatus(problem.status).phrase,
        "status": problem.status,
        "detail": problem.detail,
        "error": error,
    }
    wait = {} if problem.retry_after_s is None else {"Retry-After": str(ceil(problem.retry_after_s))}
    return JSONResponse(body, problem.status, headers=wait, media_type=MEDIA_TYPE)


def install(app: FastAPI, metrics: MetricSink) -> None:
    """Make every error of `app` such an answer."""

    def told(problem: Problem) -> JSONResponse:
        metrics.inc("diagonal_errors_total", code=problem.code)
        return answer(problem)

    async def on_problem(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, Problem)
        return told(error)

    async def on_invalid(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return told(invalid(error))

    async def on_http(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        phrase = HTTPStatus(error.status_code).phrase
        return told(Problem(error.status_code, phrase.lower().replace(" ", "_"), phrase))

    async def on_silence(request: Request, error: Exception) -> JSONResponse:
        _LOG.warning("%s %s: %s", request.method, request.url.path, type(error).__name__)
        return told(unavailable())

    async def on_anything(request: Request, error: Exception) -> JSONResponse:
        _LOG.error("%s %s: %s", request.method, request.url.path, type(error).__name__)
        return told(Problem(500, "internal_error", "something went wrong on the server"))

    app.add_exception_handler(Problem, on_problem)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(HTTPException, on_http)
    for silence in (RayError, RayServeException, TimeoutError):
        app.add_exception_handler(silence, on_silence)
    app.add_exception_handler(Exception, on_anything)
