"""Model-free figures of any video files: motion, flicker, saturation, sharpness, and how they drift over time."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import av
import numpy as np

from diagonal.errors import FieldError, require
from diagonal.evaluate.intervals import interval
from diagonal.evaluate.quality.report import shown, table
from diagonal.media.measures import Pixels, measure
from diagonal.storage import Folder

REFERENCE_S = 180.0  # slopes are told for so long a video
SUFFIXES = (".mp4", ".webm", ".mkv", ".mov", ".avi")
WINDOW_S = 2.0


def windows(path: Path, window_s: float = WINDOW_S) -> Iterator[tuple[float, Pixels]]:
    """The middle, in seconds, and the frames `[f, h, w, 3]` of window after window; one is in memory at a time. What is
    left at the end counts if it is at least half a window, or all there is."""
    try:
        with av.open(str(path)) as container:
            require(bool(container.streams.video), "video", str(path), "a file with a video stream")
            rate = float(container.streams.video[0].average_rate or 0)
            require(rate > 0, "video", str(path), "a file that says its frame rate")
            size, start, images = max(2, round(window_s * rate)), 0, list[Pixels]()
            for frame in container.decode(video=0):
                images.append(np.asarray(frame.to_ndarray(format="rgb24"), np.uint8))
                if len(images) == size:
                    yield (start + size / 2) / rate, np.stack(images)
                    start, images = start + size, []
            if images and (2 * len(images) >= size or start == 0):
                yield (start + len(images) / 2) / rate, np.stack(images)
    except av.error.FFmpegError as error:
        raise FieldError("video", str(path), f"a file that can be decoded ({error})") from error


def slopes(times_s: Sequence[float], rows: Sequence[Sequence[float]], until_s: float) -> list[float]:
    """Least-squares slope of each video's figure over its first `until_s` seconds, times 180 s; none where fewer than
    two windows lie in them."""
    count = sum(time <= until_s for time in times_s)
    if count < 2:
        return []
    times = np.asarray(times_s[:count])
    return [round(float(np.polyfit(times, np.asarray(row[:count]), 1)[0]) * REFERENCE_S, 9) + 0.0 for row in rows]


def measure_video(path: Path) -> dict[str, Any]:
    """Means of the four measures, and the slope of each, times 180 s, where two windows are there."""
    found = [(time_s, asdict(measure(pixels))) for time_s, pixels in windows(path)]
    require(bool(found), "video", str(path), "a file with at least one frame")
    times, last = [time_s for time_s, _ in found], 1.0 + found[-1][0]
    values = {name: [one[name] for _, one in found] for name in found[0][1]}
    slope = {name: slopes(times, [row], last) for name, row in values.items()}
    return {
        "windows": len(found),
        "means": {name: float(np.mean(row)) for name, row in values.items()},
        "slopes": {name: some[0] for name, some in slope.items() if some},
    }


def measure_all(uri: str, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Figures of one video, or of every video in a folder, local or s3://; a remote one is copied while it is read."""
    folder, names = _files(uri)
    found = {}
    for name in names:
        with tempfile.TemporaryDirectory(prefix="diagonal-video-") as scratch:
            path = folder.path / name if folder.is_local else Path(scratch) / Path(name).name
            if not folder.is_local:
                folder.get(name, path)
            found[name] = measure_video(path)
        say(f"{name}: " + ", ".join(f"{key} {value:.4f}" for key, value in found[name]["means"].items()))
    return {"videos": found, "source": uri, "summary": _summary(found)}


def _files(uri: str) -> tuple[Folder, list[str]]:
    whole = Folder(uri)
    if whole.name.endswith(SUFFIXES) and whole.parent.has(whole.name):
        return whole.parent, [whole.name]
    names = [name for name in whole.files() if name.endswith(SUFFIXES)]
    require(bool(names), "--videos", uri, f"a video, or a folder of videos, ending in one of {SUFFIXES}")
    return whole, names


def _summary(found: Mapping[str, Any]) -> dict[str, Any]:
    """Means over videos with intervals; slopes of those that were long enough."""
    parts: dict[str, Any] = {}
    for part in ("means", "slopes"):
        rows = [one[part] for one in found.values() if one[part]]
        parts[part] = {name: interval([row[name] for row in rows]).to_dict() for name in (rows[0] if rows else {})}
    return parts


def markdown(report: Mapping[str, Any]) -> str:
    """The figures as tables, and of VBench what was run and what was missing."""
    names = list(report["summary"]["means"])
    rows = [
        [
            name,
            *(f"{one['means'][key]:.4f}" for key in names),
            *(f"{one['slopes'][key]:+.4f}" if key in one["slopes"] else "too short" for key in names),
        ]
        for name, one in report["videos"].items()
    ]
    spread = report["summary"]["slopes"]
    rows.append(
        [
            "mean of videos",
            *(shown(report["summary"]["means"][key], 4) for key in names),
            *(shown(spread[key], 4, sign="+") if key in spread else "too short" for key in names),
        ]
    )
    lines = [
        f"# Figures of {len(report['videos'])} videos",
        "",
        f"{report['date']}, {report['machine']}. Reproduce: `{report['command']}`. From pixels alone, in windows of "
        f"{WINDOW_S:g} s; slopes are times {REFERENCE_S:g} s. Brackets are 95 % intervals over videos.",
        "",
        *table(["", *names, *(f"{name}, slope" for name in names)], rows),
    ]
    if "vbench" in report:
        found = report["vbench"]
        lines += [
            "## VBench",
            "",
            *table(["dimension", "score"], [[k, f"{v:.4f}"] for k, v in found["scores"].items()]),
            *(f"- {name}: not run, {why}" for name, why in found["missing"].items()),
        ]
    return "\n".join(lines) + "\n"
