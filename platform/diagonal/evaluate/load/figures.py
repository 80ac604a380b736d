"""What a load on the service came to: a viewer's playback, percentiles, a summary and its table. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

Outcome = Literal["completed", "rejected", "failed"]
Percentiles = dict[str, float | int | None]
_START_CHUNKS = 2  # a player starts with so many chunks, however short they are


class Player:
    """Somebody who plays at the stream's rate from when enough is buffered, and waits whenever there is no more."""

    def __init__(self, start_buffer_s: float) -> None:
        self._start_buffer_s = start_buffer_s
        self._media_s, self._zero_s = 0.0, math.inf
        self._chunks = self.stalls = 0
        self.stall_s = 0.0

    def arrived(self, at_s: float, media_s: float) -> None:
        """A chunk with so many seconds of media came."""
        late_s = at_s - self._zero_s - self._media_s
        if late_s > 0:
            self.stalls, self.stall_s, self._zero_s = self.stalls + 1, self.stall_s + late_s, self._zero_s + late_s
        self._media_s, self._chunks = self._media_s + media_s, self._chunks + 1
        if self._zero_s == math.inf and (self._media_s >= self._start_buffer_s or self._chunks >= _START_CHUNKS):
            self._zero_s = at_s

    def position_s(self, at_s: float) -> float:
        """Seconds of media played by then."""
        return min(max(at_s - self._zero_s, 0.0), self._media_s)

    def shown_s(self, media_s: float) -> float:
        """When that place of the stream is on the screen, were there no stall from now on."""
        return self._zero_s + media_s


@dataclass
class Trace:
    """One session as its client saw it; times are seconds since the load began, `retry_after_s` is what it was told."""

    asked_s: float = 0.0
    carrier: str = "ws"
    connect_s: float = 0.0
    outcome: Outcome = "failed"
    code: str = ""
    answered_s: float | None = None
    retry_after_s: float | None = None
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    stalls: int = 0
    stall_s: float = 0.0
    prompt_chunk_s: list[float] = field(default_factory=list)
    prompt_shown_s: list[float] = field(default_factory=list)
    reconnects: int = 0

    @property
    def first_frame_s(self) -> float | None:
        """From the request to the first media bytes."""
        return self.arrivals[0][0] - self.asked_s if self.arrivals else None

    @property
    def frames(self) -> int:
        return sum(frames for _, frames in self.arrivals)

    @property
    def intervals_s(self) -> list[float]:
        return [after - before for (before, _), (after, _) in pairwise(self.arrivals)]

    @property
    def fps(self) -> float | None:
        """Pixel frames a second from the first chunk on, without it."""
        if len(self.arrivals) < 2:
            return None
        took_s = self.arrivals[-1][0] - self.arrivals[0][0]
        return (self.frames - self.arrivals[0][1]) / took_s if took_s > 0 else None


def percentiles(values: Iterable[float | None], ranks: Sequence[int] = (50, 95, 99)) -> Percentiles:
    """The nearest-rank percentiles of what is known, with how many that were, the least and the greatest."""
    known = sorted(value for value in values if value is not None)
    found: Percentiles = {"count": len(known), "least": known[0] if known else None}
    for rank in ranks:
        found[f"p{rank}"] = known[max(0, math.ceil(rank / 100 * len(known)) - 1)] if known else None
    return found | {"greatest": known[-1] if known else None}


def summarise(traces: Sequence[Trace]) -> dict[str, Any]:
    """The figures of a load."""
    rejected = [trace for trace in traces if trace.outcome == "rejected"]
    failed = [trace for trace in traces if trace.outcome == "failed"]
    admitted = [trace for trace in traces if trace.outcome != "rejected" and trace.arrivals]
    media = [trace for trace in traces if trace.arrivals]
    return {
        "sessions": len(traces),
        "completed": sum(trace.outcome == "completed" for trace in traces),
        "rejected": dict(Counter(trace.code for trace in rejected)),
        "failed": dict(Counter(trace.code for trace in failed)),
        "frames": sum(trace.frames for trace in media),
        "first_frame_s": percentiles(trace.first_frame_s for trace in admitted),
        "chunk_interval_s": percentiles(interval for trace in media for interval in trace.intervals_s),
        "session_fps": percentiles((trace.fps for trace in admitted), (1, 5, 50)),
        "stalls": sum(trace.stalls for trace in media),
        "stall_s": sum(trace.stall_s for trace in media),
        "sessions_with_stalls": sum(trace.stalls > 0 for trace in media),
        "prompt_to_chunk_s": percentiles(latency for trace in media for latency in trace.prompt_chunk_s),
        "prompt_to_screen_s": percentiles(latency for trace in media for latency in trace.prompt_shown_s),
        "rejection_s": percentiles(trace.answered_s for trace in rejected),
        "rejections_without_retry_after": sum(trace.retry_after_s is None for trace in rejected),
        "reconnects": sum(trace.reconnects for trace in traces),
    }


def table(figures: Mapping[str, Any]) -> str:
    """A load's figures as Markdown."""
    lines = [
        f"{figures['sessions']} sessions: {figures['completed']} completed, {_counted(figures['rejected'])} rejected, "
        f"{_counted(figures['failed'])} failed; {figures['frames']} frames, each checked by number, hash and place; "
        f"{figures['stalls']} stalls, {figures['stall_s']:.2f} s in all, in {figures['sessions_with_stalls']} "
        f"sessions; {figures['reconnects']} reconnects.",
        "",
        "| | p50 | p95 | p99 | greatest | count |",
        "|---|---|---|---|---|---|",
    ]
    rows = {
        "first_frame_s": "time to first frame, ms",
        "chunk_interval_s": "between chunks, ms",
        "prompt_to_chunk_s": "prompt change to its chunk, ms",
        "prompt_to_screen_s": "prompt change to the screen, ms",
        "rejection_s": "rejection, ms",
    }
    for name, title in rows.items():
        values = figures[name]
        shown = " | ".join(_ms(values[rank]) for rank in ("p50", "p95", "p99", "greatest"))
        lines.append(f"| {title} | {shown} | {values['count']} |")
    fps = figures["session_fps"]
    lines += [
        "",
        f"Frames a second of a session, its first chunk left out: least {_number(fps['least'])}, "
        f"p5 {_number(fps['p5'])}, median {_number(fps['p50'])}.",
    ]
    return "\n".join(lines)


def _counted(codes: Mapping[str, int]) -> str:
    names = ", ".join(f"{count} {code}" for code, count in sorted(codes.items()))
    return f"{sum(codes.values())}" + (f" ({names})" if names else "")


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{1000 * value:.0f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
