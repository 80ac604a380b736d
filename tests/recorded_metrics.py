"""A metrics backend that keeps what it gets, and refuses what `diagonal.metrics` does not declare."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from diagonal.errors import FieldError
from diagonal.metrics import BY_NAME, NullBackend


class Measurement(NamedTuple):
    """One number of one metric."""

    name: str
    value: float
    labels: dict[str, str]


@dataclass
class RecordedMetrics(NullBackend):
    """Every measurement, in order; `wrong` keeps what was refused, as the code under test may survive that."""

    records: list[Measurement] = field(default_factory=list)
    wrong: list[FieldError] = field(default_factory=list)

    def inc(self, name: str, value: float = 1.0, **labels: str) -> None:
        self._keep("inc", name, value, labels)

    def set(self, name: str, value: float, **labels: str) -> None:
        self._keep("set", name, value, labels)

    def observe(self, name: str, value: float, **labels: str) -> None:
        self._keep("observe", name, value, labels)

    def of(self, name: str) -> list[Measurement]:
        """The measurements of one metric."""
        assert name in BY_NAME, name
        return [record for record in list(self.records) if record.name == name]

    def values(self, name: str) -> list[float]:
        return [record.value for record in self.of(name)]

    def labels(self, name: str) -> list[dict[str, str]]:
        return [record.labels for record in self.of(name)]

    def total(self, name: str) -> float:
        return sum(self.values(name))

    def last(self, name: str) -> float:
        return self.values(name)[-1]

    def _keep(self, method: str, name: str, value: float, labels: dict[str, str]) -> None:
        try:
            getattr(NullBackend, method)(self, name, value, **labels)
        except FieldError as error:
            self.wrong.append(error)
            raise
        self.records.append(Measurement(name, value, labels))
