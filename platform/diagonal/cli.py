"""The command line: `diagonal VERB`. Verbs load what they need when they run, so `diagonal --help` is quick.

Exit codes: 0 done, 2 refused, 3 no answer from the server, 4 the server is full, 5 the video failed, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import diagonal
from diagonal.errors import FieldError

DONE, REFUSED, NO_ANSWER, FULL, FAILED, INTERRUPTED = 0, 2, 3, 4, 5, 130
API_KEY_VARIABLE, URL_VARIABLE, DEFAULT_URL = "DIAGONAL_API_KEY", "DIAGONAL_URL", "http://127.0.0.1:8000"
CHECKOUT = Path(diagonal.__file__).parents[2]
CLIENT = "diagonal.client.commands:"


def main(arguments: Sequence[str] | None = None, client: Callable[..., Any] | None = None) -> int:
    """Run one verb; returns its exit code. `client` stands for `DiagonalClient`."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if words[:1] == ["keys"]:  # a command line of its own
            return int(_of_the_checkout("keys", "serve.keys:main")(words[1:]))
        options = parser().parse_args(words)
        if options.run.startswith(CLIENT):
            return int(resolve_name(f"{CLIENT}run")(options, client))
        run = (
            resolve_name(options.run)
            if options.run.startswith("diagonal.")
            else _of_the_checkout(words[0], options.run)
        )
        return int(run(options) or DONE)
    except BrokenPipeError:  # the player was closed: nothing is wrong
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except (OSError, FieldError) as error:
        print(f"diagonal: {error}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        print("diagonal: interrupted", file=sys.stderr)
        return INTERRUPTED


def parser() -> argparse.ArgumentParser:
    """Every verb and option; loads nothing else."""
    parser = argparse.ArgumentParser(
        prog="diagonal",
        description="Make, watch and steer videos on a Diagonal server; start a service and ask for its settings.",
        epilog=f"The API key is taken from ${API_KEY_VARIABLE}, which no list of processes shows. "
        "`diagonal VERB --help` tells more.",
    )
    parser.add_argument("--version", action="version", version=f"diagonal {diagonal.__version__}")
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    _add_client_verbs(verbs)
    _add_local_verbs(verbs)
    return parser


def _add_client_verbs(verbs: Any) -> None:
    make = _client_verb(verbs, "generate", "make a whole video and save it")
    _video_options(make)
    make.add_argument("--out", default="video.mp4", metavar="FILE", help="where to save it (default: %(default)s)")
    make.add_argument("--timeout", type=float, default=600.0, metavar="S", help="give up after so long (default: 600)")
    watch = _client_verb(
        verbs,
        "watch",
        "stream a live session whose prompt changes with each line that is typed meanwhile",
        "Without a length it lasts until Ctrl-C; /pause, /resume and /stop do what they say. "
        "A player reads standard output: diagonal watch 'a red circle' | ffplay -",
    )
    _video_options(watch)
    _transition_option(watch)
    live = _client_verb(verbs, "stream", "write a video's bytes while it is made")
    what = live.add_mutually_exclusive_group(required=True)
    what.add_argument("prompt", nargs="?", help="what the video shall show")
    what.add_argument("--video", metavar="ID", help="or the id of a video that is being made")
    _video_options(live, prompt=False)
    live.add_argument("--pacing", choices=("realtime", "none"), default="realtime", help="default: realtime")
    for one in (watch, live):
        one.add_argument("--out", default="-", metavar="FILE", help="a file, or - for standard output (default: -)")
    steer = _client_verb(verbs, "steer", "change the prompt of a video that is being made", of_video=True)
    steer.add_argument("prompt", help="what it shall show from the next chunk on")
    _transition_option(steer)
    _client_verb(verbs, "pause", "stop a video after its current chunk; its place is freed", of_video=True)
    _client_verb(verbs, "resume", "continue a paused video", of_video=True)
    link = _json_option(
        _client_verb(verbs, "share", "make a link of a video for somebody without a key", of_video=True)
    )
    link.add_argument(
        "--role", choices=("watch", "steer"), default="watch", help="steer: who has it may change the prompt"
    )
    link.add_argument("--name", default="", help="whose link it is: told with the changes that he makes")
    link.add_argument("--expires-in-s", type=int, metavar="N", help="it ends after so long (default: a day)")
    instead = link.add_mutually_exclusive_group()
    instead.add_argument("--list", action="store_true", help="show the links that there are instead")
    instead.add_argument("--revoke", metavar="ID", help="end one of them instead")
    check = _client_verb(verbs, "verify", "check a recorded stream against its signed chain")
    check.add_argument("file", help="a recorded stream (`stream --out`, `watch --out`)")
    check.add_argument("--chain", required=True, metavar="FILE|URL|ID", help="its chain, or the video's id")
    check.add_argument("--public-key", metavar="HEX", help="the signer's (default: the one that the server names now)")
    check.add_argument("--part", action="store_true", help="the recording may begin late and end early")
    _json_option(_client_verb(verbs, "models", "list models with their sizes and limits"))
    videos = _json_option(_client_verb(verbs, "list", "list videos, the newest first"))
    videos.add_argument("--limit", type=int, default=20, metavar="N", help="at most so many (default: 20)")
    _json_option(_client_verb(verbs, "show", "show one video", of_video=True))
    _client_verb(verbs, "delete", "cancel a video if it is not over, and remove it", of_video=True)


def _add_local_verbs(verbs: Any) -> None:
    up = _verb(verbs, "up", "infra.local.verbs:up", "start Ray and the service on this machine")
    up.add_argument(
        "release", nargs="?", default="", help="a folder, an s3:// URI, or org/name on the hub (default: embedded)"
    )
    up.add_argument("--cpus", type=int, default=0, metavar="N", help="logical CPUs (default: those that demos need)")
    down = _verb(verbs, "down", "infra.local.verbs:down", "end both, by process id")
    down.add_argument("--keep-logs", action="store_true", help="move Ray's logs to .diagonal/logs first")
    _json_option(_verb(verbs, "status", "infra.local.verbs:status", "say what runs on this machine, and where"))
    about = 'print what a shell needs to reach it: eval "$(diagonal env)"'
    _verb(verbs, "env", "infra.local.verbs:env", about)
    deploy = _verb(verbs, "serve", "infra.local.verbs:serve", "deploy a release on the Ray that is running")
    deploy.add_argument("release", help="a folder that the cluster's nodes see, an s3:// URI, or org/name on the hub")
    deploy.add_argument("--config", metavar="FILE", help="Serve's configuration (default: serve/config.yaml)")
    deploy.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the service")
    deploy.add_argument("--port", type=int, metavar="N", help="of the service (default: the configuration's)")
    _verb(verbs, "keys", "", "create, list and revoke API keys (in a checkout)")
    push = _verb(
        verbs, "push", "diagonal.model.publish:push", "upload a release to the Hugging Face hub, private at first"
    )
    push.add_argument("release", help="a folder, an s3:// URI, or org/name on the hub")
    push.add_argument("name", help="the repository that it becomes: org/name")
    push.add_argument("--licence", required=True, metavar="ID", help="of the weights, as the hub names it: apache-2.0")
    push.add_argument("--base-model", default="", metavar="ID", help="default: what the release's model.path names")
    config = _json_option(_verb(verbs, "config", "diagonal.cli:show_config", "print every setting with its meaning"))
    config.add_argument("section", nargs="?", help="only these, such as distill.loss, or service")
    config.add_argument("--preset", default="wan-1.3b", help="whose values are shown (default: %(default)s)")
    completion = _verb(verbs, "completion", "diagonal.cli:completion", "print the completion script of a shell")
    completion.add_argument("shell", choices=("bash", "zsh", "tcsh"))


def _verb(verbs: Any, name: str, run: str, about: str, more: str = "") -> argparse.ArgumentParser:
    one: argparse.ArgumentParser = verbs.add_parser(name, help=about, description=f"{about}. {more}")
    one.set_defaults(run=run)
    return one


def _client_verb(
    verbs: Any, name: str, about: str, more: str = "", *, of_video: bool = False
) -> argparse.ArgumentParser:
    one = _verb(verbs, name, f"{CLIENT}{'list_videos' if name == 'list' else name}", about, more)
    one.add_argument("--url", help=f"the server (default: ${URL_VARIABLE}, else {DEFAULT_URL})")
    one.add_argument("--key", help=f"the API key; no list of processes shows it in ${API_KEY_VARIABLE}")
    if of_video:
        one.add_argument("video", help="the video's id, which `stream`, `watch` and `list` print")
    return one


def _json_option(one: argparse.ArgumentParser) -> argparse.ArgumentParser:
    one.add_argument("--json", action="store_true", help="for scripts")
    return one


def _transition_option(one: argparse.ArgumentParser) -> None:
    about = "blend a new prompt in over N chunks (default: 0, at once)"
    one.add_argument("--transition-chunks", type=int, default=0, metavar="N", help=about)


def _video_options(one: argparse.ArgumentParser, prompt: bool = True) -> None:
    if prompt:
        one.add_argument("prompt", help="what the video shall show")
    length = one.add_mutually_exclusive_group()
    length.add_argument("--seconds", type=float, help="how long it plays")
    length.add_argument("--frames", type=int, help="how many pixel frames it has")
    one.add_argument("--seed", type=int, help="the same seed gives the same video")
    one.add_argument("--size", metavar="WxH", help="one of the sizes that the server names")
    one.add_argument("--model", help="one of the models that the server names (default: the server's)")


def _of_the_checkout(verb: str, name: str) -> Callable[..., Any]:
    """What lies beside the package in a checkout and in no wheel."""
    if not (CHECKOUT / "infra" / "local").is_dir():
        raise FieldError("verb", verb, "used in a checkout of Diagonal with its extras train and serve (`make env`)")
    sys.path.append(str(CHECKOUT))  # last: the folder `platform` hides no module
    try:
        function: Callable[..., Any] = resolve_name(name)
    except ModuleNotFoundError as error:
        allowed = f"used with the extras train and serve (`make env`): there is no module {error.name}"
        raise FieldError("verb", verb, allowed) from error
    return function


def completion(options: argparse.Namespace) -> None:
    """Print a shell's completion script."""
    try:
        import shtab
    except ImportError as error:
        raise FieldError("completion", options.shell, "used with the package shtab: pip install shtab") from error
    print(shtab.complete(parser(), options.shell))


def show_config(options: argparse.Namespace) -> None:
    """Print settings as a table, or as JSON; those of the service are known in a checkout alone."""
    if options.section == "service":
        print(_of_the_checkout("config service", "serve.describe:describe")(options.json))
        return
    describe = resolve_name("diagonal.config.describe:describe")
    print(describe(options.section or "", options.preset, as_json_text=options.json))


if __name__ == "__main__":
    sys.exit(main())
