"""The command that makes, lists and ends API keys."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from serve.keys import DONE, REFUSED, main
from serve.settings import ServeSettings
from serve.store.credentials import Credentials
from serve.store.tables import Tables
from serve.tokens import parse_secret


def test_a_key_is_made_listed_and_revoked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--data", str(tmp_path)]
    assert main(["create", "--name", "a person", "--sessions", "2", "--frames-per-minute", "960", *data]) == DONE
    text = capsys.readouterr().out.strip()
    shown = parse_secret("dk", text)
    assert shown is not None
    tables = Tables(ServeSettings(data=str(tmp_path)).database_url)
    caller = Credentials(tables).caller(shown)
    assert caller is not None and (caller.sessions, caller.frames_per_minute) == (2, 960)
    assert main(["list", *data]) == DONE
    listed = capsys.readouterr().out
    assert shown.id in listed and "a person" in listed and text.split("_", 2)[2] not in listed
    assert main(["revoke", shown.id, *data]) == DONE and main(["revoke", shown.id, *data]) == REFUSED
    assert Credentials(tables).caller(shown) is None
    tables.close()


def test_a_wrong_limit_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["create", "--name", "x", "--sessions", "-1", "--data", str(tmp_path)]) == REFUSED
    assert "sessions" in capsys.readouterr().err


def test_the_database_is_its_owners_alone(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        main(["create", "--name", "x", "--data", str(tmp_path)])
    finally:
        after = os.umask(before)
    assert (tmp_path / "store.sqlite").stat().st_mode & 0o077 == 0
    assert after == 0o022, "the process that called it makes its other files as before"
