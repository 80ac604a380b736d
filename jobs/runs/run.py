"""What every job starts with: its arguments and its run folder, on local disk or S3."""

from __future__ import annotations

import argparse
import importlib
import json
import secrets
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from diagonal.config import Config
from diagonal.errors import FieldError, require
from diagonal.model.base_model import LINEAGE, base_folder, embedded
from diagonal.model.manifest import MANIFEST, ReleaseError
from diagonal.storage import Folder, StorageError
from diagonal.storage.remote import location
from diagonal.training.checkpoint import CheckpointError
from diagonal.training.loop import TooManyNonFiniteError
from jobs.ray_cluster import connect as connect
from jobs.runs.lease import leased

STOPPED = 128 + signal.SIGTERM
CONFIG, HISTORY, SUMMARY = "config.json", "history.json", "summary.json"
PATHS = ("model.path", "pairs.prompts", "distill.prompts", "distill.teacher", "distill.init")
FREE_FIELDS = frozenset(
    {  # where and how often, never what: a run may go on with others
        "train.workers",
        "train.nodes_wait_s",
        "train.min_workers",
        "train.gpus_per_worker",
        "train.cpus_per_worker",
        "train.shard_group",
        "train.checkpoint_activations",
        "train.compile",
        "train.storage",
        "train.storage_patience_s",
        "train.lease",
        "train.max_failures",
        "train.stall_timeout_s",
        "train.sample_every",
        "train.sample_clips",
        "train.trackers",
        "ode_init.checkpoint_every",
        "ode_init.micro_batch_size",
        "distill.checkpoint_every",
        "distill.keep_checkpoints",
        "distill.micro_batch_size",
        "distill.max_nonfinite",
        "pairs.text_workers",
        "pairs.solver_workers",
        "pairs.max_bad_share",
        "decoder.checkpoint_every",
        "pretrain.checkpoint_every",
        "pretrain.score_every",
        "pretrain.updates",  # refused by the teacher's own state where it is too late for it
        "prompts.extend_timeout_s",
        "prompts.extend_concurrency",
        "prompts.extend_api_key_env",
    }
)


class JobFailed(RuntimeError):  # noqa: N818
    """A stage ended with an error that its restarts did not mend; the message is all that is said."""


class JobStopped(Exception):  # noqa: N818  # not an error: somebody asked for it
    """The job was asked to end before its time, by SIGTERM; the message says how to go on."""


@dataclass(frozen=True)
class Run:
    """One run: its configuration and the folder that holds every artefact of it, local or s3://.

    `config.json`, `history.json`, `base/` (with --from-scratch), `pairs/`, `ode_init/`, `stage1/`, `stage2/`,
    `train/STAGE/`, `release/`, `summary.json`. `identity` tells runs apart that have the same name, one after another.
    """

    name: str
    config: Config
    folder: Folder
    identity: str = ""
    check_lease: Callable[[], None] = field(default=lambda: None, compare=False, repr=False)
    """Raises `FieldError` once another job has taken the run over; workers, which publish nothing, have none."""

    @property
    def from_scratch(self) -> bool:
        """Whether the run trains its own base model."""
        return self.config.model.path == str(self.folder / "base")

    @property
    def base(self) -> Path:
        """The base model's folder: the run's own when it trains one, else the configured; a copy of one on S3."""
        own = self.from_scratch and self.folder.is_local
        return (self.folder / "base").path if own else base_folder(self.config)

    @property
    def makes_student(self) -> bool:
        """Whether stage 0 is the run's own: else its student is given, or shipped with the embedded model."""
        return self.initial_student == str(self.folder / "ode_init")

    @property
    def initial_student(self) -> str:
        """Where the student lies that stage 1 starts from: a folder with `transformer/`, or a `.pt`; path or URI."""
        if self.config.distill.init:
            return location(self.config.distill.init)
        shipped = self.config.is_embedded and not self.config.model.path
        return str(embedded("ode_init", self.config.embedded_model) if shipped else self.folder / "ode_init")

    @property
    def has_release(self) -> bool:
        """Whether its release is there."""
        return self.folder.has(f"release/{MANIFEST}")

    @property
    def is_finished(self) -> bool:
        """Whether all of it is done: its release is scored, and its summary written."""
        return self.folder.has(SUMMARY)

    @property
    def resume_hint(self) -> str:
        """How a run that was cut off is resumed."""
        return f"resume with --name {self.name} --resume"

    def has_student(self, stage: str) -> bool:
        """Whether the student of `ode_init`, `stage1` or `stage2` is there, whole."""
        return self.folder.has(f"{stage}/{LINEAGE}")

    def note(self, event: str, **details: Any) -> None:
        """Add one entry to the run's history."""
        past = self.folder.read_json(HISTORY)
        entry = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "event": event, **details}
        self.folder.write_json(HISTORY, {**past, "events": [*past["events"], entry]})

    def to_settings(self) -> dict[str, Any]:
        """The run as plain values, for its workers."""
        return {
            "name": self.name,
            "config": self.config.to_dict(),
            "folder": str(self.folder),
            "identity": self.identity,
        }

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Run:
        config = Config.from_dict(settings["config"])
        folder = Folder(settings["folder"], config.train.storage_patience_s)
        return cls(settings["name"], config, folder, settings["identity"])


def open_run(arguments: argparse.Namespace) -> Run:
    """The run of these arguments: a new one, or with --resume the one of that name; a dry run writes nothing.

    `FieldError` when a new run's name is taken, when there is none to go on with, or when a setting differs from what
    the run began with (but `FREE_FIELDS`).
    """
    run, keep = _resolve(arguments)
    if not arguments.dry_run:
        keep()
    return run


@contextmanager
def opened(arguments: argparse.Namespace) -> Iterator[Run]:
    """`open_run` for the block, with the run's lease: no other job writes to it meanwhile."""
    run, keep = _resolve(arguments)
    if arguments.dry_run:
        yield run
        return
    with leased(run.folder, run.config.train.lease) as check:
        _resolve(argparse.Namespace(**{**vars(arguments), "name": run.name}))  # another may have begun it since
        keep()
        yield replace(run, check_lease=check)


def _resolve(arguments: argparse.Namespace) -> tuple[Run, Callable[[], None]]:
    """The run, and what writes its beginning or its going on to its folder."""
    name, resume = arguments.name, arguments.resume
    require(bool(name) or not resume, "--name", name, "the name of the run to resume")
    wanted = None if resume and _says_nothing(arguments) else _config(arguments)
    storage = _storage(arguments, wanted)
    name = name or _new_name(storage, (wanted or _config(arguments)).preset)
    require("/" not in name and not name.startswith("."), "--name", name, "a name without '/' that starts with no dot")
    folder = storage / name
    exists = folder.has(CONFIG)
    if resume:
        require(exists, "--resume", name, f"a run that exists in {storage}")
        return _resume(arguments, folder, name)
    require(not exists, "--name", name, f"a name that no run in {storage} has; or --resume")
    assert wanted is not None
    if arguments.from_scratch:
        require(wanted.is_embedded, "--from-scratch", wanted.preset, "a preset whose data is embedded, such as 'tiny'")
        wanted = wanted.with_settings([f"model.path={folder / 'base'}"])
    run = Run(name, wanted, folder, secrets.token_hex(8))
    return run, partial(_begin, run)


def _says_nothing(arguments: argparse.Namespace) -> bool:
    return not (arguments.preset or arguments.config)


def _config(arguments: argparse.Namespace) -> Config:
    if arguments.config:
        require(Path(arguments.config).is_file(), "--config", arguments.config, "a file that exists")
        return _absolute(Config.load(arguments.config).with_settings(arguments.settings))
    return _absolute(Config.from_preset(arguments.preset or "tiny", arguments.settings))


def _absolute(config: Config) -> Config:
    """Names made URIs, and local paths absolute: workers have other working directories."""
    leaves = dict(_leaves(config.to_dict()))
    found = {key: _place(key, str(leaves[key])) for key in PATHS if leaves[key]}
    return config.with_settings(f"{key}={json.dumps(place)}" for key, place in found.items())


def _place(key: str, name: str) -> str:
    """The URI or the absolute path that a setting names: models and students, or lists of prompts."""
    place = location(name, "datasets" if key.endswith("prompts") else "")
    return place if "://" in place else str(Path(place).absolute())


def _storage(arguments: argparse.Namespace, wanted: Config | None) -> Folder:
    """Where runs are kept; without a configuration, as the settings and the defaults have it."""
    train = (wanted or _config_of_storage(arguments.settings)).train
    return Folder(
        str(Path(train.storage).expanduser()) if "://" not in train.storage else train.storage, train.storage_patience_s
    )


def _config_of_storage(settings: Sequence[str]) -> Config:
    return Config.from_preset("tiny", [s for s in settings if s.strip().startswith("train.storage")])


def _begin(run: Run) -> None:
    """The configuration is written last: with it the run exists."""
    entry = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "event": "began"}
    run.folder.write_json(HISTORY, {"identity": run.identity, "events": [entry]})
    run.folder.write_json(CONFIG, run.config.to_dict())


def _resume(arguments: argparse.Namespace, folder: Folder, name: str) -> tuple[Run, Callable[[], None]]:
    stored = Config.from_dict(folder.read_json(CONFIG))
    if _says_nothing(arguments):
        wanted = _absolute(stored.with_settings(arguments.settings))
    else:
        wanted = _config(arguments)
        if stored.model.path == str(folder / "base"):  # --from-scratch, said or not: the run's own base model
            wanted = wanted.with_settings([f"model.path={stored.model.path}"])
    changed = _changes(stored, wanted, name)
    run = Run(name, wanted, folder, str(folder.read_json(HISTORY)["identity"]))
    return run, partial(_keep_changes, run, changed)


def _keep_changes(run: Run, changed: Mapping[str, tuple[object, object]]) -> None:
    run.note("resumed", changed={key: list(values) for key, values in changed.items()})
    if changed:
        run.folder.write_json(CONFIG, run.config.to_dict())


def _changes(stored: Config, wanted: Config, name: str) -> dict[str, tuple[object, object]]:
    """Old and new value of each field that differs; `FieldError` when one of them is not free to."""
    before, after = dict(_leaves(stored.to_dict())), dict(_leaves(wanted.to_dict()))
    changed = {key: (before[key], after[key]) for key in after if before[key] != after[key]}
    for key, (old, new) in changed.items():
        require(key in FREE_FIELDS, key, new, f"{old!r}, as run {name!r} began with; or another --name")
    return changed


def _new_name(storage: Folder, preset: str) -> str:
    """A name by preset and time, with a random end, as others may begin in the same second."""
    names = (f"{preset}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}" for _ in range(100))
    return next(name for name in names if not (storage / name).has(CONFIG))


def _leaves(tree: dict[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", list(value) if isinstance(value, tuple) else value


def say(message: str) -> None:
    """One line of progress, at once."""
    print(message, flush=True)


def _stop(number: int, frame: FrameType | None) -> None:
    raise JobStopped("stopped: what is finished is kept; resume with --name NAME --resume")


def main(module: str) -> None:
    """Run that job module's `work` on the command line's arguments.

    It is imported by name, as Ray can send workers a function of a module but not of `__main__`. Wrong input ends the
    job with one line and status 2, anything else with its traceback.
    """
    signal.signal(signal.SIGTERM, _stop)
    try:
        importlib.import_module(module).work(sys.argv[1:])
    except (FieldError, ReleaseError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (StorageError, CheckpointError, TooManyNonFiniteError, JobFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except JobStopped as stopped:
        print(str(stopped), file=sys.stderr)
        sys.exit(STOPPED)
