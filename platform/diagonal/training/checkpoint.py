"""Checkpoints of a training run on any storage: written in the background, whole or not at all, for any world size."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from diagonal.errors import FieldError, require
from diagonal.storage import Folder, StorageError
from diagonal.training import checkpoint_manifest
from diagonal.training.checkpoint_manifest import Checkpoint, CheckpointError, UnfinishedError, folder_name
from diagonal.training.distributed import (
    Group,
    from_rank_0,
    gathered,
    gloo_group,
    highest,
    is_grouped,
    own_rank,
    world_size,
)
from diagonal.training.state import TrainState

IDLE, RUNNING, FAILED = range(3)
LONGEST_TRANSFER_S = 3600.0  # of one rank's files, which the other ranks wait for

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Restored:
    """What `Checkpointer.restore` loaded, and the newer ones that it could not use, with the reason of each."""

    folder: Folder
    update: int
    refused: tuple[CheckpointError, ...] = ()


class Checkpointer:
    """Saves a run's state below `root` and restores the newest; keeps the newest `keep` whole ones.

    Every method is collective, and so is making one: all ranks call them in the same order. Training waits for a copy
    to CPU memory alone (pinned where there is a GPU; as large as this rank's part of the state). A thread then writes,
    hashes and, for S3, uploads the files, speaking to other ranks over a process group of its own.

    On local storage files go straight into the final folder, which every node must see. On S3 they go through `scratch`
    (the system's temporary folder by default), which needs room for this rank's part to save and for a whole
    checkpoint a node to restore. Names are unique by save, so nothing is ever overwritten; what counts is said in
    `manifest`. Older whole ones beyond `keep`, and what is left of broken ones, are deleted after a newer one is whole.
    """

    def __init__(self, root: Folder, keep: int, scratch: Path | None = None) -> None:
        require(keep >= 1, "keep_checkpoints", keep, "a whole number of at least 1")
        self._root, self._keep = root, keep
        mark = hashlib.sha256(root.uri.encode()).hexdigest()[:12]
        self._scratch = (scratch or Path(tempfile.gettempdir())) / f"diagonal-checkpoint-{mark}"
        timeout_s = LONGEST_TRANSFER_S + root.patience_s
        self._main, self._background = gloo_group(timeout_s), gloo_group(timeout_s)
        self._token = from_rank_0(lambda: uuid.uuid4().hex[:8], self._main)
        cuda = torch.cuda.is_available()
        self._stager = DefaultStager(StagingOptions(cuda, False, False, cuda))
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._newest: Future[None] | None = None
        self._saves = 0
        self._refused: set[str] = set()
        self.skipped = 0
        """Saves that were skipped because an earlier one was still being written."""
        self.waited_s = 0.0
        """Seconds that training waited in the newest `save`."""
        self.wrote_s = 0.0
        """Seconds that the newest finished save took in the background."""

    def save(self, state: TrainState, *, wait: bool = False) -> None:
        """Copy `state` and write it in the background.

        At most one save is in flight: while one is, another is skipped, counted and warned about, so that training goes
        on when the storage is slow or away. With `wait` it is never skipped: it waits for the one in flight, and
        returns when its own is whole (for the last save of a run).
        Raises, on all ranks together, the `CheckpointError` of an earlier save that failed (and, with `wait`, its own).
        """
        started_s = time.monotonic()
        if wait:
            self.finish()
        elif self._agreed_status() == RUNNING:
            self.skipped += 1
            if own_rank() == 0:
                _log.warning("update %d: no checkpoint, as an earlier one is still being written", state.update)
            return
        staged = cast(dict[str, Tensor], self._stager.stage(state.state_dict()))  # no future: it is not asynchronous
        token = f"{self._token}{self._saves:04d}"
        folder = self._root / folder_name(state.update, token)
        self._saves += 1
        self._newest = self._thread.submit(self._write, staged, state.progress, folder, token)
        if wait:
            self.finish()
        self.waited_s = time.monotonic() - started_s

    def finish(self) -> None:
        """Wait until the newest save is whole; raises as `save` does. May be called again and before further saves."""
        if self._newest is not None:
            wait_for([self._newest])
        self._agreed_status()

    def restore(self, state: TrainState) -> Restored | None:
        """Load the newest checkpoint whose every file has its size and hash; None when the run has none yet.

        An altered one is refused and the one before it taken, the same on all ranks. The number of ranks may differ
        from the one that saved. Learning rates, betas and weight decay stay those of `state`'s optimizers, that is of
        this run's configuration: a resume with another lr goes on with the saved moments and the new rate.
        Raises `CheckpointError` when there are some and none can be used (nothing is then begun from anew by itself),
        `FieldError` when it is of other networks, `StorageError` when the storage does not answer.
        """
        found, broken = from_rank_0(lambda: _listed(self._root), self._main)
        refused = list(broken)
        for name, manifests in found:
            chosen = Checkpoint(self._root / name, manifests)
            error = self._load(state, chosen)
            if error is None:
                self._refused = {other.folder.rpartition("/")[2] for other in refused}
                newer = [other for other in refused if _is_newer(other, chosen)]
                return Restored(chosen.folder, chosen.update, tuple(newer))
            refused.append(error)
        lost = [error for error in refused if not isinstance(error, UnfinishedError)]
        if lost:
            reasons = "; ".join(map(str, lost))
            raise CheckpointError(self._root, f"none of {len(lost)} can be used, remove them to begin anew: {reasons}")
        return None

    def _agreed_status(self) -> int:
        """IDLE, or RUNNING while any rank still writes; raises on all ranks when a save failed on any."""
        done = self._newest is None or self._newest.done()
        error = self._newest.exception() if self._newest is not None and done else None
        status = highest(FAILED if error else IDLE if done else RUNNING, self._main)
        if status == FAILED:
            raise error or CheckpointError(self._root, "another rank could not write its part")
        return status

    def _write(self, staged: dict[str, Tensor], progress: dict[str, int], folder: Folder, token: str) -> None:
        """One save, in the background; all ranks end it together, whole or failed."""
        started_s, failure = time.monotonic(), None
        try:
            self._put(staged, progress, folder, token)
        except (OSError, RuntimeError, CheckpointException) as error:
            failure = CheckpointError(folder, f"could not be written: {_reason(error)}")
            failure.__cause__ = error
        if highest(failure is not None, self._background):
            if own_rank() == 0 and folder.is_local:
                shutil.rmtree(folder.path, ignore_errors=True)  # a full disk gets its room back
            raise failure or CheckpointError(folder, "another rank could not write its part")
        if own_rank() == 0:
            self._retain(folder)
        self.wrote_s = time.monotonic() - started_s

    def _put(self, staged: dict[str, Tensor], progress: dict[str, int], folder: Folder, token: str) -> None:
        with self._written_at(folder) as local:
            writer = dcp.FileSystemWriter(local, sync_files=folder.is_local)
            dcp.save(staged, storage_writer=writer, process_group=self._background, no_dist=not is_grouped())
            told = checkpoint_manifest.compose(local, own_rank(), world_size(), token, progress)
            if not folder.is_local:
                for name in told["files"]:
                    folder.put(local / name, name)
            folder.write_json(checkpoint_manifest.name_of(own_rank()), told)

    @contextmanager
    def _written_at(self, folder: Folder) -> Iterator[Path]:
        """The local folder that this rank's files are written into."""
        if folder.is_local:
            yield folder.path
            return
        with _emptied(self._scratch / f"rank{own_rank()}") as local:
            yield local

    def _retain(self, newest: Folder) -> None:
        whole, broken = checkpoint_manifest.scan(self._root)
        names = [found.folder.name for found in whole if found.folder.name not in self._refused]
        if newest.name not in names:
            raise CheckpointError(newest, "rank 0 does not see the files of all ranks: every node must see the folder")
        kept = {newest.name, *[name for name in names if name != newest.name][: self._keep - 1]}
        useless = {found.folder.name for found in whole} | {error.folder.rpartition("/")[2] for error in broken}
        try:
            for name in sorted(useless - kept):
                checkpoint_manifest.delete_checkpoint(self._root / name)
        except (OSError, StorageError) as error:
            _log.warning("old checkpoints stay: %s", error)

    def _load(self, state: TrainState, chosen: Checkpoint) -> CheckpointError | None:
        """Check `chosen` and read it into `state`; why not, the same on all ranks."""
        if chosen.folder.is_local:
            return self._checked_load(state, chosen, chosen.folder.path, own_rank(), world_size())
        self._scratch.mkdir(parents=True, exist_ok=True)
        place = os.stat(self._scratch)
        nodes = gathered((socket.gethostname(), place.st_dev, place.st_ino), self._main)
        mine = [rank for rank, node in enumerate(nodes) if node == nodes[own_rank()]]
        local, leads = self._scratch / "restore", mine[0] == own_rank()
        if leads:
            shutil.rmtree(local, ignore_errors=True)
        highest(IDLE, self._main)  # a barrier: the old files are gone
        try:
            return self._checked_load(state, chosen, local, mine.index(own_rank()), len(mine))
        finally:
            if leads:
                shutil.rmtree(local, ignore_errors=True)

    def _checked_load(
        self, state: TrainState, chosen: Checkpoint, local: Path, share: int, shares: int
    ) -> CheckpointError | None:
        errors = gathered(_fetched(chosen, local, sorted(chosen.files)[share::shares]), self._main)
        for error in errors:
            if isinstance(error, StorageError):
                raise error
        refusals = [error for error in errors if isinstance(error, CheckpointError)]
        if refusals:
            return refusals[0]
        _read_into(state, local, self._main)
        highest(IDLE, self._main)  # a barrier: every rank has read its part
        return None


def _listed(root: Folder) -> tuple[list[tuple[str, tuple[checkpoint_manifest.Manifest, ...]]], list[CheckpointError]]:
    whole, broken = checkpoint_manifest.scan(root)
    return [(found.folder.name, found.manifests) for found in whole], broken


def _is_newer(refused: CheckpointError, chosen: Checkpoint) -> bool:
    return refused.folder.rpartition("/")[2] > chosen.folder.name.rpartition("-")[0]


def _fetched(chosen: Checkpoint, local: Path, names: list[str]) -> CheckpointError | StorageError | None:
    """Check those files of `chosen` in `local`, after their download when it is on S3; what was wrong."""
    try:
        for name in names:
            if not chosen.folder.is_local:
                chosen.folder.get(name, local / name)
            checkpoint_manifest.check_file(chosen, name, local / name)
    except (CheckpointError, StorageError) as error:
        return error
    except FieldError as error:
        return CheckpointError(chosen.folder, str(error))
    return None


def _read_into(state: TrainState, local: Path, group: Group) -> None:
    reader = dcp.FileSystemReader(local)
    saved = reader.read_metadata().state_dict_metadata
    tensors = state.template({key: value for key, value in saved.items() if isinstance(value, TensorStorageMetadata)})
    dcp.load(tensors, storage_reader=reader, process_group=group, no_dist=not is_grouped())
    state.load_state_dict(tensors)


@contextmanager
def _emptied(folder: Path) -> Iterator[Path]:
    """A folder without what an ended process left there, removed at the end."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _reason(error: BaseException) -> str:
    """The first rank's own error where torch wraps those of several."""
    if isinstance(error, CheckpointException):
        rank, (cause, _) = min(error.failures.items())
        return f"rank {rank}: {cause!r}"
    return str(error)
