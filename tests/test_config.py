"""The configuration tree: presets, settings, JSON in and out, and what it refuses."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from diagonal.config import Config
from diagonal.config.describe import describe, rows
from diagonal.config.presets import PRESETS
from diagonal.errors import FieldError
from diagonal.jsonfile import read_json, write_json


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_goes_through_json_unchanged(name: str, tmp_path: Path) -> None:
    config = Config.from_preset(name)
    config.save(tmp_path / "config.json")
    assert Config.load(tmp_path / "config.json") == config
    assert config.preset == name


def test_the_full_preset_is_wan_at_832x480_with_the_diagonal_and_its_window() -> None:
    config = Config.from_preset("wan-1.3b")
    assert (config.geometry.frame_tokens, config.geometry.clip_pixel_frames) == (1560, 81)
    assert (config.schedule.steps, config.schedule.shift, config.schedule.resolved_context) == ("4322222", 5.0, "reuse")
    assert (config.cache.window_frames, config.cache.sink_frames, config.model.text_tokens) == (12, 3, 512)
    assert (config.pairs.guidance, config.distill.guidance) == (6.0, 4.0)


def test_both_presets_share_everything_that_the_method_fixes() -> None:
    tiny, wan = Config.from_preset("tiny"), Config.from_preset("wan-1.3b")
    assert (tiny.schedule, tiny.cache) == (wan.schedule, wan.cache)
    assert tiny.geometry.clip_frames == wan.geometry.clip_frames
    assert tiny.pairs.kept_raw == wan.pairs.kept_raw


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("distill.lr=1e-6", 1e-6),
        ("distill.lr=1", 1.0),
        ("distill.loss.gamma=0.5", 0.5),
        ("schedule.steps=5432222", "5432222"),
        ("schedule.steps=self-forcing", "self-forcing"),
        ("distill.stage1_steps=3", "3"),
        ("schedule.context=0.25", 0.25),
        ("schedule.context=0", 0.0),
        ("schedule.context=reuse", "reuse"),
        ("schedule.context=null", None),
        ("train.checkpoint_activations=true", True),
        ("pairs.kept_raw=[1000, 500, 0]", (1000, 500, 0)),
        ("model.path=s3://bucket/a=b", "s3://bucket/a=b"),
        (" seed = 7 ", 7),
    ],
)
def test_a_setting_reaches_its_field_in_its_type(setting: str, value: object) -> None:
    config = Config.from_preset("wan-1.3b", [setting])
    reached: object = config
    for name in setting.partition("=")[0].strip().split("."):
        reached = getattr(reached, name)
    assert reached == value and type(reached) is type(value)


def test_later_settings_win_and_the_preset_stays_as_it_was() -> None:
    assert Config.from_preset("tiny", ["seed=1", "seed=2"]).seed == 2
    assert Config.from_preset("tiny").seed == 0


@pytest.mark.parametrize(
    ("setting", "field"),
    [
        ("distill.rate=1", "distill.rate"),
        ("nothing=1", "nothing"),
        ("seed.low=1", "seed.low"),
        ("=1", ""),
        ("seed", "seed"),
    ],
)
def test_an_unknown_key_is_refused_with_the_known_ones(setting: str, field: str) -> None:
    with pytest.raises(FieldError) as refused:
        Config.from_preset("tiny", [setting])
    assert field in (refused.value.value, refused.value.field)
    assert "lr" in refused.value.allowed if field == "distill.rate" else refused.value.allowed


@pytest.mark.parametrize(
    ("setting", "field"),
    [
        ("seed=1.5", "seed"),
        ("seed=true", "seed"),
        ("train.checkpoint_activations=1", "train.checkpoint_activations"),
        ("model.path=3", "model.path"),
        ("distill=3", "distill"),
        ("model.compute_dtype=float16", "model.compute_dtype"),
        ("pairs.kept_raw=7", "pairs.kept_raw"),
        ("pairs.kept_raw=[1000,0.5,0]", "pairs.kept_raw"),
        ("schedule.context=warm", "schedule.context"),
        ("schedule.context=true", "schedule.context"),
        ("schedule.context=1.5", "schedule.context"),
        ("schedule.steps=4376", "schedule.steps"),
        ("schedule.steps=4321", "schedule.context"),
        ("distill.stage1_steps=9", "distill.stage1_steps"),
        ("distill.stage1_steps=1", "distill.stage1_steps"),
        ("serve.degraded_steps=9", "serve.degraded_steps"),
        ("serve.degraded_steps=1", "serve.degraded_steps"),
        ("serve.budget_share=0", "serve.budget_share"),
        ("serve.decoder=small", "serve.decoder"),
        ("serve.decoder_layout=rows", "serve.decoder_layout"),
        ("serve.linear_dtype=int8", "serve.linear_dtype"),
        ("serve.cache_dtype=float8", "serve.cache_dtype"),
        ("decoder.updates=0", "decoder.updates"),
        ("decoder.difference_weight=-1", "decoder.difference_weight"),
        ("serve.budget_share=1.01", "serve.budget_share"),
        ("serve.max_paused_sessions=-1", "serve.max_paused_sessions"),
        ("serve.max_paused_s=0", "serve.max_paused_s"),
        ("serve.reanchor_drift=-0.1", "serve.reanchor_drift"),
        ("serve.reanchor_every_chunks=-1", "serve.reanchor_every_chunks"),
        ("cache.sink_frames=2", "cache.sink_frames"),
        ("cache.sink_frames=-3", "cache.sink_frames"),
        ("cache.window_frames=3", "cache.window_frames"),
        ("cache.window_frames=13", "cache.window_frames"),
        ("geometry.clip_frames=20", "geometry.clip_frames"),
        ("pairs.solver_steps=30", "pairs.solver_steps"),
        ("pairs.kept_raw=[1000,250,500,0]", "pairs.kept_raw"),
        ("pairs.kept_raw=[750,0]", "pairs.kept_raw"),
        ("pairs.kept_raw=[1000,250]", "pairs.kept_raw"),
        ("pairs.kept_raw=[]", "pairs.kept_raw"),
        ("pretrain.caption_drop=1", "pretrain.caption_drop"),
        ("model.text_tokens=0", "model.text_tokens"),
        ("network.layers=0", "network.layers"),
        ("ode_init.ema_decay=1", "ode_init.ema_decay"),
        ("ode_init.sink_positions=relative", "ode_init.sink_positions"),
        ("distill.lr=NaN", "distill.lr"),
        ("distill.beta2=1", "distill.beta2"),
        ("distill.stage2_updates=-1", "distill.stage2_updates"),
        ("distill.level_low=0.99", "distill.level_low"),
        ("distill.loss.motion=-1", "distill.loss.motion"),
        ("train.workers=0", "train.workers"),
        ("serve.max_sessions=0", "serve.max_sessions"),
    ],
)
def test_a_wrong_value_is_refused_by_the_name_of_its_field(setting: str, field: str) -> None:
    with pytest.raises(FieldError) as refused:
        Config.from_preset("tiny", [setting])
    assert refused.value.field.rstrip(".") == field
    assert refused.value.allowed and repr(refused.value.value) in str(refused.value)


def test_stage_one_may_have_one_step_where_the_context_is_a_level() -> None:
    assert Config.from_preset("tiny", ["schedule.context=0.0", "distill.stage1_steps=1"]).distill.stage1_steps == "1"


def test_an_unknown_preset_is_refused_with_the_known_ones() -> None:
    with pytest.raises(FieldError, match=r"preset = 'huge': allowed is one of \['tiny', 'tiny-textured', 'wan-1.3b'\]"):
        Config.from_preset("huge")


def test_an_unknown_key_in_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"distill": {"loss": {"gama": 1.0}}}))
    with pytest.raises(FieldError, match="distill.loss.gama = 1.0.*no such key.*gamma"):
        Config.load(tmp_path / "config.json")


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "\xff"])
def test_a_file_that_is_no_configuration_is_refused_by_name(text: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(FieldError):
        Config.load(path)
    with pytest.raises(FieldError, match="missing.json.*a JSON file that exists"):
        Config.load(tmp_path / "missing.json")


def test_json_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "data.json"
    write_json(path, {"ü": 1})
    with pytest.raises(TypeError):
        write_json(path, {"ü": object()})
    assert read_json(path) == {"ü": 1}

    def fail(*_: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="full"):
        write_json(path, {"ü": 2})
    assert read_json(path) == {"ü": 1}


@pytest.mark.parametrize(
    ("setting", "near"),
    [
        ("distil.lr=1", "distill.lr"),
        ("lr=1", "pretrain.lr or ode_init.lr or distill.lr or decoder.lr"),
        ("serve.lead_s=1", "serve.playout_lead_s"),
        ("sed=1", "seed"),
    ],
)
def test_an_unknown_setting_is_refused_with_the_one_that_is_near(setting: str, near: str) -> None:
    with pytest.raises(FieldError) as refused:
        Config.from_preset("tiny", [setting])
    assert f"no such key, did you mean {near}?" in refused.value.allowed


def test_an_unknown_key_of_a_file_is_refused_with_the_one_that_is_near() -> None:
    with pytest.raises(FieldError, match=r"distill.loss.gama.*no such key, did you mean distill.loss.gamma\?"):
        Config.from_dict({"distill": {"loss": {"gama": 1.0}}})


def test_the_papers_model_is_served_by_the_fast_path() -> None:
    """What the GPU's path was built for is on without a word of the user's; its gain is not measured yet."""
    serve = Config.from_preset("wan-1.3b").serve
    assert serve.compile and serve.overlap_decode and serve.attention == "auto"


def test_every_setting_has_a_meaning_and_what_is_allowed() -> None:
    assert [row.name for row in rows() if not row.meaning.endswith(".") or not row.allowed] == []
    assert len({row.name for row in rows()}) == len(rows()) > 120


def test_a_section_is_described_with_the_values_of_its_preset() -> None:
    text = describe("serve", "tiny")
    assert "serve.pixel_scale = 8\n" in text and "serve.playout_lead_s = 1.0 s\n" in text and "distill" not in text
    (row,) = [row for row in json.loads(describe("distill.loss", as_json_text=True)) if row["name"].endswith("gamma")]
    assert (row["default"], row["allowed"]) == (1.0, "a number of at least 0")


def test_an_unknown_section_or_preset_to_describe_is_refused_with_the_near_one() -> None:
    with pytest.raises(FieldError, match=r"section = 'distil'.*did you mean distill\?"):
        describe("distil")
    with pytest.raises(FieldError, match=r"preset = 'tinny'.*did you mean tiny\?"):
        describe("", "tinny")
