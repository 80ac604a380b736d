"""The `openai` package's own client, unchanged, against the service."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from openai import (
    AuthenticationError,
    BadRequestError,
    ConflictError,
    NotFoundError,
    OpenAI,
    RateLimitError,
    UnprocessableEntityError,
)

from tests.serve.harness import FakeEngine, Service
from tests.serve.sockets import LOCAL_TOKEN


@pytest.fixture
def videos(service: Service) -> Iterator[Any]:
    with (
        warnings.catch_warnings(),
        OpenAI(base_url=f"{service.urls[0]}/v1", api_key=LOCAL_TOKEN, max_retries=0) as client,
    ):
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


def test_the_list_is_paged_by_the_clients_own_iterator(videos: Any) -> None:
    made = [videos.create_and_poll(prompt="a red circle", seconds="1", poll_interval_ms=50).id for _ in range(3)]
    page = videos.list(limit=2)
    assert ([one.id for one in page.data], page.has_more) == ([made[2], made[1]], True)
    assert [one.id for one in videos.list(limit=1)] == made[::-1]  # the iterator asks for page after page
    assert [one.id for one in videos.list(limit=2, order="asc")] == made
    assert [one.id for one in videos.list(after=made[0])] == []


def test_what_is_wrong_with_a_wish_or_too_early_is_told_as_its_own_error(videos: Any, engine: FakeEngine) -> None:
    for wrong, param in ({"seconds": "0"}, "seconds"), ({"size": "1x1"}, "size"):
        with pytest.raises(BadRequestError) as refused:
            videos.create(prompt="a red circle", **wrong)
        assert (refused.value.param, refused.value.code) == (param, "invalid_value")
    with pytest.raises(NotFoundError) as unknown:
        videos.create(prompt="a red circle", model="sora-2")
    assert unknown.value.code == "model_not_found"
    engine.allow(0)
    early = videos.create(prompt="a red circle")
    with pytest.raises(ConflictError) as conflict:
        videos.download_content(early.id)
    assert conflict.value.code == "video_not_ready" and conflict.value.request_id
    assert videos.delete(early.id).deleted
    with pytest.raises(NotFoundError):
        videos.delete(early.id)


def test_a_wrong_key_is_an_authentication_error(make_service: Callable[..., Service]) -> None:
    service = make_service(auth="keys")
    with OpenAI(base_url=f"{service.urls[0]}/v1", api_key="sk-wrong", max_retries=0) as client:
        with pytest.raises(AuthenticationError) as refused:
            client.models.list()
    assert refused.value.code == "invalid_api_key"


def test_the_models_are_listed(service: Service) -> None:
    with OpenAI(base_url=f"{service.urls[0]}/v1", api_key=LOCAL_TOKEN, max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["fake-tiny"]
