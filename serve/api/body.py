"""Reads request bodies, bounded in size and time, before anything looks at what they say."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import Request
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.types import Message, Scope

from serve.wire.dialects import read_json
from serve.wire.problems import Problem, wrong_value
from serve.wire.schemas import MAX_BODY_BYTES

_TIMEOUT_S = 10.0


async def read_body(request: Request, form: bool = True, empty: object = None) -> tuple[object, bool]:
    """The body (`empty` stands for none), and whether it is a form, in which every value is text."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            data = await _bounded(request)
    except TimeoutError:
        raise Problem(408, "request_timeout", f"the body did not come within {_TIMEOUT_S:g} s") from None
    if not data and empty is not None:
        return empty, False
    if kind in ("application/json", ""):
        try:
            return read_json(data), False
        except (ValueError, RecursionError) as error:
            raise Problem(400, "invalid_json", "the body is not JSON") from error
    if form and kind in ("multipart/form-data", "application/x-www-form-urlencoded"):
        return await _form(request.scope, data), True
    allowed = "application/json or multipart/form-data" if form else "application/json"
    raise wrong_value(415, "unsupported_media_type", "Content-Type", kind, allowed)


async def _form(scope: Scope, data: bytes) -> dict[str, object]:
    async def receive() -> Message:
        return {"type": "http.request", "body": data, "more_body": False}

    try:
        fields = await Request(scope, receive).form(max_files=8, max_fields=64)
    except (MultiPartException, HTTPException) as error:
        raise Problem(400, "invalid_form", "the body is not the form that its Content-Type says") from error
    outers = {name.partition("[")[0] for name in fields if "[" in name}
    if len(fields) != len(fields.multi_items()) or not outers.isdisjoint(fields):
        raise Problem(422, "repeated_field", "a field is given more than once")
    found: dict[str, Any] = {}
    for name, value in fields.items():
        outer, bracket, inner = name.partition("[")  # OpenAI's SDKs write nested objects as extra[pacing]
        plain = value if isinstance(value, str) else ["a file"]
        if not bracket:
            found[name] = plain
            continue
        if not inner.endswith("]") or "[" in inner:
            raise Problem(
                422, "invalid_value", f"{name} is no field of a form: allowed is such as extra[pacing]", param=name
            )
        found.setdefault(outer, {})[inner[:-1]] = plain
    return found


async def _bounded(request: Request) -> bytes:
    too_large = Problem(413, "body_too_large", f"the body is larger than {MAX_BODY_BYTES} bytes")
    if int(request.headers.get("content-length", 0)) > MAX_BODY_BYTES:  # the server checked that it is a number
        raise too_large
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > MAX_BODY_BYTES:
            raise too_large
    return bytes(data)
