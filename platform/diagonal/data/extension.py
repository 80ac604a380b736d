"""Prompt extension: a language model behind an OpenAI-compatible endpoint rewrites each prompt, once."""

from __future__ import annotations

import hashlib
import os
import secrets
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2

from diagonal.config import PromptsConfig
from diagonal.errors import FieldError, require
from diagonal.model.text import clean_prompt
from diagonal.storage import Folder

TRIES = 5
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0
TRY_AGAIN = frozenset({408, 409, 425, 429})
OF_THIS_PROMPT = frozenset({400, 413, 422})
FAILED_SHOWN = 5
PENDING = "pending"


class NoAnswerError(RuntimeError):
    """One prompt got no usable answer."""


class Extender:
    """Asks for longer prompts, at most `extend_concurrency` at a time, and keeps every answer in `cache`.

    What was answered is never asked again: each answer is written as it comes, and each thousand as one file. A prompt
    without an answer keeps its text; more than `max_failed` of them raise `FieldError`. The request is deterministic
    as far as the endpoint is: temperature 0 and a seed. The key goes into the request's header and nowhere else.
    """

    def __init__(self, config: PromptsConfig, seed: int, cache: Folder, max_failed: int) -> None:
        self._config, self._seed, self._cache, self._max_failed = config, seed, cache, max_failed
        self._url = f"{config.extend_url.rstrip('/')}/chat/completions"
        plain = httpx2.URL(self._url)
        require(
            plain.scheme in ("http", "https") and not plain.userinfo,
            "prompts.extend_url",
            plain.host or self._url,
            "an http:// or https:// address without a key in it",
        )
        key = os.environ.get(config.extend_api_key_env, "")
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._failed: list[str] = []
        self._extended = 0
        self._stop = threading.Event()

    def extend(self, prompts: Sequence[tuple[str, str]]) -> list[str | None]:
        """For each (id, prompt) its longer form, or None where the endpoint gave none."""
        name = f"{hashlib.sha256(' '.join(i for i, _ in prompts).encode()).hexdigest()[:16]}.json"
        if self._cache.has(name):
            answers = self._cache.read_json(name)
        else:
            answers = self._asked(prompts)
            self._cache.write_json(name, answers)
            (self._cache / PENDING).delete()
        found = [answers[identity]["prompt"] for identity, _ in prompts]
        self._extended += sum(text is not None for text in found)
        self._note([i for (i, _), text in zip(prompts, found, strict=True) if text is None])
        return found

    def summary(self) -> dict[str, Any]:
        """What was asked, and how often it failed."""
        return {
            "url": self._config.extend_url,
            "model": self._config.extend_model,
            "seed": self._seed,
            "instruction": self._config.extend_instruction,
            "extended": self._extended,
            "failed": len(self._failed),
        }

    def _asked(self, prompts: Sequence[tuple[str, str]]) -> dict[str, dict[str, str | None]]:
        """Answers by id; those that an earlier, broken-off call got are not asked for."""
        pending = self._cache / PENDING
        answers = {name.removesuffix(".json"): pending.read_json(name) for name in pending.children()}
        left = [(i, prompt) for i, prompt in prompts if i not in answers]
        failed: list[str] = []
        self._stop.clear()
        with (
            httpx2.Client(timeout=self._config.extend_timeout_s, headers=self._headers) as client,
            ThreadPoolExecutor(self._config.extend_concurrency) as pool,
        ):
            try:
                for i, answer in pool.map(lambda item: self._one(client, *item), left):
                    answers[i] = answer
                    if answer["prompt"] is None:
                        failed.append(i)
                        self._check([*self._failed, *failed])
            finally:  # nothing is left to do, or no more is to be asked
                self._stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
        return {i: answers[i] for i, _ in prompts}

    def _one(self, client: httpx2.Client, identity: str, prompt: str) -> tuple[str, dict[str, str | None]]:
        try:
            answer: dict[str, str | None] = {"prompt": self._answer(client, prompt)}
        except NoAnswerError as error:
            return identity, {"prompt": None, "reason": str(error)}
        (self._cache / PENDING).write_json(f"{identity}.json", answer)
        return identity, answer

    def _answer(self, client: httpx2.Client, prompt: str) -> str:
        body = {
            "model": self._config.extend_model,
            "temperature": 0,
            "seed": self._seed,
            "messages": [
                {"role": "system", "content": self._config.extend_instruction},
                {"role": "user", "content": prompt},
            ],
        }
        wait_s, reason = FIRST_WAIT_S, "stopped"
        for left in reversed(range(TRIES)):
            if self._stop.is_set():
                break
            try:
                response = client.post(self._url, json=body)
            except httpx2.TransportError as error:
                reason, asked_wait_s = type(error).__name__, 0.0
            else:
                reason, asked_wait_s = f"status {response.status_code}", _retry_after_s(response)
                if response.is_success:
                    return _text_of(response)
                if response.status_code in OF_THIS_PROMPT:
                    break
                self._require_willing(response.status_code)
            if left:
                self._stop.wait(max(asked_wait_s, wait_s * secrets.SystemRandom().uniform(0.5, 1.0)))
                wait_s = min(2 * wait_s, LONGEST_WAIT_S)
        raise NoAnswerError(reason)

    def _require_willing(self, status: int) -> None:
        """Raise where asking again, or for another prompt, would be answered no better."""
        allowed = (
            f"an endpoint that knows prompts.extend_model = {self._config.extend_model!r} and takes the key in "
            f"{self._config.extend_api_key_env} (it answered with status {status})"
        )
        require(status >= 500 or status in TRY_AGAIN, "prompts.extend_url", self._config.extend_url, allowed)

    def _note(self, failed: Sequence[str]) -> None:
        self._failed += failed
        self._check(self._failed)

    def _check(self, failed: Sequence[str]) -> None:
        if len(failed) > self._max_failed:
            raise FieldError(
                "prompts without an answer of prompts.extend_url",
                f"{len(failed)} and counting",
                f"at most {self._max_failed} (pairs.max_bad_share of all); the first are "
                f"{', '.join(failed[:FAILED_SHOWN])}",
            )


def _retry_after_s(response: httpx2.Response) -> float:
    text = response.headers.get("Retry-After", "")
    return min(float(text), LONGEST_WAIT_S) if text.isdigit() else 0.0


def _text_of(response: httpx2.Response) -> str:
    try:
        text = response.json()["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise NoAnswerError("the answer is not a chat completion") from error
    if not isinstance(text, str) or not clean_prompt(text):
        raise NoAnswerError("the answer is empty")
    return clean_prompt(text)
