"""The HTTP surface: routes, bodies and headers; what they do is in `serve.gateway`."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from fastapi import Depends, FastAPI, Query, Request
from fastapi.responses import FileResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles
from starlette.formparsers import MultiPartException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import diagonal
from diagonal.metrics import MetricSink
from serve import problems
from serve.gateway import Gateway
from serve.problems import Problem
from serve.schemas import (
    Health,
    InteractionQueued,
    InteractionRequest,
    ModelAnswer,
    ModelList,
    VideoAnswer,
    VideoDeleted,
    VideoList,
    VideoRequest,
    parse,
    request_schemas,
)

VIEWER = Path(__file__).parent / "viewer"
_BODY_BYTES = 64 * 1024
_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
_PAGE_POLICY = "default-src 'self'; media-src 'self' blob:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
_PROBLEM = {"description": "Problem details, with OpenAI's error member", "content": {problems.MEDIA_TYPE: {}}}
_ERRORS: dict[int | str, dict[str, Any]] = dict.fromkeys(("4XX", "5XX"), _PROBLEM)
_VIDEO: dict[int | str, dict[str, Any]] = {200: {"content": {"video/mp4": {}}}}


def create_app(gateway: Gateway, metrics: MetricSink) -> FastAPI:
    """The application of one gateway."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await gateway.close()

    app = FastAPI(title="Diagonal", version=diagonal.__version__, lifespan=lifespan, responses=_ERRORS)
    app.state.gateway = gateway
    problems.install(app, metrics)
    app.add_middleware(SameOrigin)
    _add_videos(app)
    _add_streams(app)
    _add_service(app)
    _describe_bodies(app)
    app.mount("/viewer", StaticFiles(directory=VIEWER), name="viewer")
    return app


def _gateway(request: Request) -> Gateway:
    gateway: Gateway = request.app.state.gateway
    return gateway


Via = Annotated[Gateway, Depends(_gateway)]


def _add_videos(app: FastAPI) -> None:
    @app.post("/v1/videos", openapi_extra=_body_of(VideoRequest, form=True))
    async def create_video(request: Request, gateway: Via) -> VideoAnswer:
        """Start a video. `extra.pacing`: `none` makes it as fast as it can, `realtime` just ahead of who watches."""
        data, text = await _read_body(request)
        return VideoAnswer.of(await gateway.create(parse(VideoRequest, data, text=text)))

    @app.get("/v1/videos")
    async def list_videos(
        gateway: Via,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        after: Annotated[str | None, Query(max_length=64)] = None,
        order: Literal["asc", "desc"] = "desc",
    ) -> VideoList:
        """The newest videos first, or the oldest."""
        found = await gateway.newest(limit + 1, after, order == "asc")
        data = [VideoAnswer.of(video) for video in found[:limit]]
        ends = (data[0].id, data[-1].id) if data else (None, None)
        return VideoList(data=data, first_id=ends[0], last_id=ends[1], has_more=len(found) > limit)

    @app.get("/v1/videos/{video_id}")
    async def get_video(video_id: str, gateway: Via) -> VideoAnswer:
        """How far the video is, and where its prompt changes took effect."""
        return VideoAnswer.of(await gateway.get(video_id))

    @app.delete("/v1/videos/{video_id}")
    async def delete_video(video_id: str, gateway: Via) -> VideoDeleted:
        """Cancel the video if it is not over, and remove it."""
        await gateway.delete(video_id)
        return VideoDeleted(id=video_id)

    @app.post("/v1/videos/{video_id}/interactions", status_code=202, openapi_extra=_body_of(InteractionRequest))
    async def interact(video_id: str, request: Request, gateway: Via) -> InteractionQueued:
        """Change the prompt from the next chunk on; the video's `interactions` say when it took effect."""
        data, text = await _read_body(request, form=False)
        event_id = await gateway.interact(video_id, parse(InteractionRequest, data, text=text))
        return InteractionQueued(video_id=video_id, event_id=event_id)


def _add_streams(app: FastAPI) -> None:
    @app.get("/v1/videos/{video_id}/content", response_class=StreamingResponse, responses=_VIDEO)
    async def content(video_id: str, gateway: Via, variant: Literal["video"] = "video") -> StreamingResponse:
        """The finished file."""
        size, parts = await gateway.content(video_id)
        name = f'inline; filename="{video_id}.mp4"'
        headers = {"Content-Length": str(size), "Content-Disposition": name}
        return StreamingResponse(parts, media_type="video/mp4", headers=headers)

    @app.get("/v1/videos/{video_id}/stream", response_class=StreamingResponse, responses=_VIDEO)
    async def stream(
        video_id: str, gateway: Via, start_chunk: Annotated[int, Query(ge=0, le=2**31 - 1)] = 0
    ) -> StreamingResponse:
        """Fragmented MP4 while it is made: initialisation segment, then each chunk. A failed video cuts it off."""
        segments = await gateway.stream(video_id, start_chunk)
        return StreamingResponse(segments, media_type="video/mp4", headers={"Cache-Control": "no-store"})


def _add_service(app: FastAPI) -> None:
    @app.get("/v1/models")
    async def list_models(gateway: Via) -> ModelList:
        """What can be asked for, and its limits."""
        return ModelList(data=[ModelAnswer.of(await gateway.model())])

    @app.get("/health/live")
    async def live() -> Health:
        """The gateway answers."""
        return Health(status="live")

    @app.get("/health/ready")
    async def ready(gateway: Via) -> Health:
        """Store and engine answer, too."""
        await gateway.check_ready()
        return Health(status="ready")

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        headers = {"Content-Security-Policy": _PAGE_POLICY, "Cache-Control": "no-cache"}
        return FileResponse(VIEWER / "index.html", headers=headers)


def _body_of(kind: type, form: bool = False) -> dict[str, Any]:
    """How the API's description shows a body that the route reads itself, to bound it first."""
    schema = {"$ref": f"#/components/schemas/{kind.__name__}"}
    types = ("application/json", "multipart/form-data") if form else ("application/json",)
    return {"requestBody": {"required": True, "content": {name: {"schema": schema} for name in types}}}


def _describe_bodies(app: FastAPI) -> None:
    described = app.openapi

    def openapi() -> dict[str, Any]:
        api = described()
        api.setdefault("components", {}).setdefault("schemas", {}).update(request_schemas())
        return api

    app.openapi = openapi  # type: ignore[method-assign]


async def _read_body(request: Request, form: bool = True) -> tuple[object, bool]:
    """The body, and whether it is a form, in which every value is text."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    data = await _bounded(request)
    if kind in ("application/json", ""):
        try:
            return json.loads(data), False
        except (ValueError, RecursionError) as error:
            raise Problem(400, "invalid_json", "the body is not JSON") from error
    if form and kind in ("multipart/form-data", "application/x-www-form-urlencoded"):
        return await _form(request.scope, data), True
    allowed = "application/json or multipart/form-data" if form else "application/json"
    raise problems.wrong_value(415, "unsupported_media_type", "Content-Type", kind, allowed)


async def _form(scope: Scope, data: bytes) -> dict[str, object]:
    async def receive() -> Message:
        return {"type": "http.request", "body": data, "more_body": False}

    try:
        fields = await Request(scope, receive).form(max_files=8, max_fields=64)
    except (MultiPartException, problems.HTTPException) as error:
        raise Problem(400, "invalid_form", "the body is not the form that its Content-Type says") from error
    if len(fields) != len(fields.multi_items()):
        raise Problem(422, "repeated_field", "a field is given more than once")
    return dict(fields)


async def _bounded(request: Request) -> bytes:
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > _BODY_BYTES:
            raise Problem(413, "body_too_large", f"the body is larger than {_BODY_BYTES} bytes")
    return bytes(data)


class SameOrigin:
    """A page of another site may not change anything here, even where the server trusts its own machine."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] not in _SAFE_METHODS:
            request = Request(scope)
            origin = request.headers.get("origin")
            if origin is not None and urlsplit(origin).netloc != request.headers.get("host", ""):
                problem = Problem(403, "foreign_origin", "a page of another origin may not do this")
                await problems.answer(problem)(scope, receive, send)
                return
        await self._app(scope, receive, send)
