"""VBench's standard suite: videos of its prompts under the names it reads, and its results as the leaderboard shows."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from diagonal.diffusion.noise import Salt, mixed_seed
from diagonal.errors import FieldError, require
from diagonal.evaluate.quality.report import table
from diagonal.evaluate.quality.sources import Student
from diagonal.jsonfile import read_json
from diagonal.media.encode import write_mp4

INFO = "VBench_full_info.json"
RESULTS = "*_eval_results.json"
SAMPLES = 5  # videos of a prompt, as the leaderboard asks for
QUALITY_WEIGHT, SEMANTIC_WEIGHT = 4.0, 1.0
PATH_BYTES = 255  # of a file's name


@dataclass(frozen=True)
class Dimension:
    """How the leaderboard reads a dimension: its raw range, and its weight within its half."""

    low: float = 0.0
    high: float = 1.0
    weight: float = 1.0


# The leaderboard's ranges and weights (VBench, scripts/constant.py).
QUALITY: Mapping[str, Dimension] = {
    "subject_consistency": Dimension(0.1462),
    "background_consistency": Dimension(0.2615),
    "temporal_flickering": Dimension(0.6293),
    "motion_smoothness": Dimension(0.706, 0.9975),
    "aesthetic_quality": Dimension(),
    "imaging_quality": Dimension(),
    "dynamic_degree": Dimension(weight=0.5),
}
SEMANTIC: Mapping[str, Dimension] = {
    "object_class": Dimension(),
    "multiple_objects": Dimension(),
    "human_action": Dimension(),
    "color": Dimension(),
    "spatial_relationship": Dimension(),
    "scene": Dimension(high=0.8222),
    "appearance_style": Dimension(0.0009, 0.2855),
    "temporal_style": Dimension(high=0.364),
    "overall_consistency": Dimension(high=0.364),
}


def suite_prompts(info: str) -> list[str]:
    """The suite's prompts, each once, from VBench's own list: a file, or '' for the one in the installed package."""
    path = Path(info) if info else _packaged()
    entries = read_json(path)
    try:
        return list(dict.fromkeys(str(entry["prompt_en"]) for entry in entries))
    except (TypeError, KeyError) as error:
        raise FieldError("--vbench-info", str(path), f"VBench's list {INFO}: entries with prompt_en") from error


def _packaged() -> Path:
    found = importlib.util.find_spec("vbench")
    require(found is not None, "--vbench-info", "", f"the path of VBench's {INFO}, as the package is not installed")
    assert found is not None and found.origin is not None
    return Path(found.origin).with_name(INFO)


def write_suite(
    student: Student, prompts: list[str], folder: Path, samples: int, seed: int, say: Callable[[str], None] = print
) -> None:
    """A video of each prompt and sample, `FOLDER/PROMPT-N.mp4`; those that are there already are left as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, prompt in enumerate(prompts):
        require("/" not in prompt, "prompt of the suite", prompt, "one that a file can be called after")
        for sample in range(samples):
            target = folder / f"{prompt}-{sample}.mp4"
            require(len(target.name.encode()) <= PATH_BYTES, "prompt of the suite", prompt, f"up to {PATH_BYTES} bytes")
            if not target.exists():
                pixels = student([prompt], [mixed_seed(seed, Salt.EVALUATE, number, sample)])[0]
                write_mp4(target, pixels.numpy(), student.config.geometry.pixel_fps)
        say(f"VBench suite: {number + 1} of {len(prompts)} prompts")


def read_results(folder: Path) -> dict[str, Any]:
    """What VBench wrote for the videos in a folder: `scores` by dimension in percent of the leaderboard's range, the
    dimensions that are `missing`, and `quality`, `semantic` and `total`, each None until all its dimensions are there.
    """
    raw: dict[str, float] = {}
    for file in sorted(folder.glob(RESULTS)):
        for name, value in read_json(file).items():
            raw[name.replace(" ", "_")] = float(value[0] if isinstance(value, list) else value)
    known = {**QUALITY, **SEMANTIC}
    unknown = sorted(set(raw) - set(known))
    require(not unknown, "VBench's dimension", unknown, f"of {sorted(known)}")
    scores = {name: 100 * _share(raw[name], known[name]) for name in known if name in raw}
    quality, semantic = (_weighted(scores, half) for half in (QUALITY, SEMANTIC))
    total = None
    if quality is not None and semantic is not None:
        total = (QUALITY_WEIGHT * quality + SEMANTIC_WEIGHT * semantic) / (QUALITY_WEIGHT + SEMANTIC_WEIGHT)
    missing = [name for name in known if name not in raw]
    return {"scores": scores, "missing": missing, "quality": quality, "semantic": semantic, "total": total}


def _share(raw: float, dimension: Dimension) -> float:
    return (raw - dimension.low) / (dimension.high - dimension.low)


def _weighted(scores: Mapping[str, float], half: Mapping[str, Dimension]) -> float | None:
    if not set(half) <= set(scores):
        return None
    return fmean([scores[name] for name in half], [dimension.weight for dimension in half.values()])


def markdown(found: Mapping[str, Any]) -> str:
    """The dimensions and their totals, beside a baseline's where there is one; '' where VBench did not run."""
    ours, other = found.get("vbench"), found.get("vbench_baseline")
    if not ours:
        return ""
    both = (ours, other or {})
    scores = [one.get("scores", {}) for one in both]
    rows = [[name.replace("_", " "), *_cells(some.get(name) for some in scores)] for name in (*QUALITY, *SEMANTIC)]
    rows += [[f"**{name}**", *_cells(one.get(name) for one in both)] for name in ("quality", "semantic", "total")]
    head = "## VBench, in percent as its leaderboard shows them"
    return "\n".join(["", head, "", *table(["dimension", "ours", "baseline"], rows)])


def _cells(values: Any) -> list[str]:
    return ["" if value is None else f"{value:.2f}" for value in values]
