"""The `openai` package's own client, unchanged, against the service."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from openai import NotFoundError, OpenAI, RateLimitError, UnprocessableEntityError

from tests.serve.conftest import FakeEngine, Service


@pytest.fixture
def videos(service: Service) -> Iterator[Any]:
    with warnings.catch_warnings(), OpenAI(base_url=f"{service.urls[0]}/v1", api_key="any", max_retries=0) as client:
        warnings.simplefilter("ignore", DeprecationWarning)  # OpenAI's own service is to end; the shape stays
        yield client.videos


def test_a_video_is_made_polled_downloaded_listed_and_deleted(videos: Any) -> None:
    asked = {"prompt": "a red circle", "model": "fake-tiny", "seconds": "2", "size": "256x256"}
    video = videos.create_and_poll(**asked, extra_body={"seed": 7}, poll_interval_ms=50)
    assert (video.status, video.progress, video.seconds, video.size) == ("completed", 100, "2", "256x256")
    assert videos.download_content(video.id).read()[4:8] == b"ftyp"
    assert [one.id for one in videos.list()] == [video.id]
    assert videos.delete(video.id).deleted


def test_errors_come_as_the_clients_own_types(videos: Any, engine: FakeEngine) -> None:
    with pytest.raises(UnprocessableEntityError) as caught:
        videos.create(prompt="x" * 500)
    assert (caught.value.code, caught.value.param) == ("prompt_too_long", "prompt")
    with pytest.raises(NotFoundError):
        videos.retrieve("video_none")
    engine.allow(0)
    for _ in range(2):
        videos.create(prompt="a red circle")
    with pytest.raises(RateLimitError) as full:
        videos.create(prompt="a red circle")
    assert full.value.response.headers["retry-after"] == "3"
