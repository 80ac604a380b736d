"""Requests as other services' clients write them: what means nothing here is named, what cannot be is refused."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

from pydantic import AliasChoices

from serve.wire.problems import Problem

EXTRA = ("extra", "extra_params", "extra_body")
EXTRA_NAMES = AliasChoices(*EXTRA)
# What other services of this shape take and this one has no use for.
IGNORED = frozenset(
    "num_inference_steps guidance_scale guidance_scale_2 true_cfg_scale negative_prompt flow_shift boundary_ratio "
    "quality user metadata output_compression response_format".split()
)
# What would change the video and cannot: refused with the reason, unless it says nothing.
UNABLE = {
    "input_reference": "this service makes videos from text alone",
    "image_reference": "this service makes videos from text alone",
    "lora": "adapters are merged into a release (model.adapters), and not chosen for each video",
}


def in_our_words(data: dict[str, Any], extras: Collection[str]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """A request's fields with those of other services taken out, and the names of these.

    `extras` are the fields of `extra`, which may stand at the top level, too. In `extra` a wrong name is left, to be an
    error; in `extra_params` and `extra_body` it is another service's. `Problem` for what cannot be done.
    """
    for name, why in UNABLE.items():
        if data.get(name):
            raise Problem(422, "unsupported_field", f"{name} is not supported: {why}", param=name)
    ignored = [name for name in data if name in IGNORED or name in UNABLE]
    plain = {name: value for name, value in data.items() if name not in ignored}
    place = next((name for name in EXTRA if name in plain), EXTRA[0])
    inner = object_of(plain.get(place, {}))
    if not isinstance(inner, dict):
        return plain, tuple(ignored)
    if place != EXTRA[0]:
        ignored += [f"{place}.{name}" for name in inner if name not in extras]
        inner = {name: value for name, value in inner.items() if name in extras}
    top = {name: plain.pop(name) for name in extras if name in plain}
    plain.pop(place, None)
    return {**plain, **({place: top | inner} if top or inner else {})}, tuple(ignored)


def object_of(value: Any) -> Any:
    """A value that a form, which holds text alone, may have as JSON."""
    if isinstance(value, str):
        try:
            return read_json(value)
        except (ValueError, RecursionError) as error:
            raise ValueError("not a JSON object") from error
    return value


def read_json(text: str | bytes) -> object:
    """What a JSON text says; `ValueError` or `RecursionError` when it is none, or holds half of a surrogate pair."""
    value = json.loads(text)
    json.dumps(value, ensure_ascii=False).encode()  # half of a pair is no character: it can be neither kept nor told
    return value
