"""Nested frozen dataclasses: built from JSON with every key and type checked, changed by `dotted.key=value`."""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, TypeVar

from diagonal.errors import FieldError, require

T = TypeVar("T")


def assign(data: dict[str, Any], key: str, text: str) -> None:
    """Put a value at the dotted `key` of a nested dict, in place: JSON where `text` is that, else `text` itself."""
    node, parts = data, key.split(".")
    for depth, part in enumerate(parts):
        if not (isinstance(node, dict) and part in node):
            raise FieldError("setting", key, _allowed_keys(data, node, key, parts[:depth]))
        if depth < len(parts) - 1:
            node = node[part]
    node[parts[-1]] = _parse(text)


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _allowed_keys(data: Mapping[str, Any], node: object, key: str, parents: list[str]) -> str:
    place = ".".join(parents) or "the configuration"
    if not isinstance(node, Mapping):
        return f"nothing below {place}, which is a value"
    return no_such_key(place, key, _dotted(data), node)


def _dotted(data: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """Every dotted key of a nested dict."""
    for key, value in data.items():
        yield f"{path}{key}"
        if isinstance(value, Mapping):
            yield from _dotted(value, f"{path}{key}.")


def no_such_key(place: str, key: str, dotted: Iterable[str], names: Iterable[str]) -> str:
    """What is allowed instead of an unknown key: the dotted key that is near, and the names in its place."""
    return f"a key of {place}; no such key{nearest(key, dotted)}; known there: {sorted(names)}"


def nearest(name: str, names: Iterable[str]) -> str:
    """`, did you mean X?` with the names that are most like `name`, or '' where none is.

    A dotted name is compared whole, then by its last part alone: `lr` and `distil.lr` both lead to `distill.lr`.
    """
    names = list(names)
    close = difflib.get_close_matches(name, names, 1, 0.75)
    close = close or [full for full in names if full.rpartition(".")[2] == name.rpartition(".")[2]]
    return f", did you mean {' or '.join(close)}?" if close else ""


def build(cls: type[T], data: object, path: str = "") -> T:
    """Build dataclass `cls` from a mapping, checking keys and types; missing keys keep their defaults.

    `FieldError` names the key (below `path`), its value and what is allowed.
    """
    if not isinstance(data, Mapping):
        raise FieldError(path or "config", data, "an object with keys")
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for key in (key for key in data if key not in names):
        dotted, place = [f"{path}{name}" for name in names], path.rstrip(".") or "the configuration"
        raise FieldError(f"{path}{key}", data[key], no_such_key(place, f"{path}{key}", dotted, names))
    return cls(**{key: _convert(hints[key], value, f"{path}{key}") for key, value in data.items()})


def _convert(hint: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, f"{path}.")
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        require(isinstance(value, list | tuple), path, value, "a list")
        return tuple(_convert(arguments[0], item, path) for item in value)
    if origin is Literal:
        require(value in arguments, path, value, f"one of {list(arguments)}")
        return value
    if origin in (typing.Union, types.UnionType):
        return _convert_union(arguments, value, path)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is str and path.endswith("steps") and isinstance(value, int):
        return str(value)  # `--set schedule.steps=4322222` parses as a number
    right = isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool)
    require(right, path, value, f"a value of type {hint.__name__}")
    return value


def _convert_union(arguments: tuple[Any, ...], value: Any, path: str) -> Any:
    for argument in arguments:
        if argument is type(None):
            if value is None:
                return None
            continue
        try:
            return _convert(argument, value, path)
        except FieldError:
            continue
    raise FieldError(path, value, " or ".join(map(hint_name, arguments)))


def hint_name(hint: Any) -> str:
    """The type of a value in words."""
    if typing.get_origin(hint) is Literal:
        return " or ".join(repr(value) for value in typing.get_args(hint))
    return "null" if hint is type(None) else f"a value of type {hint.__name__}"
