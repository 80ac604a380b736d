"""What the store and a replica can be asked, as mypy checks it, and Serve's handles as such."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast

from diagonal.chain import Link
from serve.records import (
    Caller,
    DriveDecision,
    EncodedChunk,
    Guest,
    Idempotency,
    Interaction,
    ModelInfo,
    Opened,
    OpenSession,
    Provenance,
    PutChunks,
    Refused,
    Role,
    Segment,
    Status,
    Usage,
    VideoRecord,
    Viewer,
)
from serve.tokens import Secret


class StoreApi(Protocol):
    """`serve.store.store.Store`, as gateways call it."""

    async def admit(
        self, video: VideoRecord, caller: Caller, idempotency: Idempotency | None
    ) -> VideoRecord | Refused | None: ...

    async def opened(self, video_id: str, replica: str, mime: str, init: bytes) -> bool: ...

    async def withdraw(self, video: VideoRecord, caller: Caller) -> None: ...

    async def usage(self, caller: Caller) -> Usage: ...

    async def get(self, video_id: str) -> VideoRecord | None: ...

    async def newest(
        self, owner: str, limit: int, after: str | None = None, ascending: bool = False
    ) -> list[VideoRecord]: ...

    async def delete(self, video_id: str, owner: str) -> VideoRecord | None: ...

    async def claim(self, video_id: str, replica: str, epoch: int) -> VideoRecord | None: ...

    async def release(self, video_id: str, epoch: int) -> None: ...

    async def orphans(self) -> list[VideoRecord]: ...

    async def check(self, video_id: str, epoch: int) -> DriveDecision: ...

    async def put_chunks(self, request: PutChunks) -> DriveDecision | None: ...

    async def snapshots(self, video_id: str) -> list[bytes]: ...

    async def complete(self, video_id: str) -> None: ...

    async def end(self, video_id: str, status: Status, code: str | None = None, message: str | None = None) -> bool: ...

    async def segment(self, video_id: str, reader: str, chunk: int, wait_s: float) -> Segment | None: ...

    async def awaited(self, video_id: str, reader: str, chunk: int, wait_s: float) -> VideoRecord | None: ...

    async def playback(self, video_id: str, reader: str, position_s: float, window_s: float) -> None: ...

    async def leave(self, video_id: str, reader: str, return_s: float = 0.0) -> None: ...

    async def take_over(self, owner: str, old_hash: str, new_hash: str) -> VideoRecord | None: ...

    async def content(self, video_id: str, start: int, stop: int) -> tuple[int, bytes] | None: ...

    async def put_recording(self, video_id: str, text: str) -> None: ...

    async def recording(self, video_id: str) -> str | None: ...

    async def add_interaction(self, video_id: str, change: Interaction) -> Interaction | bool: ...

    async def set_paused(self, video_id: str, event_id: str, paused: bool) -> bool: ...

    async def remove_interaction(self, video_id: str, event_id: str) -> None: ...

    async def chunk_frames(self, video_id: str, start_chunk: int) -> list[int]: ...

    async def links(self, video_id: str, start_chunk: int, limit: int) -> list[Link]: ...

    async def provenance(self) -> Provenance: ...

    async def caller(self, shown: Secret) -> Caller | None: ...

    async def create_client_secret(self, key_id: str, seconds: float) -> tuple[str, float]: ...

    async def redeem(self, shown: Secret) -> Caller | None: ...

    async def add_viewer(self, video_id: str, role: Role, name: str, seconds: float) -> tuple[str, Viewer] | None: ...

    async def viewers(self, video_id: str) -> list[Viewer]: ...

    async def revoke_viewer(self, video_id: str, viewer_id: str) -> bool: ...

    async def guest(self, shown: Secret) -> Guest | None: ...

    async def ready(self) -> bool: ...


class ReplicaApi(Protocol):
    """`serve.replica.replica.Replica`, as gateways call it."""

    async def describe(self) -> ModelInfo: ...

    async def ready(self) -> bool: ...

    async def check_room(self, request: OpenSession) -> Refused | None: ...

    async def open(self, request: OpenSession) -> Opened | Refused: ...

    async def restore(
        self, parts: Sequence[bytes], scale: int, ahead_s: float | None = None, traceparent: str = ""
    ) -> Opened | Refused: ...

    async def pull(
        self, video_id: str, chunk: int, ahead: int = 0, since_chunk: int | None = None, wait_s: float = 60.0
    ) -> tuple[EncodedChunk, ...] | Refused | None: ...

    async def holds(self, video_id: str, replica_name: str) -> bool: ...

    async def interact(self, video_id: str, event_id: str, prompt: str, transition_chunks: int) -> Refused | None: ...

    async def pause(self, video_id: str) -> Refused | None: ...

    async def resume(self, video_id: str) -> Refused | None: ...

    async def recording(self, video_id: str) -> str | Refused: ...

    async def close(self, video_id: str, outcome: str, replica_name: str = "") -> None: ...


class _Remote:
    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def __getattr__(self, method: str) -> Any:
        async def invoke(*arguments: Any) -> Any:
            return await getattr(self._handle, method).remote(*arguments)

        return invoke


def remote_store(handle: Any) -> StoreApi:
    """The store behind a Serve handle."""
    return cast(StoreApi, _Remote(handle))


class Replicas:
    """The replicas of one release, behind a Serve handle."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def at(self, routing_key: str = "") -> ReplicaApi:
        """The replica that the key leads to (`serve.policies.routing`); '' is any."""
        return cast(ReplicaApi, _Remote(self._handle.options(session_id=routing_key)))
