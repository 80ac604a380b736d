"""Figures reach every tracker that a run names; TensorBoard by itself, the others through their clients' own calls."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from diagonal.config import Config
from diagonal.errors import FieldError
from jobs.runs import trackers as module
from jobs.runs.trackers import check_trackers, trackers

PIXELS = np.zeros((4, 6, 3), np.uint8)
SETTINGS = {"preset": "tiny", "seed": 3}


def drive(name: str, folder: Path, *updates: int) -> None:
    for update in updates:  # of a start, and of a resume
        (tracker,) = trackers([name], "first/distill", SETTINGS, folder, update)
        tracker.log(update + 1, {"distill/critic": 0.5})
        tracker.picture(update + 1, "distill/samples", PIXELS)
        tracker.flush()
        tracker.close()


def test_tensorboard_has_figures_and_pictures_and_a_resume_takes_back_what_came_after_it(tmp_path: Path) -> None:
    drive("tensorboard", tmp_path, 2)
    events = [event for file in sorted(tmp_path.rglob("events*")) for event in _events(file)]
    tags = [(event.step, value.tag) for event in events for value in event.summary.value]
    assert tags == [(3, "distill/critic"), (3, "distill/samples")]
    assert any(event.session_log.status == 1 and event.step == 3 for event in events), "a purge from update 3 on"


def _events(file: Path) -> list[Event]:
    data, events = file.read_bytes(), []
    while data:
        length = int.from_bytes(data[:8], "little")
        events.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    return events


def test_weights_and_biases_continues_one_run_below_the_stages_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    def init(**options: Any) -> Any:
        calls.append(options)
        return SimpleNamespace(
            log=lambda figures, step: calls.append((step, figures)), finish=lambda: calls.append("end")
        )

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Image=lambda pixels: pixels.shape))
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setenv("WANDB_PROJECT", "films")
    drive("wandb", tmp_path, 0, 2)
    first, second = calls[:4], calls[4:]
    assert (
        first[0]
        == second[0]
        == {
            "project": "films",
            "name": "first/distill",
            "id": "first-distill",
            "resume": "allow",
            "config": SETTINGS,
            "dir": str(tmp_path),
        }
    )
    assert first[1:] == [(1, {"distill/critic": 0.5}), (1, {"distill/samples": (4, 6, 3)}), "end"]
    assert second[1][0] == 3


@pytest.mark.parametrize(("names", "match"), [(["wandb"], "train.trackers = 'wandb'.*pip install wandb")])
def test_a_tracker_whose_package_is_missing_is_refused_by_name(
    names: list[str], match: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FieldError, match=match):
        check_trackers(names)


def test_an_unknown_tracker_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(FieldError, match=r"train.trackers = .*neptune.*a list of tensorboard, wandb, mlflow"):
        Config.from_preset("tiny", ['train.trackers=["neptune"]'])
