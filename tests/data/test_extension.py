"""Prompt extension against a real endpoint: what is asked, what is kept, what is never asked twice, what fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from diagonal.config import PromptsConfig
from diagonal.data.extension import Extender
from diagonal.data.prompts import prompt_id
from diagonal.errors import FieldError
from diagonal.storage import Folder
from tests.data.chat_server import Answer, ChatServer, chat_server, longer

KEY = "sk-a-key-that-nothing-may-show"
PROMPTS = [(prompt_id(text), text) for text in ("a cat", "a dog", "a red bird", "rain", "snow")]


@pytest.fixture(autouse=True)
def quick_and_keyed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setenv("TEST_MODEL_KEY", KEY)


def extender(server: ChatServer | str, cache: Path, max_failed: int = 0, **others: Any) -> Extender:
    url = server if isinstance(server, str) else server.url
    settings = {"extend_concurrency": 2, "extend_timeout_s": 5.0, "extend_api_key_env": "TEST_MODEL_KEY", **others}
    return Extender(PromptsConfig(extend_url=url, extend_model="m", **settings), 7, Folder(str(cache)), max_failed)


def said(text: str | None, **more: Any) -> tuple[int, Any]:
    """An answer of the endpoint with that text."""
    return 200, {"choices": [{"message": {"content": text}, **more}]}


def failing(**answers: tuple[int, Any]) -> Answer:
    """Prompts by their last word that are answered otherwise."""
    return lambda prompt, asked: answers.get(prompt.split()[-1], longer(prompt, asked))


def test_every_prompt_is_rewritten_in_one_form_and_in_order(tmp_path: Path) -> None:
    with chat_server() as server:
        found = extender(server, tmp_path)
        assert found.extend(PROMPTS) == [f"{text}, at dawn" for _, text in PROMPTS]
    assert found.summary() == {
        "url": server.url,
        "model": "m",
        "seed": 7,
        "instruction": PromptsConfig().extend_instruction,
        "extended": 5,
        "failed": 0,
        "reasons": {},
    }
    assert set(server.asked.values()) == {1} and server.most_at_once <= 2


def test_the_request_is_a_deterministic_chat_completion_with_its_key_in_a_header(tmp_path: Path) -> None:
    with chat_server() as server:
        extender(server, tmp_path).extend(PROMPTS[:1])
    (body,), (headers,) = server.bodies, server.headers
    assert body == {
        "path": "/v1/chat/completions",
        "model": "m",
        "temperature": 0,
        "seed": 7,
        "messages": [
            {"role": "system", "content": PromptsConfig().extend_instruction},
            {"role": "user", "content": "a cat"},
        ],
    }
    assert {name.lower(): value for name, value in headers.items()}["authorization"] == f"Bearer {KEY}"
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and KEY in file.read_text()]


def test_an_endpoint_without_a_key_is_asked_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEST_MODEL_KEY")
    with chat_server() as server:
        extender(server, tmp_path).extend(PROMPTS[:1])
    assert "authorization" not in {name.lower() for name in server.headers[0]}


def test_what_was_answered_is_never_asked_again(tmp_path: Path) -> None:
    with chat_server() as server:
        first = extender(server, tmp_path).extend(PROMPTS)
        server.answer = lambda prompt, asked: (200, {"choices": [{"message": {"content": "another text"}}]})
        again = extender(server, tmp_path)
        assert again.extend(PROMPTS) == first and again.summary()["extended"] == 5
    assert set(server.asked.values()) == {1}
    assert len(list(tmp_path.iterdir())) == 1


def test_a_run_that_broke_off_among_answers_asks_for_the_others_alone(tmp_path: Path) -> None:
    with chat_server(failing(snow=(401, {}))) as server:
        with pytest.raises(FieldError):
            extender(server, tmp_path).extend(PROMPTS)
        got = {text for text in server.asked if (tmp_path / "pending" / f"{prompt_id(text)}.json").exists()}
        assert got and "snow" not in got
        server.answer = longer
        assert extender(server, tmp_path).extend(PROMPTS) == [f"{text}, at dawn" for _, text in PROMPTS]
    assert all(server.asked[text] == 1 for text in got) and server.asked["snow"] == 2
    assert not (tmp_path / "pending").exists()


@pytest.mark.parametrize("status", [429, 500, 503, 0])
def test_a_failure_that_passes_is_tried_again(status: int, tmp_path: Path) -> None:
    with chat_server(lambda prompt, asked: (status, {}) if asked < 3 else longer(prompt, asked)) as server:
        assert extender(server, tmp_path).extend(PROMPTS[:2]) == ["a cat, at dawn", "a dog, at dawn"]
    assert set(server.asked.values()) == {3}


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ((400, {}), "status 400"),
        ((500, {}), "status 500"),
        ((200, {"choices": []}), "the answer is not a chat"),
        ((200, b"<html>"), "the answer is not a chat"),
        ((0, None), "RemoteProtocolError"),
        ((200, {"choices": [{"message": {"content": " \n"}}]}), "the answer is empty"),
        ((200, {"choices": [{"message": {"content": None}}]}), "the answer is empty"),
        (said("a dog, at", finish_reason="length"), "the answer is cut off"),
        (said(None, finish_reason="content_filter"), "the model refused"),
        ((200, {"choices": [{"message": {"content": "", "refusal": "no"}}]}), "the model refused"),
        (said("<think>a dog wants"), "the answer holds thoughts that do not end"),
    ],
)
def test_a_prompt_without_an_answer_is_kept_as_it_is_and_counted(
    answer: tuple[int, Any], reason: str, tmp_path: Path
) -> None:
    with chat_server(failing(dog=answer)) as server:
        found = extender(server, tmp_path, max_failed=1)
        assert found.extend(PROMPTS)[:3] == ["a cat, at dawn", None, "a red bird, at dawn"]
        assert (found.summary()["extended"], found.summary()["failed"]) == (4, 1)
        assert list(found.summary()["reasons"].values()) == [1] and next(iter(found.summary()["reasons"])).startswith(
            reason
        )
        again = extender(server, tmp_path, max_failed=1)
        assert again.extend(PROMPTS)[1] is None and again.summary()["failed"] == 1
        assert set(server.asked.values()) <= {1, 5}
    (kept,) = tmp_path.glob("*.json")
    assert json.loads(kept.read_text())[prompt_id("a dog")]["reason"].startswith(reason)


def test_too_many_without_an_answer_end_the_run_and_are_asked_again_by_the_next(tmp_path: Path) -> None:
    with chat_server(failing(dog=(400, {}), bird=(400, {}))) as server:
        found = extender(server, tmp_path, max_failed=1, extend_concurrency=1)
        with pytest.raises(FieldError, match=rf"2 and counting.*at most 1 .*first are {prompt_id('a dog')}"):
            found.extend(PROMPTS)
        server.answer = longer
        assert None not in extender(server, tmp_path).extend(PROMPTS)


@pytest.mark.parametrize("status", [301, 401, 403, 404])
def test_an_endpoint_that_refuses_ends_the_run_at_once_without_naming_the_key(status: int, tmp_path: Path) -> None:
    with chat_server(lambda prompt, asked: (status, {})) as server:
        with pytest.raises(FieldError, match=f"extend_model = 'm'.*key in TEST_MODEL_KEY.*status {status}") as raised:
            extender(server, tmp_path, max_failed=5, extend_concurrency=1).extend(PROMPTS)
    assert KEY not in str(raised.value) and len(server.bodies) <= 2


@pytest.mark.parametrize("url", ["ftp://127.0.0.1", "http://user:word@127.0.0.1/v1", "127.0.0.1/v1"])
def test_an_address_that_holds_a_key_or_is_none_is_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(FieldError, match="prompts.extend_url") as raised:
        extender(url, tmp_path)
    assert "word" not in str(raised.value)


def test_an_endpoint_that_is_not_there_ends_the_run(tmp_path: Path) -> None:
    with chat_server() as server:
        url = server.url
    with pytest.raises(FieldError, match="prompts without an answer"):
        extender(url, tmp_path).extend(PROMPTS)


@pytest.mark.parametrize("name", ["think", "Thinking", "reasoning"])
def test_a_reasoning_models_thoughts_are_no_part_of_a_prompt(name: str, tmp_path: Path) -> None:
    thought = f"<{name}>The user wants\na cat.</{name}>\n\nA cat at dawn"
    with chat_server(lambda prompt, asked: said(thought)) as server:
        assert extender(server, tmp_path).extend(PROMPTS[:1]) == ["A cat at dawn"]


@pytest.mark.parametrize("parameter", ["temperature", "seed"])
def test_a_parameter_that_the_model_refuses_is_told_as_such_and_ends_the_run(parameter: str, tmp_path: Path) -> None:
    refusal = {"error": {"message": f"Unsupported value: '{parameter}'", "param": parameter, "type": "invalid_request"}}
    with chat_server(lambda prompt, asked: (400, refusal)) as server:
        with pytest.raises(FieldError, match=f"extend_model = 'm'.*refuses the parameter '{parameter}'.*Unsupported"):
            extender(server, tmp_path, max_failed=5, extend_concurrency=1).extend(PROMPTS)
    assert len(server.bodies) <= 2
