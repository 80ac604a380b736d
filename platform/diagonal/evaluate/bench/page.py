"""How measured speed is written: a JSON a run, a plot, and `speed.md` of all runs in a folder, each row by its floor.

python -m diagonal.evaluate.bench.page docs/results
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diagonal.config import Config
from diagonal.evaluate.bench.random_release import RandomRelease
from diagonal.evaluate.bench.rates import Variant, variants
from diagonal.files import write_text
from diagonal.jsonfile import write_json
from diagonal.model.architecture import TransformerLayout
from diagonal.model.flops import chunk_flops, rollout_flops

Found = Mapping[str, Any]
CEILING_TFLOPS = 790.0  # where no run measured it: bfloat16 of an H100 or H200
PREFIX, PAGE, NOTES = "speed-", "speed.md", "speed-notes.json"


def write(out: Path, found: Found, config: Config) -> None:
    """Write a run's JSON, and its plot where matplotlib is there; each whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, {**found, "config": config.to_dict()})
    _plot(out.with_suffix(".png"), found)


def write_page(folder: Path) -> None:
    """Write `speed.md` anew from the runs beside it."""
    write_text(folder / PAGE, page(runs_in(folder), _notes(folder)))


def runs_in(folder: Path) -> dict[str, Found]:
    """The runs in a folder by file name, oldest first."""
    files = [path for path in folder.glob(f"{PREFIX}*.json") if path.name != NOTES]
    runs = {path.name: json.loads(path.read_text()) for path in files}
    return dict(sorted(runs.items(), key=lambda item: item[1]["date"]))


def _notes(folder: Path) -> dict[str, str]:
    """Reasons for a row's distance from its floor, by the row's figure; written by hand after profiling."""
    path = folder / NOTES
    return dict(json.loads(path.read_text())) if path.exists() else {}


def summary(found: Found) -> str:
    """The three rates side by side, for the terminal."""
    rates, client = found["rates"], found["client"]
    lines = [f"{found['preset']}, {found['device']}, torch {found['torch']}, {_how(found)}"]
    for name, row in (("DiT only", rates.get("dit")), ("DiT + VAE", rates.get("decoded"))):
        lines.append(_rate_line(name, row, rates))
    lines.append(
        f"received by a client  not measured: {client['not_measured']}"
        if "not_measured" in client
        else f"received by a client  clip {client['fps']:7.1f} fps, "
        f"first media byte after {client['ttff_s'] * 1e3:.0f} ms"
    )
    return "\n".join(lines)


def _how(found: Found) -> str:
    how = [
        "compiled" if found["compile"] else "eager",
        *(["decoding overlapped"] if found.get("overlap") else []),
        *(["8-bit layers and cache"] if found["fp8"] else []),
        f"{found['clock']} clock",
    ]
    return f"decoder {found['decoder']}, {', '.join(how)}, ceiling {found['ceiling_tflops']:.4g} TFLOP/s"


def _rate_line(name: str, row: Found | None, rates: Found) -> str:
    if row is None:
        return f"{name:21} not measured: {rates.get('not_measured', '')}"
    return (
        f"{name:21} clip {row['clip_fps']:7.1f} fps, steady {row['steady_fps']:7.1f} fps, chunk p50 "
        f"{row['p50_ms']:.1f} p95 {row['p95_ms']:.1f} p99 {row['p99_ms']:.1f} ms, {row['forwards']} forwards, "
        f"{row['clip_tflop']:.4g} TFLOP"
    )


@dataclass(frozen=True)
class Line:
    """One row of a page: its figure, what is aimed at, what arithmetic allows, and where a run holds the measurement.

    `measured` gives a number of a run that is of the row's kind, or raises `KeyError`; `form` writes numbers.
    """

    figure: str
    target: str
    floor: float | None
    measured: Callable[[Found], float]
    form: str = ".1f"
    decoder: str = ""


def page(runs: Mapping[str, Found], notes: Mapping[str, str]) -> str:
    """The whole page, from the runs alone."""
    out = [
        "# Speed",
        "",
        "Generated from the JSON files beside it by `python -m diagonal.evaluate.bench.page docs/results`; nothing "
        "is estimated. Floors are arithmetic: operations over the ceiling of one large matrix product that the run "
        f"measured, or {CEILING_TFLOPS:g} TFLOP/s where there is no run.",
        "",
        "## 832x480, Wan2.1-1.3B's shapes, one GPU",
        "",
        "One command on a bare GPU machine: `make bench-gpu`.",
        "",
    ]
    big = {name: run for name, run in runs.items() if run["preset"] == "wan-1.3b" and run["cuda"] != "None"}
    out += _table(_gpu_lines(_ceiling(big)), big, notes)
    small = {name: run for name, run in runs.items() if run["preset"] == "tiny" and "CPU" in run["device"]}
    out += ["", "## The embedded model on a CPU", "", "`make bench`; 32x32 pixels, random weights.", ""]
    out += _table(_cpu_lines(), small, notes)
    for name, run in runs.items():
        out += ["", *_run_lines(name, run)]
    return "\n".join([*out, ""])


def _ceiling(runs: Mapping[str, Found]) -> float:
    return float(list(runs.values())[-1]["ceiling_tflops"]) if runs else CEILING_TFLOPS


def _table(lines: Sequence[Line], runs: Mapping[str, Found], notes: Mapping[str, str]) -> list[str]:
    rows = ["| figure | target | floor | measured | in | why not the floor |", "|---|---|---|---|---|---|"]
    for line in lines:
        name, value = _newest(line, runs)
        floor = "" if line.floor is None else format(line.floor, line.form)
        shown = "not measured" if value is None else format(value, line.form)
        rows.append(f"| {line.figure} | {line.target} | {floor} | {shown} | {name} | {notes.get(line.figure, '')} |")
    return rows


def _newest(line: Line, runs: Mapping[str, Found]) -> tuple[str, float | None]:
    for name, run in reversed(list(runs.items())):
        if line.decoder in ("", run["decoder"]) and not run["fp8"]:
            try:
                return name, line.measured(run)
            except (KeyError, TypeError):  # the run did not come to that row
                continue
    return "", None


def _schedule(run: Found, name: str) -> float:
    """The clip's seconds under another schedule over those of the run's own."""
    row = next(row for row in run["schedules"] if row["name"] == name)
    return float(row["clip_s"] / run["rates"]["dit"]["clip_s"])


def _gpu_lines(ceiling: float) -> list[Line]:
    """The targets of the project, each with its floor at that ceiling."""
    config = Config.from_preset("wan-1.3b")
    floors = {kind: _Floors(config, kind, ceiling) for kind in ("fast", "full")}
    fast, full = floors["fast"], floors["full"]
    return [
        Line(
            "client-received FPS, 81-frame clip, fast decoder",
            ">= 62",
            fast.clip_fps,
            _of("client", "fps"),
            decoder="fast",
        ),
        Line(
            "client-received FPS, 81-frame clip, full VAE", ">= 45", full.clip_fps, _of("client", "fps"), decoder="full"
        ),
        Line("DiT-only FPS, steady state", ">= 110", fast.steady_fps, lambda run: run["rates"]["dit"]["steady_fps"]),
        Line(
            "DiT + VAE FPS, steady state, full VAE",
            "",
            full.steady_decoded_fps,
            lambda run: run["rates"]["decoded"]["steady_fps"],
            decoder="full",
        ),
        Line("time to first frame, fast decoder, s", "<= 0.16", fast.first_s, _of("client", "ttff_s"), ".3f", "fast"),
        Line(
            "self-forcing, same window, over 4322222 (DiT time of a clip)",
            ">= 2.0",
            full.ratio(1),
            lambda run: _schedule(run, "self-forcing"),
            ".2f",
        ),
        Line(
            "self-forcing as published (21 frames) over 4322222",
            ">= 2.2",
            full.ratio(2),
            lambda run: _schedule(run, "self-forcing as published"),
            ".2f",
        ),
        Line(
            "real-time sessions without a stall, fast decoder and encoding",
            ">= 4",
            fast.steady_decoded_fps / 16,
            _of("sessions", "sessions"),
            ".1f",
            "fast",
        ),
        Line(
            "K/V of one session at window 12, GB",
            "3.4505",
            full.cache_bytes / 1e9,
            lambda run: run["rates"]["cache_bytes"] / 1e9,
            ".4f",
        ),
        Line("chunk 700 over chunk 10, time", "<= 1.03", 1.0, _grown("time_ratio"), ".3f"),
        Line("chunk 700 over chunk 10, memory", "<= 1.03", 1.0, _grown("memory_ratio"), ".3f"),
        Line(
            "share of the measured matmul ceiling, DiT, steady",
            "",
            1.0,
            lambda run: run["rates"]["dit"]["ceiling_share"],
            ".2f",
        ),
    ]


def _cpu_lines() -> list[Line]:
    clip = Config.from_preset("tiny").geometry
    media_s = clip.clip_pixel_frames / clip.pixel_fps
    return [
        Line(
            "5-second clip through DiT and decoder, times real time",
            ">= 10",
            None,
            lambda run: media_s / run["rates"]["decoded"]["clip_s"],
            decoder="full",
        ),
        Line("client-received over DiT + decoder FPS of the same clip", "", 1.0, _received_share, ".2f", "full"),
        Line(
            "real-time sessions without a stall, in process with encoding",
            ">= 8",
            None,
            _of("sessions", "sessions"),
            ".0f",
            "full",
        ),
        Line("sharing forwards over time slicing, 8 sessions", ">= 1.5", None, _of("batching", "ratio"), ".2f", "full"),
        Line("chunk 700 over chunk 10, time", "<= 1.03", 1.0, _grown("time_ratio"), ".3f"),
        Line("chunk 700 over chunk 10, memory", "<= 1.03", 1.0, _grown("memory_ratio"), ".3f"),
    ]


def _of(section: str, name: str) -> Callable[[Found], float]:
    return lambda run: run[section][name]


def _grown(name: str) -> Callable[[Found], float]:
    """Of the comparison that the row names: a shorter run does not stand for it."""
    return lambda run: {run["growth"]["name"]: run["growth"][name]}["chunk 700 against chunk 10"]


def _received_share(run: Found) -> float:
    """Only where both were taken by the same clock: a client knows that on the wall alone."""
    return float({run["clock"]: run["client"]["fps"] / run["rates"]["decoded"]["clip_fps"]}["wall"])


class _Floors:
    """What arithmetic allows at a ceiling: operations over it, nothing overlapped, nothing waited for."""

    def __init__(self, config: Config, decoder: str, ceiling: float) -> None:
        self._config, self._rate = config, ceiling * 1e12
        self._release = RandomRelease(config.with_settings([f"serve.decoder={decoder}"]), torch.device("meta"))
        self._layout = TransformerLayout.of(self._release.layout)
        self._first, self._later = self._release.decode_flops()

    @property
    def clip_fps(self) -> float:
        geometry = self._config.geometry
        decoded = self._first + (geometry.clip_chunks - 1) * self._later
        return geometry.clip_pixel_frames * self._rate / (rollout_flops(self._layout, self._config) + decoded)

    @property
    def _steady(self) -> int:
        last = self._config.geometry.clip_chunks
        return self._config.schedule.forwards(last) * chunk_flops(self._layout, self._config, last)

    @property
    def steady_fps(self) -> float:
        return self._config.geometry.chunk_pixel_frames(1) * self._rate / self._steady

    @property
    def steady_decoded_fps(self) -> float:
        return self._config.geometry.chunk_pixel_frames(1) * self._rate / (self._steady + self._later)

    @property
    def first_s(self) -> float:
        chunk = self._config.schedule.forwards(0) * chunk_flops(self._layout, self._config, 0)
        return (self._release.text_flops() + chunk + self._first) / self._rate

    def ratio(self, variant: int) -> float:
        """The clip's operations under a baseline over those of the configured schedule."""
        return self._clip(variants(self._config)[variant]) / rollout_flops(self._layout, self._config)

    def _clip(self, variant: Variant) -> int:
        own = self._config.with_settings([f"cache.window_frames={variant.window_frames}"])
        return rollout_flops(self._layout, own, variant.schedule(self._config))

    @property
    def cache_bytes(self) -> int:
        """Keys and values of every layer for every token of the window, two bytes each."""
        tokens = self._config.cache.window_frames * self._config.geometry.frame_tokens
        return 2 * self._layout.layers * self._layout.hidden * tokens * 2


def _run_lines(name: str, run: Found) -> list[str]:
    """One run: how it was made, then its rates."""
    lines = [
        f"## {name}",
        "",
        f"{run['date']}, {run['device']} ({run['cpus']} CPUs, {run['threads']} threads, load {run['load']:.1f}), torch "
        f"{run['torch']}, CUDA {run['cuda']}, diffusers {run['diffusers']}, commit {run['commit'][:12]}; {_how(run)}. "
        "Command:",
        "",
        f"    {run['command']}",
        "",
        "| schedule, what | window | forwards | TFLOP a clip | clip FPS | steady FPS (chunk) | p50 / p95 / p99 ms | "
        "share of ceiling |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rates = run.get("rates", {})
    found = [rates.get("dit"), rates.get("decoded"), *_rows(run.get("schedules"))]
    lines += [_rate_row(row) for row in found if row is not None]
    client = run.get("client", {})
    if "fps" in client:
        lines.append(
            f"| received by a client (wall clock) | | | | {client['fps']:.1f} | | {client['p50_ms']:.1f} / "
            f"{client['p95_ms']:.1f} / {client['p99_ms']:.1f} | |"
        )
    parts = {part: of for part, of in run.items() if isinstance(of, dict)}
    left = [f"{part}: {of['not_measured']}" for part, of in parts.items() if "not_measured" in of]
    return [*lines, "", f"Not measured: {'; '.join(left)}."] if left else lines


def _rows(found: object) -> list[Found]:
    return [row for row in found if "clip_fps" in row] if isinstance(found, list) else []


def _rate_row(row: Found) -> str:
    share = row.get("ceiling_share")
    return (
        f"| {row['name']}, {row['what']} | {row['window_frames']} | {row['forwards']} | {row['clip_tflop']:.4g} | "
        f"{row['clip_fps']:.1f} | {row['steady_fps']:.1f} ({row['steady_chunk']}) | {row['p50_ms']:.1f} / "
        f"{row['p95_ms']:.1f} / {row['p99_ms']:.1f} | {'' if share is None else format(share, '.2f')} |"
    )


def _plot(path: Path, found: Found) -> None:
    """Clip rates by schedule as bars, where matplotlib is at hand."""
    rows = [
        *_rows([found["rates"][part] for part in ("dit", "decoded") if part in found.get("rates", {})]),
        *_rows(found.get("schedules")),
    ]
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return
    if not rows:
        return
    figure = Figure(figsize=(8, 0.5 * len(rows) + 1), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    names = [f"{row['name']}, {row['what']}" for row in rows][::-1]
    axes.barh(names, [row["clip_fps"] for row in rows][::-1])
    axes.set_xlabel(f"pixel frames a second, one clip ({found['preset']}, {found['device']})")
    part = path.with_suffix(".png.part")
    figure.savefig(part, format="png")
    part.replace(path)


if __name__ == "__main__":
    write_page(Path(sys.argv[1]))
