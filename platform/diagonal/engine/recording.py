"""A recorded session: its wish and its event log, from which `engine.replay` makes the same latents again.

It holds prompts, so it is made only for who asked for it, and never goes to logs or metrics.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from diagonal.engine.snapshot import Identity, SnapshotError
from diagonal.engine.specs import Event, SessionSpec
from diagonal.schedule import StepSchedule

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Recording:
    """The first `chunks` chunks of a session, and what happened before each of them."""

    identity: Identity
    spec: SessionSpec
    schedule: StepSchedule
    chunks: int
    events: tuple[Event, ...]

    def before(self, chunk: int) -> Sequence[Event]:
        """What happened before that chunk was made, in order."""
        return [event for event in self.events if event.chunk == chunk]

    def to_json(self) -> str:
        return json.dumps(
            {
                "schema": SCHEMA_VERSION,
                "identity": asdict(self.identity),
                "spec": asdict(self.spec),
                "schedule": asdict(self.schedule),
                "chunks": self.chunks,
                "events": [asdict(e) for e in self.events],
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Recording:
        """What `to_json` wrote; `SnapshotError` when it is broken or of another version."""
        try:
            data = json.loads(text)
            if data["schema"] != SCHEMA_VERSION:
                raise SnapshotError(f"recording.schema = {data['schema']!r}: allowed is {SCHEMA_VERSION}")
            return cls(
                Identity(**data["identity"]),
                SessionSpec(**data["spec"]),
                StepSchedule(**data["schedule"]),
                int(data["chunks"]),
                tuple(Event(**event) for event in data["events"]),
            )
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            if isinstance(error, SnapshotError):
                raise
            raise SnapshotError(f"recording: {type(error).__name__}: {error}") from error
