"""Speed of a preset at its real shapes, random weights, on one device: no Ray, no network.

    python -m diagonal.evaluate.bench --preset wan-1.3b --out docs/results/speed-h200.json

Prints three rates side by side: the network alone (DiT only), with its decoder (DiT + VAE), and what a client in
another process receives as fragmented MP4 over a loopback socket; then the schedules and baselines over the same
kernels, how many sessions play at once, and whether chunk 700 costs more than chunk 10. Sections are measured in order
of importance and written one by one; what did not fit into `--minutes` says so. Needs torch, diffusers and
transformers; PyAV for the client's rate.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from diagonal.config import Config
from diagonal.config.presets import PRESETS
from diagonal.engine.engine import Engine
from diagonal.engine.model_runner import ModelRunner
from diagonal.errors import FieldError, require
from diagonal.evaluate.bench.page import summary, write, write_page
from diagonal.evaluate.bench.random_release import RandomRelease
from diagonal.evaluate.bench.rates import Variant, ceiling_tflops, decoded_row, growth_row, network_row, variants
from diagonal.evaluate.bench.training_page import environment
from diagonal.metrics import MetricsBackend, NullBackend, exporter

Row = dict[str, Any]
SECTIONS = ("rates", "client", "schedules", "sessions", "batching", "growth")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
_MOST = 100_000  # of chunks or sessions
_POOL_SESSIONS = 2  # of the hand-driven streams: a window of 21 frames fits


@dataclass
class Bench:
    """One run: what is measured, where it is written, and when it must end."""

    config: Config
    device: torch.device
    options: argparse.Namespace
    ends_s: float
    found: Row = field(default_factory=dict)
    metrics: MetricsBackend = field(default_factory=NullBackend)

    def run(self) -> Row:
        """Every section that fits, each written as soon as it is there."""
        self.release = RandomRelease(self.config, self.device)
        self.clock = CLOCKS[self.options.clock]
        self.found["ceiling_tflops"] = ceiling_tflops(self.device, self.clock)
        for name in SECTIONS:
            if name not in self.options.sections:
                self._note(name, "not asked for")
            elif time.monotonic() > self.ends_s:
                self._note(name, f"the {self.options.minutes:g} minutes were over")
            else:
                self._section(name, getattr(self, f"_{name}"))
            write(self.options.out, self.found, self.config)
        write_page(self.options.out.parent)
        return self.found

    def _section(self, name: str, measure: Callable[[], object]) -> None:
        print(f"{name} ...", flush=True)
        started_s = time.monotonic()
        try:
            self.found[name] = measure()
        except (RuntimeError, ImportError, OSError) as error:  # one row that fails leaves the others
            self._note(name, f"{type(error).__name__}: {error}".partition("\n")[0])
        self.found.setdefault("seconds", {})[name] = time.monotonic() - started_s
        self._free()

    def _free(self) -> None:
        """Let go of what nobody holds; peak memory counts from here."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def _note(self, name: str, reason: str) -> None:
        self.found[name] = {"not_measured": reason}

    def _maker(self) -> ModelRunner:
        return ModelRunner(self.release, self.device, _POOL_SESSIONS)

    def _rates(self) -> Row:
        """The configured schedule: the network alone, then an engine of one stream, with its decoder; its memory."""
        rest = (self.release, variants(self.config)[0], self.found["ceiling_tflops"], self.options.chunks, self.clock)
        alone = network_row(self._maker(), *rest)
        self._free()
        engine = self._engine(1, 1)
        decoded = decoded_row(engine, *rest)
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None
        return {
            "dit": alone,
            "decoded": decoded,
            "cache_bytes": engine.stats().cache_capacity_bytes,
            "peak_bytes": peak,
            "decode_tflop": [flops / 1e12 for flops in self.release.decode_flops()],
        }

    def _schedules(self) -> list[Row]:
        """The network alone under every other schedule, in the same run."""
        maker, rows = self._maker(), []
        for variant in variants(self.config)[1:]:
            if time.monotonic() > self.ends_s:
                rows.append({"name": variant.name, "not_measured": f"the {self.options.minutes:g} minutes were over"})
                continue
            steady = max(2, self.options.chunks // 4)
            rows.append(network_row(maker, self.release, variant, self.found["ceiling_tflops"], steady, self.clock))
        return rows

    def _client(self) -> Row:
        from diagonal.evaluate.bench.stream import received_row

        return received_row(self._engine(1, 1), self.config.geometry.clip_pixel_frames, self.config.serve.pixel_scale)

    def _sessions(self) -> Row:
        from diagonal.evaluate.bench.sessions import most_sessions

        limit = self.options.sessions
        engine = self._engine(limit, self.config.serve.batch_sessions)
        ends_s = min(self.ends_s, time.monotonic() + self.options.session_minutes * 60)
        return most_sessions(engine, limit, self.options.media_s, self.config.serve.pixel_scale, ends_s)

    def _batching(self) -> Row:
        """Sessions that share forwards against the same number, one after the other."""
        from diagonal.evaluate.bench.sessions import throughput

        count, chunks = self.options.batching_sessions, max(2, self.options.chunks // 2)
        rates = {}
        for name, batch in (("one_by_one_fps", 1), ("together_fps", count)):
            rates[name] = throughput(self._engine(count, batch), count, chunks, self.clock)
        return {"sessions": count, **rates, "ratio": rates["together_fps"] / rates["one_by_one_fps"]}

    def _growth(self) -> Row:
        config = self.config
        variant = Variant(config.schedule.steps, config.schedule.steps, config.cache.window_frames)
        return growth_row(self._maker(), variant, min(10, self.options.late // 2), self.options.late, self.clock)

    def _engine(self, sessions: int, batch: int) -> Engine:
        """An engine of so many slots that makes batches of at most so many, warmed up until nothing is compiled."""
        release = self.release.under([f"serve.max_sessions={sessions}", f"serve.batch_sessions={batch}"])
        engine = Engine(release, device=self.device, metrics=self.metrics, encode_prompts_async=True)
        engine.warm_up()
        return engine


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="wan-1.3b", choices=sorted(PRESETS))
    parser.add_argument("--out", type=Path, required=True, help="a .json; speed.md and a plot are written beside it")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings")
    parser.add_argument("--decoder", choices=("full", "fast"), default="full")
    parser.add_argument("--fp8", action="store_true", help="8-bit linear layers and K/V cache")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    parser.add_argument(
        "--overlap",
        action=argparse.BooleanOptionalAction,
        default=torch.cuda.is_available(),
        help="decode a chunk beside the next one's forwards (a CPU has nothing to gain from it)",
    )
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--chunks", type=int, default=24, help="steady chunks of a rate")
    parser.add_argument("--late", type=int, default=700, help="the chunk that is compared with chunk 10")
    parser.add_argument("--sessions", type=int, default=8, help="the most viewers that are tried")
    parser.add_argument("--batching-sessions", type=int, default=8)
    parser.add_argument("--media-s", type=float, default=8.0, help="what each viewer watches")
    parser.add_argument("--minutes", type=float, default=8.5)
    parser.add_argument("--session-minutes", type=float, default=2.0)
    parser.add_argument(
        "--clock",
        choices=sorted(CLOCKS),
        default="wall",
        help="cpu: the process's own time, on a CPU that others use too; not of client and sessions",
    )
    parser.add_argument(
        "--metrics-port",
        type=int,
        default=0,
        help="show the engine's metrics to Prometheus at 127.0.0.1 meanwhile; 0 does not",
    )
    parser.add_argument("--threads", type=int, default=0, help="of torch on a CPU; 0 is its default")
    return parser.parse_args(arguments)


def config_of(options: argparse.Namespace) -> Config:
    """The preset with what the options ask for; `FieldError` on a wrong one."""
    require(options.clock == "wall" or not torch.cuda.is_available(), "--clock", options.clock, "wall on a GPU")
    for name in ("chunks", "late", "sessions", "batching_sessions"):
        value = getattr(options, name)
        require(2 <= value <= _MOST, f"--{name.replace('_', '-')}", value, f"a whole number from 2 to {_MOST}")
    for name, most in (("media_s", 3600.0), ("minutes", 1440.0), ("session_minutes", 1440.0)):
        value, least = getattr(options, name), 0.1 if name == "media_s" else 0.0
        require(least <= value <= most, f"--{name.replace('_', '-')}", value, f"a number from {least:g} to {most:g}")
    for name, limit in (("threads", os.cpu_count() or 1), ("metrics_port", 65_535)):
        value = getattr(options, name)
        require(0 <= value <= limit, f"--{name.replace('_', '-')}", value, f"a whole number from 0 to {limit}")
    out: Path = options.out
    require(out.suffix == ".json" and not out.is_dir(), "--out", str(out), "the name of a file that ends with .json")
    settings = [
        f"serve.decoder={options.decoder}",
        f"serve.compile={str(options.compile).lower()}",
        f"serve.overlap_decode={str(options.overlap).lower()}",
    ]
    if torch.cuda.is_available():
        settings += ["serve.attention=auto"]
    if options.fp8:
        settings += ["serve.linear_dtype=fp8", "serve.cache_dtype=fp8"]
    if options.preset != "tiny":
        settings += ["serve.batch_sessions=1"]  # one stream of this size keeps a device busy
    return Config.from_preset(options.preset, (*settings, *options.settings))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write; 2 where a setting is wrong or the machine does not allow it."""
    started_s, options = time.monotonic(), parse(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        config = config_of(options)
        require(
            options.preset == "tiny" or device.type == "cuda",
            "--preset",
            options.preset,
            "tiny on a machine without a CUDA device",
        )
    except FieldError as error:
        print(error, file=sys.stderr)
        return 2
    if options.threads:
        torch.set_num_threads(options.threads)
    bench = Bench(config, device, options, started_s + 60 * options.minutes)
    bench.found.update(environment(device))
    given = [part.replace(str(options.out.parent), "docs/results") for part in arguments or sys.argv[1:]]
    bench.found |= {
        "command": " ".join(["python -m diagonal.evaluate.bench", *given]),
        "preset": options.preset,
        "attention": config.serve.attention,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        **{name: getattr(options, name) for name in ("decoder", "fp8", "compile", "overlap", "clock")},
    }
    with exporter(options.metrics_port) if options.metrics_port else nullcontext(NullBackend()) as bench.metrics:
        print(summary(bench.run()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
