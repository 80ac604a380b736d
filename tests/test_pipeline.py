"""The pipeline of a release: the service's frames, in diffusers' forms, and opened by diffusers itself."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, WanPipeline

from diagonal.engine.specs import PromptChange
from diagonal.errors import FieldError
from diagonal.media.encode import read_mp4
from diagonal.model.base_model import save_base
from diagonal.model.manifest import ReleaseError
from diagonal.model.release import Release, write_release
from diagonal.pipeline import DiagonalPipeline
from tests.engine.driving import OTHER, PROMPT, engine_of, pull, spec_of, stream
from tests.networks import small_config, small_text_model, small_tokenizer, small_vae, small_wan


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release of random weights with Wan's own kind of codec."""
    root, config = tmp_path_factory.mktemp("pipeline"), small_config()
    base = root / "base"
    save_base(base, config, small_wan(), small_vae(), small_tokenizer(), small_text_model(), {})
    return write_release(root / "r", name="r", student=base, base=base, lineage={}, scores={}).folder


@pytest.fixture
def pipe(folder: Path) -> DiagonalPipeline:
    made = DiagonalPipeline.from_pretrained(folder)
    made.set_progress_bar_config(disable=True)
    return made


def served(folder: Path, frames: int = 21, seed: int = 7) -> np.ndarray[Any, Any]:
    """What an engine of the service makes of the release."""
    chunks = stream(engine_of(release=Release.load(folder)), spec_of(frames=frames, seed=seed))  # type: ignore[arg-type]
    return np.concatenate([chunk.pixels.numpy() for chunk in chunks])


def grey(frames: Any) -> np.ndarray[Any, Any]:
    return np.round(np.asarray(frames) * 255.0).astype(np.uint8)


def test_a_pipeline_gives_the_frames_of_the_service_for_the_same_seed(pipe: DiagonalPipeline, folder: Path) -> None:
    expected = served(folder)
    for generator in (7, torch.Generator().manual_seed(7)):
        frames = pipe(PROMPT, num_frames=21, generator=generator).frames
        assert frames.shape == (1, 21, 32, 48, 3) and np.array_equal(grey(frames[0]), expected)
    assert not np.array_equal(grey(pipe(PROMPT, num_frames=21, generator=8).frames[0]), expected)


def test_diffusers_opens_a_release_by_its_own_call_with_equal_frames(folder: Path) -> None:
    opened = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    opened.set_progress_bar_config(disable=True)
    assert isinstance(opened, DiagonalPipeline)
    assert np.array_equal(grey(opened(PROMPT, num_frames=21, generator=7).frames[0]), served(folder))
    for prompt in (["a red circle"], ["a 🙂 left"]):
        settings = {"padding": "max_length", "max_length": 6, "truncation": True}
        own = DiagonalPipeline.from_pretrained(folder).tokenizer(prompt, **settings)
        assert opened.tokenizer(prompt, **settings)["input_ids"] == own["input_ids"]
    with pytest.raises(ValueError, match="trust_remote_code"):
        WanPipeline.from_pretrained(folder)


@pytest.mark.parametrize(
    "output_type, shape", [("np", (2, 9, 32, 48, 3)), ("pt", (2, 9, 3, 32, 48)), ("latent", (2, 4, 3, 4, 6))]
)
def test_frames_come_in_diffusers_forms(output_type: Any, shape: tuple[int, ...], pipe: DiagonalPipeline) -> None:
    frames = pipe([PROMPT, OTHER], num_frames=9, generator=[1, 2], output_type=output_type).frames
    assert tuple(frames.shape) == shape
    (tuple_form,) = pipe(PROMPT, num_frames=9, generator=1, output_type=output_type, return_dict=False)
    assert np.array_equal(np.asarray(tuple_form[0]), np.asarray(frames[0]))


def test_images_and_each_chunk_for_the_callback(pipe: DiagonalPipeline) -> None:
    seen: list[tuple[int, int]] = []
    videos = pipe(
        PROMPT,
        num_frames=21,
        generator=1,
        output_type="pil",
        callback_on_chunk=lambda _, number, frames: seen.append((number, len(frames))),
    ).frames
    assert seen == [(0, 9), (1, 12)] and len(videos[0]) == 21 and videos[0][0].size == (48, 32)


def test_a_stream_is_steered_as_the_engine_steers_it(pipe: DiagonalPipeline, folder: Path) -> None:
    engine = engine_of(release=Release.load(folder))  # type: ignore[arg-type]
    engine.open(spec_of(frames=None, seed=7))
    expected = [pull(engine).pixels.numpy() for _ in range(2)]
    engine.interact("s", PromptChange("e", OTHER))
    expected.append(pull(engine).pixels.numpy())
    chunks = pipe.stream(PROMPT, generator=7)
    found = [grey(next(chunks)) for _ in range(2)]
    pipe.change_prompt(OTHER)
    found.append(grey(next(chunks)))
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def test_one_video_at_a_time_and_a_stream_that_nobody_reads_is_let_go(pipe: DiagonalPipeline, folder: Path) -> None:
    first = pipe.stream(PROMPT, generator=7)
    next(first)
    assert np.array_equal(grey(pipe(PROMPT, num_frames=21, generator=7).frames[0]), served(folder))
    with pytest.raises(FieldError, match="stream"):
        pipe.change_prompt(OTHER)
    with pytest.raises(FieldError, match="stream.*no later video"):
        next(first)


def test_wrong_arguments_are_refused_in_one_line(pipe: DiagonalPipeline, tmp_path: Path, folder: Path) -> None:
    for arguments in ({"output_type": "mp4"}, {"generator": [1, 2]}, {"num_frames": -1}, {"prompt": " "}):
        with pytest.raises(FieldError):
            pipe(**{"prompt": PROMPT, **arguments})  # type: ignore[arg-type]
    with pytest.raises(FieldError, match=r"compute_dtype.*float16"):
        DiagonalPipeline.from_pretrained(folder, torch_dtype=torch.float16)
    with pytest.raises(FieldError, match="existing folder"):
        DiagonalPipeline.from_pretrained(tmp_path / "none")


def test_the_code_beside_a_release_is_that_line_or_none(folder: Path) -> None:
    code = folder / "pipeline.py"
    written = code.read_text()
    code.write_text(written + "import os\n")
    try:
        with pytest.raises(ReleaseError, match=r"pipeline\.py.*could run code"):
            Release.load(folder)
    finally:
        code.write_text(written)
    assert Release.load(folder).name == "r"


def test_the_numbers_are_of_the_type_that_was_asked_for(folder: Path) -> None:
    pipe = DiagonalPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16).to("cpu")
    assert pipe.transformer.patch_embedding.weight.dtype == torch.bfloat16
    assert pipe.settings.model.compute_dtype == "bfloat16"
    assert pipe(PROMPT, num_frames=9, generator=1).frames.shape == (1, 9, 32, 48, 3)


def test_the_package_imports_without_torch() -> None:
    code = "import sys, diagonal; print('torch' in sys.modules, 'DiagonalPipeline' in diagonal.__all__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["False", "True"], done.stderr


def test_the_example_in_the_docs_runs(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (repository / "docs" / "python.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 3
    monkeypatch.chdir(tmp_path)
    exec("\n".join(blocks), {})
    assert read_mp4(tmp_path / "circle.mp4").shape == (81, 32, 32, 3)
