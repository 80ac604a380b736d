"""The job that trains an embedded base model: what it writes loads, with the codec that its configuration asks for."""

from __future__ import annotations

from pathlib import Path

import pytest
from diffusers import AutoencoderKLWan

from diagonal.config import Config
from diagonal.jsonfile import read_json
from diagonal.model.base_model import load_codec, load_teacher
from diagonal.model.vae import LinearCodec
from jobs import pretrain

SMALL = (
    "pretrain.clips=4",
    "pretrain.codec_clips=8",
    "pretrain.updates=3",
    "pretrain.batch_size=2",
    "network.layers=1",
    "pretrain.text_updates=1",
    "pretrain.codec_width=4",
    "pairs.solver_steps=20",
)


@pytest.mark.slow
@pytest.mark.parametrize(("codec_updates", "kind"), [(0, LinearCodec), (1, AutoencoderKLWan)])
def test_the_base_model_loads_and_has_the_codec_that_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec_updates: int, kind: type
) -> None:
    monkeypatch.setattr(pretrain, "SCORED_CLIPS", 1)
    settings = (*SMALL, f"train.storage={tmp_path}", f"pretrain.codec_updates={codec_updates}")
    pretrain.work(["--preset=tiny-textured", "--name=a", *(f"--set={setting}" for setting in settings)])
    base, config = tmp_path / "a" / "base", Config.from_preset("tiny-textured", settings)
    assert isinstance(load_codec(base, config), kind)
    assert load_teacher(base, config).config.num_layers == 1
    assert read_json(base / "lineage.json")["updates"] == 3
    assert set(read_json(base / "scores.json")["teacher"]) >= {"colour", "small_direction"}
