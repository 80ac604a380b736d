"""The releases that one service offers side by side: their names, what each may use, and which makes a video."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args, get_type_hints

from diagonal.errors import FieldError, require

NAME = re.compile(r"[a-z0-9._-]{1,64}")
_NAMES = "1 to 64 of a-z, 0-9, '.', '_' and '-'"
_TRUE, _FALSE = ("true", "1", "yes"), ("false", "0", "no")


@dataclass(frozen=True)
class ReleaseSettings:
    """One of several releases. What is None is as the service's own setting of that name says.

    `name` is what callers ask for as `model`; `release` a folder or an s3:// URI, '' the embedded one.
    """

    name: str
    release: str = ""
    device: str | None = None
    replicas: int | None = None
    max_replicas: int | None = None
    replica_cpus: float | None = None
    replica_gpus: float | None = None
    allow_unpromoted: bool | None = None

    def __post_init__(self) -> None:
        check_name("releases.name", self.name)

    def changes(self) -> dict[str, Any]:
        """What it says otherwise than the service's own settings."""
        told = {key: value for key, value in dataclasses.asdict(self).items() if key != "name" and value is not None}
        return told | {"model": self.name}


def check_name(field: str, name: object) -> None:
    """`FieldError` unless callers may ask for a release by this name: no path can be made of it."""
    right = isinstance(name, str) and NAME.fullmatch(name) is not None and set(name) != {"."}
    require(right, field, name, _NAMES)


def parse_releases(value: object) -> tuple[ReleaseSettings, ...]:
    """From a file: a list of mappings with `name`, `release` and more; from a command line: "name=uri, name=uri"."""
    allowed = 'a list of {name: ..., release: ...}, or "name=uri, name=uri"'
    if isinstance(value, str):
        pairs = [part.strip().partition("=") for part in value.split(",") if part.strip()]
        require(all(equals for _, equals, _ in pairs), "releases", value, allowed)
        value = [{"name": name.strip(), "release": uri.strip()} for name, _, uri in pairs]
    if not isinstance(value, Sequence):
        raise FieldError("releases", value, allowed)
    found = tuple(one if isinstance(one, ReleaseSettings) else _release(one, allowed) for one in value)
    names = [one.name for one in found]
    require(len(set(names)) == len(names), "releases", names, "each name once")
    return found


def _release(value: object, allowed: str) -> ReleaseSettings:
    require(isinstance(value, Mapping), "releases", value, allowed)
    assert isinstance(value, Mapping)
    hints = get_type_hints(ReleaseSettings)
    for key in value:
        require(key in hints, f"releases.{key}", value[key], f"no such field; known are {sorted(hints)}")
    require("name" in value, "releases", dict(value), "a name for each")
    given = {key: one for key, one in value.items() if one is not None}
    kinds = {key: (*(kind for kind in get_args(hints[key]) if kind is not type(None)), hints[key])[0] for key in given}
    return ReleaseSettings(**{key: parsed(f"releases.{key}", one, kinds[key]) for key, one in given.items()})


def parsed(field: str, value: Any, kind: type) -> Any:
    """A value of a file or of a command line, where all are text, as `kind`: str, int, float or bool."""
    allowed = f"a value of type {kind.__name__}"
    if kind is bool:
        text = str(value).lower()
        require(text in _TRUE + _FALSE, field, value, "true or false")
        return text in _TRUE
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise FieldError(field, value, allowed)
    try:
        return kind(value)
    except (ValueError, OverflowError) as error:
        raise FieldError(field, value, allowed) from error


@dataclass(frozen=True)
class Canaries:
    """The `user_config` of the deployment `Gateway`: `weights` by release, and the `applications` of those that the
    service's own application does not hold."""

    weights: object
    applications: Mapping[str, str]

    @classmethod
    def parse(cls, user_config: Mapping[str, Any]) -> Canaries:
        """`FieldError` when it says something else."""
        known = {"weights", "applications"}
        require(set(user_config) <= known, "user_config", dict(user_config), f"a mapping of {sorted(known)}")
        applications = user_config.get("applications") or {}
        right = isinstance(applications, Mapping) and all(isinstance(one, str) and one for one in applications.values())
        require(right, "applications", applications, "a mapping of releases to names of Serve applications")
        for name in applications:
            check_name("applications", name)
        return cls(user_config.get("weights"), applications)


@dataclass(frozen=True)
class Shares:
    """How new videos that name no model are shared among releases; weight 0 is made on request only."""

    weights: Mapping[str, float]

    @classmethod
    def parse(cls, names: Sequence[str], weights: object = None) -> Shares:
        """Of the releases `names`: by default the first one makes all. `FieldError` when the weights are none."""
        if weights is None:
            return cls({name: float(name == names[0]) for name in names})
        require(isinstance(weights, Mapping), "weights", weights, f"a mapping of names in {sorted(names)} to weights")
        assert isinstance(weights, Mapping)
        for name, weight in weights.items():
            require(name in names, "weights", name, f"a name in {sorted(names)}")
            number = isinstance(weight, int | float) and not isinstance(weight, bool)
            right = number and math.isfinite(weight) and weight >= 0
            require(right, f"weights.{name}", weight, "a number of at least 0")
        require(any(weights.values()), "weights", dict(weights), "one above 0")
        return cls({name: float(weights.get(name, 0.0)) for name in names})

    def ranked(self, video_id: str) -> list[str]:
        """The releases with a weight, the one that makes this video first; every gateway ranks them alike.

        Weighted rendezvous hashing: of many ids each release gets its share, and when weights change, only the ids
        move that must.
        """
        rank = {name: -weight / math.log(_fraction(name, video_id)) for name, weight in self.weights.items() if weight}
        return sorted(rank, key=lambda name: (-rank[name], name))


def _fraction(name: str, video_id: str) -> float:
    """A number above 0 and below 1 that the two decide."""
    digest = hashlib.blake2b(f"{name}/{video_id}".encode(), digest_size=8).digest()
    return ((int.from_bytes(digest, "big") >> 11) + 0.5) / 2**53
