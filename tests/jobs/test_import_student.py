"""A public student's file becomes a release: by its recipe, with its hash, without training and without Ray."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from diffusers import WanTransformer3DModel

from diagonal.config import Config
from diagonal.config.recipes import RECIPES
from diagonal.errors import FieldError
from diagonal.model.base_model import save_base
from diagonal.model.release import Release
from diagonal.pipeline import DiagonalPipeline
from jobs.import_student import work
from tests.engine.driving import PROMPT, engine_of, spec_of, stream
from tests.model.test_import_checkpoints import wan_name
from tests.model.test_taehv import published
from tests.networks import SMALL, small_config, small_text_model, small_tokenizer, small_vae, small_wan

SIZE = ["geometry.latent_height=6", "geometry.latent_width=10"]  # 48 x 80 pixels


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three layers as diffusers and transformers write it."""
    folder = tmp_path_factory.mktemp("import") / "base"
    parts = small_wan(layers=3), small_vae(), small_tokenizer(), small_text_model()
    save_base(folder, small_config(*SIZE), *parts, {})
    for extra in ("config.json", "lineage.json"):
        (folder / extra).unlink()
    return folder


@pytest.fixture(scope="module")
def student(base: Path) -> Path:
    """Another network of that layout, in Self Forcing's layout."""
    weights = {f"model.{wan_name(name)}": value for name, value in small_wan(5, layers=3).state_dict().items()}
    torch.save({"generator": weights, "generator_ema": {}}, base.parent / "self_forcing_dmd.pt")
    return base.parent / "self_forcing_dmd.pt"


def imported(base: Path, student: Path, out: Path, recipe: str, *settings: str, decoder: Path | None = None) -> Release:
    given = [word for text in (*SMALL, "model.compute_dtype=float32", *SIZE, *settings) for word in ("--set", text)]
    source = ["--base", str(base), "--student", str(student), "--recipe", recipe]
    work([*source, "--out", str(out), *given, *(["--decoder", str(decoder)] if decoder else [])])
    return Release.load(out)


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_a_release_runs_its_recipe_and_says_where_it_is_from(
    recipe: str, base: Path, student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    release = imported(base, student, tmp_path / "r", recipe)
    config, wanted = release.config, RECIPES[recipe]
    assert (config.cache.window_frames, config.cache.sink_frames) == (wanted.window_frames, wanted.sink_frames)
    assert config.schedule.resolved_context == wanted.context and config.schedule.steps == wanted.steps
    lineage = release.manifest["lineage"]["student"]
    assert lineage["sha256"] == {student.name: hashlib.sha256(student.read_bytes()).hexdigest()}
    assert lineage["recipe"] == recipe and lineage["source"] == wanted.source
    assert str(tmp_path.parent) not in str(lineage)
    card = (release.folder / "README.md").read_text()
    assert "trained by others" in card and "distilled by Diagonal" not in card and not release.promoted
    said = capsys.readouterr().out
    assert f"recipe {recipe}: steps {wanted.steps}" in said and f"{student} is a path" in said


def test_the_levels_of_causvid_are_its_own_timesteps() -> None:
    schedule = Config.from_preset("wan-1.3b", RECIPES["causvid"].settings).schedule
    assert schedule.levels(0) == schedule.levels(9) == (1.0, 0.757, 0.522) and schedule.forwards(3) == 4


def test_the_release_opens_in_diffusers_pipeline_and_service_with_equal_frames(
    base: Path, student: Path, tmp_path: Path
) -> None:
    release = imported(base, student, tmp_path / "r", "self-forcing", "cache.window_frames=12")
    assert release.config.cache.window_frames == 12
    stored = WanTransformer3DModel.from_pretrained(release.folder / "transformer", torch_dtype=torch.float32)
    expected = small_wan(5, layers=3).bfloat16().state_dict()
    assert all(torch.equal(value.bfloat16(), expected[name]) for name, value in stored.state_dict().items())
    served = stream(engine_of(release=release), spec_of(frames=21, seed=7))  # type: ignore[arg-type]
    pipe = DiagonalPipeline.from_pretrained(release.folder)
    frames = pipe(PROMPT, num_frames=21, generator=7).frames[0]
    assert frames.shape == (21, 48, 80, 3)
    assert np.array_equal(np.round(frames * 255.0), torch.cat([chunk.pixels for chunk in served]).numpy())


def test_what_cannot_be_imported_leaves_nothing_behind(base: Path, student: Path, tmp_path: Path) -> None:
    (tmp_path / "p.pt").write_text("<html>")
    with pytest.raises(FieldError, match="a web page"):
        imported(base, tmp_path / "p.pt", tmp_path / "r", "self-forcing")
    with pytest.raises(FieldError, match="window_frames"):
        imported(base, student, tmp_path / "r", "self-forcing", "cache.window_frames=4")
    assert [path.name for path in tmp_path.iterdir()] == ["p.pt"]
    with pytest.raises(FieldError, match="does not exist yet"):
        imported(base, student, base, "self-forcing")


def test_an_import_starts_no_ray(base: Path, student: Path, tmp_path: Path) -> None:
    imported(base, student, tmp_path / "r", "longlive")
    assert not ray.is_initialized()


def test_a_fast_decoder_of_another_geometry_is_refused_before_the_release(
    base: Path, student: Path, tmp_path: Path
) -> None:
    torch.save(published(), tmp_path / "taew2_1.pth")
    with pytest.raises(FieldError, match="decoder latent_channels = 16"):
        imported(base, student, tmp_path / "r", "diagonal", decoder=tmp_path / "taew2_1.pth")
    assert not (tmp_path / "r").exists()
