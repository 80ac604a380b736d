"""`docs/results/serving.md` from the JSON files beside it: what the service is asked to hold, and what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diagonal.evaluate.load.figures import table
from diagonal.files import write_text
from diagonal.jsonfile import read_json

PAGE = "docs/results/serving.md"
KINDS = {
    "in-process": "Through the service against in one process",
    "overload": "Ten times the load that is admitted",
    "load": "A load that is admitted",
}
MISSING = "not measured"
Found = Mapping[str, Any]


def write_page(path: Path) -> str:
    """Write the page, whole or not at all; returns it."""
    text = page([read_json(file) for file in sorted(path.parent.glob(f"{path.stem}-*.json"))])
    write_text(path, text)
    return text


def page(measurements: list[Found]) -> str:
    """The page of these measurements; what was not measured says so."""
    lines = [
        "# What the service holds",
        "",
        "Written by `python -m jobs.benchmarks.load --report` from the JSON files beside this page.",
        "",
        "| asked for | measured |",
        "|---|---|",
    ]
    by_kind = {kind: [found for found in measurements if found["kind"] == kind] for kind in KINDS}
    lines += [f"| {asked} | {measured} |" for asked, measured in _claims(by_kind)]
    for kind, title in KINDS.items():
        lines += ["", f"## {title}"]
        for found in by_kind[kind]:
            lines += ["", _how(found), "", _body(found)]
        if not by_kind[kind]:
            lines += ["", f"{MISSING.capitalize()}."]
    return "\n".join(lines) + "\n"


def _claims(by_kind: Mapping[str, list[Found]]) -> list[tuple[str, str]]:
    """What issue 4 asks for, and the newest figure of each."""
    newest = {kind: max(found, key=lambda one: str(one["date"])) if found else None for kind, found in by_kind.items()}
    against, over = newest["in-process"], newest["overload"]
    ratio = f"{against['fps_ratio']:.3f} ({against['clip_fps_ratio']:.3f} of the whole clip)" if against else MISSING
    later = f"{1000 * against['first_frame_later_s']:+.0f} ms" if against else MISSING
    figures = over["figures"] if over else {}
    return [
        ("frames a second that a client receives, over those in one process: at least 0.9", ratio),
        ("time to first frame: at most 150 ms after that in one process", later),
        (
            "overloaded, the slowest admitted session: at least 16 frames a second",
            _value(figures, "session_fps", "least", "{:.1f}"),
        ),
        (
            "overloaded, time to first frame of the admitted: as without (p95)",
            f"{_value(figures, 'first_frame_s', 'p95', '{:.0f} ms', 1000)}, "
            f"{_value(over or {}, 'calm_first_frame_s', 'p95', '{:.0f} ms', 1000)} without"
            if over
            else MISSING,
        ),
        ("overloaded, the rest refused within 100 ms (p95)", _value(figures, "rejection_s", "p95", "{:.0f} ms", 1000)),
        ("after the overload: back within 10 s", _recovered(over)),
    ]


def _value(found: Found, name: str, rank: str, form: str, unit: float = 1.0) -> str:
    value = found.get(name, {}).get(rank)
    return MISSING if value is None else form.format(unit * value)


def _recovered(over: Found | None) -> str:
    if over is None:
        return MISSING
    return "never" if over["recovered_s"] is None else f"{over['recovered_s']:.1f} s"


def _how(found: Found) -> str:
    return (
        f"{found['date']}, {found['machine']} (load of five minutes before: {found['load']}), "
        f"commit {str(found['commit'])[:12]}:\n\n    {found['command']}"
    )


def _body(found: Found) -> str:
    if found["kind"] == "in-process":
        return against_text(found)
    text = table(found["figures"])
    return f"{overload_text(found)}\n\n{text}" if found["kind"] == "overload" else text


def overload_text(found: Found) -> str:
    """How much was asked for, and how it ended."""
    calm = _value(found, "calm_first_frame_s", "p95", "{:.0f} ms", 1000)
    return (
        f"{found['capacity']} sessions are admitted at once, with a time to first frame of {calm} (p95) while they "
        f"come one by one; {found['rate']:.1f} a second came for {found['last_s']:.0f} s. After the last of them a "
        f"new session had its first frame within {_recovered(found)}."
    )


def against_text(found: Found) -> str:
    """Both ways side by side."""
    lines = ["| | in one process | through the service |", "|---|---|---|"]
    rows = {
        "fps": ("frames a second from the first chunk on, without it, median", "{:.1f}", 1.0),
        "clip_fps": ("frames a second of the whole clip, from the request on, median", "{:.1f}", 1.0),
        "first_frame_s": ("time to first frame, median, ms", "{:.0f}", 1000.0),
    }
    for name, (title, form, unit) in rows.items():
        shown = " | ".join(form.format(unit * found[way][name]["p50"]) for way in ("in_process", "service"))
        lines.append(f"| {title} | {shown} |")
    ratios = f"{found['fps_ratio']:.3f}, of the whole clip {found['clip_fps_ratio']:.3f}"
    lines += [
        "",
        f"{found['clips']} unpaced clips of {found['frames']} frames in each of {found['rounds']} rounds, "
        f"both ways in turns; generation pinned to CPU {found['engine_cpu']}, all else to the others. Median "
        f"ratio of the rounds: {ratios}.",
    ]
    return "\n".join(lines)
