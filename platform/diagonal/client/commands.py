"""What each client verb does. Files are there whole; of a stream that was cut off, what came is kept as FILE.part."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diagonal.cli import DONE, FAILED, FULL, NO_ANSWER, REFUSED
from diagonal.client import verify as chains
from diagonal.client.client import DiagonalClient, Video
from diagonal.client.errors import BrokenStreamError, DiagonalError, RefusedError, ServerFullError, VideoFailedError
from diagonal.client.files import part_of, write_kept
from diagonal.client.realtime import Realtime
from diagonal.errors import FieldError
from diagonal.mp4 import read_fragment, split

_BAR_CELLS = 30
_EXIT_CODES = {ServerFullError: FULL, RefusedError: REFUSED, VideoFailedError: FAILED, BrokenStreamError: FAILED}


def run(options: argparse.Namespace, client: Callable[..., DiagonalClient] | None = None) -> int:
    """Run the verb that `options.run` names; returns its exit code. An error is one line."""
    verb = globals()[options.run.partition(":")[2]]
    try:
        with (client or DiagonalClient)(options.url, api_key=options.key) as opened:
            verb(opened, options)
        return DONE
    except DiagonalError as error:
        wait = f" (try again in {error.retry_after_s:g} s)" if error.retry_after_s else ""
        name = f" [request {error.request_id}]" if error.request_id and error.status >= 500 else ""
        _say(f"diagonal: {error}{wait}{name}")
        return _EXIT_CODES.get(type(error), NO_ANSWER)


class Progress:
    """One line on a terminal: chunks, frames a second, time left; elsewhere nothing, which a log is better for."""

    def __init__(self, frames: int | None = None) -> None:
        self.frames, self._started_s = frames, time.monotonic()
        self._shows = sys.stderr.isatty()

    def show(self, done: int, chunks: int) -> None:
        if self._shows:
            print(
                f"\r\x1b[K{self.line(done, chunks, time.monotonic() - self._started_s)}",
                end="",
                file=sys.stderr,
                flush=True,
            )

    def line(self, done: int, chunks: int, took_s: float) -> str:
        """`done` pixel frames in `chunks` chunks came in so many seconds."""
        rate_fps = done / took_s if took_s > 0 else 0.0
        text = f"chunk {chunks}, {rate_fps:.1f} fps"
        if self.frames is None:
            return f"{done} frames, {text}"
        filled = _BAR_CELLS * done // self.frames
        left = f", {(self.frames - done) / rate_fps:.0f} s left" if rate_fps and done < self.frames else ""
        return f"[{'#' * filled}{'.' * (_BAR_CELLS - filled)}] {done}/{self.frames} frames, {text}{left}"

    def end(self) -> None:
        if self._shows:
            print(file=sys.stderr)


def generate(client: DiagonalClient, options: argparse.Namespace) -> None:
    """Make a whole video and save it."""
    _check_target(options.out)
    started_s = time.monotonic()
    video = client.create(options.prompt, pacing="none", **_asked(options))
    progress = Progress(video.frames)
    try:
        done = client.wait(video.id, timeout_s=options.timeout, progress=lambda now: _show(progress, now))
        client.save(video.id, options.out)
    except KeyboardInterrupt:
        client.delete(video.id)  # nobody will fetch it
        raise
    finally:
        progress.end()
    took_s = time.monotonic() - started_s
    rate = f"in {took_s:.1f} s ({done.frames_done / took_s:.1f} frames a second)"
    _say(f"{options.out}: {done.frames_done} frames, {done.size}, {done.fps} fps, {rate}")


def stream(client: DiagonalClient, options: argparse.Namespace) -> None:
    """Write a video's bytes while it is made; `--out -` is standard output, for a player."""
    _check_target(options.out)
    made = options.video is None
    pacing = {"pacing": options.pacing}
    video = client.create(options.prompt, **_asked(options), **pacing) if made else client.get(options.video)
    _say(f"{video.id}: {video.frames or 'endless'} frames, {video.size}, {video.fps} fps")
    try:
        _write(options.out, _timed(client.stream(video.id), Progress(video.frames)))
    except KeyboardInterrupt:
        if made:
            client.delete(video.id)
        raise


def watch(client: DiagonalClient, options: argparse.Namespace) -> None:
    """Stream a live session whose prompt changes with each line that is typed meanwhile.

    Without a length it lasts until Ctrl-C, which ends it whole; /pause, /resume and /stop do what they say.
    """
    _check_target(options.out)
    asked = _asked(options)
    endless = options.seconds is None and options.frames is None
    with client.realtime(options.prompt, endless=endless, **asked) as live, _stopped_by_interrupt(live):
        _say(
            f"{live.opening.request_id}: {live.opening.frames or 'endless'} frames, {live.opening.fps} fps; "
            "type a prompt, /pause, /resume or /stop"
        )
        threading.Thread(target=_steer_live, args=(live, options.transition_chunks), daemon=True).start()
        _write(options.out, _timed(_told(live), Progress(live.opening.frames)))


def steer(client: DiagonalClient, options: argparse.Namespace) -> None:
    """Change the prompt of a video that is being made."""
    event = client.interact(options.video, options.prompt, transition_chunks=options.transition_chunks)
    _say(f"queued as {event}: it applies at the next chunk")


def pause(client: DiagonalClient, options: argparse.Namespace) -> None:
    client.pause(options.video)
    _say("paused: `diagonal resume` continues it")


def resume(client: DiagonalClient, options: argparse.Namespace) -> None:
    client.resume(options.video)
    _say("resumed")


def delete(client: DiagonalClient, options: argparse.Namespace) -> None:
    client.delete(options.video)
    _say("deleted")


def share(client: DiagonalClient, options: argparse.Namespace) -> None:
    """Print a new link of a video; or the links that there are; or end one."""
    if options.revoke:
        client.revoke(options.video, options.revoke)
        return _say("revoked")
    if options.list:
        viewers = client.viewers(options.video)
        return _print(viewers, map(_viewer_row, viewers), options)
    made = client.share(options.video, role=options.role, name=options.name, expires_in_s=options.expires_in_s)
    _print(made, [made["watch_url"]], options)
    _say(f"{made['role']} link {made['id']}, good until {_clock(made)}; for an HLS player: {made['playlist_url']}")


def models(client: DiagonalClient, options: argparse.Namespace) -> None:
    """One line a model."""
    answer = client.models()
    rows = (f"{one['id']:24}  {one['fps']} fps  {' '.join(one['sizes'])}" for one in answer["data"])
    _print(answer, rows, options)


def list_videos(client: DiagonalClient, options: argparse.Namespace) -> None:
    """One line a video."""
    videos = client.list(options.limit)
    _print([video.answer for video in videos], map(_row, videos), options)


def show(client: DiagonalClient, options: argparse.Namespace) -> None:
    """One field a line."""
    video = client.get(options.video)
    _print(video.answer, (f"{name:20}  {value}" for name, value in video.answer.items()), options)


def verify(client: DiagonalClient, options: argparse.Namespace) -> None:
    """Check a recorded stream against its signed chain, and name every chunk that is not as it was."""
    chains.run(client, options)


def _row(video: Video) -> str:
    frames = f"{video.frames_done}/{video.frames or 'endless'} frames"
    return f"{video.id}  {video.status:12}  {frames:20}  {video.size:10}  {video.error or ''}".rstrip()


def _viewer_row(viewer: Mapping[str, Any]) -> str:
    return f"{viewer['id']}  {viewer['role']:5}  {_clock(viewer)}  {viewer['name']}"


def _clock(viewer: Mapping[str, Any]) -> str:
    """When a link ends, here."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(viewer["expires_at"]))


def _print(answer: Any, rows: Iterable[str], options: argparse.Namespace) -> None:
    print(json.dumps(answer, indent=2) if options.json else "\n".join(rows))


def typed_lines() -> Iterator[str]:
    """Lines of standard input as they come; read below Python's buffer, whose lock would outlive its thread."""
    rest = b""
    while data := os.read(sys.stdin.fileno(), 4096):
        *lines, rest = (rest + data).split(b"\n")
        yield from (line.decode(errors="replace").strip() for line in lines)
    yield rest.decode(errors="replace").strip()


def _steer_live(live: Realtime, transition_chunks: int) -> None:
    actions = {"/pause": live.pause, "/resume": live.resume, "/stop": live.stop}
    for line in typed_lines():
        if line in actions:
            actions[line]()
        elif line:
            live.change(line, transition_chunks=transition_chunks)


def _told(live: Realtime) -> Iterator[bytes]:
    """The session's bytes; says what became of each change."""
    refused: set[str] = set()
    for chunk in live:
        yield chunk.data
        if chunk.started_events:
            _say(f"new prompt from frame {chunk.first_frame} on")
        for event, change in list(live.changes.items()):
            if change.error and event not in refused:
                refused.add(event)
                _say(f"refused: {change.error}")


@contextmanager
def _stopped_by_interrupt(live: Realtime) -> Iterator[None]:
    """The first Ctrl-C ends the session, and what was under way still comes; the second one interrupts."""

    def stop(*_: Any) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        threading.Thread(target=live.stop, daemon=True).start()  # the main thread may hold the socket's lock

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _asked(options: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(options, name) for name in ("frames", "seconds", "seed", "size", "model")}


def _check_target(path: str) -> None:
    """Before any work is asked for, not after."""
    if path == "-" and sys.stdout.isatty():
        raise FieldError("--out", path, "a file, or - where a player reads: `| ffplay -`; a terminal shows no video")
    folder = Path(path).resolve().parent
    if path != "-" and not folder.is_dir():
        raise FileNotFoundError(f"--out = {path!r}: there is no folder {folder}")


def _write(path: str, parts: Iterable[bytes]) -> None:
    """To a file, or to standard output."""
    if path == "-":
        for part in parts:
            sys.stdout.buffer.write(part)
            sys.stdout.buffer.flush()
        return
    try:
        write_kept(path, parts)
    finally:
        if part_of(path).exists():
            _say(f"what came is kept in {part_of(path)}")


def _timed(parts: Iterable[bytes], progress: Progress) -> Iterator[bytes]:
    """Pass parts on, and say when the first came and how much there was."""
    started_s, size, frames, chunks = time.monotonic(), 0, 0, 0
    try:
        for part in parts:
            if not size:
                _say(f"first bytes after {time.monotonic() - started_s:.2f} s")
            size += len(part)
            yield part
            if media := split(part)[1]:
                frames, chunks = frames + read_fragment(media).frames, chunks + 1
                progress.show(frames, chunks)
    finally:
        progress.end()
    took_s = time.monotonic() - started_s
    _say(f"{frames} frames, {size / 1000:.0f} kB in {took_s:.1f} s")


def _show(progress: Progress, video: Video) -> None:
    progress.show(video.frames_done, int(video.answer.get("chunks_done", 0)))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
