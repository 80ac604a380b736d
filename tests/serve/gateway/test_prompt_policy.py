"""The prompt policy: off by default, asked about every prompt, refusing when in doubt, telling nothing of itself."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diagonal.errors import FieldError
from serve.gateway.prompt_policy import DenyList, PromptPolicy, levelled
from serve.settings import ServeSettings
from serve.wire.problems import Problem
from tests.recorded_metrics import RecordedMetrics
from tests.serve.harness import Service, http_client
from tests.serve.sockets import viewer

Make = Callable[..., Service]
FORBIDDEN = "the secret heron"
RELEASE = threading.Event()  # what the hanging policy waits for


def allows_herons_not(prompt: str, account: str) -> bool:
    return "heron" not in prompt


async def knows_the_account(prompt: str, account: str) -> bool:
    await asyncio.sleep(0)
    return account == "local"


def raises(prompt: str, account: str) -> bool:
    raise ValueError(f"this text names {prompt}")


def says_maybe(prompt: str, account: str) -> str:
    return "yes"


def hangs(prompt: str, account: str) -> bool:
    RELEASE.wait(20)
    return True


def settings(name: str, timeout_s: float = 2.0) -> ServeSettings:
    return ServeSettings(prompt_policy=name, prompt_policy_timeout_s=timeout_s)


def judged(name: str, prompt: str, account: str = "local", timeout_s: float = 2.0) -> tuple[str, list[dict[str, str]]]:
    """The code of the refusal, '' for none, and what was counted."""
    metrics = RecordedMetrics()
    policy = PromptPolicy.from_settings(settings(name, timeout_s), metrics)
    try:
        asyncio.run(policy.check(prompt, account))
    except Problem as problem:
        return problem.code, metrics.labels("diagonal_prompts_refused_total")
    return "", metrics.labels("diagonal_prompts_refused_total")


def test_without_a_policy_every_prompt_passes() -> None:
    assert judged("", FORBIDDEN) == ("", [])


def test_a_callable_of_the_operators_is_asked_with_the_account() -> None:
    here = f"{__name__}:"
    assert judged(here + "allows_herons_not", "a red circle") == ("", [])
    assert judged(here + "allows_herons_not", FORBIDDEN) == ("prompt_refused", [{"reason": "policy"}])
    assert judged(here + "knows_the_account", FORBIDDEN)[0] == ""
    assert judged(here + "knows_the_account", FORBIDDEN, "another")[0] == "prompt_refused"


@pytest.mark.parametrize("name", ["raises", "says_maybe"])
def test_a_policy_that_fails_has_refused_and_its_words_go_nowhere(name: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        assert judged(f"{__name__}:{name}", FORBIDDEN) == ("prompt_policy_failed", [{"reason": "failed"}])
    assert "prompt policy failed" in caplog.text and "heron" not in caplog.text


def test_a_policy_that_hangs_has_refused_in_time() -> None:
    RELEASE.clear()
    release = threading.Timer(60.0, RELEASE.set)  # the interpreter waits for its threads at the end
    release.start()
    metrics = RecordedMetrics()
    policy = PromptPolicy.from_settings(settings(f"{__name__}:hangs", 0.1), metrics)

    async def ask() -> None:
        answers = await asyncio.gather(*(policy.check("x", "y") for _ in range(8)), return_exceptions=True)
        assert [getattr(one, "code", one) for one in answers] == ["prompt_policy_failed"] * 8
        assert not RELEASE.is_set(), "nobody waited for it"
        RELEASE.set()
        release.cancel()

    asyncio.run(ask())
    assert metrics.labels("diagonal_prompts_refused_total") == [{"reason": "timeout"}] * 8


@pytest.mark.parametrize("name", ["no.such.module:policy", f"{__name__}:nothing", f"{__name__}:FORBIDDEN"])
def test_a_policy_that_is_not_there_keeps_the_gateway_from_starting(name: str) -> None:
    with pytest.raises(FieldError, match="prompt_policy"):
        PromptPolicy.from_settings(settings(name), RecordedMetrics())


DISGUISED = [
    "a Heron",
    "HERON",
    "a hero\u200bn",
    "h\u0435r\u043en",
    "ｈｅｒｏｎ",
    "h\u00e9ron",
    "he\u00adron",
    "𝐡𝐞𝐫𝐨𝐧",
    "heron, flying",
    "grey\n  egret",
    "GREY\u00a0EGRET",
    "12 ibises",
    "\u2066heron\u2069",
]


@pytest.mark.parametrize("prompt", DISGUISED)
def test_a_listed_word_is_found_however_it_is_dressed(prompt: str) -> None:
    listed = DenyList(["# birds", "", "heron", "Grey  egret", r"regex: \d+ ibis(es)?"])
    assert not listed(prompt)


@pytest.mark.parametrize("prompt", ["a red circle", "a heronry", "grey and egret", "some ibises", "", "сокол летит"])
def test_other_prompts_pass(prompt: str) -> None:
    listed = DenyList(["# birds", "", "heron", "Grey  egret", r"regex: \d+ ibis(es)?"])
    assert listed(prompt)


def test_words_of_other_alphabets_are_found_as_well() -> None:
    listed = DenyList(["сокол", "鷺"])
    assert not listed("Красивый СОКОЛ") and not listed("鷺") and listed("соколиный")
    assert levelled("Ѕорос") == "sopoc" != levelled("soros")  # letters that look alike, not those that sound alike


@pytest.mark.parametrize("entries", [[], ["# only words about it"], ["regex:"], ["regex: (a"], ["\u200b"]])
def test_a_list_that_says_nothing_or_nonsense_is_refused(entries: list[str]) -> None:
    with pytest.raises(FieldError, match="prompt_policy") as caught:
        DenyList(entries)
    assert "(a" not in str(caught.value)


def test_an_expression_that_would_take_for_ever_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "list"
    path.write_text("regex: (a|aa|a+)+$\n")
    assert judged(f"deny-list:{path}", "a" * 200 + "b", timeout_s=0.2) == (
        "prompt_policy_failed",
        [{"reason": "timeout"}],
    )


def test_a_list_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "list").write_bytes(b"\xff\xfe\x00")
    for name in ("none", "list"):
        with pytest.raises(FieldError, match="prompt_policy"):
            PromptPolicy.from_settings(settings(f"deny-list:{tmp_path / name}"), RecordedMetrics())


@pytest.fixture
def listed(make_service: Make, tmp_path: Path) -> Service:
    (tmp_path / "list").write_text("heron\nregex: gr[ae]y egret\n", encoding="utf-8")
    return make_service(prompt_policy=f"deny-list:{tmp_path / 'list'}")


def test_every_way_in_asks_it(listed: Service, caplog: pytest.LogCaptureFixture) -> None:
    event: dict[str, Any] = {"event": {"prompt": FORBIDDEN}, "event_id": "e1"}
    listed.engine.allow(1)
    with caplog.at_level(logging.DEBUG), http_client(listed.urls[0]) as http:
        refused = http.post("/v1/videos", json={"prompt": FORBIDDEN})
        assert (refused.status_code, refused.json()["error"]["code"]) == (422, "prompt_refused")
        assert refused.json()["error"]["param"] == "prompt" and "heron" not in refused.text
        assert http.get("/v1/videos").json()["data"] == []
        video = http.post("/v1/videos", json={"prompt": "a red circle", "num_frames": 33}).json()["id"]
        refused = http.post(f"/v1/videos/{video}/interactions", json={"interaction": event})
        assert (refused.status_code, refused.json()["error"]["code"]) == (422, "prompt_refused")
        with viewer(listed.urls[0]) as one:
            one.say("session.start", prompt=FORBIDDEN)
            assert one.next()["code"] == "prompt_refused"
        with viewer(listed.urls[0]) as one:
            one.start(num_frames=33)
            one.say("session.interaction", interaction=event)
            error = one.until("error")
            assert (error["code"], error["event_id"]) == ("prompt_refused", "e1")
        assert http.get(f"/v1/videos/{video}").json()["interactions"] == []
    reasons = listed.metrics.labels("diagonal_prompts_refused_total")
    assert reasons == [{"reason": "policy"}] * 4
    of_a_client = ("websockets.client", "httpcore", "httpx2")
    logged = [one.getMessage() for one in caplog.records if not one.name.startswith(of_a_client)]
    assert logged and not [line for line in logged if "heron" in line]
