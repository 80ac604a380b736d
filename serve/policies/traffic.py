"""How new videos are shared among the releases that one service offers side by side."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diagonal.errors import require
from serve.settings import check_name


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
