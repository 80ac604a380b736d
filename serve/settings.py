"""What a deployment of the service is told: where the release is, what it may use, where it keeps its files."""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

from diagonal.config import Config
from diagonal.errors import FieldError, require
from diagonal.media.encode import CODECS

AUTH_MODES = ("local", "keys")
SPREAD_SPECTRUM, DENY_LIST = "spread-spectrum", "deny-list:"
_PLUG_IN = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


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


@dataclass(frozen=True)
class ServeSettings:
    """Arguments of `serve.app:build`; limits of the API itself come from the release's own configuration.

    `release`: a folder or s3:// URI, '' is the embedded one; `model` names it to callers, '' is its own name.
    `releases`: several side by side, instead of these two (`ReleaseSettings`). `allow_unpromoted`: also serve a
    release whose manifest does not say that it was promoted. `options`: other values of the release's own `serve`
    settings, by commas, such as decoder=fast,cache_dtype=fp8. `device`: of each replica, such as cpu or cuda.
    `replicas`, `gateways`: how many of each. With `max_replicas`, `max_gateways` that is how many at least, and there
    are more while sessions (connections) need them: after `scale_up_delay_s`, until `scale_down_delay_s` without
    need; `headroom` of the slots and of the time is kept free, and a gateway has about `gateway_connections`.
    `replica_pool`, `gateway_pool`: replicas, and gateways with the store, run on nodes whose Ray label `pool` is this
    one; '' is any. `encode_threads`: chunks of different sessions encoded at once.
    `data`: folder of the store on a durable volume, with its database, chunks and finished files.
    `database`: SQLAlchemy URL such as postgresql://user@host/name, '' is a SQLite file in `data`.
    `files`: where finished files go besides, a folder or an s3:// URI; '' is `data` alone.
    `auth`: `keys` asks every caller for an API key; `local` for the one in `local_key` in `data`,
    which only its owner can read: whoever can is the service's one user.
    `origins`: pages that may call from a browser besides the service's own, such as https://a.example, by commas.
    `retention_s`: a video is removed so long after its end. `resume_window_s`: a viewer who lost his connection has so
    long to come back. `max_stream_s`: seconds of video after which a stream without an end is over.
    `c2pa_certificate`, `c2pa_key`: PEM files of the operator's certificate chain (its own first) and P-256 key, with
    which finished files are signed; '' leaves them unsigned. `signing_key`: PEM file of the Ed25519 key that signs
    live chunks; '' is one in `data`, made at first start.
    `watermark`: `spread-spectrum`, or module:callable of another; '' is none. `watermark_key`: file with its secret.
    `prompt_policy`: deny-list:/path or module:callable, asked about every prompt; '' lets all pass. A policy that has
    not answered within `prompt_policy_timeout_s` has refused.
    `drain_s`: streams over HTTP may go on so long through a gateway that is to end, and are cut then. `surge_percent`:
    so many of 100 replicas more may run while an upgrade replaces them; with 0, for want of room, old ones go first.
    `traces`: OTLP/HTTP address that traces are sent to, such as http://127.0.0.1:4318; '' is none, unless
    OTEL_EXPORTER_OTLP_ENDPOINT names one.
    """

    release: str = ""
    model: str = ""
    releases: tuple[ReleaseSettings, ...] = ()
    allow_unpromoted: bool = False
    options: str = ""
    device: str = "cpu"
    replicas: int = 1
    max_replicas: int = 0
    gateways: int = 1
    max_gateways: int = 0
    scale_up_delay_s: float = 5.0
    scale_down_delay_s: float = 300.0
    headroom: float = 0.2
    gateway_connections: int = 200
    replica_cpus: float = 1.0
    replica_gpus: float = 0.0
    gateway_cpus: float = 0.1
    store_cpus: float = 0.1
    replica_pool: str = ""
    gateway_pool: str = ""
    encode_threads: int = 2
    codec: str = "h264"
    data: str = ".diagonal/serve"
    database: str = ""
    files: str = ""
    auth: str = "local"
    origins: str = ""
    retention_s: float = 24 * 3600.0
    resume_window_s: float = 30.0
    max_stream_s: float = 3600.0
    c2pa_certificate: str = ""
    c2pa_key: str = ""
    signing_key: str = ""
    watermark: str = ""
    watermark_key: str = ""
    prompt_policy: str = ""
    prompt_policy_timeout_s: float = 2.0
    reader_start_timeout_s: float = 10.0
    session_idle_timeout_s: float = 60.0
    drain_s: float = 600.0
    surge_percent: int = 0
    traces: str = ""

    def __post_init__(self) -> None:
        require(self.codec in CODECS, "codec", self.codec, f"one of {list(CODECS)}")
        for name in ("replicas", "gateways", "gateway_connections", "encode_threads"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "a whole number of at least 1")
        for name in ("replica_cpus", "replica_gpus", "gateway_cpus", "store_cpus"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "a number of at least 0")
        for name in ("scale_up_delay_s", "scale_down_delay_s"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "seconds of at least 0")
        for name, least in (("max_replicas", self.replicas), ("max_gateways", self.gateways)):
            most = getattr(self, name)
            require(most == 0 or most >= least, name, most, f"0, for no scaling, or at least {least}")
        require(0 <= self.headroom < 1, "headroom", self.headroom, "a number from 0 to below 1")
        if self.model:
            check_name("model", self.model)
        if self.releases:
            alone = not self.release and not self.model
            require(alone, "releases", self.releases, "no `release` and no `model` beside it")
        Config().with_settings(self.release_settings)
        self.served()
        for name in (
            "reader_start_timeout_s",
            "session_idle_timeout_s",
            "retention_s",
            "resume_window_s",
            "max_stream_s",
            "prompt_policy_timeout_s",
            "drain_s",
        ):
            require(getattr(self, name) > 0, name, getattr(self, name), "seconds above 0")
        require(0 <= self.surge_percent <= 100, "surge_percent", self.surge_percent, "a whole number from 0 to 100")
        require(bool(self.data), "data", self.data, "a folder")
        require(self.auth in AUTH_MODES, "auth", self.auth, f"one of {list(AUTH_MODES)}")
        self._check_provenance()
        right = not self.traces or self.traces.startswith(("http://", "https://"))
        require(right, "traces", self.traces, "'' or an address that begins with http:// or https://")
        for origin in self.allowed_origins:
            right = origin.startswith(("http://", "https://")) and origin.count("/") == 2
            require(right, "origins", origin, "http://host or https://host, with a port where it has one")

    def _check_provenance(self) -> None:
        """What belongs together is given together, and plug-ins are named as such."""
        both = bool(self.c2pa_certificate) == bool(self.c2pa_key)
        require(both, "c2pa_key", self.c2pa_key, "given together with c2pa_certificate, or neither")
        require(
            bool(self.watermark) == bool(self.watermark_key),
            "watermark_key",
            self.watermark_key,
            "given together with watermark, or neither",
        )
        right = self.watermark in ("", SPREAD_SPECTRUM) or is_plug_in(self.watermark)
        require(right, "watermark", self.watermark, f"'', {SPREAD_SPECTRUM} or module:callable")
        policy = self.prompt_policy
        right = (
            not policy or bool(policy.removeprefix(DENY_LIST)) and (policy.startswith(DENY_LIST) or is_plug_in(policy))
        )
        require(right, "prompt_policy", policy, f"'', {DENY_LIST}/path or module:callable")

    def served(self) -> dict[str, ServeSettings]:
        """The settings of each release by the name that callers ask for; of one without a name, by ''."""
        if not self.releases:
            return {self.model: self}
        return {one.name: replace(self, releases=(), **one.changes()) for one in self.releases}

    @property
    def release_settings(self) -> tuple[str, ...]:
        """`options` as settings of the release's configuration."""
        return tuple(f"serve.{part.strip()}" for part in self.options.split(",") if part.strip())

    @property
    def allowed_origins(self) -> tuple[str, ...]:
        return tuple(part.strip().lower() for part in self.origins.split(",") if part.strip())

    @property
    def local_key(self) -> Path:
        """The file with the key that every caller shows where `auth` is `local`."""
        return Path(self.data).expanduser().resolve() / "local_key"

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
        told = {key: value for key, value in arguments.items() if key != "releases"}
        values = {key: parsed(key, value, hints[key]) for key, value in told.items()}
        return cls(**values, releases=parse_releases(arguments.get("releases", ())))

    def to_arguments(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def is_plug_in(name: str) -> bool:
    """Whether it reads module:callable."""
    return _PLUG_IN.fullmatch(name) is not None


def load_plug_in(field: str, name: str) -> Callable[..., Any]:
    """What module:callable names; `FieldError` when it is not there. It runs in the service's own process."""
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise FieldError(field, name, "module:callable that can be imported here") from error
    require(callable(found), field, name, "module:callable, and that is none")
    loaded: Callable[..., Any] = found
    return loaded


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
