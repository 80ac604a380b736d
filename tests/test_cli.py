"""The command line `diagonal`: quick to start, complete in a shell, and one line for whatever is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from diagonal import cli
from diagonal.client import DiagonalClient, DiagonalError
from diagonal.client.client import Video

VERBS = (
    "generate watch stream steer pause resume share verify models list show delete up down status env serve keys config"
)
ANSWER = {"id": "video_1", "status": "completed", "progress": 100, "num_frames": 81, "frames_done": 81}
ANSWER |= {"fps": 16, "size": "256x256", "mime": "video/mp4", "error": None}
VIEWER = {"id": "v1", "role": "steer", "name": "Ann", "expires_at": 0}
MODEL = {"id": "tiny", "fps": 16, "sizes": ["256x256", "32x32"]}


class Client:
    """A server's answers without one."""

    def __init__(self, url: str | None, api_key: str | None = None) -> None:
        self.deleted: list[str] = []

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None: ...

    def get(self, video_id: str) -> Video:
        return Video.from_answer(ANSWER | {"id": video_id})

    def list(self, limit: int) -> tuple[Video, ...]:
        return (self.get("video_1"), self.get("video_2"))[:limit]

    def models(self) -> dict[str, object]:
        return {"data": [MODEL]}

    def share(self, video_id: str, **asked: object) -> dict[str, object]:
        assert asked == {"role": "steer", "name": "Ann", "expires_in_s": 60}
        urls = {"watch_url": "http://x/watch/vt_1", "playlist_url": "http://x/v1/shared/vt_1/index.m3u8"}
        return VIEWER | urls

    def viewers(self, video_id: str) -> list[dict[str, object]]:  # type: ignore[valid-type]
        return [VIEWER]

    def revoke(self, video_id: str, viewer_id: str) -> None:
        assert (video_id, viewer_id) == ("video_1", "v1")

    def delete(self, video_id: str) -> None:
        assert video_id == "video_1"


def run(*words: str) -> int:
    return cli.main(words, client=Client)


def test_help_is_quick_and_loads_nothing_that_a_verb_needs() -> None:
    code = """
import resource, sys
from diagonal.cli import main
try:
    main(["--help"])
finally:
    loaded = {"httpx2", "websockets", "cryptography", "asyncio", "torch", "ray"} & set(sys.modules)
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(sorted(loaded), used.ru_utime + used.ru_stime < 1.0, file=sys.stderr)
"""
    environment = os.environ | {"PYTHONPATH": "platform"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stderr.strip() == "[] True"
    assert not [verb for verb in VERBS.split() if f"  {verb} " not in done.stdout]


@pytest.mark.parametrize("verb", VERBS.split())
def test_each_verb_leads_to_a_function(verb: str) -> None:
    """What a verb runs is named in text, so that nothing else loads it."""
    (verbs,) = (action for action in cli.parser()._actions if action.dest == "==SUPPRESS==")
    name = dict(verbs.choices or {})[verb].get_default("run") or "serve.keys:main"
    assert callable(cli.resolve_name(name)), name


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_a_shell_completes_verbs_and_options(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", shell]) == cli.DONE
    script = capsys.readouterr().out
    assert all(word in script for word in (*VERBS.split(), "--transition-chunks"))


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out.startswith("diagonal 0.")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("models",), "tiny                      16 fps  256x256 32x32"),
        (("list",), "video_2  completed     81/81 frames          256x256"),
        (("list", "--limit", "1"), "video_1  completed     81/81 frames          256x256"),
        (("show", "video_3"), "id                    video_3"),
    ],
)
def test_what_there_is_is_shown_in_lines(words: tuple[str, ...], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*words) == cli.DONE
    assert line in capsys.readouterr().out.splitlines()


def test_scripts_read_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("models", "--json") == run("list", "--json") == run("show", "video_1", "--json") == cli.DONE
    decoder, text, answers = json.JSONDecoder(), capsys.readouterr().out, []
    while text:
        answer, end = decoder.raw_decode(text)
        answers.append(answer)
        text = text[end:].lstrip()
    assert answers == [{"data": [MODEL]}, [ANSWER, ANSWER | {"id": "video_2"}], ANSWER]


def test_a_video_is_deleted(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("delete", "video_1") == cli.DONE and capsys.readouterr().err == "deleted\n"


def test_a_video_is_shared_and_its_links_are_shown_and_ended(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("share", "video_1", "--role", "steer", "--name", "Ann", "--expires-in-s", "60") == cli.DONE
    told = capsys.readouterr()
    assert told.out == "http://x/watch/vt_1\n" and "http://x/v1/shared/vt_1/index.m3u8" in told.err
    assert run("share", "video_1", "--list") == cli.DONE
    assert capsys.readouterr().out.startswith("v1  steer  19")
    assert run("share", "video_1", "--revoke", "v1") == cli.DONE and capsys.readouterr().err == "revoked\n"


@pytest.mark.parametrize("words", [("stream", "x"), ("watch", "x"), ("stream", "x", "--out", "-")])
def test_a_terminal_gets_no_video(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert run(*words) == cli.REFUSED
    assert capsys.readouterr().err.startswith("diagonal: --out = '-': allowed is a file")


@pytest.mark.parametrize("verb", ["up", "down", "status", "env", "serve", "keys"])
def test_outside_a_checkout_a_local_verb_says_what_it_needs(
    verb: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "CHECKOUT", tmp_path)
    assert cli.main([verb, *(["release"] if verb == "serve" else [])]) == cli.REFUSED
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{verb!r}" in line and "checkout" in line


PROXY = "http://127.0.0.1:9"


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
@pytest.mark.parametrize("proxy", [PROXY, "socks://127.0.0.1:9", "socks5h://127.0.0.1:9"])
@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "http://localhost:1", "http://[::1]:1"])
def test_no_proxy_is_asked_for_an_address_of_this_machine(
    variable: str, proxy: str, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, proxy)
    with DiagonalClient(url, max_retries=0) as client:
        transports = [client._http._transport_for_url(client._http.base_url), *client._http._mounts.values()]
        assert transports == [client._http._transport]


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("ALL_PROXY", "socks://proxy:1", "Unknown scheme"),
        ("ALL_PROXY", "socks5h://proxy:1", "pip install socksio"),
        ("SSL_CERT_FILE", "/none", "No such file"),
    ],
)
@pytest.mark.parametrize("verb", ["list", "watch"])
def test_an_environment_that_lets_no_connection_be_made_is_one_line_that_names_the_variable(
    variable: str, value: str, said: str, verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(variable, value)
    words = [verb, *(["x", "--out", "video"] if verb == "watch" else []), "--url", "http://server.example"]
    assert cli.main(words) == cli.REFUSED
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"diagonal: {variable} = {value!r}") and said in line


@pytest.mark.slow
def test_a_live_session_goes_by_the_same_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "socks5h://127.0.0.1:9")
    with DiagonalClient("http://127.0.0.1:9") as client, pytest.raises(DiagonalError, match="refused"):
        client.realtime("x")


def test_config_shows_a_section_or_names_the_near_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "distill.lr", "--json"]) == cli.DONE
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["name"], row["default"]) == ("distill.lr", 2e-6)
    assert cli.main(["config", "srve"]) == cli.REFUSED
    assert "did you mean serve?" in capsys.readouterr().err
