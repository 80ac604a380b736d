"""The command line: `diagonal generate`, `stream`, `watch`, `steer`, `pause`, `resume`, `verify`; they speak on stderr.

Exit codes: 0 done, 2 the request was refused, 3 no answer from the server, 4 the server is full, 5 the video failed,
130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from diagonal.client import commands, verify
from diagonal.client.client import API_KEY_VARIABLE, DEFAULT_URL, URL_VARIABLE, DiagonalClient
from diagonal.client.errors import BrokenStreamError, DiagonalError, RefusedError, ServerFullError, VideoFailedError
from diagonal.errors import FieldError

DONE, REFUSED, NO_ANSWER, FULL, FAILED, INTERRUPTED = 0, 2, 3, 4, 5, 130


def main(arguments: Sequence[str] | None = None, client: Callable[..., DiagonalClient] = DiagonalClient) -> int:
    """Run one command; returns its exit code."""
    options = _parser().parse_args(arguments)
    try:
        with client(options.url, api_key=options.key) as opened:
            options.run(opened, options)
        return DONE
    except DiagonalError as error:
        print(f"diagonal: {_describe(error)}", file=sys.stderr)
        return _exit_code(error)
    except BrokenPipeError:  # the player was closed: nothing is wrong
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except (OSError, FieldError) as error:
        print(f"diagonal: {error}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        print("diagonal: interrupted", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="diagonal",
        description="Make, watch and steer videos on a Diagonal server.",
        epilog=f"The API key is taken from ${API_KEY_VARIABLE}, which no list of processes shows.",
    )
    adding = parser.add_subparsers(required=True, metavar="command")
    make = _command(adding, "generate", commands.generate)
    _video_options(make)
    make.add_argument("--out", default="video.mp4", metavar="FILE", help="where to save it (default: video.mp4)")
    make.add_argument("--timeout", type=float, default=600.0, metavar="S", help="give up after so long (default: 600)")
    live = _command(adding, "stream", commands.stream)
    what = live.add_mutually_exclusive_group(required=True)
    what.add_argument("prompt", nargs="?", help="what the video shall show")
    what.add_argument("--video", metavar="ID", help="or the id of a video that is being made")
    _video_options(live, prompt=False)
    live.add_argument("--out", default="-", metavar="FILE", help="a file, or - for standard output (default: -)")
    live.add_argument("--pacing", choices=("realtime", "none"), default="realtime", help="default: realtime")
    watch = _command(adding, "watch", commands.watch)
    _video_options(watch)
    watch.add_argument("--out", default="-", metavar="FILE", help="a file, or - for standard output (default: -)")
    _transition_option(watch)
    steer = _of_video(_command(adding, "steer", commands.steer))
    steer.add_argument("prompt", help="what it shall show from the next chunk on")
    _transition_option(steer)
    _of_video(_command(adding, "pause", commands.pause))
    _of_video(_command(adding, "resume", commands.resume))
    _verify_options(_command(adding, "verify", verify.run))
    return parser


def _command(
    adding: argparse._SubParsersAction[argparse.ArgumentParser], name: str, run: Callable[..., None]
) -> argparse.ArgumentParser:
    about = (run.__doc__ or "").strip()
    parser = adding.add_parser(name, help=about.splitlines()[0], description=about)
    parser.add_argument("--url", help=f"the server (default: ${URL_VARIABLE}, else {DEFAULT_URL})")
    parser.add_argument("--key", help=f"the API key; no list of processes shows it in ${API_KEY_VARIABLE}")
    parser.set_defaults(run=run)
    return parser


def _verify_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="a recorded stream (`stream --out`, `watch --out`)")
    parser.add_argument("--chain", required=True, metavar="FILE|URL|ID", help="its chain, or the video's id")
    parser.add_argument("--public-key", metavar="HEX", help="the signer's (default: the one that the server names now)")
    parser.add_argument("--part", action="store_true", help="the recording may begin late and end early")


def _of_video(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("video", help="the video's id, which `stream` and `watch` print")
    return parser


def _transition_option(parser: argparse.ArgumentParser) -> None:
    about = "blend a new prompt in over N chunks (default: 0, at once)"
    parser.add_argument("--transition-chunks", type=int, default=0, metavar="N", help=about)


def _video_options(parser: argparse.ArgumentParser, prompt: bool = True) -> None:
    if prompt:
        parser.add_argument("prompt", help="what the video shall show")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--seconds", type=float, help="how long it plays")
    length.add_argument("--frames", type=int, help="how many pixel frames it has")
    parser.add_argument("--seed", type=int, help="the same seed gives the same video")
    parser.add_argument("--size", metavar="WxH", help="one of the sizes that the server names")
    parser.add_argument("--model", help="one of the models that the server names (default: the server's)")


def _describe(error: DiagonalError) -> str:
    wait = f" (try again in {error.retry_after_s:g} s)" if error.retry_after_s else ""
    name = f" [request {error.request_id}]" if error.request_id and error.status >= 500 else ""
    return f"{error}{wait}{name}"


def _exit_code(error: DiagonalError) -> int:
    kinds = {ServerFullError: FULL, RefusedError: REFUSED, VideoFailedError: FAILED, BrokenStreamError: FAILED}
    return kinds.get(type(error), NO_ANSWER)


if __name__ == "__main__":
    sys.exit(main())
