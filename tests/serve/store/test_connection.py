"""The store's database by its URL: what is refused, what is waited for, and what no message shows."""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import sqlalchemy as sql

from diagonal.errors import FieldError
from serve import keys
from serve.settings import ServeSettings
from serve.store import connection
from serve.store.connection import connect
from serve.store.tables import Tables

SECRET = "s3cret%40word"


@pytest.mark.parametrize(
    ("url", "field", "text"),
    [
        ("mysql://u@h/d", "database", "mysql://u@h/d"),
        ("no url", "database", "no url"),
        (f"postgresql://u:{SECRET}@127.0.0.1:1/d", "database", r"u:\*\*\*@127.0.0.1:1/d.*a database that answers"),
        ("postgres://u:a@b@127.0.0.1/d", "database", r"'\.\.\.'.*'@' in a password is %40"),
        ("$NO_SUCH_VARIABLE", "database", "a variable that is set where the store runs"),
    ],
)
def test_a_url_that_leads_nowhere_is_one_line_without_a_secret(url: str, field: str, text: str) -> None:
    with pytest.raises(FieldError, match=text) as refused:
        connect(url)
    assert refused.value.field == field and "\n" not in str(refused.value)
    assert (
        SECRET not in str(refused.value) and "s3cret@word" not in str(refused.value) and "a@b" not in str(refused.value)
    )


def test_every_usual_spelling_reaches_the_database(postgres_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rest = postgres_server.partition("://")[2]
    monkeypatch.setenv("STORE_URL", f"postgres://{rest}")
    for url in (f"postgres://{rest}", f"postgresql://{rest}", f"postgresql+psycopg://{rest}", "$STORE_URL"):
        engine = connect(url)
        with engine.connect() as open_connection:
            assert open_connection.execute(sql.text("SELECT 1")).scalar() == 1
        engine.dispose()


def test_a_database_that_does_not_exist_is_not_waited_for(postgres_server: str) -> None:
    url = sql.make_url(postgres_server).set(database="nobody_made_this").render_as_string(hide_password=False)
    began_s = time.monotonic()
    with pytest.raises(FieldError, match='database "nobody_made_this" does not exist'):
        connect(url, wait_s=300.0)
    assert time.monotonic() - began_s < 100.0


def test_a_database_that_starts_late_is_waited_for(
    postgres_server: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(connection, "_LOOK_EVERY_S", 0.1)
    server = sql.make_url(postgres_server)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    relay = threading.Timer(0.5, _relay, (port, str(server.host), int(server.port or 0)))
    relay.daemon = True
    relay.start()
    url = server.set(host="127.0.0.1", port=port).render_as_string(hide_password=False)
    engine = connect(f"{url}?sslmode=disable", wait_s=30.0)
    engine.dispose()
    assert "waiting for the database" in caplog.text and "refused" in caplog.text


def _relay(port: int, host: str, server_port: int) -> None:
    """Pass one connection on to the server, whose own port cannot be late."""
    with socket.create_server(("127.0.0.1", port)) as listening:
        client, _ = listening.accept()
        where: Any = (host, server_port)
        if host.startswith("/"):
            server = socket.socket(socket.AF_UNIX)
            server.connect(f"{host}/.s.PGSQL.{server_port}")
        else:
            server = socket.create_connection(where)
        ways = [threading.Thread(target=_copy, args=pair, daemon=True) for pair in ((client, server), (server, client))]
        for way in ways:
            way.start()
        for way in ways:
            way.join()


def _copy(source: socket.socket, target: socket.socket) -> None:
    while data := source.recv(65536):
        target.sendall(data)
    target.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize(("kind", "refused"), [("nfs4", True), ("fuse.sshfs", True), ("lustre", True), ("ext4", False)])
def test_sqlite_on_a_network_file_system_is_refused_with_the_way_out(
    kind: str, refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounts = [SimpleNamespace(mountpoint="/", fstype="ext4"), SimpleNamespace(mountpoint=str(tmp_path), fstype=kind)]
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: mounts)
    url = ServeSettings(data=str(tmp_path / "data")).database_url
    (tmp_path / "data").mkdir()
    if refused:
        with pytest.raises(FieldError, match=f"data = .*a local disk, for SQLite .this is {kind}.*PostgreSQL"):
            connect(url)
    else:
        connect(url).dispose()


@pytest.mark.parametrize("name", ["a b", "a?b", "a%20b", "a#b"])
def test_any_folder_may_hold_the_database(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    Tables(ServeSettings(data=str(tmp_path / name)).database_url).close()
    assert (tmp_path / name / "store.sqlite").is_file()


def test_a_password_in_the_settings_is_refused() -> None:
    with pytest.raises(FieldError, match=r"database = '\.\.\.': .*PGPASSWORD") as refused:
        ServeSettings(database=f"postgresql://u:{SECRET}@h/d")
    assert SECRET not in str(refused.value)
    ServeSettings(database="$DATABASE_URL")


def test_keys_end_with_one_line_where_there_is_no_database(capsys: pytest.CaptureFixture[str]) -> None:
    assert keys.main(["list", "--database", "postgresql://u@127.0.0.1:1/d"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("keys: database = 'postgresql+psycopg://u@127.0.0.1:1/d'") and shown.count("\n") == 1
