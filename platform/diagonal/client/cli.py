"""The command line: `diagonal generate`, `stream`, `watch` and `steer`; progress and errors go to standard error.

Exit codes: 0 done, 2 the request was refused, 3 no answer from the server, 4 the server is full, 5 the video failed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from diagonal.client.client import (
    API_KEY_VARIABLE,
    DEFAULT_URL,
    URL_VARIABLE,
    DiagonalClient,
    DiagonalError,
    Video,
    write_whole,
)

DONE, REFUSED, NO_ANSWER, FULL, FAILED, INTERRUPTED = 0, 2, 3, 4, 5, 130
_BAR_CELLS = 30


def main(
    arguments: Sequence[str] | None = None, client: Callable[[str | None], DiagonalClient] = DiagonalClient
) -> int:
    """Run one command; returns its exit code."""
    options = _parser().parse_args(arguments)
    try:
        with client(options.url) as opened:
            options.run(opened, options)
        return DONE
    except DiagonalError as error:
        print(f"diagonal: {_describe(error)}", file=sys.stderr)
        return _exit_code(error)
    except OSError as error:
        print(f"diagonal: {error}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        print("diagonal: interrupted", file=sys.stderr)
        return INTERRUPTED


def generate(client: DiagonalClient, options: argparse.Namespace) -> None:
    """Make a whole video and save it."""
    _check_folder(options.out)
    started = time.monotonic()
    video = _create(client, options, "none")
    try:
        done = client.wait(video.id, timeout_s=options.timeout, progress=_show_progress)
        client.save(video.id, options.out)
    except KeyboardInterrupt:
        client.delete(video.id)  # nobody will fetch it
        raise
    finally:
        _end_progress()
    took = time.monotonic() - started
    rate = f"in {took:.1f} s ({done.frames / took:.1f} frames a second)"
    _say(f"{options.out}: {done.frames} frames, {done.size}, {done.fps} fps, {rate}")


def stream(client: DiagonalClient, options: argparse.Namespace) -> None:
    """Write a video's bytes while it is made; `--out -` is standard output, for a player."""
    if options.out != "-":
        _check_folder(options.out)
    video = _create(client, options, options.pacing)
    _say(f"{video.id}: {video.frames} frames, {video.size}, {video.fps} fps")
    parts = _timed(client.stream(video.id))
    try:
        if options.out == "-":
            for part in parts:
                sys.stdout.buffer.write(part)
                sys.stdout.buffer.flush()
        else:
            write_whole(options.out, parts)
    except KeyboardInterrupt:
        client.delete(video.id)
        raise


def watch(client: DiagonalClient, options: argparse.Namespace) -> None:
    """Follow a video until it is over, and save it if `--out` says where."""
    if options.out is not None:
        _check_folder(options.out)
    try:
        done = client.wait(options.video, timeout_s=options.timeout, progress=_show_progress)
    finally:
        _end_progress()
    for change in done.answer.get("interactions", ()):
        where = f"at frame {change['pixel_frame']}" if change["status"] == "applied" else change["status"]
        _say(f"prompt change {change['event_id']}: {where}")
    if options.out is not None:
        client.save(done.id, options.out)
    _say(f"{options.out or done.id}: {done.frames} frames, {done.size}, {done.fps} fps")


def steer(client: DiagonalClient, options: argparse.Namespace) -> None:
    """Change the prompt of a video that is being made."""
    event = client.interact(options.video, options.prompt, transition_chunks=options.transition_chunks)
    _say(f"queued as {event}: it applies at the next chunk")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="diagonal",
        description="Make, watch and steer videos on a Diagonal server.",
        epilog=f"The API key is taken from ${API_KEY_VARIABLE}, which no list of processes shows.",
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    make = _command(commands, "generate", generate)
    _video_options(make)
    make.add_argument("--out", default="video.mp4", metavar="FILE", help="where to save it (default: video.mp4)")
    make.add_argument("--timeout", type=float, default=600.0, metavar="S", help="give up after so long (default: 600)")
    live = _command(commands, "stream", stream)
    _video_options(live)
    live.add_argument("--out", default="-", metavar="FILE", help="a file, or - for standard output (default: -)")
    live.add_argument("--pacing", choices=("realtime", "none"), default="realtime", help="default: realtime")
    follow = _command(commands, "watch", watch)
    follow.add_argument("video", help="the video's id, which `stream` prints")
    follow.add_argument("--out", metavar="FILE", help="save it there when it is done")
    follow.add_argument("--timeout", type=float, default=600.0, metavar="S", help="give up after that (default: 600)")
    turn = _command(commands, "steer", steer)
    turn.add_argument("video", help="the video's id, which `stream` prints")
    turn.add_argument("prompt", help="what it shall show from the next chunk on")
    turn.add_argument("--transition-chunks", type=int, default=0, metavar="N", help="blend over N chunks (default: 0)")
    return parser


def _command(commands: argparse._SubParsersAction, name: str, run: Callable[..., None]) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
    parser.add_argument("--url", help=f"the server (default: ${URL_VARIABLE}, else {DEFAULT_URL})")
    parser.set_defaults(run=run)
    return parser


def _video_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", help="what the video shall show")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--seconds", type=float, help="how long it plays")
    length.add_argument("--frames", type=int, help="how many pixel frames it has")
    parser.add_argument("--seed", type=int, help="the same seed gives the same video")
    parser.add_argument("--size", metavar="WxH", help="one of the sizes that the server names")


def _create(client: DiagonalClient, options: argparse.Namespace, pacing: str) -> Video:
    return client.create(
        options.prompt,
        frames=options.frames,
        seconds=options.seconds,
        seed=options.seed,
        size=options.size,
        pacing="realtime" if pacing == "realtime" else "none",
    )


def _check_folder(path: str) -> None:
    """Before any work is asked for, not after."""
    folder = Path(path).resolve().parent
    if not folder.is_dir():
        raise FileNotFoundError(f"--out = {path!r}: there is no folder {folder}")


def _timed(parts: Iterator[bytes]) -> Iterator[bytes]:
    """Pass parts on, and say when the first came and how much there was."""
    started, size, first = time.monotonic(), 0, True
    for part in parts:
        if first:
            _say(f"first bytes after {time.monotonic() - started:.2f} s")
            first = False
        size += len(part)
        yield part
    _say(f"{size / 1000:.0f} kB in {time.monotonic() - started:.1f} s")


def _show_progress(video: Video) -> None:
    """A bar on a terminal; elsewhere nothing, which a log is better for."""
    if sys.stderr.isatty():
        filled = _BAR_CELLS * video.progress // 100
        bar = "#" * filled + "." * (_BAR_CELLS - filled)
        print(f"\r[{bar}] {video.frames_done}/{video.frames} frames", end="", file=sys.stderr, flush=True)


def _end_progress() -> None:
    if sys.stderr.isatty():
        print(file=sys.stderr)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _describe(error: DiagonalError) -> str:
    wait = f" (try again in {error.retry_after_s:g} s)" if error.retry_after_s else ""
    name = f" [request {error.request_id}]" if error.request_id and error.status >= 500 else ""
    return f"{error}{wait}{name}"


def _exit_code(error: DiagonalError) -> int:
    if error.status == 429:
        return FULL
    if 400 <= error.status < 500:
        return REFUSED
    return FAILED if error.status == 200 or error.code == "timeout" else NO_ANSWER


if __name__ == "__main__":
    sys.exit(main())
