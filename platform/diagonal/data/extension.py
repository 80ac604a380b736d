"""Prompt extension: a language model behind an OpenAI-compatible endpoint rewrites each prompt, once."""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from diagonal.config import PromptsConfig
from diagonal.errors import FieldError, require
from diagonal.model.text import clean_prompt
from diagonal.storage import Folder

if TYPE_CHECKING:  # a second to import, for those who extend alone
    from openai import APIStatusError, OpenAI
    from openai.types.chat import ChatCompletion

TRIES = 5
TRY_AGAIN = frozenset({408, 409, 425, 429})
OF_THIS_PROMPT = frozenset({400, 413, 422})
FAILED_SHOWN = 5
PENDING = "pending"
THOUGHTS = re.compile(r"<(think|thinking|reasoning)>.*?</\1>", re.DOTALL | re.IGNORECASE)
OPEN_THOUGHT = re.compile(r"</?(think|thinking|reasoning)>", re.IGNORECASE)


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
        plain = urlsplit(config.extend_url)
        require(
            plain.scheme in ("http", "https") and "@" not in plain.netloc,
            "prompts.extend_url",
            plain.hostname or config.extend_url,
            "an http:// or https:// address without a key in it",
        )
        self._key = os.environ.get(config.extend_api_key_env, "")
        self._failed: list[str] = []
        self._reasons: Counter[str] = Counter()
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
        self._reasons.update(str(answers[i]["reason"]) for i, _ in prompts if answers[i]["prompt"] is None)
        self._extended += sum(text is not None for text in found)
        self._note([i for (i, _), text in zip(prompts, found, strict=True) if text is None])
        return found

    def summary(self) -> dict[str, Any]:
        """What was asked, how often it failed, and why."""
        return {
            "url": self._config.extend_url,
            "model": self._config.extend_model,
            "seed": self._seed,
            "instruction": self._config.extend_instruction,
            "extended": self._extended,
            "failed": len(self._failed),
            "reasons": dict(self._reasons.most_common()),
        }

    def _asked(self, prompts: Sequence[tuple[str, str]]) -> dict[str, dict[str, str | None]]:
        """Answers by id; those that an earlier, broken-off call got are not asked for."""
        pending = self._cache / PENDING
        answers = {name.removesuffix(".json"): pending.read_json(name) for name in pending.children()}
        left = [(i, prompt) for i, prompt in prompts if i not in answers]
        failed: list[str] = []
        self._stop.clear()
        with self._client() as client, ThreadPoolExecutor(self._config.extend_concurrency) as pool:
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

    def _client(self) -> OpenAI:
        """The endpoint's, which tries again by itself what may pass, after as long as the endpoint asks for."""
        import openai

        return openai.OpenAI(
            base_url=self._config.extend_url,
            api_key=self._key or "none",
            timeout=self._config.extend_timeout_s,
            max_retries=TRIES - 1,
        )

    def _one(self, client: OpenAI, identity: str, prompt: str) -> tuple[str, dict[str, str | None]]:
        try:
            answer: dict[str, str | None] = {"prompt": self._answer(client, prompt)}
        except NoAnswerError as error:
            return identity, {"prompt": None, "reason": str(error)}
        (self._cache / PENDING).write_json(f"{identity}.json", answer)
        return identity, answer

    def _answer(self, client: OpenAI, prompt: str) -> str:
        import openai

        if self._stop.is_set():
            raise NoAnswerError("stopped")
        try:
            answer = client.chat.completions.create(
                model=self._config.extend_model,
                temperature=0,
                seed=self._seed,
                messages=[
                    {"role": "system", "content": self._config.extend_instruction},
                    {"role": "user", "content": prompt},
                ],
                extra_headers={} if self._key else {"Authorization": openai.Omit()},
            )
        except openai.APIStatusError as error:
            self._require_willing(error)
            raise NoAnswerError(f"status {error.status_code}") from error
        except openai.APIConnectionError as error:
            raise NoAnswerError(type(error.__cause__ or error).__name__) from error
        except (openai.OpenAIError, ValueError) as error:
            raise NoAnswerError("the answer is not a chat completion") from error
        return _text_of(answer)

    def _require_willing(self, error: APIStatusError) -> None:
        """Raise where asking again, or for another prompt, would be answered no better."""
        status, url = error.status_code, self._config.extend_url
        parameter = _refused_parameter(error)
        require(
            not parameter,
            "prompts.extend_model",
            self._config.extend_model,
            f"a model that takes temperature 0 and a seed: it refuses the parameter {parameter!r} ({error.message})",
        )
        allowed = (
            f"an endpoint that knows prompts.extend_model = {self._config.extend_model!r} and takes the key in "
            f"{self._config.extend_api_key_env} (it answered with status {status})"
        )
        willing = status >= 500 or status in TRY_AGAIN | OF_THIS_PROMPT
        require(willing, "prompts.extend_url", url, allowed)

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


def _refused_parameter(error: APIStatusError) -> str:
    """The parameter of the request that an answer with status 400 names, which another prompt would not mend."""
    body = error.body if isinstance(error.body, dict) else {}
    named = str(body.get("param") or "")
    return named if error.status_code in OF_THIS_PROMPT and named in ("temperature", "seed", "model") else ""


def _text_of(answer: ChatCompletion) -> str:
    """The longer prompt, without a reasoning model's thoughts; an answer cut off or refused is none."""
    try:
        choice = answer.choices[0]
        text, refusal = choice.message.content, choice.message.refusal
    except (AttributeError, IndexError, TypeError) as error:
        raise NoAnswerError("the answer is not a chat completion") from error
    if refusal or choice.finish_reason == "content_filter":
        raise NoAnswerError("the model refused")
    if choice.finish_reason == "length":
        raise NoAnswerError("the answer is cut off")
    text = THOUGHTS.sub("", text) if isinstance(text, str) else ""
    if OPEN_THOUGHT.search(text):
        raise NoAnswerError("the answer holds thoughts that do not end")
    if not clean_prompt(text):
        raise NoAnswerError("the answer is empty")
    return clean_prompt(text)
