"""Which prompts are let through: by the operator's deny list, a model, or a callable of his own; by default all are.

A policy that fails or takes too long has refused. Prompts are told to the policy alone, never to a log or a metric.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import unicodedata
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import regex

from diagonal.errors import FieldError, require
from diagonal.metrics import MetricsBackend
from serve.gateway.moderation import Moderation
from serve.settings import DENY_LIST, MODERATION, ServeSettings, load_plug_in
from serve.wire.problems import Problem

Judge = Callable[[str, str], Any]
_LOG = logging.getLogger("ray.serve")
_FIELD = "prompt_policy"
_REGEX, _COMMENT = "regex:", "#"
_THREADS = 4  # calls that hang hold one each; with all of them held every prompt is refused
_RETRY_S = 5.0
_INVISIBLE = ("Mn", "Me", "Cf", "Cc")  # marks on letters, and what no screen shows
_LOOK_ALIKE = str.maketrans("авеіјкмнорстухԁһӏѕԛԝүαβεικνορτυχωγ", "abeijkmhopctyxdhlsqwyabeikvoptuxwy")


class PromptPolicy:
    """Asks `judge(prompt, account)`, plain or async, about each prompt; only True lets it pass. None asks nobody."""

    def __init__(self, judge: Judge | None, timeout_s: float, metrics: MetricsBackend) -> None:
        self._judge, self._timeout_s, self._metrics = judge, timeout_s, metrics
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="policy")

    @classmethod
    def from_settings(cls, settings: ServeSettings, metrics: MetricsBackend) -> PromptPolicy:
        """As `prompt_policy` says; `FieldError` when its file or module is not there, or not as it should be."""
        name, timeout_s = settings.prompt_policy, settings.prompt_policy_timeout_s
        judge: Judge | None = None
        if name.startswith(DENY_LIST):
            judge = DenyList.read(name.removeprefix(DENY_LIST), timeout_s)
        elif name.startswith(MODERATION):
            judge = Moderation(name.removeprefix(MODERATION), timeout_s)
        elif name:
            judge = load_plug_in(_FIELD, name)
        return cls(judge, timeout_s, metrics)

    async def check(self, prompt: str, account: str, param: str = "prompt") -> None:
        """`Problem` 422 when the policy refuses, 503 when it failed; which of its rules spoke is told to nobody."""
        if self._judge is None:
            return
        try:
            async with asyncio.timeout(self._timeout_s):
                passed = await self._ask(self._judge, prompt, account)
        except TimeoutError:
            raise self._failed("timeout", "TimeoutError") from None
        except Exception as error:  # edge: the operator's own code; what it raises must not let a prompt pass
            raise self._failed("failed", type(error).__name__) from None
        if passed is not True and passed is not False:
            raise self._failed("failed", f"it gave {type(passed).__name__}, not bool")
        if not passed:
            self._metrics.inc("diagonal_prompts_refused_total", reason="policy")
            raise Problem(422, "prompt_refused", "this prompt is against the policy of the service", param=param)

    async def _ask(self, judge: Judge, prompt: str, account: str) -> Any:
        if inspect.iscoroutinefunction(judge) or inspect.iscoroutinefunction(getattr(judge, "__call__", None)):  # noqa: B004
            return await judge(prompt, account)
        return await asyncio.get_running_loop().run_in_executor(self._threads, judge, prompt, account)

    def _failed(self, reason: str, why: str) -> Problem:
        self._metrics.inc("diagonal_prompts_refused_total", reason=reason)
        _LOG.error("the prompt policy failed: %s", why)
        message = "the prompt could not be checked, so it is refused; try again later"
        return Problem(503, "prompt_policy_failed", message, retry_after_s=_RETRY_S)


class DenyList:
    """Words, phrases and regular expressions that no prompt may hold.

    One entry a line, UTF-8; `#` begins a comment line. A word or phrase is found where it stands alone, whatever its
    case, width, accents, invisible characters and look-alike letters of other alphabets. `regex:` entries are searched
    for in the prompt so levelled, and as it came.
    """

    def __init__(self, entries: Iterable[str], timeout_s: float = 2.0) -> None:
        """`FieldError` names the number of an entry that is wrong; entries are counted from 1, comments too."""
        self._timeout_s = timeout_s
        words: set[str] = set()
        self._patterns: list[regex.Pattern[str]] = []
        for number, line in enumerate(entries, start=1):
            entry = line.strip()
            if entry.startswith(_REGEX):
                self._patterns.append(_compiled(entry.removeprefix(_REGEX).strip(), number))
            elif entry and not entry.startswith(_COMMENT):
                require(bool(levelled(entry)), _FIELD, f"entry {number}", "one with a visible character")
                words.add(levelled(entry))
        require(bool(words or self._patterns), _FIELD, "no entry", "a deny list with at least one")
        if words:
            self._patterns.append(regex.compile(r"(?<!\w)\L<words>(?!\w)", words=words))

    @classmethod
    def read(cls, path: str, timeout_s: float) -> DenyList:
        """From a file; `FieldError` when it cannot be read."""
        try:
            text = Path(path).expanduser().read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise FieldError(_FIELD, path, "a UTF-8 file that can be read") from error
        return cls(text.splitlines(), timeout_s)

    def __call__(self, prompt: str, account: str = "") -> bool:
        """Whether a prompt holds none of them; `TimeoutError` when an expression takes too long to tell."""
        texts = (levelled(prompt), prompt)
        return not any(
            pattern.search(text, timeout=self._timeout_s, concurrent=True)
            for pattern in self._patterns
            for text in texts
        )


def levelled(text: str) -> str:
    """Text without what only looks different: case, width, accents, invisible characters, look-alike letters."""
    split = unicodedata.normalize("NFKD", unicodedata.normalize("NFKC", text).casefold())
    visible = (" " if letter.isspace() else letter for letter in split)
    kept = (letter for letter in visible if unicodedata.category(letter) not in _INVISIBLE)
    return " ".join("".join(kept).translate(_LOOK_ALIKE).split())


def _compiled(pattern: str, number: int) -> regex.Pattern[str]:
    try:
        require(bool(pattern), _FIELD, f"entry {number}", "a regular expression behind regex:")
        return regex.compile(pattern, regex.IGNORECASE)
    except regex.error as error:
        raise FieldError(_FIELD, f"entry {number}", f"a regular expression: {error.msg}") from error
