"""JSON files, written whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from diagonal.errors import FieldError, require
from diagonal.files import write_text


def write_json(path: str | os.PathLike[str], data: object) -> None:
    """Write `data` as JSON beside its final name, then rename, so that no reader ever sees half of it."""
    write_text(Path(path), json.dumps(data, indent=2, ensure_ascii=False, sort_keys=True) + "\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """What a JSON file holds; `FieldError` when it is missing or not JSON."""
    require(Path(path).is_file(), "file", str(path), "a JSON file that exists")
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise FieldError("file", str(path), f"JSON ({error})") from error
