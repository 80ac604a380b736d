"""Seconds, model-flops utilisation and memory of training updates on one device, random weights, real shapes, no Ray.

    python -m diagonal.evaluate.bench.training --preset wan-1.3b --out docs/results/training-speed.json

Needs torch, diffusers and transformers. Generator, critic and teacher are sharded over a mesh of one rank: FSDP's hooks
run as they do on many, gathering copies shards within the device, nothing is sent; so the time of communication, and
only that, is not in these figures.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers import WanTransformer3DModel
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from diagonal.config import Config
from diagonal.config.presets import PRESETS
from diagonal.errors import FieldError, require
from diagonal.evaluate.bench.attention import Row, attention_rows, synchronize
from diagonal.evaluate.bench.training_page import write_report
from diagonal.jsonfile import read_json
from diagonal.model.architecture import TransformerLayout
from diagonal.model.attention import stage0_mask
from diagonal.model.base_model import embedded
from diagonal.model.dit import CausalWan
from diagonal.model.flops import update_flops
from diagonal.training.distill import DistillStep, PromptBatch
from diagonal.training.loop import Figures
from diagonal.training.memory import estimate
from diagonal.training.ode_init import PairBatch
from diagonal.training.parallel import ParallelPlan
from diagonal.training.stage import build_stage

PEAK_TFLOPS = 790.0  # bfloat16 of an H100 or H200: an 8192-cubed product measured 788
WAN_LAYOUT = {  # transformer/config.json of Wan2.1-T2V-1.3B
    "patch_size": [1, 2, 2],
    "num_attention_heads": 12,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 8960,
    "num_layers": 30,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
    "image_dim": None,
    "added_kv_proj_dim": None,
    "rope_max_seq_len": 1024,
}
Layout = Mapping[str, Any]
Update = Callable[[int], Figures]


@dataclasses.dataclass(frozen=True)
class Case:
    """What is measured: a configuration, a layout for all three networks, a device, and how often."""

    config: Config
    layout: Layout
    device: torch.device
    updates: int
    peak_tflops: float | None

    @classmethod
    def of(cls, preset: str, settings: Sequence[str], device: torch.device, updates: int) -> Case:
        """The preset with one sample an update, which trains the generator and the critic every time."""
        require(
            preset == "tiny" or device.type == "cuda",
            "preset",
            preset,
            "tiny on a machine without a CUDA device: the real size needs a GPU of about 100 GB",
        )
        one = (
            "train.workers=1",
            "distill.batch_size=1",
            "distill.micro_batch_size=1",
            "ode_init.batch_size=1",
            "ode_init.micro_batch_size=1",
            "distill.generator_every=1",
        )
        config = Config.from_preset(preset, (*one, *settings))
        layout: Layout = WAN_LAYOUT
        if preset == "tiny":
            found = read_json(embedded("base") / "transformer" / "config.json")
            layout = {name: value for name, value in found.items() if not name.startswith("_")}
        return cls(config, layout, device, updates, PEAK_TFLOPS if device.type == "cuda" else None)

    def rows(self, compiled: bool) -> list[Row]:
        """Stage 2's whole update, its critic's alone, and stage 0's."""
        config = self.config
        seldom = config.with_settings(["distill.generator_every=1000000"])
        size = TransformerLayout.of(self.layout)
        work, regression = update_flops(config, size, size, 2), update_flops(config, size, size, 0)
        mode = "compiled" if compiled else "eager"
        text = self._text()
        pairs = self._pairs(text)
        with one_rank_mesh(self.device) as mesh:
            step = self._step(2, mesh, compiled, text)
            whole = self._measured(f"stage 2 update, {mode}", work.generator + work.critic, 2, _of_prompts(step, text))
            alone = dataclasses.replace(step, config=seldom)
            critic = self._measured(
                f"stage 2 update of the critic alone, {mode}", work.critic, 2, _of_prompts(alone, text)
            )
            del step, alone
            step0 = self._step(0, mesh, compiled, text)
            first = self._measured(
                f"stage 0 update, {mode}",
                regression.generator,
                0,
                lambda number: step0(number, dataclasses.replace(pairs, samples=[number - 1])),
            )
        return [whole, critic, first]

    def _measured(self, what: str, flops: int, stage: int, update: Update) -> Row:
        """One update to warm up (and compile), then the mean of the others; their peak memory beside the estimate's."""
        seconds, skipped = [], 0.0
        for number in range(1, self.updates + 2):
            if number == 2 and self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)
            synchronize(self.device)
            started_s = time.perf_counter()
            skipped += update(number)["skipped"]
            synchronize(self.device)
            seconds.append(time.perf_counter() - started_s)
        mean_s = sum(seconds[1:]) / self.updates
        planned = estimate(self.config, self.layout, self.layout, 1, stage, mesh_of_one=True)
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None
        return {
            "what": what,
            "first_s": seconds[0],
            "update_s": mean_s,
            "each_s": seconds[1:],
            "tflop": flops / 1e12,
            "utilisation": flops / mean_s / self.peak_tflops / 1e12 if self.peak_tflops else None,
            "peak_bytes": peak,
            "estimated_bytes": planned.total_bytes,
            "skipped": skipped,  # updates whose gradients were not finite: their optimizer did not step
        }

    def _load(self, role: str) -> Any:
        """A network of random weights, drawn on the device by a seed."""
        kind = CausalWan if role in ("generator", "reference") else WanTransformer3DModel
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), torch.device(self.device):
            return kind(**self.layout).eval()

    def _step(self, stage: int, mesh: DeviceMesh, compiled: bool, text: torch.Tensor) -> Any:
        """The stage's step, built as a job builds it."""
        parallel = dataclasses.replace(ParallelPlan.of(self.config), compile=compiled)
        built = build_stage(self.config, stage, self.device, self._load, negative=-text, mesh=mesh, parallel=parallel)
        return built[1].step

    def _text(self) -> torch.Tensor:
        """Numbers in the place of an encoded prompt `[1, l, n]`: the text encoder is not part of these figures."""
        draws = torch.Generator(self.device).manual_seed(0)
        shape = (1, self.config.model.text_tokens, self.layout["text_dim"])
        return torch.randn(shape, generator=draws, device=self.device)

    def _pairs(self, text: torch.Tensor) -> PairBatch:
        """A trajectory of noise in the place of the teacher's."""
        draws = torch.Generator(self.device).manual_seed(1)
        shape = (1, len(self.config.pairs.kept_raw), *self.config.geometry.clip_shape()[1:])
        states = torch.randn(shape, generator=draws, device=self.device)
        return PairBatch(states, torch.linspace(1.0, 0.0, shape[1], device=self.device), text, [])


def _of_prompts(step: DistillStep, text: torch.Tensor) -> Update:
    return lambda number: step(number, PromptBatch(text, [number - 1]))


@contextmanager
def one_rank_mesh(device: torch.device) -> Iterator[DeviceMesh]:
    """A process group and a mesh of this process alone."""
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh(device.type, (1,), mesh_dim_names=("shard",))
    finally:
        dist.destroy_process_group()


def mean_update(rows: Sequence[Row], every: int) -> list[Row]:
    """What the average update costs where the generator learns in every `every`-th, from the two that were measured."""
    found = {row["what"]: row for row in rows}
    means = []
    for name, whole in found.items():
        critic = found.get(name.replace("update,", "update of the critic alone,"))
        if name.startswith("stage 2 update,") and critic is not None:
            share = {key: critic[key] + (whole[key] - critic[key]) / every for key in ("update_s", "tflop")}
            means.append({"what": f"{name}: mean, generator every {every}th (computed)", **share})
    return means


def measure(case: Case, modes: Sequence[str]) -> dict[str, list[Row]]:
    rows: list[Row] = []
    for mode in modes:
        rows += case.rows(compiled=mode == "compiled")
        if case.device.type == "cuda":
            torch.cuda.empty_cache()
    rows += mean_update(rows, PRESETS[case.config.preset].distill.generator_every)
    pattern = dataclasses.replace(stage0_mask(case.config), window_positions=False)  # kernels alone: nothing is turned
    return {
        "updates": rows,
        "attention": attention_rows(TransformerLayout.of(case.layout), pattern, case.device, case.updates),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write; 2 where the machine or a setting does not allow it."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="wan-1.3b", choices=sorted(PRESETS))
    parser.add_argument("--out", type=Path, required=True, help="a .json; the table is written beside it as .md")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings")
    parser.add_argument(
        "--modes", nargs="+", choices=("eager", "compiled"), default=["eager", "compiled"] if cuda else ["eager"]
    )
    parser.add_argument("--updates", type=int, default=5)
    given = parser.parse_args(arguments)
    try:
        require(given.updates >= 1, "updates", given.updates, "a whole number of at least 1")
        case = Case.of(given.preset, given.settings, torch.device("cuda" if cuda else "cpu"), given.updates)
    except FieldError as error:
        print(error, file=sys.stderr)
        return 2
    command = " ".join(["python -m diagonal.evaluate.bench.training", *(arguments or sys.argv[1:])])
    print(write_report(given.out, command, case.config, case.device, measure(case, given.modes)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
