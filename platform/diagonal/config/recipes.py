"""How public students are sampled: schedule, context and window that each was trained for, with its source."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """One recipe. `positions` is how its own code numbers the frames of the cache; here they count from the window's
    first frame, which is the same as absolute ones until the window is full."""

    steps: str
    shift: float
    context: float | str
    window_frames: int
    sink_frames: int
    positions: str
    source: str

    @property
    def settings(self) -> list[str]:
        """The recipe as settings of a configuration."""
        return [
            f"schedule.steps={self.steps}",
            f"schedule.shift={self.shift}",
            f"schedule.context={self.context}",
            f"cache.window_frames={self.window_frames}",
            f"cache.sink_frames={self.sink_frames}",
            f"distill.stage1_steps={self.steps}",
        ]


RECIPES = {
    "self-forcing": Recipe(
        "self-forcing",
        5.0,
        0.0,
        21,
        0,
        "absolute",
        "Self-Forcing, configs/self_forcing_dmd.yaml; the 21 frames of a clip",
    ),
    "causvid": Recipe(
        "causvid", 1.0, 0.0, 21, 0, "absolute", "CausVid, configs/wan_causal_dmd.yaml: timesteps that are not warped"
    ),
    "longlive": Recipe(
        "self-forcing",
        5.0,
        0.0,
        12,
        3,
        "absolute",
        "LongLive, configs/longlive_inference.yaml; its LoRA has its own file",
    ),
    "causal-forcing": Recipe(
        "self-forcing",
        5.0,
        0.0,
        21,
        0,
        "absolute",
        "Causal-Forcing, chunk by chunk, which keeps Self-Forcing's sampler",
    ),
    "diagonal": Recipe("4322222", 5.0, "reuse", 12, 3, "window", "the paper's default, as jobs/distill.py trains it"),
}
