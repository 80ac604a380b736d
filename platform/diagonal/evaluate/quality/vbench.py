"""VBench's dimensions of a folder of videos, where package and weights are there; else what is missing.

Those dimensions are run that VBench has for videos of one's own (its mode `custom_input`), from local weights alone:
nothing is downloaded.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from diagonal.errors import require
from diagonal.storage import Folder

PACKAGE = "vbench"
# By dimension: the files below VBENCH_CACHE_DIR (default ~/.cache/vbench) that it reads.
DIMENSIONS: Mapping[str, tuple[str, ...]] = {
    "subject_consistency": ("dino_model/dino_vitbase16_pretrain.pth", "dino_model/facebookresearch_dino_main"),
    "background_consistency": ("clip_model/ViT-B-32.pt",),
    "motion_smoothness": ("amt_model/amt-s.pth",),
    "dynamic_degree": ("raft_model/models/raft-things.pth",),
    "aesthetic_quality": ("clip_model/ViT-L-14.pt", "aesthetic_model/emb_reader/sa_0_4_vit_l_14_linear.pth"),
    "imaging_quality": ("pyiqa_model/musiq_spaq_ckpt-358bb6af.pth",),
}


def weights_folder() -> Path:
    """Where VBench looks for its weights."""
    return Path(os.environ.get("VBENCH_CACHE_DIR") or Path.home() / ".cache" / "vbench")


def missing() -> dict[str, str]:
    """Why a dimension cannot be run, by dimension; none for those that can."""
    if importlib.util.find_spec(PACKAGE) is None:
        return dict.fromkeys(DIMENSIONS, f"the package {PACKAGE} is not installed (pip install {PACKAGE})")
    root = weights_folder()
    found = {name: [file for file in files if not (root / file).exists()] for name, files in DIMENSIONS.items()}
    return {name: f"no {', '.join(files)} in {root}" for name, files in found.items() if files}


def evaluate(videos: str, device: str, say: Callable[[str], None] = print) -> dict[str, Any]:
    """`scores` by dimension of a local folder of videos, and `missing` with the reason of each that was not run."""
    require(Folder(videos).is_local, "--videos", videos, "a local folder, for VBench")
    absent = missing()
    for name, why in absent.items():
        say(f"VBench {name}: not run, {why}")
    wanted = [name for name in DIMENSIONS if name not in absent]
    scores: dict[str, float] = {}
    for name in wanted:
        try:
            scores[name] = _run(videos, device, name)
        except ImportError as error:  # of a package that this dimension alone needs
            absent[name] = f"its own packages are not whole ({error})"
            say(f"VBench {name}: not run, {absent[name]}")
    return {"scores": scores, "missing": absent}


def _run(videos: str, device: str, dimension: str) -> float:
    """One dimension's mean over the videos."""
    package = importlib.import_module(PACKAGE)
    with tempfile.TemporaryDirectory(prefix="diagonal-vbench-") as out:
        bench = package.VBench(device, "", out)
        bench.evaluate(
            videos_path=str(Path(videos).absolute()),
            name=dimension,
            dimension_list=[dimension],
            local=True,
            mode="custom_input",
        )
        found = json.loads((Path(out) / f"{dimension}_eval_results.json").read_text())
    return float(found[dimension][0])
