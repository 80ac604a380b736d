"""A request becomes a record: the video or the interaction that it asks for, checked against the model."""

from __future__ import annotations

import math
import secrets

from serve.records import Interaction, InteractionKind, ModelInfo, Pacing, VideoRecord
from serve.wire.problems import Problem, wrong_value
from serve.wire.schemas import MAX_SEED, InteractionRequest, VideoRequest


def checked_prompt(prompt: str, info: ModelInfo, param: str = "prompt") -> str:
    """The prompt without surrounding space; `Problem` when nothing is left, or too much."""
    text = prompt.strip()
    if "\0" in text:
        raise wrong_value(422, "invalid_value", param, prompt, "text without NUL")  # PostgreSQL keeps none
    if not text:
        raise wrong_value(422, "prompt_empty", param, prompt, f"1 to {info.max_prompt_characters} characters")
    if len(text) > info.max_prompt_characters:
        detail = f"{param} has {len(text)} characters: allowed are 1 to {info.max_prompt_characters}"
        raise Problem(422, "prompt_too_long", detail, param=param)
    return text


def asked_change(request: InteractionRequest, info: ModelInfo) -> Interaction:
    """What an interaction asks for; `Problem` when its event says nothing, or two things."""
    asked = request.interaction
    event, where = asked.event, "interaction.event"
    if event.action is not None:
        if event.prompt is not None or asked.transition_chunks:
            raise Problem(422, "invalid_value", f"{where} has an action: it stands alone", param=f"{where}.action")
        return Interaction(asked.event_id, "", kind=InteractionKind(event.action))
    if event.prompt is None:
        raise Problem(422, "missing_field", f"{where}.prompt is missing", param=f"{where}.prompt")
    return Interaction(asked.event_id, checked_prompt(event.prompt, info, f"{where}.prompt"), asked.transition_chunks)


def new_video_id() -> str:
    """An id that nobody guesses."""
    return f"video_{secrets.token_hex(16)}"


def new_video(request: VideoRequest, info: ModelInfo, created_at: float, video_id: str) -> VideoRecord:
    """The video that a request describes; `Problem` when this model cannot make it."""
    prompt = checked_prompt(request.prompt, info)
    if request.fps not in (None, info.fps):
        raise wrong_value(400, "invalid_value", "fps", request.fps, str(info.fps))
    scale = _scale(request, info)
    return VideoRecord(
        id=video_id,
        model=info.name,
        prompt=prompt,
        seed=secrets.randbelow(MAX_SEED + 1) if request.seed is None else request.seed,
        frames=_frames(request, info),
        fps=info.fps,
        scale=scale,
        size=info.size(scale),
        pacing=Pacing(request.extra.pacing),
        created_at=created_at,
        release_sha256=info.release_sha256,
        record=request.extra.record,
        ignored=request.ignored,
    )


def _scale(request: VideoRequest, info: ModelInfo) -> int:
    sizes = {info.size(scale): scale for scale in info.scales}
    asked = request.size
    if (request.width is None) != (request.height is None):
        raise Problem(422, "invalid_value", "width and height belong together", param="width")
    if request.width is not None:
        pair = f"{request.width}x{request.height}"
        if asked not in (None, pair):
            raise wrong_value(400, "invalid_value", "size", asked, f"{pair}, as width and height say")
        asked = pair
    if asked is None:
        return info.scales[0]
    if asked not in sizes:
        raise wrong_value(400, "invalid_value", "size", asked, " or ".join(sizes))
    return sizes[asked]


def _frames(request: VideoRequest, info: ModelInfo) -> int:
    """Pixel frames; 0 for a stream without an end."""
    seconds = _seconds(request.seconds)
    if request.extra.endless:
        if seconds is not None or request.num_frames is not None:
            raise Problem(422, "invalid_value", "extra.endless stands without seconds and num_frames", param="extra")
        return 0
    if seconds is None:
        if request.num_frames is not None and request.num_frames > info.max_frames:
            raise wrong_value(400, "invalid_value", "num_frames", request.num_frames, f"1 to {info.max_frames}")
        return request.num_frames or info.clip_frames
    if not 0 < seconds <= info.max_frames / info.fps:
        allowed = f"above 0, up to {info.max_frames / info.fps:g}"
        raise wrong_value(400, "invalid_value", "seconds", request.seconds, allowed)
    frames = max(1, round(seconds * info.fps))
    if request.num_frames not in (None, frames):
        allowed = f"{frames}, as seconds = {seconds:g} says; or give one of the two"
        raise wrong_value(400, "invalid_value", "num_frames", request.num_frames, allowed)
    return frames


def _seconds(value: float | str | None) -> float | None:
    """OpenAI sends seconds as text."""
    if not isinstance(value, str):
        return value
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not math.isfinite(seconds):
        raise wrong_value(422, "invalid_value", "seconds", value, "a number")
    return seconds
