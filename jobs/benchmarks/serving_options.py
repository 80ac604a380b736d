"""What serving options cost on the embedded world: oracle scores, PSNR from equal noise, bytes, decoding time."""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import diagonal
from diagonal.evaluate.quality.report import shown
from diagonal.evaluate.quality.serving_options import Rows, chunk_decode_ms, codec_psnr_db, compare_options
from diagonal.jsonfile import write_json
from diagonal.model.base_model import FAST_DECODER
from diagonal.model.release import Release
from jobs.runs.run import main, say

MEASURES = ("colour", "shape", "direction", "speed", "steadiness", "smoothness", "saturation")
COMPARED: dict[str, Rows] = {
    "fast-decoder": {"full": ["serve.decoder=full"], "fast": ["serve.decoder=fast"]},
    "fp8": {
        "bfloat16 or float32, as configured": [],
        "linear layers in fp8": ["serve.linear_dtype=fp8"],
        "K/V cache in fp8": ["serve.cache_dtype=fp8"],
        "both": ["serve.linear_dtype=fp8", "serve.cache_dtype=fp8"],
    },
}


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=sorted(COMPARED))
    parser.add_argument("--release", help="a release folder or s3:// URI (default: the embedded one)")
    parser.add_argument("--clips", type=int, default=288, help="clips a row (default: 288, every scene twice)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", help="writes OUT.json and OUT.md (default: docs/results/WHAT)")
    return parser.parse_args(argv)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The report: each row's figures, and where and how they were taken."""
    release, load = Release.load(options.release), os.getloadavg()[0]
    rows = compare_options(release, COMPARED[options.what], options.clips, options.seed, say)
    if options.what == "fast-decoder":
        for row in rows:
            varied = release.with_settings(row["settings"])
            row["original_psnr_db"] = round(codec_psnr_db(varied, options.clips, options.seed), 2)
            row["chunk_ms"] = chunk_decode_ms(varied.decoder(), varied.config)
    given = f" --release {options.release}" if options.release else ""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "torch": torch.__version__,
        "diagonal": diagonal.__version__,
        "machine": f"{platform.machine()}, CPU, {torch.get_num_threads()} thread(s)",
        "load": f"{load:.1f} before, {os.getloadavg()[0]:.1f} after, {os.cpu_count()} cores",
        "command": f"python jobs/benchmarks/serving_options.py {options.what}{given} --clips {options.clips} "
        f"--seed {options.seed}",
        "clips": options.clips,
        "seed": options.seed,
        "release": release.name,
        "rows": rows,
        "decoder": release.manifest["lineage"].get(FAST_DECODER),
    }


def markdown(what: str, report: dict[str, Any]) -> str:
    """The report as a table, with what is needed to reproduce it."""
    columns = [
        ("PSNR to the first row, dB", "psnr_db"),
        ("PSNR to the world's pixels, dB", "original_psnr_db"),
        ("a chunk, ms (median / least)", "chunk_ms"),
        ("K/V of a session, bytes", "kv_bytes_per_session"),
    ]
    told = [(title, key) for title, key in columns if key in report["rows"][0]]
    heads = [title for title, _ in told] + list(MEASURES)
    lines = [
        f"# Serving options: {what}",
        "",
        f"{report['date']}, {report['machine']}, load {report['load']}, torch {report['torch']}; release "
        f"`{report['release']}`, {report['clips']} clips a row from equal noise, seed {report['seed']}. Reproduce: "
        f"`{report['command']}`. In brackets the 95 % interval.",
        "",
        "| | " + " | ".join(heads) + " |",
        "|---" * (len(heads) + 1) + "|",
    ]
    for row in report["rows"]:
        values = ["{median} / {least}".format(**row[key]) if key == "chunk_ms" else row[key] for _, key in told]
        cells = ["same" if value is None else str(value) for value in values]
        cells += [shown(row["scores"][measure]) for measure in MEASURES]
        lines.append("| " + " | ".join([row["name"], *cells]) + " |")
    if decoder := report["decoder"]:
        lines += [
            "",
            f"Fast decoder: {decoder['parameters']:,} parameters, {decoder['flops_per_latent_frame']:,} "
            f"FLOPs a latent frame; {decoder['updates']} updates over {decoder['clips']} clips of the student; "
            f"PSNR to the full decoder on clips that it has not seen: {decoder['psnr_db']} dB.",
        ]
    return "\n".join(lines) + "\n"


def work(argv: Sequence[str]) -> None:
    options = arguments(argv)
    torch.set_num_threads(1)  # so that a chunk's time is that of one core
    report, out = measure(options), options.out or f"docs/results/{options.what}"
    write_json(f"{out}.json", report)
    Path(f"{out}.md").write_text(markdown(options.what, report))
    say(f"report {out}.md")


if __name__ == "__main__":
    main("jobs.benchmarks.serving_options")
