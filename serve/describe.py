"""The service's settings in words; `python -m serve.describe docs/configuration.md` writes the page of all settings."""

from __future__ import annotations

import sys
from pathlib import Path

from diagonal.config.describe import page, rows_of, shown
from serve.settings import ServeSettings


def describe(as_json_text: bool = False) -> str:
    """What `diagonal config service [--json]` prints."""
    return shown(rows_of(ServeSettings()), as_json_text)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(ServeSettings()), encoding="utf-8")
