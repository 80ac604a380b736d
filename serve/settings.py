"""What a deployment of the service is told: where the release is, what it may use, where it keeps its files."""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints
from urllib.parse import quote

from diagonal.config import Config
from diagonal.config.parse import nearest
from diagonal.errors import FieldError, require
from diagonal.media.encode import CODECS
from diagonal.setting import NOT_NEGATIVE, SHARE, Allowed, check, setting

AUTH_MODES, LOG_FORMATS = ("local", "keys"), ("text", "json")
SPREAD_SPECTRUM, DENY_LIST, MODERATION = "spread-spectrum", "deny-list:", "moderation:"
_PLUG_IN = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


NAME = re.compile(r"[a-z0-9._-]{1,64}")
_NAMES = "1 to 64 of a-z, 0-9, '.', '_' and '-'"
RELEASES = 'a list of {name: ..., release: ...}, or "name=uri, name=uri"'
COUNT = Allowed("a whole number of at least 1", lambda count: count >= 1)
SECONDS = Allowed("seconds of at least 0", lambda seconds: seconds >= 0)
POSITIVE_SECONDS = Allowed("seconds above 0", lambda seconds: seconds > 0)
_TRUE, _FALSE = ("true", "1", "yes"), ("false", "0", "no")


def is_plug_in(name: str) -> bool:
    """Whether it reads module:callable."""
    return _PLUG_IN.fullmatch(name) is not None


def _is_http(address: str) -> bool:
    return address.startswith(("http://", "https://"))


def _origins(text: str) -> tuple[str, ...]:
    return tuple(part.strip().lower() for part in text.split(",") if part.strip())


def _are_origins(text: str) -> bool:
    return all(_is_http(origin) and origin.count("/") == 2 for origin in _origins(text))


def _is_watermark(name: str) -> bool:
    return name == SPREAD_SPECTRUM or is_plug_in(name)


def _is_policy(name: str) -> bool:
    return is_plug_in(name) or any(name.startswith(kind) and name != kind for kind in (DENY_LIST, MODERATION))


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
        given = {key: value for key, value in dataclasses.asdict(self).items() if key != "name" and value is not None}
        return given | {"model": self.name}


@dataclass(frozen=True)
class ServeSettings:
    """The service: where its releases are, what it may use, where it keeps its files.

    Arguments of `serve.app:build`. Limits of the API itself come from the release's own configuration.
    """

    release: str = setting("", "The release, a folder or an s3:// URI; empty is the embedded one.")
    model: str = setting("", "The release's name for callers; empty is its own name.", f"'' or {_NAMES}")
    releases: tuple[ReleaseSettings, ...] = setting(
        (), "Several releases side by side, instead of `release` and `model`.", RELEASES
    )
    allow_unpromoted: bool = setting(False, "Also serve a release whose manifest does not say that it was promoted.")
    options: str = setting(
        "", "Other values of the release's own `serve` settings.", "'' or such as decoder=fast,cache_dtype=fp8"
    )
    device: str = setting("cpu", "Device of each replica.", "such as cpu or cuda")
    replicas: int = setting(1, "Replicas; with `max_replicas` the least number of them.", COUNT)
    max_replicas: int = setting(
        0, "Most replicas, where sessions decide how many there are.", "0, for no scaling, or at least `replicas`"
    )
    gateways: int = setting(1, "Gateways; with `max_gateways` the least number of them.", COUNT)
    max_gateways: int = setting(
        0, "Most gateways, where connections decide how many there are.", "0, for no scaling, or at least `gateways`"
    )
    scale_up_delay_s: float = setting(5.0, "Need that lasts so long adds replicas or gateways.", SECONDS)
    scale_down_delay_s: float = setting(300.0, "Replicas or gateways without need end after this.", SECONDS)
    headroom: float = setting(0.2, "Share of the replicas' slots and time that scaling keeps free.", SHARE)
    gateway_connections: int = setting(200, "Connections that a gateway has in the eyes of scaling.", COUNT)
    replica_cpus: float = setting(1.0, "CPUs that Ray reserves for a replica.", NOT_NEGATIVE)
    replica_gpus: float = setting(0.0, "GPUs that Ray reserves for a replica.", NOT_NEGATIVE)
    gateway_cpus: float = setting(0.1, "CPUs that Ray reserves for a gateway.", NOT_NEGATIVE)
    store_cpus: float = setting(0.1, "CPUs that Ray reserves for the store.", NOT_NEGATIVE)
    replica_pool: str = setting("", "Ray label `pool` of the nodes that replicas run on; empty is any node.")
    gateway_pool: str = setting("", "The same for the store and the gateways.")
    encode_threads: int = setting(2, "Chunks of different sessions that are encoded at once.", COUNT)
    codec: str = setting("h264", "Codec of the streams.", Allowed(f"one of {list(CODECS)}", CODECS.__contains__))
    data: str = setting(
        ".diagonal/serve",
        "Folder of the store on a durable volume: its database, chunks and finished files.",
        Allowed("a folder", bool),
    )
    database: str = setting(
        "",
        "SQLAlchemy URL of the database, without a password; empty is a SQLite file in `data`. Ray writes settings to "
        "its logs, so a password comes from PGPASSWORD or PGPASSFILE, or the URL from the variable that $NAME names.",
        "'', such as postgresql://user@host/name, or $NAME",
    )
    files: str = setting("", "Second place of finished files, a folder or an s3:// URI; empty is `data` alone.")
    auth: str = setting(
        "local",
        "Who may call. `keys`: whoever shows an API key. `local`: whoever shows the key in the file `local_key` in "
        "`data`, which its owner alone can read.",
        Allowed(f"one of {list(AUTH_MODES)}", AUTH_MODES.__contains__),
    )
    origins: str = setting(
        "",
        "Pages of other origins that may call from a browser, by commas.",
        Allowed("http://host or https://host, with a port where it has one; several by commas", _are_origins),
    )
    retention_s: float = setting(24 * 3600.0, "A video is removed so long after its end.", POSITIVE_SECONDS)
    resume_window_s: float = setting(
        30.0, "Time in which a viewer who lost his connection may come back.", POSITIVE_SECONDS
    )
    max_stream_s: float = setting(3600.0, "Media after which a stream without an end is over.", POSITIVE_SECONDS)
    c2pa_certificate: str = setting(
        "", "PEM file of the operator's certificate chain, its own first; finished files are signed with it."
    )
    c2pa_key: str = setting("", "PEM file of the P-256 key of `c2pa_certificate`.", "given together with it")
    signing_key: str = setting(
        "", "PEM file of the Ed25519 key that signs live chunks; empty is one in `data`, made at the first start."
    )
    watermark: str = setting(
        "",
        "Watermark of every frame; empty is none.",
        Allowed(f"'', {SPREAD_SPECTRUM} or module:callable", lambda name: not name or _is_watermark(name)),
    )
    watermark_key: str = setting("", "File with the secret of `watermark`.", "given together with it")
    prompt_policy: str = setting(
        "",
        "What is asked about every prompt; empty lets all pass.",
        Allowed(
            f"'', {DENY_LIST}/path, {MODERATION}http://host/v1#model or module:callable",
            lambda name: not name or _is_policy(name),
        ),
    )
    prompt_policy_timeout_s: float = setting(
        2.0, "A policy that has not answered within this has refused.", POSITIVE_SECONDS
    )
    reader_start_timeout_s: float = setting(
        10.0, "A video over HTTP that nobody reads is cancelled after this.", POSITIVE_SECONDS
    )
    session_idle_timeout_s: float = setting(
        60.0, "A WebSocket session without a sign of its client ends after this.", POSITIVE_SECONDS
    )
    drain_s: float = setting(
        600.0, "Time that streams over HTTP have to end, on a gateway that is to stop.", POSITIVE_SECONDS
    )
    surge_percent: int = setting(
        0,
        "Of 100 replicas, how many more may run while an upgrade replaces them; with 0, old ones end first.",
        Allowed("a whole number from 0 to 100", lambda percent: 0 <= percent <= 100),
        "percent",
    )
    log_format: str = setting(
        "text",
        "How logs are written: lines of text, or one JSON object a line, of every part of the service.",
        Allowed(f"one of {list(LOG_FORMATS)}", LOG_FORMATS.__contains__),
    )
    traces: str = setting(
        "",
        "OTLP/HTTP address that traces are sent to; empty is none, unless OTEL_EXPORTER_OTLP_ENDPOINT names one.",
        Allowed("'' or an address that begins with http:// or https://", lambda url: not url or _is_http(url)),
    )

    def __post_init__(self) -> None:
        check(self)
        for name, least in (("max_replicas", self.replicas), ("max_gateways", self.gateways)):
            most = getattr(self, name)
            require(most == 0 or most >= least, name, most, f"0, for no scaling, or at least {least}")
        if self.model:
            check_name("model", self.model)
        if self.releases:
            alone = not self.release and not self.model
            require(alone, "releases", self.releases, "no `release` and no `model` beside it")
        for name, other in (("c2pa_key", "c2pa_certificate"), ("watermark_key", "watermark")):
            value = getattr(self, name)
            require(bool(value) == bool(getattr(self, other)), name, value, f"given together with {other}, or neither")
        if ":" in self.database.partition("://")[2].rpartition("@")[0]:
            raise FieldError("database", "...", "a URL without a password; that comes from PGPASSWORD, or give $NAME")
        Config().with_settings(self.release_settings)
        self.served()

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
        return _origins(self.origins)

    @property
    def local_key(self) -> Path:
        """The file with the key that every caller shows where `auth` is `local`."""
        return Path(self.data).expanduser().resolve() / "local_key"

    @property
    def database_url(self) -> str:
        """The database's SQLAlchemy URL."""
        file = Path(self.data).expanduser().resolve() / "store.sqlite"
        return self.database or f"sqlite:///{quote(str(file))}"

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> ServeSettings:
        """From `serve run serve.app:build key=value ...` (all strings) or a config file's `args`."""
        hints = get_type_hints(cls)
        for key in (key for key in arguments if key not in hints):
            raise FieldError(key, arguments[key], f"no such argument{nearest(key, hints)}; known are {sorted(hints)}")
        simple = {key: value for key, value in arguments.items() if key != "releases"}
        values = {key: parsed(key, value, hints[key]) for key, value in simple.items()}
        return cls(**values, releases=parse_releases(arguments.get("releases", ())))

    def to_arguments(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def load_plug_in(field: str, name: str) -> Callable[..., Any]:
    """What module:callable names; `FieldError` when it is not there. It runs in the service's own process."""
    module, _, attribute = name.partition(":")
    try:
        loaded: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise FieldError(field, name, "module:callable that can be imported here") from error
    require(callable(loaded), field, name, "module:callable, and that is none")
    return loaded


def check_name(field: str, name: object) -> None:
    """`FieldError` unless callers may ask for a release by this name: no path can be made of it."""
    right = isinstance(name, str) and NAME.fullmatch(name) is not None and set(name) != {"."}
    require(right, field, name, _NAMES)


def parse_releases(value: object) -> tuple[ReleaseSettings, ...]:
    """From a file: a list of mappings with `name`, `release` and more; from a command line: "name=uri, name=uri"."""
    if isinstance(value, str):
        pairs = [part.strip().partition("=") for part in value.split(",") if part.strip()]
        require(all(equals for _, equals, _ in pairs), "releases", value, RELEASES)
        value = [{"name": name.strip(), "release": uri.strip()} for name, _, uri in pairs]
    if not isinstance(value, Sequence):
        raise FieldError("releases", value, RELEASES)
    releases = tuple(one if isinstance(one, ReleaseSettings) else _release(one) for one in value)
    names = [one.name for one in releases]
    require(len(set(names)) == len(names), "releases", names, "each name once")
    return releases


def _release(value: object) -> ReleaseSettings:
    require(isinstance(value, Mapping), "releases", value, RELEASES)
    assert isinstance(value, Mapping)
    hints = get_type_hints(ReleaseSettings)
    for key in (key for key in value if key not in hints):
        allowed = f"no such field{nearest(key, hints)}; known are {sorted(hints)}"
        raise FieldError(f"releases.{key}", value[key], allowed)
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
