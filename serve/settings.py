"""What a deployment of the service is told: where the release is, what it may use, where it keeps its files."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from diagonal.errors import FieldError, require
from diagonal.media.encode import CODECS

AUTH_MODES = ("local", "keys")


@dataclass(frozen=True)
class ServeSettings:
    """Arguments of `serve.app:build`; limits of the API itself come from the release's own configuration.

    `release`: a folder or s3:// URI, '' is the embedded one. `device`: of each replica, such as cpu or cuda.
    `replicas`, `gateways`: how many of each. `encode_threads`: chunks of different sessions encoded at once.
    `data`: folder of the store on a durable volume, with its database, chunks and finished files.
    `database`: SQLAlchemy URL such as postgresql://user@host/name, '' is a SQLite file in `data`.
    `files`: where finished files go besides, a folder or an s3:// URI; '' is `data` alone.
    `auth`: `keys` asks every caller for an API key; `local` does not ask callers on this machine itself.
    `origins`: pages that may call from a browser besides the service's own, such as https://a.example, by commas.
    `expire_s`: a video is removed so long after its end. `resume_window_s`: a viewer who lost his connection has so
    long to come back.
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
    files: str = ""
    auth: str = "local"
    origins: str = ""
    expire_s: float = 24 * 3600.0
    resume_window_s: float = 10.0
    reader_start_timeout_s: float = 10.0
    session_idle_timeout_s: float = 60.0

    def __post_init__(self) -> None:
        require(self.codec in CODECS, "codec", self.codec, f"one of {list(CODECS)}")
        for name in ("replicas", "gateways", "encode_threads"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "a whole number of at least 1")
        for name in ("replica_cpus", "replica_gpus", "gateway_cpus", "store_cpus"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "a number of at least 0")
        for name in ("reader_start_timeout_s", "session_idle_timeout_s", "expire_s", "resume_window_s"):
            require(getattr(self, name) > 0, name, getattr(self, name), "seconds above 0")
        require(bool(self.data), "data", self.data, "a folder")
        require(self.auth in AUTH_MODES, "auth", self.auth, f"one of {list(AUTH_MODES)}")
        for origin in self.allowed_origins:
            right = origin.startswith(("http://", "https://")) and origin.count("/") == 2
            require(right, "origins", origin, "http://host or https://host, with a port where it has one")

    @property
    def allowed_origins(self) -> tuple[str, ...]:
        return tuple(part.strip().lower() for part in self.origins.split(",") if part.strip())

    @property
    def database_url(self) -> str:
        """The database's SQLAlchemy URL."""
        return self.database or f"sqlite:///{Path(self.data).expanduser().resolve() / 'store.sqlite'}"

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
