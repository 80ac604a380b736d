"""A model behind an OpenAI-compatible endpoint judges prompts: `POST BASE/moderations`, or a guard model by chat."""

from __future__ import annotations

import os
from typing import Any

import httpx2

from diagonal.errors import FieldError

KEY_VARIABLE = "DIAGONAL_MODERATION_API_KEY"
_FIELD = "prompt_policy"


class Moderation:
    """Asks about each prompt, and lets it pass where nothing of it is flagged.

    `address` is `BASE` or `BASE#MODEL`, BASE with its `/v1`. A name of a model that ends in `:chat` is asked by
    `/chat/completions`, as Llama Guard is: an answer that begins with "safe" passes. What is no such answer raises,
    and the policy then refuses. The key comes from `DIAGONAL_MODERATION_API_KEY`.
    """

    def __init__(self, address: str, timeout_s: float, transport: httpx2.AsyncBaseTransport | None = None) -> None:
        base, _, model = address.partition("#")
        url = httpx2.URL(base)
        if url.scheme not in ("http", "https") or url.userinfo:
            raise FieldError(_FIELD, url.host or base, "moderation:http(s)://host/v1 without a key in it")
        self._model, self._chats = model.removesuffix(":chat"), model.endswith(":chat")
        key = os.environ.get(KEY_VARIABLE, "")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx2.AsyncClient(base_url=base, headers=headers, timeout=timeout_s, transport=transport)

    async def __call__(self, prompt: str, account: str = "") -> bool:
        """Whether the prompt may pass; raises where the endpoint does not say."""
        named: dict[str, Any] = {"model": self._model} if self._model else {}
        if self._chats:
            asked = {**named, "messages": [{"role": "user", "content": prompt}], "temperature": 0, "max_tokens": 16}
            answer = await self._post("chat/completions", asked)
            word = str(answer["choices"][0]["message"]["content"]).strip().lower()
            if not word.startswith(("safe", "unsafe")):
                raise ValueError("the guard model said neither safe nor unsafe")
            return word.startswith("safe")
        answer = await self._post("moderations", {**named, "input": prompt})
        flags = [result["flagged"] for result in answer["results"]]
        if not flags or any(flag is not True and flag is not False for flag in flags):
            raise ValueError("the endpoint's answer is no moderation")
        return not any(flags)

    async def _post(self, path: str, body: dict[str, Any]) -> Any:
        return (await self._http.post(path, json=body)).raise_for_status().json()
