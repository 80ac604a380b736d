"""Every setting with its default, unit, allowed values and meaning: for a terminal, as JSON, and as a page."""

from __future__ import annotations

import dataclasses
import inspect
import json
import shutil
import textwrap
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from diagonal.config import Config
from diagonal.config.parse import nearest
from diagonal.config.presets import PRESETS
from diagonal.errors import require
from diagonal.setting import Allowed

_UNITS = {"_s": "s", "_frames": "latent frames", "_fps": "frames/s", "_sessions": "sessions", "_chunks": "chunks"}
_UNITS |= {"_characters": "characters", "updates": "updates", "_clips": "clips", "_steps": "steps", "_drift": "share"}
_UNITS |= {"_share": "share", "_workers": "workers", "_tokens": "tokens", "_size": "samples"}
_TYPES = {int: "whole number", float: "number", str: "text", bool: "true or false"}
_TABLE = "| setting | default | unit | allowed | meaning |\n|---|---|---|---|---|\n"
_INTRO = """# Configuration

Every setting of a run, a release and an engine: its name, default, unit, what is allowed, and what it means. Set one
with `--set distill.lr=1e-6`; `diagonal config SECTION` prints the same tables. Defaults are those of the preset
`wan-1.3b`; another preset's value stands beside it. The last section has the settings of the service, which stand in
`serve/config.yaml` or after `diagonal serve RELEASE --set`. This page is made by
`python -m serve.describe docs/configuration.md`.
"""


@dataclass(frozen=True)
class Row:
    """One setting; `default` is the value in the preset asked for."""

    name: str
    default: Any
    unit: str
    allowed: str
    meaning: str


def rows(section: str = "", preset: str = "wan-1.3b") -> list[Row]:
    """The settings of `section` (all of them where it is empty), such as `distill` or `distill.loss`."""
    require(preset in PRESETS, "preset", preset, f"one of {sorted(PRESETS)}{nearest(preset, PRESETS)}")
    every = rows_of(PRESETS[preset])
    chosen = [row for row in every if not section or f"{row.name}.".startswith(f"{section}.")]
    sections = sorted(name for name, _ in sections_of(Config()) if name)
    require(bool(chosen), "section", section, f"one of {sections}{nearest(section, sections)}")
    return chosen


def rows_of(owner: Any) -> list[Row]:
    """The settings of a dataclass whose fields are settings, and of those in it."""
    return list(_rows(owner, ""))


def _rows(owner: Any, path: str) -> Iterator[Row]:
    hints = typing.get_type_hints(type(owner))
    for field in dataclasses.fields(owner):
        name, value = f"{path}{field.name}", getattr(owner, field.name)
        if dataclasses.is_dataclass(value):
            yield from _rows(value, f"{name}.")
        else:
            yield Row(name, value, _unit(field), _allowed(field, hints[field.name]), field.metadata["meaning"])


def sections_of(owner: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every section below `owner` with its dotted name, `owner` itself first."""
    yield path, owner
    for field in dataclasses.fields(owner):
        if dataclasses.is_dataclass(value := getattr(owner, field.name)):
            yield from sections_of(value, f"{path}.{field.name}".lstrip("."))


def _unit(field: dataclasses.Field[Any]) -> str:
    ending = next((unit for end, unit in _UNITS.items() if field.name.endswith(end)), "")
    return str(field.metadata["unit"]) or (ending if field.type not in ("str", "bool") else "")


def _allowed(field: dataclasses.Field[Any], hint: Any) -> str:
    allowed = field.metadata["allowed"]
    words = allowed.text if isinstance(allowed, Allowed) else allowed
    if typing.get_origin(hint) is Literal:
        return " | ".join(value or "''" for value in typing.get_args(hint))
    if hint is int and words.startswith("a number"):
        return str(words.replace("a number", "a whole number"))
    return str(words) or _TYPES.get(hint, "a list of whole numbers")


def as_text(chosen: list[Row], width: int = 0) -> str:
    """Rows for a terminal: a line `name = default [unit]`, then what is allowed and the meaning, indented."""
    width = width or min(shutil.get_terminal_size((100, 24)).columns, 120)
    lines = []
    for row in chosen:
        unit = f" {row.unit}" if row.unit else ""
        lines.append(textwrap.shorten(f"{row.name} = {_shown(row.default)}{unit}", width, placeholder=" ..."))
        about = f"{row.meaning} Allowed: {row.allowed}."
        lines += textwrap.wrap(about, width, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines) + "\n"


def as_json(chosen: list[Row]) -> str:
    """Rows for a script."""
    return json.dumps([dataclasses.asdict(row) for row in chosen], indent=2, ensure_ascii=False) + "\n"


def shown(chosen: list[Row], as_json_text: bool) -> str:
    """Rows as `diagonal config` prints them."""
    return as_json(chosen) if as_json_text else as_text(chosen)


def describe(section: str = "", preset: str = "wan-1.3b", as_json_text: bool = False) -> str:
    """What `diagonal config [SECTION] [--preset P] [--json]` prints; `FieldError` on an unknown section or preset."""
    return shown(rows(section, preset), as_json_text)


def page(service: Any) -> str:
    """docs/configuration.md, with the settings of the service last."""
    others = {name: {row.name: row.default for row in rows("", name)} for name in PRESETS if name != "wan-1.3b"}
    parts = [_INTRO]
    for path, section in sections_of(Config()):
        own = [row for row in rows(path) if row.name.rpartition(".")[0] == path]
        parts.append(_section(path or "Everything", section, own, others))
    return "\n".join([*parts, _section("The service", service, rows_of(service), {})])


def _section(title: str, owner: Any, own: list[Row], others: dict[str, dict[str, Any]]) -> str:
    about = inspect.cleandoc(type(owner).__doc__ or "").partition("\n\n")[0].replace("\n", " ")
    text = f"## {title}\n\n{about}\n\n{_TABLE}"
    for row in own:
        cells = (f"`{row.name}`", _default(row, others), row.unit, _cell(row.allowed), _cell(row.meaning))
        text += f"| {' | '.join(cells)} |\n"
    return text


def _default(row: Row, others: dict[str, dict[str, Any]]) -> str:
    values = {name: settings[row.name] for name, settings in others.items()}
    different = "; ".join(f"{name}: {_code(value)}" for name, value in values.items() if value != row.default)
    return _code(row.default) + (f" ({different})" if different else "")


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) and value else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:40]} ..."


def _code(value: Any) -> str:
    return f"`{_cell(_shown(value))}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
