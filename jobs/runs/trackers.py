"""Where a stage's figures and pictures go: TensorBoard, Weights & Biases, MLflow, each by its own client."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from diagonal.config.training import TRACKERS
from diagonal.errors import require

PROJECT = "diagonal"


class Tracker(Protocol):
    """Rank 0's alone. A resumed stage continues the same record."""

    def __init__(self, run: str, settings: Mapping[str, Any], folder: Path, update: int) -> None: ...

    def log(self, update: int, figures: Mapping[str, float]) -> None:
        """Figures of one update, by name."""

    def picture(self, update: int, name: str, pixels: Any) -> None:
        """A picture `[h, w, 3]` uint8."""

    def flush(self) -> None:
        """Send what waits."""

    def close(self) -> None:
        """End the record."""


def check_trackers(names: Sequence[str]) -> None:
    """`FieldError` for one whose package is not installed."""
    for name in names:
        package = TRACKERS[name]
        installed = importlib.util.find_spec(package) is not None
        require(installed, "train.trackers", name, f"one whose package is installed: pip install {package}")


def trackers(names: Sequence[str], run: str, settings: Mapping[str, Any], folder: Path, update: int) -> list[Tracker]:
    """Those of these names, for a run that continues after `update`; files of theirs lie in `folder`."""
    makers: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases, "mlflow": MLflow}
    check_trackers(names)
    return [makers[name](run, settings, folder, update) for name in names]


class TensorBoard:
    """Event files in the stage's own folder."""

    def __init__(self, run: str, settings: Mapping[str, Any], folder: Path, update: int) -> None:
        from tensorboardX import SummaryWriter

        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=update + 1)

    def log(self, update: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._board.add_scalar(name, value, update)

    def picture(self, update: int, name: str, pixels: Any) -> None:
        self._board.add_image(name, pixels, update, dataformats="HWC")

    def flush(self) -> None:
        self._board.flush()

    def close(self) -> None:
        self._board.close()


class WeightsAndBiases:
    """A run of the project `diagonal` (or `WANDB_PROJECT`); `WANDB_MODE=offline` keeps it in the stage's folder."""

    def __init__(self, run: str, settings: Mapping[str, Any], folder: Path, update: int) -> None:
        import wandb

        self._wandb, project = wandb, os.environ.get("WANDB_PROJECT", PROJECT)
        options = {"name": run, "id": run.replace("/", "-"), "resume": "allow"}
        self._run = wandb.init(project=project, config=dict(settings), dir=str(folder), **options)

    def log(self, update: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=update)

    def picture(self, update: int, name: str, pixels: Any) -> None:
        self._run.log({name: self._wandb.Image(pixels)}, step=update)

    def flush(self) -> None:
        """Its own process sends as it goes."""

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """A run of the experiment `diagonal` (or `MLFLOW_EXPERIMENT_NAME`) at `MLFLOW_TRACKING_URI`."""

    def __init__(self, run: str, settings: Mapping[str, Any], folder: Path, update: int) -> None:
        from mlflow import MlflowClient

        self._client, experiment = MlflowClient(), os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(experiment)
        number = found.experiment_id if found else self._client.create_experiment(experiment)
        same = self._client.search_runs([number], f"tags.`mlflow.runName` = '{run}'", max_results=1)
        made = same[0] if same else self._client.create_run(number, run_name=run)
        self._id = made.info.run_id
        if not same:
            for section, values in settings.items():
                self._client.log_param(self._id, section, str(values)[:6000])

    def log(self, update: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._client.log_metric(self._id, name, value, step=update)

    def picture(self, update: int, name: str, pixels: Any) -> None:
        self._client.log_image(self._id, pixels, key=name.replace("/", "-"), step=update)

    def flush(self) -> None:
        """Each call is sent at once."""

    def close(self) -> None:
        self._client.set_terminated(self._id)
