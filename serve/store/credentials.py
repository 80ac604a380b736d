"""API keys and one-time client secrets in the database: of each only its hash is kept."""

from __future__ import annotations

import hmac
import os
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sql

from diagonal.errors import FieldError, require
from diagonal.files import create_private
from serve.records import LOCAL, Caller
from serve.store.tables import CLIENT_SECRETS, KEYS, Tables
from serve.tokens import CLIENT_SECRET, KEY, Secret, new_secret, parse_secret


@dataclass(frozen=True)
class KeyRecord:
    """A key as `list` shows it."""

    id: str
    name: str
    account: str
    sessions: int
    frames_per_minute: int
    created_at: float
    revoked_at: float | None


def local_key(path: Path) -> Secret:
    """The key in the file of a service for this machine's own user; made if there is none, for its owner alone to read.

    `FieldError` when others may read it, or it holds no such key: somebody who is not its owner may have put it there.
    """
    if not path.exists():
        create_private(path, new_secret(KEY, LOCAL)[0].encode())
    state = path.stat()
    own = state.st_uid == os.geteuid() and not state.st_mode & 0o077
    require(own, "data", str(path), "a file of the service's own user, with mode 0600")
    secret = parse_secret(KEY, path.read_text().strip())
    if secret is None or secret.id != LOCAL:
        raise FieldError("data", str(path), f"a key that begins with {KEY}_{LOCAL}_; remove the file for a new one")
    return secret


class Credentials:
    """Keys and client secrets. Safe to use from several threads and processes."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables

    def create_key(self, name: str, sessions: int, frames_per_minute: int, now: float, account: str = "") -> str:
        """A new key, told this once. Keys of one account share what it may use; 0 is no limit.

        `FieldError` on a wrong value.
        """
        require(0 < len(name) <= 128 and name.isprintable(), "name", name, "1 to 128 printable characters")
        require(len(account) <= 64 and account.isprintable(), "account", account, "up to 64 printable characters")
        require(sessions >= 0, "sessions", sessions, "a whole number of at least 0")
        require(frames_per_minute >= 0, "frames_per_minute", frames_per_minute, "a whole number of at least 0")
        text, secret = new_secret(KEY)
        limits = {"sessions": sessions, "frames_per_minute": frames_per_minute}
        row = {"id": secret.id, "hash": secret.hash, "name": name, "account": account or secret.id, "created_at": now}
        with self._tables.writing() as connection:
            connection.execute(KEYS.insert().values(**row, **limits))
        return text

    def keys(self) -> list[KeyRecord]:
        """Every key, oldest first."""
        columns = [KEYS.c[name] for name in KeyRecord.__dataclass_fields__]
        with self._tables.reading() as connection:
            rows = connection.execute(sql.select(*columns).order_by(KEYS.c.created_at)).mappings()
            return [KeyRecord(**row) for row in rows]

    def revoke_key(self, key_id: str, now: float) -> bool:
        """End a key and its client secrets; False when there is no such key, or it was ended before."""
        with self._tables.writing() as connection:
            alive = (KEYS.c.id == key_id) & KEYS.c.revoked_at.is_(None)
            connection.execute(CLIENT_SECRETS.delete().where(CLIENT_SECRETS.c.key_id == key_id))
            return bool(connection.execute(KEYS.update().where(alive).values(revoked_at=now)).rowcount)

    def caller(self, shown: Secret) -> Caller | None:
        """Whose key this is; None when it is nobody's."""
        with self._tables.reading() as connection:
            return _caller(connection, shown.id, shown.hash)

    def create_client_secret(self, key_id: str, expires_at: float) -> str:
        """A secret for a browser: it opens one session in the key's name."""
        text, secret = new_secret(CLIENT_SECRET)
        row = {"id": secret.id, "hash": secret.hash, "key_id": key_id, "expires_at": expires_at}
        with self._tables.writing() as connection:
            connection.execute(CLIENT_SECRETS.insert().values(**row))
        return text

    def redeem(self, shown: Secret, now: float) -> str | None:
        """Use a client secret up: the id of the key that it stands for; None when it is not, or no longer, one."""
        mine = (CLIENT_SECRETS.c.id == shown.id) & (CLIENT_SECRETS.c.expires_at > now)
        with self._tables.writing() as connection:
            row = connection.execute(CLIENT_SECRETS.select().where(mine).with_for_update()).first()
            if row is None or not hmac.compare_digest(row.hash, shown.hash):
                return None
            gone = connection.execute(CLIENT_SECRETS.delete().where(CLIENT_SECRETS.c.id == shown.id))
            return str(row.key_id) if gone.rowcount else None

    def caller_of(self, key_id: str) -> Caller | None:
        """The key by its id alone, for who has shown a client secret of it."""
        with self._tables.reading() as connection:
            return _caller(connection, key_id, None)

    def prune(self, now: float) -> None:
        """Drop client secrets that are past their time."""
        with self._tables.writing() as connection:
            connection.execute(CLIENT_SECRETS.delete().where(CLIENT_SECRETS.c.expires_at <= now))


def _caller(connection: sql.Connection, key_id: str, shown_hash: str | None) -> Caller | None:
    row = connection.execute(KEYS.select().where(KEYS.c.id == key_id, KEYS.c.revoked_at.is_(None))).first()
    if row is None or (shown_hash is not None and not hmac.compare_digest(row.hash, shown_hash)):
        return None
    return Caller(row.id, row.account, row.sessions, row.frames_per_minute)
