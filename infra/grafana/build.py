"""Writes the dashboards beside their code: `python -m infra.grafana.build`; `--check` tells of any that differ."""

from __future__ import annotations

import argparse
from pathlib import Path

from diagonal.client.files import write_whole
from infra.grafana import capacity, data, training, viewers
from infra.grafana.panels import Board, to_json

FOLDER = Path(__file__).parent / "dashboards"


def boards() -> tuple[Board, ...]:
    """All dashboards, in the order of their links."""
    return (viewers.BOARD, capacity.BOARD, training.BOARD, data.BOARD)


def files() -> dict[str, str]:
    """The JSON of every dashboard, by file name."""
    return {f"{board.name}.json": to_json(board, boards()) for board in boards()}


def different(folder: Path = FOLDER) -> list[str]:
    """Names of files in `folder` that are missing, too many, or not what the code makes."""
    made = files()
    found = {path.name: path.read_text() for path in folder.glob("*.json")}
    return sorted(name for name in made.keys() | found.keys() if made.get(name) != found.get(name))


def main(arguments: list[str] | None = None) -> int:
    """0, or with `--check` 1 where a file differs."""
    parser = argparse.ArgumentParser(prog="python -m infra.grafana.build", description="dashboards as JSON")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a file differs")
    if parser.parse_args(arguments).check:
        print("\n".join(f"{name} differs from its code: run `make dashboards`" for name in different()) or "the same")
        return int(bool(different()))
    for name, text in files().items():
        write_whole(FOLDER / name, [text.encode()])
        print(f"{FOLDER / name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
