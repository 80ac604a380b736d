"""What a gateway can reach: a handle for each release, what each serves, and which of them makes a new video."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

from diagonal.errors import require
from serve.actors import Replicas
from serve.policies.traffic import Shares
from serve.records import ModelInfo, Refused, VideoRecord
from serve.rpc import UNAVAILABLE, call
from serve.wire.problems import unavailable, wrong_value

_LOG = logging.getLogger("ray.serve")
_READY_TIMEOUT_S = 5.0
_NOT_SERVED = Refused("release_gone", "the video's release is no longer served")


class Fleet:
    """The releases of one service by name; of a single one whose name only its replicas know, by ''."""

    def __init__(self, handles: Mapping[str, Any]) -> None:
        self._own = {name: Replicas(handle) for name, handle in handles.items()}
        self._replicas = self._own
        self._shares = Shares.parse(list(handles))
        self._infos: dict[str, ModelInfo] = {}

    def share(self, weights: object, others: Mapping[str, Any] | None = None) -> None:
        """From now on new videos are shared by these weights, among these other releases too.

        `FieldError`, and nothing changes, when the weights or a name are none.
        """
        replicas = self._own | {name: Replicas(handle) for name, handle in (others or {}).items()}
        require(
            len(replicas) == len(self._own) + len(others or {}), "applications", sorted(others or {}), "other names"
        )
        self._shares = Shares.parse(list(replicas), weights)
        self._replicas = replicas
        self._infos = {name: info for name, info in self._infos.items() if name in replicas}
        _LOG.info("new videos are shared by %s", dict(self._shares.weights))

    def replicas(self, video: VideoRecord) -> Replicas:
        """The replicas of the video's release: no others ever hold its session."""
        return self._replicas.get(video.model) or self._replicas.get("") or Replicas(_Absent())

    def known(self, video: VideoRecord) -> ModelInfo | None:
        """What the video's release serves, if that was asked for already."""
        return self._infos.get(video.model) or self._infos.get("")

    async def info(self, name: str) -> ModelInfo:
        """What a release serves; asked for once."""
        if name not in self._infos:
            self._infos[name] = await call(self._replicas[name].at().describe(), _READY_TIMEOUT_S)
        return self._infos[name]

    async def info_of(self, video: VideoRecord) -> ModelInfo:
        """What the video's release serves; `Problem` 503 when it is no longer there."""
        name = video.model if video.model in self._replicas else ""
        if name not in self._replicas:
            raise unavailable()
        return await self.info(name)

    async def infos(self) -> list[ModelInfo]:
        """What each release serves that answers now; the failure of one when none does."""
        found = await asyncio.gather(*(self.info(name) for name in self._replicas), return_exceptions=True)
        for one in found:
            if isinstance(one, BaseException) and not isinstance(one, UNAVAILABLE):
                raise one
        infos = [one for one in found if isinstance(one, ModelInfo)]
        if not infos:
            raise unavailable()
        return infos

    async def choose(self, video_id: str, asked: str | None) -> ModelInfo:
        """The release that makes a new video: the one that is asked for, else the one that the weights say.

        One that does not answer gives way to the next; `Problem` 404 when there is none of that name.
        """
        if asked is not None:
            return await self._named(asked)
        for name in self._shares.ranked(video_id):
            try:
                return await self.info(name)
            except UNAVAILABLE:
                _LOG.warning("release %s does not answer", name)
        raise unavailable()

    async def _named(self, asked: str) -> ModelInfo:
        key = asked if asked in self._replicas else ""
        info = await self.info(key) if key in self._replicas else None
        if info is None or info.name != asked:
            names = sorted({*self._replicas, info.name if info else ""} - {""})
            raise wrong_value(404, "model_not_found", "model", asked, " or ".join(map(repr, names)))
        return info

    async def ready(self) -> bool:
        """Whether chunks come out of a release that makes videos without being asked for."""
        found = await asyncio.gather(*(self._ready(name) for name in self._shares.ranked("")))
        return any(found)

    async def _ready(self, name: str) -> bool:
        try:
            return await call(self._replicas[name].at().ready(), _READY_TIMEOUT_S)
        except UNAVAILABLE:
            return False


class _Absent:
    """Stands for the replicas of a release that is no longer served: whatever is asked is refused, and why."""

    def options(self, **_: Any) -> _Absent:
        return self

    def __getattr__(self, name: str) -> Any:
        async def call() -> Refused:
            return _NOT_SERVED

        class Method:
            @staticmethod
            def remote(*_: Any) -> Any:
                return call()

        return Method
