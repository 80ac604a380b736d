"""Laws of saving: training waits for a copy alone; a kill, a full disk or a slow storage never costs an older one."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from diagonal.storage import Folder
from diagonal.training.checkpoint import Checkpointer
from diagonal.training.checkpoint_manifest import CheckpointError, UnfinishedError, checkpoints, scan
from diagonal.training.distributed import gathered, highest, own_rank, world_size
from diagonal.training.parallel import device_mesh
from tests.training.ranks import Ranks
from tests.training.states import advance, contents, flip, folder_of, fresh, keeper, remove_manifest, same, saved

DEADLINE_S = 30.0


@contextmanager
def held() -> Iterator[threading.Event]:
    """While the block runs, a save's writing in the background waits for the event (or the end of the block)."""
    release, write = threading.Event(), dcp.save

    def slow(*arguments: Any, **options: Any) -> Any:
        assert release.wait(DEADLINE_S)
        return write(*arguments, **options)

    with mock.patch.object(dcp, "save", slow):
        try:
            yield release
        finally:
            release.set()


def updates(root: Path) -> list[int]:
    return [found.update for found in checkpoints(Folder(str(root)))]


def test_training_continues_during_a_save_which_holds_the_state_of_its_request(tmp_path: Path) -> None:
    state, own = fresh(0, 1), keeper(tmp_path)
    advance(state, 4)
    before = contents(state)
    with held() as release:
        own.save(state)
        advance(state, 2)
        assert updates(tmp_path) == []
        release.set()
        own.finish()
    assert updates(tmp_path) == [4]
    keeper(tmp_path).restore(other := fresh(50, 1))
    assert same(before, contents(other)) and not same(before, contents(state))


def test_a_save_during_another_is_skipped_and_counted_unless_it_waits(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state, own, states = fresh(0, 1), keeper(tmp_path), {}
    with held() as release:
        for update in (1, 2, 3):
            advance(state, 1)
            states[update] = contents(state)
            own.save(state)
        assert own.skipped == 2
        threading.Timer(0.2, release.set).start()
        advance(state, 1)
        own.save(state, wait=True)
    assert updates(tmp_path) == [4, 1]
    shutil.rmtree(folder_of(tmp_path, 4))
    keeper(tmp_path).restore(state)
    assert same(states[1], contents(state))  # its copy was not written over by that of update 4
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(told) == 2 and "update 3: no checkpoint" in told[1]
    assert own.skipped == 2 and own.wrote_s > 0.0


def test_all_saves_of_a_run_that_waits_for_none_are_whole_after_finish(tmp_path: Path) -> None:
    state, own = fresh(0, 1), keeper(tmp_path)
    own.finish()
    for state.update in (1, 2):
        own.save(state)
        own.finish()
    own.finish()
    assert updates(tmp_path) == [2, 1]


def test_a_full_disk_is_told_by_the_next_call_with_the_folder_and_leaves_the_older_one(tmp_path: Path) -> None:
    state, own = fresh(0, 1), keeper(tmp_path)
    own.save(state, wait=True)
    full = OSError(errno.ENOSPC, "No space left on device")
    with mock.patch("torch.distributed.checkpoint.filesystem.os.fsync", side_effect=full):
        state.update = 7
        own.save(state)
        with pytest.raises(CheckpointError, match="update-00000007.*could not be written.*No space left on device"):
            own.finish()
    with pytest.raises(CheckpointError, match="update-00000007"):
        own.save(state)
    assert [path.name for path in tmp_path.iterdir()] == [folder_of(tmp_path, 0).name]  # the disk has its room back
    assert updates(tmp_path) == [0]


def fails_on_rank_1(rank: int, root: str) -> tuple[str, int]:
    """Rank 1's manifest cannot be written; each rank then goes on to its next save."""
    state, own = fresh(0, 2), keeper(root)
    saved(state, root)
    state.update = 7
    full = OSError(errno.ENOSPC, "No space left on device")
    with mock.patch.object(Folder, "write_json", side_effect=full if rank == 1 else None):
        own.save(state)
        assert own._newest is not None
        own._newest.exception(timeout=DEADLINE_S)
    with pytest.raises(CheckpointError) as caught:
        own.save(state)
    restored = keeper(root).restore(state)
    assert restored is not None
    return str(caught.value), restored.update


def test_a_save_that_fails_on_one_rank_is_told_on_all_together(two_ranks: Ranks, tmp_path: Path) -> None:
    (first, update), (second, other) = two_ranks.run(fails_on_rank_1, str(tmp_path))
    assert "update-00000007" in first and "another rank could not write its part" in first
    assert "update-00000007" in second and "No space left on device" in second
    assert update == other == 0


def late_on_rank_0(rank: int, root: str) -> tuple[int, int, list[int]]:
    """Rank 1 has ended its first save when the second is asked for; rank 0 still deletes old ones."""
    state, own, release, retain = fresh(0, 2), keeper(root), threading.Event(), Checkpointer._retain

    def slow(self: Checkpointer, newest: Folder) -> None:
        assert release.wait(DEADLINE_S)
        retain(self, newest)

    with mock.patch.object(Checkpointer, "_retain", slow):
        state.update = 1
        own.save(state)
        assert own._newest is not None
        if rank == 1:
            own._newest.result(timeout=DEADLINE_S)
        state.update = 2
        own.save(state)
        release.set()
        state.update = 3
        own.save(state, wait=True)
    return own.skipped, own._saves, [found.update for found in checkpoints(Folder(root))]


def test_all_ranks_skip_together_while_one_still_writes(two_ranks: Ranks, tmp_path: Path) -> None:
    assert two_ranks.run(late_on_rank_0, str(tmp_path)) == [(1, 2, [3, 1])] * 2


def trains_while_saving(rank: int, root: str) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
    """The same updates without saves, and with one begun at each while the other ranks' threads are late."""
    torch.manual_seed(rank)
    alone = fresh(0, 2)
    advance(alone, 8)
    torch.manual_seed(rank)
    state, own, write = fresh(0, 2), keeper(root), dcp.save

    def late(*arguments: Any, **options: Any) -> Any:
        time.sleep(0.02 * rank)
        return write(*arguments, **options)

    with mock.patch.object(dcp, "save", late):
        for update in range(8):
            if update == 4:
                own.finish()  # else a slow disk leaves one save in flight to the end
            own.save(state)
            advance(state, 1)
        own.finish()
    return contents(alone), contents(state), own._saves


@pytest.mark.slow
def test_the_collectives_of_a_save_do_not_mix_with_those_of_training(two_ranks: Ranks, tmp_path: Path) -> None:
    for alone, state, saves in two_ranks.run(trains_while_saving, str(tmp_path)):
        assert same(alone, state) and saves >= 2


def killed_at(write: int, root: Path) -> bool:
    """Save update 9 in a process that is killed before its `write`-th opening, syncing, renaming or removing of a file
    below `root`; whether it came so far."""
    child = os.fork()
    if child == 0:
        _save_until(write, root)
    until_s = time.monotonic() + DEADLINE_S
    while time.monotonic() < until_s:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
            return os.WIFSIGNALED(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    raise AssertionError("the process did not end")


def _save_until(write: int, root: Path) -> None:
    seen = 0

    def count(event: str, arguments: tuple[Any, ...] = ()) -> None:
        nonlocal seen
        writes = event in ("os.rename", "os.mkdir", "os.remove", "os.fsync")
        writes = writes or (event == "open" and isinstance(arguments[2], int) and bool(arguments[2] & os.O_WRONLY))
        if writes and (event == "os.fsync" or str(arguments[0]).startswith(str(root))):
            seen += 1
            if seen == write:
                os.kill(os.getpid(), signal.SIGKILL)

    sync = os.fsync

    def counted_sync(descriptor: int) -> None:
        count("os.fsync")
        sync(descriptor)

    os.fsync = counted_sync  # type: ignore[assignment]
    sys.addaudithook(count)
    status = 1
    try:
        state = fresh(0, 1)
        state.update = 9
        keeper(root, keep=1).save(state, wait=True)
        status = 0
    finally:
        os._exit(status)


@pytest.mark.slow
def test_a_kill_at_any_write_call_leaves_a_whole_checkpoint_the_older_one_or_the_newer(tmp_path: Path) -> None:
    state, found = fresh(0, 1), []
    for write in range(1, 100):
        root = tmp_path / str(write)
        saved(state, root, 5)
        killed = killed_at(write, root)
        restored = keeper(root).restore(state)
        assert restored is not None
        found.append(restored.update)
        if not killed:
            break
    assert found == sorted(found) and found[-1] == 9 and found.count(5) >= 6
    assert [path.name for path in root.iterdir()] == [folder_of(root, 9).name]


def test_only_the_newest_whole_checkpoints_are_kept_and_no_leftover_of_a_broken_one(tmp_path: Path) -> None:
    state = fresh(0, 1)
    saved(state, tmp_path, 1, 2, 3)
    remove_manifest(folder_of(tmp_path, 3))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "text").write_text("kept")
    own = keeper(tmp_path, keep=2)
    for state.update, left in ((4, [4, 2]), (5, [5, 4])):
        own.save(state, wait=True)
        assert updates(tmp_path) == left
        assert len(list(tmp_path.iterdir())) == 3
    with pytest.raises(ValueError, match="keep_checkpoints = 0"):
        keeper(tmp_path, keep=0)


def test_a_deletion_that_is_cut_off_leaves_a_folder_that_does_not_count(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state, own = fresh(0, 1), keeper(tmp_path, keep=1)
    own.save(state, wait=True)
    first, state.update = folder_of(tmp_path, 0), 1

    def cut_off(folder: Folder) -> None:
        (folder.path / "__0_0.distcp").unlink()
        raise OSError(errno.EIO, "Input/output error")

    with mock.patch.object(Folder, "delete", cut_off):
        own.save(state, wait=True)
    whole, (broken,) = scan(Folder(str(tmp_path)))
    assert [found.update for found in whole] == [1]
    assert isinstance(broken, UnfinishedError) and broken.folder == str(first)
    assert "old checkpoints stay: " in caplog.text


def test_an_altered_newer_checkpoint_never_takes_the_place_of_a_good_one(tmp_path: Path) -> None:
    state = fresh(0, 1)
    saved(state, tmp_path, 7, 9)
    flip(folder_of(tmp_path, 9))
    own = keeper(tmp_path, keep=2)
    restored = own.restore(state)
    assert restored is not None and restored.update == 7
    state.update = 8
    own.save(state, wait=True)
    assert updates(tmp_path) == [8, 7]


def test_a_folder_that_not_every_node_sees_is_refused_by_the_first_save(two_ranks: Ranks, tmp_path: Path) -> None:
    answers = two_ranks.run(own_roots, str(tmp_path))
    assert "every node must see the folder" in answers[0] and "another rank" in answers[1]


def own_roots(rank: int, root: str) -> str:
    own = Checkpointer(Folder(f"{root}/{rank}"), 2)
    with pytest.raises(CheckpointError) as caught:
        own.save(fresh(0, 2), wait=True)
    shutil.rmtree(f"{root}/{rank}")
    return str(caught.value)


def loses_its_group(rank: int, root: str) -> tuple[list[str], str]:
    """A rank whose group Ray Train ends, as another is lost, while a save is being written and training goes on."""
    state, own = fresh(rank, 2), keeper(root)
    advance(state, 2)
    asked = (own_rank, world_size, lambda: highest(3, None), lambda: gathered(rank, None), lambda: state.state_dict())
    with held() as release:
        own.save(state)
        dist.destroy_process_group()
        release.set()
        errors = [named(call) for call in (*asked, lambda: device_mesh(2, "cpu"))]
    return errors, named(own.finish)


def named(call: Callable[[], object]) -> str:
    """The name of the error that `call` raises."""
    try:
        return f"none, but {call()}"
    except RuntimeError as error:
        return type(error).__name__


@pytest.mark.slow
def test_a_rank_whose_group_is_ended_never_takes_itself_for_the_only_one(tmp_path: Path) -> None:
    """Else it would refuse its own samples for good, and its half of a checkpoint would count as a whole one."""
    ranks = Ranks(2)
    try:
        answers = ranks.run(loses_its_group, str(tmp_path))
    finally:
        ranks.stop()
    lost = "GroupLostError"
    assert answers == [([lost] * 6, lost)] * 2
    assert updates(tmp_path) == []
