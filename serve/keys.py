"""API keys from the command line: `diagonal keys create --name ...`, `list`, `revoke`.

It works on the service's database itself, so whoever may run it may do anything. Give --data or --database as the
service has them. A new key is shown once; what is kept of it is a hash.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

from diagonal.errors import FieldError
from serve.settings import ServeSettings
from serve.store.credentials import Credentials
from serve.store.tables import Tables

DONE, REFUSED = 0, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    options = _parser().parse_args(arguments)
    try:
        with closing(_tables(options)) as tables:
            return int(options.run(Credentials(tables), options))
    except FieldError as error:
        print(f"keys: {error}", file=sys.stderr)
        return REFUSED


def _tables(options: argparse.Namespace) -> Tables:
    settings = ServeSettings(data=options.data, database=options.database)
    if not options.database:
        Path(settings.data).expanduser().mkdir(parents=True, exist_ok=True)
    mask = os.umask(0o077)  # a database made here is its owner's alone
    try:
        return Tables(settings.database_url)
    finally:
        os.umask(mask)


def create(credentials: Credentials, options: argparse.Namespace) -> int:
    """Make a key and print it, this once."""
    limits = (options.sessions, options.frames_per_minute)
    print(credentials.create_key(options.name, *limits, now=time.time(), account=options.account))
    print("keep it: it is not shown again", file=sys.stderr)
    return DONE


def show(credentials: Credentials, options: argparse.Namespace) -> int:
    """List the keys, without the keys themselves."""
    print(f"{'id':16}  {'sessions':>8}  {'frames/min':>10}  {'created':10}  {'revoked':10}  account / name")
    for key in credentials.keys():
        limits = f"{key.sessions or 'any':>8}  {key.frames_per_minute or 'any':>10}"
        days = f"{_day(key.created_at):10}  {_day(key.revoked_at):10}"
        print(f"{key.id:16}  {limits}  {days}  {key.account} / {key.name}")
    return DONE


def revoke(credentials: Credentials, options: argparse.Namespace) -> int:
    """End a key at once; videos that it began go on."""
    if credentials.revoke_key(options.id, time.time()):
        return DONE
    print(f"keys: there is no key {options.id!r} that counts", file=sys.stderr)
    return REFUSED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="diagonal keys", description="API keys of a Diagonal service.")
    commands = parser.add_subparsers(required=True, metavar="command")
    where = argparse.ArgumentParser(add_help=False)
    where.add_argument("--data", default=ServeSettings().data, help="folder of the store (default: %(default)s)")
    where.add_argument("--database", default="", help="SQLAlchemy URL, when the service has one")
    new = commands.add_parser("create", parents=[where], help=create.__doc__)
    new.add_argument("--name", required=True, help="who it is for")
    new.add_argument("--sessions", type=int, default=0, help="videos at once (default: any number)")
    new.add_argument("--frames-per-minute", type=int, default=0, help="pixel frames a minute (default: any number)")
    new.add_argument("--account", default="", help="keys of one account share what they may use (default: its own)")
    new.set_defaults(run=create)
    commands.add_parser("list", parents=[where], help=show.__doc__).set_defaults(run=show)
    end = commands.add_parser("revoke", parents=[where], help=revoke.__doc__)
    end.add_argument("id", help="as `list` shows it")
    end.set_defaults(run=revoke)
    return parser


def _day(seconds: float | None) -> str:
    return "" if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d")


if __name__ == "__main__":
    sys.exit(main())
