"""What every job starts with: its arguments, its run folder, and a connection to Ray."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ray

from diagonal.config import PRESETS, Config
from diagonal.errors import FieldError, require
from diagonal.model.weights import ReleaseError, base_folder, embedded

LOCAL_CPUS = 8  # logical: with fewer, Ray Data waits for ever behind Ray Train's workers


@dataclass(frozen=True)
class Run:
    """One run: its configuration and the folder that holds every artefact of it.

    `config.json`, `base/` (with --from-scratch), `pairs/`, `ode_init/`, `stage1/`, `stage2/`, `release/`, `train/`.
    """

    name: str
    config: Config
    folder: Path
    from_scratch: bool = False

    @property
    def base(self) -> Path:
        """The base model's folder: the run's own when it trains one, else the configured one."""
        return self.folder / "base" if self.from_scratch else base_folder(self.config)

    @property
    def initial_student(self) -> Path:
        """The initialised student: given, shipped with the embedded model, or the run's own stage 0."""
        if self.config.distill.init:
            given = Path(self.config.distill.init)
            require((given / "transformer").is_dir(), "distill.init", str(given), "a folder that holds transformer/")
            return given
        shipped = self.config.preset == "tiny" and not self.config.model.path and not self.from_scratch
        return embedded("ode_init") if shipped else self.folder / "ode_init"


def parser(description: str) -> argparse.ArgumentParser:
    """The arguments that all jobs share."""
    arguments = argparse.ArgumentParser(description=description)
    arguments.add_argument("--preset", default="tiny", help=f"one of {sorted(PRESETS)} (default: tiny)")
    arguments.add_argument("--config", help="a config.json instead of a preset")
    arguments.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings",
                           help="one setting, such as distill.lr=1e-6; may be repeated")
    arguments.add_argument("--name", help="run name; an existing run with the same configuration goes on "
                                          "(default: a new name)")
    arguments.add_argument("--from-scratch", action="store_true",
                           help="train the embedded base model too, instead of taking the shipped one")
    return arguments


def open_run(arguments: argparse.Namespace) -> Run:
    """The run folder of these arguments, made or continued; `FieldError` when it exists with another configuration."""
    if arguments.config:
        require(Path(arguments.config).is_file(), "--config", arguments.config, "a file that exists")
        config = Config.load(arguments.config).with_settings(arguments.settings)
    else:
        config = Config.from_preset(arguments.preset, arguments.settings)
    storage = Path(config.train.storage).absolute()
    name = arguments.name or _new_name(storage, config.preset)
    require("/" not in name and not name.startswith("."), "--name", name, "a name without '/' that starts with no dot")
    from_scratch = bool(arguments.from_scratch)
    if from_scratch:
        require(config.preset == "tiny", "--from-scratch", config.preset, "the preset 'tiny', whose data is embedded")
        config = config.with_settings([f"model.path={storage / name / 'base'}"])
    folder = storage / name
    if (folder / "config.json").exists():
        _require_same(Config.load(folder / "config.json"), config, name)
    else:
        config.save(folder / "config.json")
    return Run(name, config, folder, from_scratch)


def _new_name(storage: Path, preset: str) -> str:
    stem = f"{preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    return next(n for n in (stem, *(f"{stem}-{i}" for i in range(2, 1000))) if not (storage / n).exists())


def _require_same(stored: Config, wanted: Config, name: str) -> None:
    for key, value in _leaves(wanted.to_dict()):
        before = dict(_leaves(stored.to_dict())).get(key)
        require(before == value, key, value, f"{before!r}, as run {name!r} began with; or another --name")


def _leaves(tree: dict[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", list(value) if isinstance(value, tuple) else value


def connect() -> None:
    """Join the cluster of RAY_ADDRESS, or start a local one without dashboard and end it with the process."""
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    if ray.is_initialized():
        return
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=True)
        return
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # else Ray writes a token file for the whole account
    ray.init(num_cpus=max(LOCAL_CPUS, os.cpu_count() or 1), include_dashboard=False)


def say(message: str) -> None:
    """One line of progress, at once."""
    print(message, flush=True)


def main(module: str) -> None:
    """Run that job module's `work` on the command line's arguments.

    It is imported by name, as Ray can send workers a function of a module but not of `__main__`. Wrong input ends the
    job with one line and status 2, anything else with its traceback.
    """
    try:
        importlib.import_module(module).work(sys.argv[1:])
    except (FieldError, ReleaseError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
