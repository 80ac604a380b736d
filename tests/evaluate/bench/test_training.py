"""The training-speed script: small here, and refused where it cannot measure what it is asked for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diagonal.evaluate.bench.attention import attention_rows
from diagonal.evaluate.bench.training import WAN_LAYOUT, Case, main, mean_update
from diagonal.model.architecture import TransformerLayout
from diagonal.model.attention import BlockCausal
from diagonal.model.flops import update_flops
from tests.networks import WAN_1_3B

CPU = torch.device("cpu")


@pytest.mark.slow
def test_the_tiny_preset_is_measured_and_written_with_what_a_figure_needs(tmp_path: Path) -> None:
    out = tmp_path / "results" / "speed.json"
    assert main(["--preset", "tiny", "--out", str(out), "--updates", "1", "--set", "schedule.steps=2"]) == 0
    found = json.loads(out.read_text())
    whole, critic, first, mean = found["updates"]
    assert [row["what"].partition(",")[0] for row in (whole, critic, first)] == [
        "stage 2 update",
        "stage 2 update of the critic alone",
        "stage 0 update",
    ]
    for row in (whole, critic, first):
        assert row["update_s"] > 0 and row["skipped"] == 0 and row["peak_bytes"] is None
    assert mean["update_s"] == pytest.approx(critic["update_s"] + (whole["update_s"] - critic["update_s"]) / 5)
    case = Case.of("tiny", ["schedule.steps=2"], CPU, 1)
    size = TransformerLayout.of(case.layout)
    work = update_flops(case.config, size, size, 2)
    assert whole["tflop"] == (work.generator + work.critic) / 1e12 and critic["tflop"] == work.critic / 1e12
    assert found["config"]["schedule"]["steps"] == "2" and "--set schedule.steps=2" in found["command"]
    assert {"date", "device", "torch", "cuda", "diffusers", "commit"} <= found.keys()
    page = out.with_suffix(".md").read_text()
    assert page.count("| stage ") == 4 and "not measured" in page and found["command"] in page
    assert not torch.distributed.is_initialized()


def test_the_real_size_without_a_gpu_is_refused_before_anything_is_built(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--preset", "wan-1.3b", "--out", str(tmp_path / "x.json")]) == 2
    assert "needs a GPU" in capsys.readouterr().err and not list(tmp_path.iterdir())
    assert main(["--preset", "tiny", "--out", str(tmp_path / "x.json"), "--set", "schedule.steps=9"]) == 2
    assert "schedule.steps" in capsys.readouterr().err


def test_the_layout_is_wans() -> None:
    assert TransformerLayout.of(WAN_LAYOUT) == TransformerLayout.of(WAN_1_3B)


def test_the_mean_update_learns_the_generator_seldom() -> None:
    rows = [
        {"what": "stage 2 update, eager", "update_s": 11.0, "tflop": 6.0},
        {"what": "stage 2 update of the critic alone, eager", "update_s": 1.0, "tflop": 1.0},
        {"what": "stage 0 update, eager", "update_s": 9.0, "tflop": 9.0},
    ]
    (mean,) = mean_update(rows, 5)
    assert (mean["update_s"], mean["tflop"]) == (3.0, 2.0)


def test_attention_rows_say_milliseconds_and_rate_of_what_is_seen() -> None:
    layout = TransformerLayout.of({**WAN_1_3B, "num_attention_heads": 2, "attention_head_dim": 8})
    chunkwise, everything = attention_rows(layout, BlockCausal(3, 4, 2, 1), CPU, 1)
    for row, pairs in ((chunkwise, 4 * (4 + 8 + 8)), (everything, 12 * 12)):
        assert row["tflops"] * row["ms"] * 1e9 == pytest.approx(3.5 * 4 * 16 * pairs)


HIDDEN = """
import sys
from importlib.machinery import PathFinder

class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        gone = {"ray", "moto", "boto3", "botocore", "fastapi", "pydantic", "av", "accelerate", "peft"}
        return None if name.partition(".")[0] in gone else super().find_spec(name, path, target)

sys.meta_path = [Bare if finder is PathFinder else finder for finder in sys.meta_path]
import diagonal.evaluate.bench.training
"""


@pytest.mark.slow
def test_the_script_needs_neither_ray_nor_an_s3_library_nor_what_serves_or_tests() -> None:
    done = subprocess.run([sys.executable, "-c", HIDDEN], timeout=120, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
