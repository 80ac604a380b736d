"""The drivers of one gateway: the videos that it drives, those that it takes up, and how it lets go of them."""

from __future__ import annotations

import asyncio
import contextlib
import logging

from diagonal.metrics import MetricsBackend
from serve.actors import StoreApi
from serve.gateway.driver import Driver
from serve.gateway.fleet import Fleet
from serve.records import VideoRecord
from serve.rpc import UNAVAILABLE, call, call_with_retry, detached

_LOG = logging.getLogger("ray.serve")
_LOOK_EVERY_S = 0.5


class Drivers:
    """One task a video. Of several gateways that want a video, the store lets one have it."""

    def __init__(self, store: StoreApi, fleet: Fleet, metrics: MetricsBackend, start_timeout_s: float) -> None:
        self._store, self._fleet, self._metrics = store, fleet, metrics
        self._start_timeout_s = start_timeout_s
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def __contains__(self, video_id: str) -> bool:
        return video_id in self._tasks

    def start(self, video: VideoRecord) -> None:
        """Drive a video whose newest epoch is this gateway's."""
        model = self._fleet.known(video)
        lead_s = model.lead_s if model else 1.0
        replicas = self._fleet.replicas(video)
        driver = Driver(video, self._store, replicas, self._metrics, lead_s, self._start_timeout_s)
        task = detached(driver.run())
        self._tasks[video.id] = task
        task.add_done_callback(lambda done: self._forget(video.id, done))

    async def adopt(self, video: VideoRecord) -> None:
        """Drive a video instead of whoever did, unless another gateway was faster."""
        mine = await call(self._store.claim(video.id, video.replica, video.epoch))
        if mine is not None:
            self.start(mine)

    async def adopt_if_orphan(self, video_id: str) -> None:
        """Drive a video that nobody drives."""
        video = await call_with_retry(lambda: self._store.get(video_id))
        if video is not None and video.orphan:
            await self.adopt(video)

    async def look_after_orphans(self) -> None:
        """Take up, until cancelled, what other gateways left behind: nobody may be there who asks for it."""
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            with contextlib.suppress(*UNAVAILABLE):  # the store is away: look again
                for video in await call(self._store.orphans()):
                    _LOG.info("video %s is taken up from a gateway that is gone", video.id)
                    await self.adopt(video)

    async def let_go(self) -> None:
        """Leave every video to other gateways, at once."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _forget(self, video_id: str, done: asyncio.Task[None]) -> None:
        if self._tasks.get(video_id) is done:  # it may have been replaced by a later one of this gateway
            del self._tasks[video_id]
