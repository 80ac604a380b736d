"""What a deployment of the service is told: where the release is, what it may use, where it keeps its files."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_type_hints

from diagonal.errors import FieldError, require
from diagonal.media.encode import CODECS


@dataclass(frozen=True)
class ServeSettings:
    """Arguments of `serve.app:build`; limits of the API itself come from the release's own configuration.

    `release`: a folder or s3:// URI, '' is the embedded one. `device`: of each replica, such as cpu or cuda.
    `replicas`, `gateways`: how many of each. `encode_threads`: chunks of different sessions encoded at once.
    `data`: folder of the store, with its database, chunks and finished files.
    `database`: SQLAlchemy URL, '' is a SQLite file in `data`.
    """

    release: str = ""
    device: str = "cpu"
    replicas: int = 1
    gateways: int = 1
    replica_cpus: float = 1.0
    replica_gpus: float = 0.0
    gateway_cpus: float = 0.1
    store_cpus: float = 0.1
    encode_threads: int = 2
    codec: str = "h264"
    data: str = ".diagonal/serve"
    database: str = ""
    reader_start_timeout_s: float = 10.0
    session_idle_timeout_s: float = 60.0

    def __post_init__(self) -> None:
        require(self.codec in CODECS, "codec", self.codec, f"one of {list(CODECS)}")
        for name in ("replicas", "gateways", "encode_threads"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "a whole number of at least 1")
        for name in ("replica_cpus", "replica_gpus", "gateway_cpus", "store_cpus"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "a number of at least 0")
        for name in ("reader_start_timeout_s", "session_idle_timeout_s"):
            require(getattr(self, name) > 0, name, getattr(self, name), "seconds above 0")
        require(bool(self.data), "data", self.data, "a folder")

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> ServeSettings:
        """From `serve run serve.app:build key=value ...` (all strings) or a config file's `args`."""
        hints = get_type_hints(cls)
        for key, value in arguments.items():
            require(key in hints, key, value, f"no such argument; known are {sorted(hints)}")
        return cls(**{key: _parsed(key, value, hints[key]) for key, value in arguments.items()})

    def to_arguments(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def _parsed(key: str, value: Any, kind: type) -> Any:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise FieldError(key, value, f"a value of type {kind.__name__}")
    try:
        return kind(value)
    except ValueError as error:
        raise FieldError(key, value, f"a value of type {kind.__name__}") from error
