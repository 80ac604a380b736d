"""The speed bench, small: three rates, baselines, sessions and growth, written with what a figure needs."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from diagonal.config import Config
from diagonal.evaluate.bench import page as pages
from diagonal.evaluate.bench.bench import SECTIONS, main, parse
from diagonal.evaluate.bench.client import samples, whole_boxes
from diagonal.evaluate.bench.page import Line, page, runs_in
from diagonal.evaluate.bench.random_release import RandomRelease
from diagonal.evaluate.bench.rates import percentiles, variants
from diagonal.media.encode import ChunkEncoder
from diagonal.model.architecture import TransformerLayout
from diagonal.model.flops import rollout_flops

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[3]
CPU = torch.device("cpu")
QUICK = [
    "--preset",
    "tiny",
    "--chunks",
    "2",
    "--late",
    "6",
    "--clock",
    "cpu",
    "--sessions",
    "2",
    "--media-s",
    "1.2",
    "--batching-sessions",
    "2",
    "--threads",
    "1",
]
NETWORK = TransformerLayout.of(RandomRelease(Config.from_preset("tiny"), CPU).layout)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """All sections at the embedded shapes; the fast decoder, which is the quicker one."""
    out = tmp_path_factory.mktemp("results") / "speed-tiny.json"
    assert main([*QUICK, "--decoder", "fast", "--out", str(out)]) == 0
    return out, json.loads(out.read_text())


@pytest.mark.slow
def test_three_rates_stand_side_by_side_with_their_cost_and_the_share_of_the_ceiling(
    run: tuple[Path, dict[str, Any]],
) -> None:
    found = run[1]
    config = Config.from_preset("tiny")
    dit, decoded, client = found["rates"]["dit"], found["rates"]["decoded"], found["client"]
    assert dit["forwards"] == decoded["forwards"] == 17
    assert dit["clip_tflop"] == rollout_flops(NETWORK, config) / 1e12
    assert dit["clip_fps"] == pytest.approx(81 / dit["clip_s"])
    assert client["fps"] == pytest.approx(81 / client["seconds"])
    share = dit["steady_tflop"] * dit["steady_fps"] / 12 / found["ceiling_tflops"]
    assert dit["ceiling_share"] == pytest.approx(share) and decoded["ceiling_share"] is None
    assert 0 < client["ttff_s"] < client["seconds"] and client["pixel_frames"] == 81 and client["chunks"] == 6
    assert found["rates"]["cache_bytes"] == 2 * NETWORK.layers * NETWORK.hidden * 12 * config.geometry.frame_tokens * 4
    for row in (dit, decoded, client):
        assert 0 < row["p50_ms"] <= row["p95_ms"] <= row["p99_ms"]


def test_baselines_and_the_papers_table_are_measured_in_the_same_run(run: tuple[Path, dict[str, Any]]) -> None:
    rows = {row["name"]: row for row in run[1]["schedules"]}
    assert list(rows) == [
        "self-forcing",
        "self-forcing as published",
        "5433333",
        "5432222",
        "5333333",
        "4333333",
        "4222222",
    ]
    assert [row["forwards"] for row in rows.values()] == [35, 35, 24, 20, 23, 22, 16]
    published = rows["self-forcing as published"]
    assert (published["window_frames"], published["context"]) == (21, 0.0)
    assert published["clip_tflop"] > rows["self-forcing"]["clip_tflop"] > run[1]["rates"]["dit"]["clip_tflop"]


def test_sessions_batching_and_growth_are_there_and_nothing_failed(run: tuple[Path, dict[str, Any]]) -> None:
    found = run[1]
    assert not any("not_measured" in found[part] for part in SECTIONS if isinstance(found[part], dict))
    assert found["sessions"]["limit"] == 2 and found["sessions"]["tried"]
    assert found["batching"]["ratio"] == found["batching"]["together_fps"] / found["batching"]["one_by_one_fps"]
    assert found["growth"]["name"] == "chunk 6 against chunk 3" and found["growth"]["memory_ratio"] > 0.5


def test_a_run_says_where_when_by_what_and_makes_the_page(run: tuple[Path, dict[str, Any]]) -> None:
    out, found = run
    assert {"date", "device", "torch", "diffusers", "commit", "cpus", "threads", "load", "clock"} <= found.keys()
    assert "--decoder fast" in found["command"] and found["config"]["serve"]["decoder"] == "fast"
    assert found["overlap"] is False and found["config"]["serve"]["overlap_decode"] is False
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    text = (out.parent / "speed.md").read_text()
    assert found["command"] in text and "received by a client" in text and text.count("not measured") >= 12
    assert not list(out.parent.glob("*.part"))


@pytest.mark.slow
def test_what_time_does_not_allow_is_said_and_the_page_is_written_all_the_same(tmp_path: Path) -> None:
    out = tmp_path / "speed-none.json"
    assert main([*QUICK, "--minutes", "0", "--sections", "rates", "client", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert "minutes were over" in found["rates"]["not_measured"] and found["growth"]["not_measured"] == "not asked for"
    assert (tmp_path / "speed.md").exists()


@pytest.mark.parametrize(
    "options",
    [
        ("--chunks", "1"),
        ("--late", "-3"),
        ("--sessions", "100001"),
        ("--batching-sessions", "0"),
        ("--media-s", "nan"),
        ("--minutes", "-1"),
        ("--session-minutes", "inf"),
        ("--threads", "-1"),
        ("--metrics-port", "65536"),
        ("--preset", "wan-1.3b"),
        ("--out", "/"),
        ("--set", "schedule.steps=9"),
        ("--set", "serve.playout_lead_s=-1.0"),
        ("--set", "words"),
        ("--sections", "all"),
        ("--chunks", "many"),
        ("--clock", "sundial"),
    ],
)
def test_a_wrong_option_is_refused_by_name_value_and_range_before_anything_is_built(
    options: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available() and options[0] == "--preset":
        pytest.skip("a GPU can measure it")
    try:
        status = main([*QUICK, "--out", str(tmp_path / "x.json"), *options])
    except SystemExit as refused:  # argparse's own
        status = int(str(refused.code))
    said = capsys.readouterr().err
    field, _, value = options[1].partition("=") if options[0] == "--set" else (options[0], "", options[1])
    assert status == 2 and field in said and value in said and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_floors_are_those_of_the_methods_own_table() -> None:
    """At 790 TFLOP/s: 95 FPS of a clip with the full VAE, 168 and 97 in steady state, ratios 2.17, 2.47."""
    floors = pages._Floors(Config.from_preset("wan-1.3b"), "full", 790.0)
    assert floors.clip_fps == pytest.approx(95, rel=0.02)
    assert floors.steady_fps == pytest.approx(168, rel=0.02)
    assert floors.steady_decoded_fps == pytest.approx(97, rel=0.02)
    assert (round(floors.ratio(1), 2), round(floors.ratio(2), 2)) == (2.17, 2.47)
    assert floors.cache_bytes == 3_450_470_400 and floors.first_s == pytest.approx(0.128, rel=0.02)


def test_a_row_shows_the_newest_run_that_has_it_and_never_one_in_8_bits() -> None:
    line = Line("rate", ">= 1", None, lambda run: run["client"]["fps"], decoder="fast")
    base = {"decoder": "fast", "fp8": False, "client": {"fps": 1.0}}
    runs = {
        "old": base,
        "other": {**base, "decoder": "full", "client": {"fps": 9.0}},
        "eight": {**base, "fp8": True, "client": {"fps": 8.0}},
        "empty": {**base, "client": {}},
    }
    assert pages._newest(line, runs) == ("old", 1.0)
    assert pages._newest(line, {}) == ("", None)


def test_a_short_stream_does_not_stand_for_chunk_700() -> None:
    measured = pages._grown("time_ratio")
    assert measured({"growth": {"name": "chunk 700 against chunk 10", "time_ratio": 1.01}}) == 1.01
    with pytest.raises(KeyError):
        measured({"growth": {"name": "chunk 6 against chunk 3", "time_ratio": 1.0}})


@pytest.mark.slow
def test_a_page_without_runs_has_every_row_and_measures_nothing(tmp_path: Path) -> None:
    rows = [row for row in page(runs_in(tmp_path), {}).splitlines() if re.match(r"\| (?!figure|-)", row)]
    assert len(rows) == 18 and all("not measured" in row for row in rows)


def test_the_client_counts_the_frames_of_fragments_however_they_are_cut() -> None:
    encoder = ChunkEncoder(32, 32, 16)
    pixels = torch.zeros(5, 32, 32, 3, dtype=torch.uint8).numpy()
    stream = encoder.init_segment() + encoder.encode_chunk(pixels[:2]) + encoder.encode_chunk(pixels)
    for step in (1, 7, len(stream)):
        held, found = bytearray(), list[tuple[str, bytes]]()
        for start in range(0, len(stream), step):
            held += stream[start : start + step]
            found += whole_boxes(held)
        assert [samples(box) for name, box in found if name == "moof"] == [2, 5] and not held
        assert [name for name, _ in found] == ["ftyp", "moov", "moof", "mdat", "moof", "mdat"]


def test_percentiles_are_in_milliseconds_and_of_the_sorted_times() -> None:
    found = percentiles([0.3, 0.1, 0.2])
    assert found["p50_ms"] == 200.0 and found["p99_ms"] == 300.0 and math.isclose(found["chunks"], 3)


def test_every_schedule_is_one_of_the_table_or_a_baseline() -> None:
    named = [variant.name for variant in variants(Config.from_preset("tiny", ["schedule.steps=3"]))]
    assert named[0] == "3" and "4322222" in named and len(named) == len(set(named)) == 9


def test_make_bench_gpu_asks_for_every_row_within_nine_minutes() -> None:
    """Its commands as make would run them: options that the bench takes, and time limits that add up."""
    done = subprocess.run(["make", "-n", "bench-gpu"], cwd=ROOT, timeout=60, check=True, capture_output=True, text=True)
    commands = [line for line in done.stdout.replace("\\\n", " ").splitlines() if "diagonal.evaluate.bench " in line]
    runs = [parse(line.partition("diagonal.evaluate.bench ")[2].split()) for line in commands]
    assert [run.decoder for run in runs] == ["fast", "full"] and all(run.preset == "wan-1.3b" for run in runs)
    assert {section for run in runs for section in run.sections} == set(SECTIONS) - {"batching"}
    assert runs[0].late == 700 and {"client", "sessions", "growth"} <= set(runs[0].sections)
    limits = [int(line.split()[1]) for line in commands]
    assert sum(limits) < 9 * 60 and all(60 * run.minutes < limit for run, limit in zip(runs, limits, strict=True))


HIDDEN = """
import sys
from importlib.machinery import PathFinder

class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        gone = {"ray", "moto", "boto3", "botocore", "fastapi", "pydantic", "av", "accelerate", "peft", "matplotlib"}
        return None if name.partition(".")[0] in gone else super().find_spec(name, path, target)

sys.meta_path = [Bare if finder is PathFinder else finder for finder in sys.meta_path]
from diagonal.evaluate.bench.bench import main
sys.exit(main(sys.argv[1:]))
"""


def test_the_bench_needs_neither_ray_nor_what_serves_and_without_an_encoder_says_so(tmp_path: Path) -> None:
    out = tmp_path / "speed-bare.json"
    options = [*QUICK, "--decoder", "fast", "--overlap", "--sections", "rates", "client", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, "-c", HIDDEN, *options], timeout=300, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert "av" in found["client"]["not_measured"] and found["rates"]["dit"]["clip_fps"] > 0
    assert found["config"]["serve"]["overlap_decode"] and found["rates"]["decoded"]["clip_fps"] > 0
