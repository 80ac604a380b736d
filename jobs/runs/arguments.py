"""The command line of every job, read before torch, diffusers and Ray are imported."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Sequence
from typing import NoReturn

from diagonal.config.presets import PRESETS
from diagonal.config.recipes import RECIPES
from diagonal.errors import require

COSTS = ("clip_ms", "forwards")
CODECS = ("h264", "vp9", "av1")


class JobParser(argparse.ArgumentParser):
    """Says for an unknown option which one is near."""

    def error(self, message: str) -> NoReturn:
        for word in message.split()[2:] if message.startswith("unrecognized arguments") else ():
            for near in difflib.get_close_matches(word.partition("=")[0], self._option_string_actions, 1):
                message += f" (did you mean {near}?)"
        super().error(message)


def run_parser(description: str) -> JobParser:
    """The arguments of the jobs that work on a run."""
    parser = JobParser(description=description)
    add = parser.add_argument
    add("--preset", help=f"one of {sorted(PRESETS)} (default: tiny; with --resume the run's own)")
    add("--config", help="a config.json instead of a preset")
    setting = "one setting, such as distill.lr=1e-6; may be repeated"
    add("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings", help=setting)
    add("--name", help="a name for the run (default: a new one)")
    add("--resume", action="store_true", help="resume the run --name, which exists; what is done is not done again")
    add("--from-scratch", action="store_true", help="train the embedded base model too, instead of the shipped one")
    checks = "check every setting, path and permission, show the plan, and end: needs no GPU"
    add("--dry-run", action="store_true", help=checks)
    return parser


def evaluate(argv: Sequence[str], description: str) -> argparse.Namespace:
    parser = JobParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--release", default="", help="a release folder or s3:// URI (default: the embedded one)")
    parser.add_argument(
        "--baseline",
        default="",
        help="a release that stands for self-forcing (default: the release itself, sampled by that schedule)",
    )
    parser.add_argument("--prompts", default="", help="a prompt file or folder, local or s3:// (default: the world's)")
    parser.add_argument("--held-out", action="store_true", help="only captions that no training clip showed")
    parser.add_argument("--clips", type=int, default=288, help="clips a row")
    parser.add_argument("--streams", type=int, default=0, help="long streams (default: none)")
    parser.add_argument("--seconds", type=float, default=180.0, help="seconds of each long stream")
    parser.add_argument("--turns", type=int, default=0, help="streams whose prompt changes (default: none)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-teacher", action="store_true", help="leave the teacher out, as for a model of real size")
    parser.add_argument("--parts", default="runs/evaluate", help="where finished batches are kept, local or s3://")
    parser.add_argument("--gate", action="store_true", help="write promoted or not into the release, with reasons")
    parser.add_argument("--videos", default="", help="a video, or a folder of them, to be measured instead")
    parser.add_argument("--vbench", action="store_true", help="with --videos: VBench's dimensions too")
    parser.add_argument(
        "--vbench-suite", default="", metavar="DIR", help="write VBench's standard suite; read its results"
    )
    parser.add_argument(
        "--vbench-info", default="", metavar="FILE", help="VBench's list of prompts (default: its package's)"
    )
    parser.add_argument("--vbench-samples", type=int, default=5, help="videos of each prompt of the suite")
    parser.add_argument("--vbench-baseline", default="", metavar="DIR", help="the suite of what the gate compares with")
    parser.add_argument("--out", default="docs/results/tiny", help="writes OUT.json, OUT.md and OUT-*.png")
    found = parser.parse_args(argv)
    for name, low in (("clips", 2), ("streams", 0), ("turns", 0), ("seed", 0), ("vbench_samples", 1)):
        value = getattr(found, name)
        require(low <= value <= 1_000_000, f"--{name}", value, f"a whole number from {low} to 1000000")
    require(6.0 <= found.seconds <= 3600.0, "--seconds", found.seconds, "seconds from 6 to 3600")
    require(bool(found.release) or not found.gate, "--gate", True, "with --release: the embedded one is not changed")
    needs = found.gate and not found.baseline
    require(not needs, "--baseline", "", "with --gate: a release that was trained with schedule.steps=self-forcing")
    require(bool(found.videos) or not found.vbench, "--vbench", True, "with --videos")
    return found


def search(argv: Sequence[str], description: str) -> argparse.Namespace:
    parser = JobParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--release", default="", help="a release folder or s3:// URI (default: the embedded one)")
    parser.add_argument("--steps", nargs="+", default=["4322222", "4222222", "3222222", "self-forcing"])
    parser.add_argument("--contexts", nargs="+", default=["reuse"], help="reuse, or levels in [0, 1]")
    parser.add_argument("--gammas", nargs="+", type=float, default=[], help="motion weights: a student is trained each")
    parser.add_argument("--updates", type=int, default=360, help="of each training, half of them stage 1")
    parser.add_argument("--clips", type=int, default=288)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cost", choices=COSTS, default="clip_ms", help="what the Pareto set is taken over")
    parser.add_argument("--margin", type=float, default=2.0, help="points of quality that the profile may be short of")
    parser.add_argument("--folder", default="runs/search", help="rows by configuration, which accumulate")
    parser.add_argument("--out", default="runs/search/report", help="writes OUT.json, .md, .png and OUT-profile.json")
    found = parser.parse_args(argv)
    for name, low in (("clips", 2), ("updates", 2), ("seed", 0)):
        value = getattr(found, name)
        require(low <= value <= 100_000, f"--{name}", value, f"a whole number from {low} to 100000")
    require(all(gamma >= 0 for gamma in found.gammas), "--gammas", found.gammas, "numbers of at least 0")
    require(0 < found.margin <= 100, "--margin", found.margin, "points above 0, at most 100")
    return found


def promote(argv: Sequence[str], description: str) -> argparse.Namespace:
    parser = JobParser(description=description)
    parser.add_argument("release", help="a release folder or s3:// URI")
    parser.add_argument("--reason", action="append", required=True, help="what was found; may be repeated")
    parser.add_argument("--refuse", action="store_true", help="say that it may not be served")
    return parser.parse_args(argv)


def import_student(argv: Sequence[str], description: str) -> argparse.Namespace:
    parser = JobParser(description=description)
    add = parser.add_argument
    add("--base", required=True, help="the base model: a folder, s3:// URI, or org/name on the hub; '' is the embedded")
    add("--student", required=True, help="its weights: a file, an index of shards, a folder, or hf://org/name/file")
    add("--lora", action="append", default=[], help="a file of LoRA pairs to merge into it, such as LongLive's")
    add("--decoder", default="", help="TAEHV's taew2_1.pth (or .safetensors) as its fast decoder, which then is served")
    add("--recipe", required=True, choices=sorted(RECIPES), help="how it is sampled")
    add("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings", help="one setting in its place")
    add("--preset", default="wan-1.3b", help=f"geometry and the rest: one of {sorted(PRESETS)}")
    add("--out", required=True, help="the release's folder, which does not exist yet")
    return parser.parse_args(argv)


def replay(argv: Sequence[str], description: str) -> argparse.Namespace:
    parser = JobParser(description=description)
    parser.add_argument("recording", help="the file that GET /v1/videos/{id}/recording gave")
    parser.add_argument("--release", default="", help="its release, a folder or s3:// URI ('' is the embedded one)")
    parser.add_argument("--device", default="cpu", help="such as cpu or cuda")
    parser.add_argument("--codec", default="h264", choices=CODECS)
    parser.add_argument("--scale", type=int, default=1, help="enlarge the pixels so many times")
    parser.add_argument("--out", required=True, help="the video file, .mp4")
    return parser.parse_args(argv)


def run_options(argv: Sequence[str], description: str) -> argparse.Namespace:
    return run_parser(description).parse_args(argv)


def distill_decoder(argv: Sequence[str], description: str) -> argparse.Namespace:
    parser = run_parser(description)
    parser.add_argument("--release", help="a release folder or s3:// URI (default: the run's own, or the embedded)")
    return parser.parse_args(argv)


def options_of(job: str) -> Callable[[Sequence[str], str], argparse.Namespace]:
    """What reads the command line of `jobs/JOB.py`; `FieldError` where a value is out of range."""
    own = (evaluate, search, promote, import_student, replay, distill_decoder)
    return {function.__name__: function for function in own}.get(job, run_options)
