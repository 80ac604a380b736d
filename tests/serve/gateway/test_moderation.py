"""A guard model is asked about each prompt, and where it does not say, the prompt is refused."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx2
import pytest

from diagonal.errors import FieldError
from diagonal.metrics import NullBackend
from serve.gateway.moderation import Moderation
from serve.gateway.prompt_policy import PromptPolicy
from serve.settings import ServeSettings
from serve.wire.problems import Problem

KEY = "sk-guard"


class Guard:
    """An endpoint that flags what speaks of weapons; keeps what it was asked."""

    def __init__(self, answer: Any = None, status: int = 200) -> None:
        self.answer, self.status, self.asked = answer, status, list[tuple[str, dict[str, Any], str]]()

    async def __call__(self, request: httpx2.Request) -> httpx2.Response:
        body = json.loads(request.content)
        self.asked.append((request.url.path, body, request.headers.get("authorization", "")))
        if self.answer is not None or self.status != 200:
            return httpx2.Response(self.status, json=self.answer)
        if "messages" in body:
            bad = "weapon" in body["messages"][0]["content"]
            return httpx2.Response(200, json={"choices": [{"message": {"content": "unsafe\nS9" if bad else " safe"}}]})
        return httpx2.Response(200, json={"results": [{"flagged": "weapon" in body["input"]}]})


def asked(guard: Guard, address: str, prompt: str) -> Any:
    return asyncio.run(Moderation(address, 2.0, httpx2.MockTransport(guard))(prompt, "a"))


@pytest.mark.parametrize(
    ("address", "path"),
    [
        ("http://guard/v1", "/v1/moderations"),
        ("http://guard/v1#omni", "/v1/moderations"),
        ("http://guard/v1#llama-guard:chat", "/v1/chat/completions"),
    ],
)
def test_what_is_flagged_does_not_pass(address: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIAGONAL_MODERATION_API_KEY", KEY)
    guard = Guard()
    assert asked(guard, address, "a red circle") is True and asked(guard, address, "a weapon") is False
    assert [one[0] for one in guard.asked] == [path] * 2 and guard.asked[0][2] == f"Bearer {KEY}"
    model = address.partition("#")[2].removesuffix(":chat")
    assert guard.asked[0][1].get("model", "") == model


@pytest.mark.parametrize(
    "guard",
    [
        Guard({"results": []}),
        Guard({"results": [{"flagged": "no"}]}),
        Guard({"error": "x"}),
        Guard(["x"]),
        Guard(status=500),
        Guard(status=401),
    ],
)
def test_an_answer_that_does_not_say_refuses_the_prompt(guard: Guard) -> None:
    policy = PromptPolicy(Moderation("http://guard/v1", 2.0, httpx2.MockTransport(guard)), 2.0, NullBackend())
    with pytest.raises(Problem, match="could not be checked") as refused:
        asyncio.run(policy.check("a red circle", "a"))
    assert (refused.value.status, refused.value.code) == (503, "prompt_policy_failed")


def test_a_guard_model_that_says_neither_is_no_judge() -> None:
    babble = Guard({"choices": [{"message": {"content": "I think so"}}]})
    with pytest.raises(ValueError, match="neither safe nor unsafe"):
        asked(babble, "http://guard/v1#g:chat", "x")


@pytest.mark.parametrize("address", ["moderation:ftp://x/v1", "moderation:http://user:key@x/v1"])
def test_an_address_that_cannot_be_asked_is_refused_without_its_key(address: str) -> None:
    with pytest.raises(FieldError, match="prompt_policy") as error:
        PromptPolicy.from_settings(ServeSettings(prompt_policy=address), NullBackend())
    assert "key@" not in str(error.value)
