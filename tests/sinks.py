"""Sinks that keep what they are told, and refuse what `diagonal.metrics` does not declare."""

from __future__ import annotations

from dataclasses import dataclass, field

from diagonal.errors import FieldError
from diagonal.metrics import NullSink


@dataclass(frozen=True)
class Told:
    """One number that a sink was told."""

    name: str
    value: float
    labels: dict[str, str]


@dataclass
class Recorded(NullSink):
    """Everything that was told, in order; `wrong` keeps what was refused, as whoever told it may survive that."""

    told: list[Told] = field(default_factory=list)
    wrong: list[FieldError] = field(default_factory=list)

    def inc(self, name: str, value: float = 1.0, **labels: str) -> None:
        self._keep("inc", name, value, labels)

    def set(self, name: str, value: float, **labels: str) -> None:
        self._keep("set", name, value, labels)

    def observe(self, name: str, value: float, **labels: str) -> None:
        self._keep("observe", name, value, labels)

    def of(self, name: str) -> list[Told]:
        """What was told of one metric."""
        return [told for told in list(self.told) if told.name == name]

    def total(self, name: str) -> float:
        """The sum of what was told of one metric."""
        return sum(told.value for told in self.of(name))

    def _keep(self, how: str, name: str, value: float, labels: dict[str, str]) -> None:
        try:
            getattr(NullSink, how)(self, name, value, **labels)
        except FieldError as error:
            self.wrong.append(error)
            raise
        self.told.append(Told(name, value, labels))
