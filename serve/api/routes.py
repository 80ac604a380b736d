"""The HTTP surface: routes, bodies and headers; what they do is in `serve.gateway.gateway`."""

from __future__ import annotations

import hashlib
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Header, Query, Request, Response, WebSocket
from fastapi import Path as InPath
from fastapi.responses import FileResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles

import diagonal
from diagonal.metrics import MetricsBackend
from serve.api.access_log import AccessLogMiddleware
from serve.api.auth import SOCKET, AuthMiddleware
from serve.api.body import read_body
from serve.api.browsers import KEPT, LIVE, CorsMiddleware, HeadMiddleware, allowed_methods
from serve.api.dependencies import By, Via, caller_of
from serve.api.headers import file_answer, rate_limits
from serve.api.openapi import CREATED, FILE, PART, PLAYLIST, RECORDING, STREAM, body_of, describe, errors
from serve.api.realtime import RealtimeLimits, RealtimeSession
from serve.api.sharing import add_sharing
from serve.gateway import hls
from serve.gateway.gateway import Gateway
from serve.records import Idempotency
from serve.wire import problems
from serve.wire.problems import Problem
from serve.wire.schemas import (
    MAX_CHUNK,
    MAX_LINKS,
    ChainAnswer,
    ClientSecret,
    ClientSecretRequest,
    Health,
    InteractionQueued,
    InteractionRequest,
    ModelAnswer,
    ModelList,
    ProvenanceAnswer,
    VideoAnswer,
    VideoDeleted,
    VideoList,
    VideoRequest,
    parse,
)

VIEWER = Path(__file__).parents[1] / "viewer"
_IDEMPOTENCY_KEY = re.compile(r"[\x21-\x7e]{1,255}")
_PAGE_POLICY = "default-src 'self'; media-src 'self' blob:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
_PAGE_HEADERS = {
    "Content-Security-Policy": _PAGE_POLICY,
    "Cache-Control": "no-cache",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def create_app(
    gateway: Gateway, metrics: MetricsBackend, names_answers: bool = True, limits: RealtimeLimits | None = None
) -> FastAPI:
    """The application of one gateway; `names_answers`: it sets X-Request-Id itself (Serve's proxy does otherwise)."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        gateway.open()
        yield
        await gateway.close()

    about: dict[str, Any] = {"title": "Diagonal", "version": diagonal.__version__, "responses": errors()}
    app = FastAPI(**about, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.gateway, app.state.names_answers = gateway, names_answers
    problems.install(app, metrics, allowed_methods)
    settings = gateway.settings
    app.add_middleware(
        AuthMiddleware, keyring=gateway, local=settings.auth == "local", origins=settings.allowed_origins
    )
    if settings.allowed_origins:
        app.add_middleware(CorsMiddleware, origins=settings.allowed_origins)
    app.add_middleware(AccessLogMiddleware, names_answers=names_answers)
    app.add_middleware(HeadMiddleware, application=app)  # the last one added is the outermost
    _add_videos(app)
    _add_streams(app)
    _add_hls(app)
    add_sharing(app)
    _add_realtime(app, limits or RealtimeLimits())
    _add_service(app)
    describe(app)
    app.mount("/viewer", StaticFiles(directory=VIEWER), name="viewer")
    return app


def _add_videos(app: FastAPI) -> None:
    @app.post(
        "/v1/videos",
        openapi_extra=body_of(VideoRequest, form=True),
        responses=errors(400, 403, 404, 408, 409, 413, 415, 422, 429, known=CREATED),
    )
    async def create_video(
        request: Request,
        response: Response,
        gateway: Via,
        caller: By,
        idempotency_key: Annotated[str | None, Header()] = None,
    ) -> VideoAnswer:
        """Start a video. `extra.pacing`: `none` makes it as fast as it can, `realtime` just ahead of who watches.

        With an `Idempotency-Key` the same request again gives the same video, for a day.
        """
        data, text = await read_body(request)
        asked: VideoRequest = parse(VideoRequest, data, text=text)
        idempotency = _idempotency(idempotency_key, asked)
        try:
            video = await gateway.create(asked, caller, idempotency, traceparent=request.headers.get("traceparent", ""))
        except Problem as problem:
            if problem.status == 429:
                problem.headers = rate_limits(caller, await gateway.usage(caller))
            raise
        response.headers.update(rate_limits(caller, await gateway.usage(caller)))
        return VideoAnswer.of(video)

    @app.get("/v1/videos", responses=errors(422))
    async def list_videos(
        gateway: Via,
        caller: By,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        after: Annotated[str | None, Query(max_length=64)] = None,
        order: Literal["asc", "desc"] = "desc",
    ) -> VideoList:
        """The newest videos first, or the oldest."""
        found = await gateway.newest(caller, limit + 1, after, order == "asc")
        data = [VideoAnswer.of(video) for video in found[:limit]]
        ends = (data[0].id, data[-1].id) if data else (None, None)
        return VideoList(data=data, first_id=ends[0], last_id=ends[1], has_more=len(found) > limit)

    @app.get("/v1/videos/{video_id}", responses=errors(404))
    async def get_video(video_id: str, gateway: Via, caller: By) -> VideoAnswer:
        """How far the video is, and where its prompt changes took effect."""
        return VideoAnswer.of(await gateway.get(video_id, caller))

    @app.delete("/v1/videos/{video_id}", responses=errors(403, 404))
    async def delete_video(video_id: str, gateway: Via, caller: By) -> VideoDeleted:
        """Cancel the video if it is not over, and remove it."""
        await gateway.delete(video_id, caller)
        return VideoDeleted(id=video_id)

    @app.post(
        "/v1/videos/{video_id}/interactions",
        status_code=202,
        openapi_extra=body_of(InteractionRequest),
        responses=errors(400, 403, 404, 408, 409, 413, 415, 422, 429),
    )
    async def interact(video_id: str, request: Request, gateway: Via, caller: By) -> InteractionQueued:
        """Change the prompt from the next chunk on; the video's `interactions` say when it took effect."""
        data, text = await read_body(request, form=False)
        event_id = await gateway.interact(video_id, parse(InteractionRequest, data, text=text), caller)
        return InteractionQueued(video_id=video_id, event_id=event_id)


def _add_streams(app: FastAPI) -> None:
    async def content(
        video_id: str,
        request: Request,
        gateway: Via,
        caller: By,
        variant: Literal["video"] = "video",
        range_: Annotated[str | None, Header(alias="Range")] = None,
        if_range: Annotated[str | None, Header()] = None,
        if_none_match: Annotated[str | None, Header()] = None,
    ) -> Response:
        """The finished file, or the one range of its bytes that is asked for."""
        return await file_answer(request, gateway, video_id, caller)

    for method in ("GET", "HEAD"):
        app.api_route(
            "/v1/videos/{video_id}/content",
            methods=[method],
            response_class=StreamingResponse,
            responses=errors(404, 409, 416, 422, known=FILE),
            operation_id=f"{method.lower()}_content",
        )(content)

    async def stream(
        video_id: str,
        request: Request,
        gateway: Via,
        caller: By,
        start_chunk: Annotated[int | None, Query(ge=0, le=MAX_CHUNK)] = None,
    ) -> Response:
        """Fragmented MP4 while it is made: initialisation segment, then each chunk. A failed video cuts it off.

        It begins with the first chunk, that of an endless stream with the newest, or with `start_chunk`; times in it
        count from the video's beginning.
        """
        if request.method == "HEAD":  # whoever looks whether it is there is no viewer
            await gateway.get(video_id, caller)
            return Response(media_type="video/mp4", headers=LIVE)
        segments = await gateway.stream(video_id, start_chunk, caller)
        return StreamingResponse(segments, media_type="video/mp4", headers=LIVE)

    for method in ("GET", "HEAD"):
        app.api_route(
            "/v1/videos/{video_id}/stream",
            methods=[method],
            response_class=StreamingResponse,
            responses=errors(404, 410, 422, known=STREAM),
            operation_id=f"{method.lower()}_stream",
        )(stream)

    @app.get("/v1/videos/{video_id}/chain", responses=errors(404, 422))
    async def chain(
        video_id: str,
        gateway: Via,
        caller: By,
        start_chunk: Annotated[int, Query(ge=0, le=2**31 - 1)] = 0,
        limit: Annotated[int, Query(ge=1, le=MAX_LINKS)] = MAX_LINKS,
    ) -> ChainAnswer:
        """The signed chain of the stream's chunks; `diagonal verify` checks a recording against it."""
        video, links = await gateway.chain(video_id, caller, start_chunk, limit + 1)
        return ChainAnswer.of(video, links[:limit], len(links) > limit)

    @app.get("/v1/videos/{video_id}/recording", response_class=Response, responses=RECORDING | errors(404))
    async def recording(video_id: str, gateway: Via, caller: By) -> Response:
        """The log of a video that was asked for with `extra.record`: `jobs/replay.py` makes it again from there."""
        text = await gateway.recording(video_id, caller)
        return Response(text, media_type="application/json", headers={"Cache-Control": "no-store"})


def _add_hls(app: FastAPI) -> None:
    @app.get(
        "/v1/videos/{video_id}/index.m3u8", response_class=Response, responses=errors(400, 404, 422, known=PLAYLIST)
    )
    async def playlist(
        video_id: str,
        gateway: Via,
        caller: By,
        msn: Annotated[int | None, Query(alias="_HLS_msn", ge=0, le=MAX_CHUNK)] = None,
    ) -> Response:
        """The HLS playlist: live while the video is made, whole when it is over. `_HLS_msn` waits for that chunk."""
        text, over = await gateway.playlist(video_id, msn, caller)
        return Response(text, media_type=hls.MEDIA_TYPE, headers=KEPT if over else {"Cache-Control": "no-cache"})

    @app.get("/v1/videos/{video_id}/init.mp4", response_class=Response, responses=errors(404, known=PART))
    async def init_segment(video_id: str, gateway: Via, caller: By) -> Response:
        """The initialisation segment of the playlist."""
        return Response(await gateway.hls_part(video_id, -1, caller), media_type="video/mp4", headers=KEPT)

    @app.get(
        "/v1/videos/{video_id}/chunks/{chunk}.m4s", response_class=Response, responses=errors(404, 410, 422, known=PART)
    )
    async def chunk_of_playlist(
        video_id: str, chunk: Annotated[int, InPath(ge=0, le=MAX_CHUNK)], gateway: Via, caller: By
    ) -> Response:
        """One chunk, the bytes that the stream has of it."""
        return Response(await gateway.hls_part(video_id, chunk, caller), media_type="video/mp4", headers=KEPT)


def _add_realtime(app: FastAPI, limits: RealtimeLimits) -> None:
    @app.websocket(SOCKET)
    async def realtime(socket: WebSocket) -> None:
        await RealtimeSession(socket, socket.app.state.gateway, caller_of(socket), limits).run()

    @app.post(
        "/v1/realtime/client_secrets",
        openapi_extra=body_of(ClientSecretRequest, required=False),
        responses=errors(400, 403, 408, 413, 415, 422),
    )
    async def create_client_secret(request: Request, gateway: Via, caller: By) -> ClientSecret:
        """A secret for a browser: it opens one session on `/v1/realtime/video`, within a minute."""
        data, text = await read_body(request, form=False, empty={})
        asked: ClientSecretRequest = parse(ClientSecretRequest, data, text=text)
        value, expires_at = await gateway.create_client_secret(caller, asked.expires_after.seconds)
        return ClientSecret(value=value, expires_at=int(expires_at))


def _add_service(app: FastAPI) -> None:
    @app.get("/v1/models")
    async def list_models(gateway: Via, caller: By) -> ModelList:
        """What can be asked for, and its limits."""
        longest_s = gateway.settings.max_stream_s
        models = [ModelAnswer.of(info, caller, longest_s) for info in await gateway.models()]
        return ModelList(data=models, provenance=ProvenanceAnswer.of(await gateway.provenance()))

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
        return FileResponse(VIEWER / "index.html", headers=_PAGE_HEADERS)

    @app.get("/watch/{token}", include_in_schema=False)
    async def watch_page(token: str) -> FileResponse:
        """The same page for every link: it asks for the video itself."""
        return FileResponse(VIEWER / "watch.html", headers=_PAGE_HEADERS)


def _idempotency(key: str | None, asked: VideoRequest) -> Idempotency | None:
    if key is None:
        return None
    if not _IDEMPOTENCY_KEY.fullmatch(key):
        allowed = "1 to 255 printable characters without spaces"
        raise problems.wrong_value(400, "invalid_value", "Idempotency-Key", key, allowed)
    return Idempotency(key, hashlib.sha256(asked.model_dump_json().encode()).hexdigest())
