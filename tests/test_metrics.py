"""Metric names, units and labels, and the backends that carry the numbers."""

from __future__ import annotations

import time
import weakref

import pytest

from diagonal.errors import FieldError
from diagonal.metrics import ALL, FactoryBackend, MetricSpec, NullBackend, kept_alive


class Recorder:
    """Takes the place of a metrics library: keeps how it was made and every call."""

    made: list[Recorder]

    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments
        self.calls: list[tuple[str, float, dict[str, str]]] = []
        self.made.append(self)

    def inc(self, value: float, tags: dict[str, str]) -> None:
        self.calls.append(("inc", value, dict(tags)))

    def set(self, value: float, tags: dict[str, str]) -> None:
        self.calls.append(("set", value, dict(tags)))

    def observe(self, value: float, tags: dict[str, str]) -> None:
        self.calls.append(("observe", value, dict(tags)))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Recorder]:
    monkeypatch.setattr(Recorder, "made", [], raising=False)
    return Recorder.made


@pytest.fixture
def backend(made: list[Recorder]) -> FactoryBackend:
    return FactoryBackend(Recorder, Recorder, Recorder)


def test_every_metric_has_its_own_name() -> None:
    assert len({spec.name for spec in ALL}) == len(ALL)


def test_no_label_can_hold_what_a_caller_chooses() -> None:
    labels = {label for spec in ALL for label in spec.labels}
    known = {"code", "outcome", "reason", "cause", "stage", "step", "network", "loss", "measure"}
    assert labels <= known


@pytest.mark.parametrize(
    ("name", "kind", "unit", "buckets"),
    [
        ("frames_total", "counter", "frames", ()),
        ("diagonal_frames", "counter", "frames", ()),
        ("diagonal_frames_total", "gauge", "frames", ()),
        ("diagonal_wait", "gauge", "seconds", ()),
        ("diagonal_wait_seconds", "histogram", "seconds", ()),
        ("diagonal_wait_seconds", "histogram", "seconds", (1.0, 1.0)),
        ("diagonal_wait_seconds", "gauge", "seconds", (1.0,)),
    ],
)
def test_a_metric_that_breaks_the_conventions_is_refused(name, kind, unit, buckets) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(FieldError):
        MetricSpec(name, kind, unit, "", (), buckets)


def test_a_metric_is_made_once_with_its_labels_and_buckets(backend: FactoryBackend, made: list[Recorder]) -> None:
    backend.observe("diagonal_update_seconds", 0.5, stage="stage1")
    backend.observe("diagonal_update_seconds", 0.25, stage="stage2")
    (metric,) = made
    name, _, buckets, labels = metric.arguments
    assert (name, labels) == ("diagonal_update_seconds", ("stage",)) and isinstance(buckets, list)
    assert metric.calls == [("observe", 0.5, {"stage": "stage1"}), ("observe", 0.25, {"stage": "stage2"})]


def test_a_gauge_takes_the_newest_value(backend: FactoryBackend, made: list[Recorder]) -> None:
    backend.set("diagonal_sessions_active", 2)
    backend.set("diagonal_sessions_active", 0)
    assert [call[1] for call in made[0].calls] == [2, 0]


def test_gauges_alone_are_told_again_while_somebody_holds_the_sink(made: list[Recorder]) -> None:
    backend = kept_alive(FactoryBackend(Recorder, Recorder, Recorder), every_s=0.01)
    backend.inc("diagonal_frames_generated_total", 9)
    for value in (1, 2):
        backend.set("diagonal_loss", value, stage="distill", loss="dmd")
    counter, gauge = made
    deadline_s = time.monotonic() + 30
    while len(gauge.calls) < 5 and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert counter.calls == [("inc", 9, {})]
    assert gauge.calls[1:5].count(("set", 2, {"stage": "distill", "loss": "dmd"})) >= 3
    held = weakref.ref(backend)
    del backend
    while held() is not None and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert held() is None, "the thread alone keeps it"


def test_a_counter_is_not_moved_by_zero(backend: FactoryBackend, made: list[Recorder]) -> None:
    backend.inc("diagonal_frames_generated_total", 0)
    backend.inc("diagonal_frames_generated_total", 9)
    assert made[0].calls == [("inc", 9, {})]


@pytest.mark.parametrize("with_factories", [True, False])
def test_an_unknown_metric_label_or_kind_is_named(with_factories: bool, backend: FactoryBackend) -> None:
    target = backend if with_factories else NullBackend()
    with pytest.raises(FieldError, match="diagonal_nothing"):
        target.inc("diagonal_nothing_total")
    with pytest.raises(FieldError, match="outcome"):
        target.inc("diagonal_sessions_total")
    with pytest.raises(FieldError, match="prompt"):
        target.set("diagonal_sessions_active", 1, prompt="a red circle")
    with pytest.raises(FieldError, match="gauge"):
        target.inc("diagonal_sessions_active")
