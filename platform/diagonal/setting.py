"""One setting of the configuration: its default, meaning, unit and allowed range stand together at the field."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from diagonal.errors import require

T = TypeVar("T")


@dataclass(frozen=True)
class Allowed:
    """The range of a setting: in words, and as a test of a value."""

    text: str
    holds: Callable[[Any], bool]


POSITIVE = Allowed("a number above 0", lambda value: value > 0)
NOT_NEGATIVE = Allowed("a number of at least 0", lambda value: value >= 0)
SHARE = Allowed("a number in [0, 1)", lambda value: 0.0 <= value < 1.0)
FULL_SHARE = Allowed("a number in [0, 1]", lambda value: 0.0 <= value <= 1.0)


def setting(default: T, meaning: str, allowed: Allowed | str = "", unit: str = "") -> T:
    """A dataclass field with what a reader must know of it.

    `allowed` as text is words alone, for a range that the section checks by itself. `unit` is needed only where the
    name does not end in it.
    """
    metadata = {"meaning": meaning, "allowed": allowed, "unit": unit}
    return dataclasses.field(default=default, metadata=metadata)


def check(section: Any, prefix: str = "") -> None:
    """Raise `FieldError` for the first field of a section whose value is outside its range."""
    for field in dataclasses.fields(section):
        allowed = field.metadata.get("allowed")
        if isinstance(allowed, Allowed):
            value = getattr(section, field.name)
            require(allowed.holds(value), f"{prefix}.{field.name}".lstrip("."), value, allowed.text)
