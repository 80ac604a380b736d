"""Settings of the data: prompts, and the trajectories of stage 0."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from diagonal.errors import require
from diagonal.schedule import RAW_TIMESTEPS
from diagonal.setting import FULL_SHARE, NOT_NEGATIVE, POSITIVE, SHARE, Allowed, check, setting


@dataclass(frozen=True)
class PromptsConfig:
    """How prompt files are prepared: the held-out share, and the extension by a language model."""

    field: str = setting("", "Field or column of prompt files; empty is prompt, caption or text, whichever is there.")
    max_bad_share: float = setting(0.01, "Share of rows without a prompt that are left out; above it, a stop.", SHARE)
    held_out_share: float = setting(0.01, "Share of prompts kept for evaluation, chosen by hash.", SHARE)
    extend_url: str = setting("", "Base URL of an OpenAI-compatible endpoint; empty is no extension.")
    extend_model: str = setting("", "Model to ask there.", "a name, where prompts.extend_url is set")
    extend_api_key_env: str = setting("OPENAI_API_KEY", "Environment variable that holds the endpoint's key.")
    extend_instruction: str = setting(
        "Rewrite the user's text as one detailed description of a short video: subject, motion, setting, light and "
        "camera. Answer with the description alone, in the language of the text, in at most 120 words.",
        "System prompt of the extension.",
    )
    extend_timeout_s: float = setting(60.0, "Limit of one request.", POSITIVE)
    extend_concurrency: int = setting(8, "Requests at once.", POSITIVE, "requests")

    def __post_init__(self) -> None:
        check(self, "prompts")
        named = not self.extend_url or bool(self.extend_model)
        allowed = "the name of a model, as prompts.extend_url is given"
        require(named, "prompts.extend_model", self.extend_model, allowed)


@dataclass(frozen=True)
class PairsConfig:
    """Stage 0 data: trajectories of the guided teacher's ODE (docs/method.md, ode-init)."""

    prompts: str = setting("", "Prompt file; empty is the embedded world's captions.")
    count: int = setting(1024, "Trajectories to make.", POSITIVE, "pairs")
    solver_steps: int = setting(
        40,
        "Steps of the solver.",
        Allowed(
            "a multiple of 20, so that every kept raw timestep is a step", lambda steps: steps > 0 and steps % 20 == 0
        ),
        "steps",
    )
    guidance: float = setting(6.0, "Scale of classifier-free guidance.")
    batch_size: int = setting(16, "Trajectories solved at once.", POSITIVE)
    rows_per_shard: int = setting(
        4, "Trajectories of one file (4 are about 80 MB at 832x480); a shard that is cut off is solved again.", POSITIVE
    )
    kept_raw: tuple[int, ...] = setting(
        (1000, 750, 500, 250, 100, 0),
        "Raw timesteps whose latents are kept.",
        Allowed(
            f"raw timesteps that fall from {RAW_TIMESTEPS} to 0",
            lambda raw: (
                all(high > low for high, low in pairwise(raw)) and raw[:1] == (RAW_TIMESTEPS,) and raw[-1:] == (0,)
            ),
        ),
    )
    max_bad_share: float = setting(0.01, "Share of quarantined samples at which the job stops.", FULL_SHARE)
    text_workers: int = setting(1, "Most actors that encode text.", POSITIVE, "actors")
    solver_workers: int = setting(0, "Most actors that solve; 0 is as many as train.workers.", NOT_NEGATIVE, "actors")

    def __post_init__(self) -> None:
        check(self, "pairs")
