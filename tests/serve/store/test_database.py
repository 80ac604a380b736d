"""The store's statements on SQLite and on PostgreSQL: what is kept, who may change it, and what a crash costs."""

from __future__ import annotations

import io
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sql
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from diagonal.chain import Link
from diagonal.errors import FieldError
from serve.records import (
    MAX_VIEWERS,
    Caller,
    EncodedChunk,
    Idempotency,
    Interaction,
    KeptChunk,
    Pacing,
    Refused,
    Role,
    Status,
    VideoRecord,
)
from serve.store.connection import connect
from serve.store.credentials import Credentials
from serve.store.database import Database, chunk_events
from serve.store.migrations import VERSION_TABLE, configuration, upgrade
from serve.store.quotas import Quotas
from serve.store.tables import TABLES, Tables
from serve.store.viewers import Viewers
from serve.tokens import parse_secret

VIDEO = VideoRecord(
    id="video_1",
    model="tiny",
    prompt="a red circle",
    seed=2**32 - 1,
    frames=21,
    fps=16,
    scale=1,
    size="32x32",
    pacing=Pacing.NONE,
    created_at=1.0,
    status=Status.QUEUED,
    mime="",
)
LOCAL = Caller("local", "local")
FIRST = EncodedChunk(0, b"first", 9, 0, (), last=False)
SECOND = EncodedChunk(1, b"second", 12, 9, (), last=True)
OLD_ROWS = (
    "INSERT INTO videos (id, model, prompt, seed, frames, fps, scale, size, pacing, created_at, status, replica, mime,"
    " chunks_done, frames_done, epoch) VALUES ('video_1', 'tiny', 'a red circle', 7, 21, 16, 1, '32x32', 'none', 1.0,"
    " 'in_progress', 'replica-1', 'video/mp4', 1, 9, 3)",
    "INSERT INTO chunks (video_id, chunk, frames, first_pixel_frame) VALUES ('video_1', 0, 9, 0)",
    "INSERT INTO interactions (video_id, event_id, prompt, transition_chunks) VALUES ('video_1', 'e1', 'x', 0)",
)


def old_database(url: str, version: int) -> sql.Engine:
    """A database as the program of that version left it, with one video: its version stood in a table of its own."""
    engine = connect(url)
    with engine.connect().execution_options(writes=True) as connection, connection.begin():
        upgrade(connection, f"{version:04d}")
        connection.execute(sql.text(f"DROP TABLE {VERSION_TABLE}"))
        if version > 1:
            connection.execute(sql.text(f"INSERT INTO schema (version) VALUES ({version})"))
        for statement in OLD_ROWS:
            connection.execute(sql.text(statement))
    return engine


@pytest.fixture
def tables(database_url: str) -> Iterator[Tables]:
    tables = Tables(database_url)
    yield tables
    tables.close()


@pytest.fixture
def database(tables: Tables) -> Database:
    """With one video that a replica holds."""
    database = Database(tables)
    assert Quotas(tables).admit(VIDEO, LOCAL, None, 1.0) is None
    assert database.opened("video_1", "replica-1", "video/mp4")
    return database


def add(database: Database, epoch: int, chunk: EncodedChunk, now: float = 1.0) -> bool:
    return database.add_chunks("video_1", epoch, [kept(chunk, epoch)], now)


def kept(chunk: EncodedChunk, epoch: int = 0, **state: Any) -> KeptChunk:
    return KeptChunk(chunk, f"{chunk.chunk}-{epoch}", Link(chunk.chunk, "hash", "", chunk.last), **state)


@pytest.mark.slow
def test_a_video_comes_back_as_it_was_put_in(database: Database) -> None:
    opened = replace(VIDEO, status=Status.IN_PROGRESS, replica="replica-1", mime="video/mp4")
    assert database.get("video_1") == opened
    assert database.get("video_2") is None


def test_it_is_still_there_after_a_restart(database: Database, tables: Tables, database_url: str) -> None:
    before = database.get("video_1")
    tables.close()
    again = Tables(database_url)
    assert Database(again).get("video_1") == before
    again.close()


def test_only_the_next_chunk_of_the_newest_driver_is_taken(database: Database) -> None:
    assert not add(database, 0, SECOND)
    assert add(database, 0, FIRST)
    assert database.claim("video_1", "replica-2", 0) and not database.claim("video_1", "replica-3", 0)
    assert not add(database, 0, SECOND)
    assert add(database, 1, SECOND)
    video = database.get("video_1")
    assert video is not None and (video.chunks_done, video.frames_done, video.epoch) == (2, 21, 1)
    assert video.replica == "replica-2" and database.chunk_files("video_1") == ["0-0", "1-1"]


def test_a_chunk_whose_acknowledgement_was_lost_may_be_given_again(database: Database) -> None:
    assert add(database, 0, FIRST) and add(database, 0, FIRST)
    video = database.get("video_1")
    assert video is not None and video.chunks_done == 1


def test_of_many_who_claim_at_once_one_gets_the_session(database: Database, database_url: str) -> None:
    won: list[str] = []

    def claim(replica: str) -> None:
        tables = Tables(database_url)
        if Database(tables).claim("video_1", replica, 0):
            won.append(replica)
        tables.close()

    threads = [threading.Thread(target=claim, args=(f"replica-{number}",)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    video = database.get("video_1")
    assert video is not None and [video.replica] == won and video.epoch == 1


def test_a_video_that_is_over_changes_no_more(database: Database) -> None:
    assert database.finish("video_1", Status.CANCELLED, 2.0, "abandoned", "nobody watches", expires_at=9.0)
    assert not database.finish("video_1", Status.COMPLETED, 3.0)
    assert not database.claim("video_1", "replica-2", 0) and not add(database, 0, FIRST)
    video = database.get("video_1")
    assert video is not None and (video.status, video.error_code) == (Status.CANCELLED, "abandoned")
    assert database.expired(8.9) == [] and database.expired(9.0) == ["video_1"]


def test_an_interaction_is_noted_once_and_told_where_it_applied(database: Database) -> None:
    change = Interaction("e1", "a blue square")
    assert database.add_interaction("video_1", change, 64) is True
    assert database.add_interaction("video_1", replace(change, prompt="other"), 64) == change
    add(database, 0, replace(FIRST, applied_event_ids=("e1",)))
    video = database.get("video_1")
    assert video is not None and video.interactions == (replace(change, chunk=0, pixel_frame=0),)


def test_only_so_many_interactions_may_wait(database: Database) -> None:
    made = [database.add_interaction("video_1", Interaction(f"e{number}", "x"), 2) for number in range(3)]
    assert made == [True, True, False]
    add(database, 0, replace(FIRST, applied_event_ids=("e0", "e1")))
    assert database.add_interaction("video_1", Interaction("e2", "x"), 2) is True


def test_all_of_a_removed_video_is_gone_and_only_its_owner_removes_it(database: Database, tables: Tables) -> None:
    database.add_interaction("video_1", Interaction("e1", "x", made_by="Ann"), 64)
    found = database.get("video_1")
    assert found is not None and found.interactions[0].made_by == "Ann"
    assert Viewers(tables).add("video_1", Role.WATCH, "Ann", 1.0, 60.0) is not None
    add(database, 0, FIRST)
    assert database.remove("video_1", "somebody") is None and database.get("video_1") is not None
    assert database.remove("video_1", "local") is not None
    with tables.reading() as connection:
        for name in ("videos", "chunks", "interactions", "viewers"):
            assert connection.execute(sql.text(f"SELECT count(*) FROM {name}")).scalar() == 0


def test_one_resume_token_counts_and_for_its_owner_alone(tables: Tables) -> None:
    database = Database(tables)
    Quotas(tables).admit(replace(VIDEO, resume_hash="one"), LOCAL, None, 1.0)
    assert database.take_over("somebody", "one", "two") is None
    taken = database.take_over("local", "one", "two")
    assert taken is not None and (taken.id, taken.resume_hash) == ("video_1", "two")
    assert database.take_over("local", "one", "three") is None and database.take_over("local", "", "three") is None


def test_a_change_is_told_with_the_chunks_that_it_starts_in_blends_in_and_ends_with() -> None:
    changes = [
        Interaction("a", "x", 3, chunk=1),
        Interaction("b", "x", 0, chunk=5),
        Interaction("c", "x", 4, chunk=7),
        Interaction("d", "x", 2, chunk=8),
        Interaction("e", "x", 0, chunk=8),
    ]
    told = [chunk_events([one for one in changes if (one.chunk or 0) <= at], at) for at in range(10)]
    assert [events.started for events in told] == [(), ("a",), (), (), (), ("b",), (), ("c",), ("d", "e"), ()]
    assert [events.active for events in told] == [(), ("a",), ("a",), ("a",), (), ("b",), (), ("c",), ("d", "e"), ()]
    assert [events.completed for events in told[:7]] == [(), (), (), ("a",), (), ("b",), ()]
    assert told[8].completed == ("d", "e")


@pytest.mark.parametrize("version", [1, 2, 3, 4])
def test_a_database_of_an_older_version_is_brought_up_with_what_it_holds(database_url: str, version: int) -> None:
    old_database(database_url, version).dispose()
    for _ in range(2):  # the second time there is nothing to do
        tables = Tables(database_url)
        database, link = Database(tables), Link(1, "hash", "", True, "5" * 128, "6" * 64)
        video = database.get("video_1")
        assert video is not None and (video.owner, video.epoch, video.expires_at) == ("local", 3, None)
        assert (video.prompt_salt, video.release_sha256, video.record) == ("", "", False)
        assert video.interactions == (Interaction("e1", "x"),)
        assert database.chunks("video_1", 0, 1) == [(9, "0", Link(0, "", "", False))]
        assert database.links("video_1", 0, 1) == [Link(0, "", "", False)]
        tables.close()
    tables = Tables(database_url)
    assert Database(tables).add_chunks("video_1", 3, [KeptChunk(SECOND, "1-3", link)], 1.0)
    assert Database(tables).links("video_1", 1, 1) == [link]
    tables.close()


@pytest.mark.parametrize("version", [0, 1, 3])
def test_the_steps_make_exactly_the_tables_of_the_program(database_url: str, version: int) -> None:
    if version:
        old_database(database_url, version).dispose()
    Tables(database_url).close()
    engine = connect(database_url)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, TABLES) == []
    engine.dispose()


def test_the_newest_steps_are_undone_without_a_loss(database_url: str, database: Database, tables: Tables) -> None:
    assert database.get("video_1") is not None
    with tables.writing() as connection:
        command.downgrade(configuration(connection), "0004")
        assert connection.execute(sql.text("SELECT version FROM schema")).scalar() == 4
        assert "viewers" not in sql.inspect(connection).get_table_names()
    again = Tables(database_url)
    assert Database(again).get("video_1") is not None
    again.close()


def test_the_steps_are_printed_for_an_administrator(capsys: pytest.CaptureFixture[str]) -> None:
    config = configuration()
    config.stdout = io.StringIO()
    config.output_buffer = output = io.StringIO()
    command.upgrade(config, "0003:head", sql=True)
    assert "ALTER TABLE videos ADD COLUMN record BOOLEAN DEFAULT false NOT NULL" in output.getvalue()
    assert "DROP TABLE schema" in output.getvalue() and "CREATE TABLE videos" not in output.getvalue()


def test_a_migration_that_fails_changes_nothing(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = old_database(database_url, 1)

    def broken(*arguments: Any, **options: Any) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("alembic.op.create_index", broken)
        with pytest.raises(OSError):
            Tables(database_url)
    there = sql.inspect(engine)
    assert "keys" not in there.get_table_names() and VERSION_TABLE not in there.get_table_names()
    assert "owner" not in {column["name"] for column in there.get_columns("videos")}
    engine.dispose()
    Tables(database_url).close()


def test_a_database_of_a_later_version_is_left_alone(database_url: str, tables: Tables) -> None:
    with tables.writing() as connection:
        connection.execute(sql.text(f"UPDATE {VERSION_TABLE} SET version_num = '0099'"))
    with pytest.raises(FieldError, match="database version = '0099': allowed is of a version that this program knows"):
        Tables(database_url)


WRITER = f"""
import sys
from {__name__} import FIRST, Database, Tables, kept, replace
database = Database(Tables(sys.argv[1]))
for number in range(10_000):
    chunk = replace(FIRST, chunk=number, first_pixel_frame=9 * number)
    assert database.add_chunks("video_1", 0, [kept(chunk)], 1.0)
    print(number, flush=True)
"""


@pytest.mark.slow
def test_a_process_killed_between_writes_loses_nothing_acknowledged(
    database: Database, tables: Tables, database_url: str, repository: Path
) -> None:
    told: list[int] = []
    command = [sys.executable, "-c", WRITER, database_url]
    with subprocess.Popen(command, cwd=repository, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        for line in writer.stdout:
            told.append(int(line))
            if len(told) == 20:
                writer.kill()
                break
    video = database.get("video_1")
    assert video is not None and told == list(range(20))
    files = database.chunk_files("video_1")
    assert len(files) >= 20 and video.chunks_done == len(files) and video.frames_done == 9 * len(files)


def test_a_commit_of_sqlite_is_on_the_disk_before_it_is_acknowledged(tmp_path: Path) -> None:
    """What a crash of the machine costs cannot be tried here: this is what SQLite itself promises nothing with."""
    tables = Tables(f"sqlite:///{tmp_path / 'store.sqlite'}")
    with tables.reading() as connection:
        found = [connection.execute(sql.text(f"PRAGMA {name}")).scalar() for name in ("journal_mode", "synchronous")]
    assert found == ["wal", 2]
    tables.close()


def test_the_same_request_again_gives_the_same_video_and_another_one_a_conflict(tables: Tables) -> None:
    quotas, database = Quotas(tables), Database(tables)
    asked = Idempotency("k1", "body")
    assert quotas.admit(VIDEO, LOCAL, asked, 1.0) is None
    other = replace(VIDEO, id="video_2")
    in_flight = quotas.admit(other, LOCAL, asked, 2.0)
    assert isinstance(in_flight, Refused) and in_flight.code == "idempotency_in_flight"
    database.opened("video_1", "replica-1", "video/mp4")
    known = quotas.admit(other, LOCAL, asked, 3.0)
    assert isinstance(known, VideoRecord) and known.id == "video_1"
    conflict = quotas.admit(other, LOCAL, replace(asked, body_hash="other"), 4.0)
    assert isinstance(conflict, Refused) and conflict.code == "idempotency_conflict"
    assert quotas.admit(replace(other, owner="somebody"), Caller("somebody", "s"), asked, 5.0) is None


def test_a_request_whose_gateway_died_may_be_made_again_after_a_while(tables: Tables) -> None:
    quotas, asked = Quotas(tables), Idempotency("k1", "body")
    assert quotas.admit(VIDEO, LOCAL, asked, 1.0) is None
    assert quotas.admit(replace(VIDEO, id="video_2"), LOCAL, asked, 70.0) is None


def test_an_account_runs_as_many_videos_as_it_may_whatever_keys_it_uses(tables: Tables) -> None:
    quotas, database = Quotas(tables), Database(tables)
    callers = [Caller(f"key{number}", "shared", sessions=2) for number in range(3)]
    made = [
        quotas.admit(replace(VIDEO, id=f"video_{n}", owner=caller.key_id, account="shared"), caller, None, 1.0)
        for n, caller in enumerate(callers)
    ]
    assert made[:2] == [None, None] and isinstance(made[2], Refused) and made[2].retry_after_s
    database.finish("video_0", Status.CANCELLED, 2.0)
    assert quotas.admit(replace(VIDEO, id="video_9", account="shared"), callers[2], None, 3.0) is None


def test_frames_a_minute_slide_and_what_no_replica_took_is_given_back(tables: Tables) -> None:
    quotas = Quotas(tables)
    caller = Caller("key", "account", frames_per_minute=50)

    def ask(number: int, now: float) -> Any:
        video = replace(VIDEO, id=f"video_{number}", account="account", created_at=now)
        return video, quotas.admit(video, caller, None, now)

    assert ask(0, 100.0)[1] is None
    video, made = ask(1, 110.0)
    assert made is None
    _, refusal = ask(2, 120.0)
    assert isinstance(refusal, Refused) and refusal.retry_after_s == pytest.approx(40.0)
    quotas.withdraw(video, caller)
    assert ask(3, 121.0)[1] is None
    assert isinstance(ask(4, 159.0)[1], Refused) and ask(5, 160.5)[1] is None
    large = quotas.admit(replace(VIDEO, id="video_6", frames=51, account="account"), caller, None, 500.0)
    assert isinstance(large, Refused) and large.code == "quota_too_small" and large.retry_after_s is None


def test_a_long_stream_is_charged_its_first_minute_and_then_as_it_goes(tables: Tables) -> None:
    quotas, database = Quotas(tables), Database(tables)
    caller = Caller("key", "account", frames_per_minute=1000)
    stream = replace(VIDEO, frames=4000, pacing=Pacing.REALTIME, account="account")
    assert quotas.admit(stream, caller, None, 1.0) is None
    database.opened("video_1", "replica-1", "video/mp4")
    asked = replace(VIDEO, id="video_2", frames=40, account="account")
    assert add(database, 0, replace(FIRST, frames=960), now=62.0)
    assert add(database, 0, replace(SECOND, frames=20, first_pixel_frame=960), now=62.0)
    assert add(database, 0, replace(SECOND, chunk=2, frames=950, first_pixel_frame=980), now=62.0)
    refusal = quotas.admit(asked, caller, None, 63.0)
    assert isinstance(refusal, Refused) and refusal.code == "frame_quota_exceeded"
    assert quotas.admit(replace(asked, frames=30), caller, None, 63.0) is None


def test_keys_are_kept_as_hashes_and_end_when_revoked(tables: Tables) -> None:
    credentials = Credentials(tables)
    text = credentials.create_key("a person", 2, 100, 1.0)
    shown = parse_secret("dk", text)
    assert shown is not None and credentials.caller(shown) == Caller(shown.id, shown.id, 2, 100)
    with tables.reading() as connection:
        row = str(connection.execute(sql.text("SELECT * FROM keys")).all())
    assert text not in row and text.split("_", 2)[2] not in row
    wrong = parse_secret("dk", text[:-1] + ("a" if text[-1] != "a" else "b"))
    assert wrong is not None and credentials.caller(wrong) is None
    secret = parse_secret("ek", credentials.create_client_secret(shown.id, 100.0))
    assert credentials.revoke_key(shown.id, 2.0) and not credentials.revoke_key(shown.id, 3.0)
    assert credentials.caller(shown) is None and credentials.keys()[0].revoked_at == 2.0
    assert secret is not None and credentials.redeem(secret, 3.0) is None


def test_a_client_secret_counts_once_and_not_for_long(tables: Tables, database_url: str) -> None:
    credentials = Credentials(tables)
    secret = parse_secret("ek", credentials.create_client_secret("key", 100.0))
    late = parse_secret("ek", credentials.create_client_secret("key", 100.0))
    assert secret is not None and late is not None
    won: list[str | None] = []
    threads = [threading.Thread(target=lambda: won.append(credentials.redeem(secret, 50.0))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(map(str, won)) == ["None"] * 5 + ["key"]
    assert credentials.redeem(late, 100.0) is None


def test_a_viewers_token_is_kept_as_a_hash_and_counts_for_its_time_and_video(
    tables: Tables, database: Database
) -> None:
    viewers = Viewers(tables)
    assert viewers.add("video_2", Role.WATCH, "", 1.0, 60.0) is None
    made = viewers.add("video_1", Role.STEER, "Ann", 1.0, 60.0)
    assert made is not None
    text, viewer = made
    shown = parse_secret("vt", text)
    assert shown is not None and shown.id == viewer.id and viewers.find(shown, 60.9) == (viewer, "local")
    assert viewers.find(shown, 61.0) is None and viewers.find(replace(shown, hash="0" * 64), 2.0) is None
    with tables.reading() as connection:
        assert text.split("_", 2)[2] not in str(connection.execute(sql.text("SELECT * FROM viewers")).all())
    assert viewers.of("video_1", 2.0) == [viewer] and viewers.of("video_1", 61.0) == []
    assert not viewers.revoke("video_2", viewer.id) and viewers.revoke("video_1", viewer.id)
    assert viewers.find(shown, 2.0) is None and viewers.of("video_1", 2.0) == []


def test_of_many_who_share_at_once_no_more_than_the_most_get_a_token(tables: Tables, database: Database) -> None:
    viewers = Viewers(tables)
    for _ in range(MAX_VIEWERS - 2):
        assert viewers.add("video_1", Role.WATCH, "", 1.0, 60.0) is not None
    made: list[object] = []
    threads = [
        threading.Thread(target=lambda: made.append(viewers.add("video_1", Role.WATCH, "", 1.0, 60.0)))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(made) == 6 and made.count(None) == 4
    viewers.prune(61.0)
    assert viewers.add("video_1", Role.WATCH, "", 61.0, 60.0) is not None


@pytest.mark.parametrize("text", ["", "dk", "dk_1", "ek_1_2", "dk_1_é", "dk_\0_x", "dk_1_" + "x" * 500])
def test_what_is_no_key_is_not_looked_up(text: str) -> None:
    assert parse_secret("dk", text) is None
