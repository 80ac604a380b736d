"""Equal seeds give equal frames: the shipped releases draw what they drew when these frames were kept.

`python -m tests.test_frames` prints the hashes of today and, with `--write`, keeps them and the frames anew.
"""

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from diagonal.engine.engine import Engine
from diagonal.engine.session import PromptChange
from diagonal.evaluate.quality.sources import Student
from diagonal.model.base_model import embedded
from diagonal.model.release import Release
from tests.engine.driving import pull, spec_of

KEPT = Path(__file__).parent / "kept_frames"
EVERY = 10  # of the pixel frames, every tenth is kept: enough to see a change, and small
GREY_LEVELS = 1  # another processor rounds otherwise in the last bit


def tiny_clip() -> np.ndarray:
    student = Student.of(Release.load())
    return np.asarray(student(["a red circle moving right quickly", "a blue square moving up slowly"], [7, 8])[0])


def textured_clip() -> np.ndarray:
    student = Student.of(Release.load(embedded("release", "textured")))
    return np.asarray(student(["a large red circle moves left"], [7])[0])


def steered_stream() -> np.ndarray:
    """A stream whose prompt changes after its third chunk, by the engine."""
    engine = Engine(Release.load(), clock=lambda: 0.0)
    engine.open(spec_of(prompt="a red circle moving right quickly", seed=5))
    chunks = [pull(engine) for _ in range(3)]
    engine.interact("s", PromptChange("e", "a blue square moving up slowly"))
    while not chunks[-1].last:
        chunks.append(pull(engine))
    return np.concatenate([chunk.pixels.numpy() for chunk in chunks])


CLIPS: list[Callable[[], np.ndarray]] = [tiny_clip, textured_clip, steered_stream]


def sha256(frames: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(frames).tobytes()).hexdigest()


def machine() -> str:
    """What the last bit hangs on: the build of torch and the processor's vector instructions."""
    return f"torch {torch.__version__} {torch.backends.cpu.get_cpu_capability()}"


@pytest.mark.slow
@pytest.mark.parametrize("clip", CLIPS, ids=lambda clip: clip.__name__)
def test_equal_seeds_give_the_frames_that_were_kept(clip: Callable[[], np.ndarray]) -> None:
    kept = json.loads((KEPT / "hashes.json").read_text())
    frames = clip()
    if machine() == kept["machine"] and sha256(frames) == kept[clip.__name__]:
        return
    before = np.load(KEPT / f"{clip.__name__}.npz")["frames"].astype(int)
    assert np.abs(frames[::EVERY].astype(int) - before).max() <= GREY_LEVELS


def main() -> None:
    hashes = {"machine": machine()}
    for clip in CLIPS:
        frames = clip()
        hashes[clip.__name__] = sha256(frames)
        if "--write" in sys.argv:
            KEPT.mkdir(exist_ok=True)
            np.savez_compressed(KEPT / f"{clip.__name__}.npz", frames=frames[::EVERY])
    if "--write" in sys.argv:
        (KEPT / "hashes.json").write_text(json.dumps(hashes, indent=2) + "\n")
    print(json.dumps(hashes, indent=2))


if __name__ == "__main__":
    main()
