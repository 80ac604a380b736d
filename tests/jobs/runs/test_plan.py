"""The plan of a job: sizes and costs before it runs, and every wrong path or permission by its field."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from diagonal.config import Config
from diagonal.errors import FieldError
from diagonal.model.base_model import embedded, load_causal
from diagonal.storage import Folder
from jobs.runs.arguments import run_options
from jobs.runs.plan import plan, run_job
from jobs.runs.run import Run, open_run
from tests.jobs.conftest import OpenRun
from tests.model.folders import edit_json, write_hollow_weights, write_tokenizer

WAN = {
    "_class_name": "WanTransformer3DModel",
    "attention_head_dim": 128,
    "cross_attn_norm": True,
    "ffn_dim": 8960,
    "freq_dim": 256,
    "image_dim": None,
    "in_channels": 16,
    "num_attention_heads": 12,
    "num_layers": 30,
    "out_channels": 16,
    "patch_size": [1, 2, 2],
    "text_dim": 4096,
}
TEXT = {"d_model": 4096, "num_heads": 64, "d_kv": 64, "d_ff": 10240, "vocab_size": 256384, "num_layers": 24}
CODEC = {
    "_class_name": "AutoencoderKLWan",
    "base_dim": 96,
    "z_dim": 16,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "temperal_downsample": [False, True, True],
}


def write_part(folder: Path, config: dict[str, Any]) -> None:
    """A network's folder: its config, and weights of which the header alone is on disk."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    if folder.name != "tokenizer":
        write_hollow_weights(folder)


@pytest.fixture
def wan(tmp_path: Path) -> Path:
    """A folder with the configurations of Wan 1.3B, and weights in name alone."""
    base = tmp_path / "wan"
    for part, content in (("transformer", WAN), ("text_encoder", TEXT), ("vae", CODEC), ("tokenizer", {})):
        write_part(base / part, content)
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n\n")
    (base / "tokenizer" / "config.json").unlink()
    write_tokenizer(base / "tokenizer")
    return base


def wan_run(wan: Path, *settings: str) -> Run:
    paths = {"train.storage": "runs", "model.path": "wan", "pairs.prompts": "prompts.txt"}
    chosen = [*(f"{key}={wan.parent / name}" for key, name in paths.items()), *settings]
    arguments = ["--preset=wan-1.3b", "--name=a", "--dry-run", *(f"--set={setting}" for setting in chosen)]
    return open_run(run_options(arguments, ""))


def test_each_embedded_preset_finds_its_own_model_and_its_initialised_student(tmp_path: Path) -> None:
    for preset, model, size in (("tiny", "tiny", "32x32"), ("tiny-textured", "textured", "48x48")):
        storage = f"--set=train.storage={tmp_path}"
        run = open_run(run_options([f"--preset={preset}", f"--name={model}", "--dry-run", storage], ""))
        assert run.base == embedded("base", model) and run.initial_student == str(embedded("ode_init", model))
        assert not run.makes_student and f"clips: {size}" in "\n".join(plan(run, count_prompts=True))


def test_a_plan_tells_shapes_parameters_costs_storage_and_memory(wan: Path) -> None:
    text = "\n".join(plan(wan_run(wan), count_prompts=True))
    assert "832x480, 81 pixel frames; latents (16, 21, 60, 104), 32760 tokens in 7 chunks of 4680" in text
    assert "17 forwards a clip" in text and "0: 1, 0.9375, 0.8333, 0.3571" in text
    assert "generator and critic 1,419.0 M each" in text
    assert "2 prompts" in text
    assert "1024 trajectories in 256 shards, 0 there; 40 steps, 80 forwards and 22.6 PFLOP each" in text
    assert "in all: " in text and "pairs (1024) 25.8 GB" in text
    assert "stage2: 1000 updates of 64 samples, 17 forwards a rollout; 101 PFLOP an update" in text
    assert "if 8 GPUs reach 40% of 790 TFLOP/s each: an assumption" in text
    assert "memory of stage 2: " in text
    assert not (wan.parent / "runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "changes", "said"),
    [
        ("text_encoder", {"num_layers": 25}, r"model\.path: text_encoder missing_keys = \['encoder\.block\.24"),
        ("transformer", {"num_layers": 29}, r"model\.path: transformer unexpected_keys = \['blocks\.29"),
        ("vae", {"num_res_blocks": 3}, r"model\.path: vae missing_keys"),
    ],
)
def test_a_plan_refuses_weights_that_do_not_fill_their_network(
    wan: Path, part: str, changes: dict[str, Any], said: str
) -> None:
    edit_json(wan / part / "config.json", **changes)
    with pytest.raises(FieldError, match=said):
        plan(wan_run(wan))


def test_a_plan_refuses_a_gpu_that_is_too_small(wan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Small:
        total_memory = 24_000_000_000

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Small)
    with pytest.raises(FieldError, match="memory of stage 0 on each GPU .* at most 24.0 GB"):
        plan(wan_run(wan))


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("model.path=", r"model\.path = '': allowed is a folder of the base model"),
        (
            "model.path=/nowhere",
            r"model\.path = '/nowhere': allowed is a folder in diffusers' layout, with transformer/",
        ),
        (
            "distill.init=/nowhere",
            r"distill\.init = '/nowhere': allowed is a folder that holds transformer/config\.json",
        ),
        ("distill.init=/nowhere/a.pt", r"distill\.init = '/nowhere/a\.pt': allowed is a \.pt file that exists"),
        ("distill.teacher=/nowhere", r"distill\.teacher = '/nowhere'"),
        (f"distill.teacher={embedded('base')}", r"distill\.teacher: transformer\.text_dim"),
        ("distill.prompts=/nowhere.txt", r"'/nowhere\.txt'"),
        ("pairs.prompts=", r"pairs\.prompts = '': allowed is a prompt file"),
        ("train.storage=/proc/runs", r"train\.storage = '/proc': allowed is a folder that can be written"),
        ("distill.batch_size=7", r"distill\.batch_size = 7: allowed is at least train\.workers = 8"),
        ("train.shard_group=3", r"train\.shard_group = 3: allowed is 0 or a divisor of train\.workers = 8"),
    ],
)
def test_what_a_job_would_stumble_over_is_refused_before_it_starts(wan: Path, setting: str, said: str) -> None:
    with pytest.raises(FieldError, match=said):
        plan(wan_run(wan, setting), count_prompts=True)


def test_a_students_file_is_opened_before_it_is_counted_on(small_run: OpenRun, tmp_path: Path) -> None:
    weights = dict(load_causal(embedded("ode_init"), Config.from_preset("tiny")).state_dict())
    name = next(iter(weights))
    torch.save({"generator": weights}, tmp_path / "whole.pt")
    torch.save({"generator": {key: value for key, value in weights.items() if key != name}}, tmp_path / "less.pt")
    (tmp_path / "pointer.pt").write_text("version https://git-lfs.github.com/spec/v1\n")
    plan(small_run("a", f"distill.init={tmp_path / 'whole.pt'}"))
    with pytest.raises(FieldError, match=name.replace(".", r"\.")):
        plan(small_run("b", f"distill.init={tmp_path / 'less.pt'}"))
    with pytest.raises(FieldError, match="this is a Git LFS pointer"):
        plan(small_run("c", f"distill.init={tmp_path / 'pointer.pt'}"))


@pytest.mark.slow
def test_a_teacher_of_another_size_is_planned_with_its_own_parameters(wan: Path) -> None:
    large = wan.parent / "large" / "transformer"
    write_part(large, {**WAN, "num_layers": 40, "num_attention_heads": 40, "ffn_dim": 13824})
    text = "\n".join(plan(wan_run(wan, f"distill.teacher={large.parent}")))
    assert "teacher 14,288" in text and "1,419.0 M each" in text


def test_keys_that_a_configuration_leaves_out_are_those_of_its_class(wan: Path) -> None:
    whole = plan(wan_run(wan))
    sizes = ("in_channels", "patch_size", "num_attention_heads", "ffn_dim", "text_dim", "num_layers", "_class_name")
    for part, content in (("vae", CODEC), ("transformer", WAN)):
        few = {key: value for key, value in content.items() if key in sizes}
        (wan / part / "config.json").write_text(json.dumps(few))
    assert [line for line in plan(wan_run(wan)) if "memory" in line] == [line for line in whole if "memory" in line]


@pytest.mark.slow
def test_a_plan_on_s3_asks_the_storage(bucket: str, wan: Path) -> None:
    storage = f"train.storage=s3://{bucket}/runs"
    assert plan(wan_run(wan, storage))[0] == f"run a in s3://{bucket}/runs/a"
    assert Folder(f"s3://{bucket}").files() == {}
    with pytest.raises(FieldError, match="train.storage"):
        plan(wan_run(wan, "train.storage=s3://no-such-bucket/runs"))


def test_a_plan_says_what_is_done_already(small_run: OpenRun) -> None:
    run = small_run("a")
    run.folder.write("stage1/lineage.json", b"{}")
    lines = plan(run)
    assert "  stage1: done" in lines
    assert any(line.startswith("  stage2: 2 updates of 2 samples") for line in lines)


@pytest.mark.parametrize(
    ("last", "planned"),
    [
        ("pairs", {"pairs"}),
        ("ode_init", {"pairs", "ode_init"}),
        ("release", {"ode_init", "stage1", "stage2", "release"}),
    ],
)
def test_a_plan_is_of_the_job_that_shows_it(small_run: OpenRun, last: str, planned: set[str]) -> None:
    """The embedded student is given, so that a distillation makes no pairs; a job for pairs does."""
    lines = plan(small_run("a"), last)
    stages = ("pairs", "ode_init", "stage1", "stage2", "release")
    assert {stage for stage in stages if any(line.startswith(f"  {stage}: ") for line in lines)} == planned
    storage = next(line for line in lines if line.startswith("  storage: "))
    assert ("pairs (5)" in storage) == ("pairs" in planned)


def test_a_dry_run_checks_and_writes_nothing_and_runs_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def body(run: Run) -> None:
        raise AssertionError("a dry run ran")

    run_job(["--dry-run", f"--set=train.storage={tmp_path / 'runs'}"], "", "release", body)
    assert capsys.readouterr().out.splitlines()[-1] == "dry run: everything checked, nothing written"
    assert list(tmp_path.iterdir()) == []


def test_a_plan_shows_the_first_prompts_their_lengths_and_what_is_cut(wan: Path) -> None:
    file = wan.parent / "prompts.txt"
    file.write_text("a red circle\na&nbsp;red circle moves left\n" + "a red circle " * 40 + "\n")
    lines = "\n".join(plan(wan_run(wan, "model.text_tokens=30"), count_prompts=True))
    assert "\n    4 tokens: a red circle\n    6 tokens: a red circle moves left\n" in lines
    assert "the first 3: 4 to 121 tokens; 1 are longer than the 30 that the text encoder reads, and are cut" in lines
    assert "warning: fewer than the" in lines
