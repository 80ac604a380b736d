"""A stage's record on storage: a line for every update and every start, from which the curves can be rebuilt."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diagonal.storage import Folder, StorageError

UPDATES = "updates.jsonl"
NOT_CURVES = {"update", "samples", "tokens", "update_s", "data_wait_s", "skipped", "stage", "world_size"}
Entry = dict[str, Any]

_log = logging.getLogger(__name__)


class FolderSync:
    """A folder for reports. On local storage files are written in place; for S3 beside, and uploaded by `send`.

    Uploads run in the background and those that fail are tried again by the next `send`: a storage that is away does
    not stop training.
    """

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self.local = folder.path if folder.is_local else Path(tempfile.mkdtemp(prefix="diagonal-outbox-"))
        self.local.mkdir(parents=True, exist_ok=True)
        self._sent: dict[str, tuple[int, int]] = {}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="outbox")
        self._sending: Future[None] | None = None

    def receive(self, name: str) -> None:
        """Have the file `name` of an earlier start at hand, if there is one."""
        if not self.folder.is_local and self.folder.has(name):
            self.folder.get(name, self.local / name)

    def send(self) -> None:
        """Upload what changed since, in the background; at most one upload runs at a time."""
        if not self.folder.is_local and (self._sending is None or self._sending.done()):
            self._sending = self._thread.submit(self._try_to_send)

    def close(self) -> None:
        """Wait for uploads and send what is left; `StorageError` when the storage does not take it."""
        if not self.folder.is_local:
            self._thread.shutdown(wait=True)
            self._send()
            shutil.rmtree(self.local, ignore_errors=True)

    def _try_to_send(self) -> None:
        try:
            self._send()
        except StorageError as error:
            _log.warning("reports are uploaded later: %s", error)

    def _send(self) -> None:
        for path in sorted(path for path in self.local.rglob("*") if path.is_file()):
            name, now = str(path.relative_to(self.local)), path.stat()
            mark = (now.st_mtime_ns, now.st_size)
            if self._sent.get(name) != mark:
                self.folder.put(path, name)
                self._sent[name] = mark


class Journal:
    """Appends to `updates.jsonl`: a line for each start (where it went on from) and for each update.

    What a lost worker did after its last checkpoint is done again: its lines are superseded by the start line that goes
    on before them. `read_journal` gives what counts.
    """

    def __init__(self, outbox: FolderSync) -> None:
        outbox.receive(UPDATES)
        self._path = outbox.local / UPDATES
        self.known = read_journal(self._path.read_text().splitlines()) if self._path.exists() else Record((), ())
        self._file = self._path.open("a", encoding="utf-8")
        self._file.write("\n" if _ends_within_a_line(self._path) else "")  # as a killed process may have left it

    def start(self, update: int, **details: Any) -> None:
        self._append({"start_after": update, **details})

    def write(self, update: int, figures: Mapping[str, Any]) -> None:
        self._append({"update": update, **figures})

    def record(self) -> Record:
        return read_journal(self._path.read_text(encoding="utf-8").splitlines())

    def close(self) -> None:
        self._file.close()

    def _append(self, entry: Entry) -> None:
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()


@dataclass(frozen=True)
class Record:
    """What a journal says: every start of the workers, and each update that counts, in order."""

    starts: tuple[Entry, ...]
    updates: tuple[Entry, ...]

    @property
    def restarts(self) -> int:
        return max(0, len(self.starts) - 1)

    @property
    def refused(self) -> int:
        """Checkpoints that were passed over as incomplete or altered."""
        return sum(len(start["refused"]) for start in self.starts)

    @property
    def skipped(self) -> int:
        """Updates that were skipped for a NaN or an infinity."""
        return sum(1 for entry in self.updates if entry.get("skipped"))

    @property
    def seconds(self) -> float:
        """Time of the updates that count, waiting for data included; without starts, checkpoints and samples."""
        return float(sum(entry["update_s"] + entry["data_wait_s"] for entry in self.updates))


def _ends_within_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 1))
        return file.read(1) not in (b"", b"\n")


def read_journal(lines: Iterable[str]) -> Record:
    """The record in a journal's lines; one that a killed process left unfinished is passed over."""
    starts: list[Entry] = []
    updates: dict[int, Entry] = {}
    for line in lines:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if "start_after" in entry:
            starts.append(entry)
            updates = {update: kept for update, kept in updates.items() if update <= entry["start_after"]}
        else:
            updates[entry["update"]] = entry
    return Record(tuple(starts), tuple(updates[update] for update in sorted(updates)))
