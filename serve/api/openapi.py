"""What `/openapi.json` says beyond the routes' own types: bodies that they read themselves, errors, headers, keys."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI

from serve.api.auth import PUBLIC, SHARED_FOLDER
from serve.wire.problems import MEDIA_TYPE
from serve.wire.schemas import ProblemAnswer, request_schemas

Responses = dict[int | str, dict[str, Any]]
_BEARER = "bearer"
_TEXT: dict[str, Any] = {"type": "string"}
_NAMED = {"X-Request-Id": {"description": "This answer's name in the service's log", "schema": _TEXT}}
_AGAIN = {"Retry-After": {"description": "Seconds to wait", "schema": {"type": "integer", "minimum": 1}}}
_QUOTAS = {
    "RateLimit-Policy": {"description": 'A key\'s quotas, such as `"frames";q=1920;w=60`', "schema": _TEXT},
    "RateLimit": {"description": 'What is left of them, such as `"frames";r=960;t=31`', "schema": _TEXT},
}
_FILE = {
    "ETag": {"description": "Strong: the file never changes", "schema": _TEXT},
    "Accept-Ranges": {"schema": {"const": "bytes"}},
    "Content-Length": {"schema": {"type": "integer"}},
}
_RANGE = {"Content-Range": {"schema": _TEXT}}
_ERROR_HEADERS: dict[int, dict[str, Any]] = {416: _RANGE, 429: _AGAIN | _QUOTAS, 503: _AGAIN}
_MP4: dict[str, Any] = {"content": {"video/mp4": {"schema": {"type": "string", "format": "binary"}}}}
_EVERYWHERE = (401, 500, 503)
_KEY = (
    "An API key, with `auth: local` the one in the file `local_key` of the service's `data` folder; "
    "a browser opens the WebSocket with a client secret"
)

STREAM: Responses = {200: {**_MP4, "description": "Fragmented MP4, as it is made"}}
PART: Responses = {200: {**_MP4, "description": "The bytes"}}
PLAYLIST: Responses = {
    200: {"content": {"application/vnd.apple.mpegurl": {"schema": _TEXT}}, "description": "The playlist"}
}
FILE: Responses = {
    200: {**_MP4, "description": "The file", "headers": _FILE},
    206: {**_MP4, "description": "The bytes that were asked for", "headers": _FILE | _RANGE},
    304: {"description": "It is the file that If-None-Match names", "headers": {"ETag": _FILE["ETag"]}},
}
RECORDING: Responses = {200: {"content": {"application/json": {}}, "description": "The log"}}
CREATED: Responses = {200: {"headers": _QUOTAS}}


def errors(*statuses: int, known: Mapping[int | str, dict[str, Any]] | None = None) -> Responses:
    """Answers that a route may give besides its own: those of every route, and these."""
    return {status: _error(status) for status in sorted({*_EVERYWHERE, *statuses})} | dict(known or {})


def body_of(kind: type, form: bool = False, required: bool = True) -> dict[str, Any]:
    """A body that the route reads itself, to bound it first."""
    schema = {"$ref": f"#/components/schemas/{kind.__name__}"}
    types = ("application/json", "multipart/form-data") if form else ("application/json",)
    return {"requestBody": {"required": required, "content": {name: {"schema": schema} for name in types}}}


def describe(app: FastAPI) -> None:
    """Complete the description that FastAPI makes of the routes."""
    described = app.openapi

    def openapi() -> dict[str, Any]:
        api = described()
        parts = api.setdefault("components", {})
        parts.setdefault("schemas", {}).update(request_schemas())
        parts["securitySchemes"] = {_BEARER: {"type": "http", "scheme": "bearer", "description": _KEY}}
        for path, operations in api["paths"].items():
            for operation in operations.values():
                _complete(operation, path in PUBLIC or path.startswith(SHARED_FOLDER))
        return api

    app.openapi = openapi  # type: ignore[method-assign]


def _complete(operation: dict[str, Any], public: bool) -> None:
    operation["security"] = [] if public else [{_BEARER: []}]
    for response in operation["responses"].values():
        response["headers"] = _NAMED | response.get("headers", {})


def _error(status: int) -> dict[str, Any]:
    content = {MEDIA_TYPE: {"schema": {"$ref": f"#/components/schemas/{ProblemAnswer.__name__}"}}}
    headers = _ERROR_HEADERS.get(status, {})
    return {"description": HTTPStatus(status).phrase, "content": content, "headers": headers}
