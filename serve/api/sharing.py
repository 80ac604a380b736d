"""Sharing one video: its owner makes tokens, and whoever has one watches or steers, by addresses that hold the token.

Answers below a link may be kept by caches in front, for as long as a revoked token may still show what they have.
"""

from __future__ import annotations

from io import BytesIO
from typing import Annotated

import segno
from fastapi import FastAPI, Header, Query, Request, Response
from fastapi import Path as InPath
from fastapi.responses import StreamingResponse

from serve.api.body import read_body
from serve.api.dependencies import By, ByLink, Via
from serve.api.headers import file_answer
from serve.api.openapi import FILE, PART, PLAYLIST, body_of, errors
from serve.gateway import hls
from serve.records import Guest
from serve.wire.schemas import (
    MAX_CHUNK,
    InteractionQueued,
    InteractionRequest,
    SharedVideo,
    ViewerAnswer,
    ViewerList,
    ViewerRequest,
    ViewerRevoked,
    ViewerToken,
    parse,
)

KEPT_S = 300  # what never changes: a cache shows it so long after its token was revoked
RELOADED_S = 1  # a live playlist; as long again for whoever asks while a cache fetches the next one
AWAITED_S = 6  # a live playlist that was waited for: whoever asks for the same chunk later may have it


def add_sharing(app: FastAPI) -> None:
    """The routes of owners and of viewers."""
    _add_viewers(app)
    _add_shared(app)


def _add_viewers(app: FastAPI) -> None:
    @app.post(
        "/v1/videos/{video_id}/viewers",
        status_code=201,
        openapi_extra=body_of(ViewerRequest, required=False),
        responses=errors(400, 403, 404, 408, 409, 413, 415, 422),
    )
    async def share(video_id: str, request: Request, gateway: Via, caller: By) -> ViewerToken:
        """A token of this video for somebody without a key: to watch, or to steer as well. It ends with the video."""
        data, text = await read_body(request, form=False, empty={})
        asked: ViewerRequest = parse(ViewerRequest, data, text=text)
        token, viewer = await gateway.share(video_id, asked, caller)
        watch = f"watch/{token}"
        qr = None if asked.qr_for is None else _qr(f"{asked.qr_for.rstrip('/')}/{watch}")
        paths = {"watch_path": watch, "playlist_path": f"v1/shared/{token}/index.m3u8"}
        return ViewerToken.of(viewer, token=token, qr=qr, **paths)

    @app.get("/v1/videos/{video_id}/viewers", responses=errors(404))
    async def list_viewers(video_id: str, gateway: Via, caller: By) -> ViewerList:
        """Whose tokens of this video count, the oldest first."""
        return ViewerList(data=[ViewerAnswer.of(one) for one in await gateway.viewers(video_id, caller)])

    @app.delete("/v1/videos/{video_id}/viewers/{viewer_id}", responses=errors(403, 404))
    async def revoke(video_id: str, viewer_id: str, gateway: Via, caller: By) -> ViewerRevoked:
        """End a token. What caches in front have of it is shown for five minutes more at most."""
        await gateway.revoke_viewer(video_id, viewer_id, caller)
        return ViewerRevoked(id=viewer_id)


def _add_shared(app: FastAPI) -> None:
    @app.get("/v1/shared/{token}", responses=errors(404))
    async def shared(gateway: Via, guest: ByLink, response: Response) -> SharedVideo:
        """What the link shows, and how far it is."""
        response.headers["Cache-Control"] = "no-store"
        return SharedVideo.of(await gateway.get(guest.viewer.video_id, guest.owner), guest)

    @app.get("/v1/shared/{token}/index.m3u8", response_class=Response, responses=errors(400, 404, 422, known=PLAYLIST))
    async def playlist(
        gateway: Via, guest: ByLink, msn: Annotated[int | None, Query(alias="_HLS_msn", ge=0, le=MAX_CHUNK)] = None
    ) -> Response:
        """The HLS playlist, as the owner's."""
        text, over = await gateway.playlist(guest.viewer.video_id, msn, guest.owner)
        headers = _kept(guest, KEPT_S if over else RELOADED_S if msn is None else AWAITED_S)
        return Response(text, media_type=hls.MEDIA_TYPE, headers=headers)

    @app.get("/v1/shared/{token}/init.mp4", response_class=Response, responses=errors(404, known=PART))
    async def init_segment(gateway: Via, guest: ByLink) -> Response:
        """The initialisation segment of the playlist."""
        return await _part(gateway, guest, -1)

    @app.get(
        "/v1/shared/{token}/chunks/{chunk}.m4s", response_class=Response, responses=errors(404, 410, 422, known=PART)
    )
    async def chunk_of_playlist(
        chunk: Annotated[int, InPath(ge=0, le=MAX_CHUNK)], gateway: Via, guest: ByLink
    ) -> Response:
        """One chunk of the playlist."""
        return await _part(gateway, guest, chunk)

    @app.get(
        "/v1/shared/{token}/content", response_class=StreamingResponse, responses=errors(404, 409, 416, 422, known=FILE)
    )
    async def content(
        request: Request,
        gateway: Via,
        guest: ByLink,
        range_: Annotated[str | None, Header(alias="Range")] = None,
        if_range: Annotated[str | None, Header()] = None,
        if_none_match: Annotated[str | None, Header()] = None,
    ) -> Response:
        """The finished file, or the one range of its bytes that is asked for."""
        answer = await file_answer(request, gateway, guest.viewer.video_id, guest.owner)
        answer.headers.update(_kept(guest, KEPT_S))
        return answer

    @app.post(
        "/v1/shared/{token}/interactions",
        status_code=202,
        openapi_extra=body_of(InteractionRequest),
        responses=errors(400, 403, 404, 408, 409, 413, 415, 422, 429),
    )
    async def interact(request: Request, gateway: Via, guest: ByLink) -> InteractionQueued:
        """Change the prompt from the next chunk on, with a link that steers."""
        data, text = await read_body(request, form=False)
        event_id = await gateway.steer(guest, parse(InteractionRequest, data, text=text))
        return InteractionQueued(video_id=guest.viewer.video_id, event_id=event_id)


async def _part(gateway: Via, guest: Guest, chunk: int) -> Response:
    data = await gateway.hls_part(guest.viewer.video_id, chunk, guest.owner)
    return Response(data, media_type="video/mp4", headers=_kept(guest, KEPT_S))


def _kept(guest: Guest, seconds: int) -> dict[str, str]:
    """So long may a cache keep an answer, and no longer than the token lasts; for `KEPT_S` what never changes."""
    more = {KEPT_S: ", immutable", RELOADED_S: f", stale-while-revalidate={RELOADED_S}"}.get(seconds, "")
    return {"Cache-Control": f"public, max-age={min(seconds, int(guest.left_s))}{more}"}


def _qr(link: str) -> str:
    """SVG of a QR code that leads there."""
    drawn = BytesIO()
    segno.make(link, error="m", micro=False).save(drawn, kind="svg", xmldecl=False, omitsize=True, nl=False)
    return drawn.getvalue().decode()
