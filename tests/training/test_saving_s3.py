"""Laws of checkpoints on S3: those of local ones, through outages, refusals and half uploads."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from torch import Tensor

from diagonal.storage import Folder, StorageError, s3
from diagonal.training.checkpoint import Checkpointer
from diagonal.training.checkpoint_manifest import CheckpointError, checkpoints, name_of
from tests.s3 import FaultyProxy, S3Server, environment
from tests.training.ranks import Ranks
from tests.training.states import advance, contents, fresh, same

DEADLINE_S = 30.0


@pytest.fixture
def root(bucket: str, faulty_s3: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> Folder:
    """A folder on S3 behind the faulty proxy, of little patience."""
    monkeypatch.setattr(s3, "ATTEMPTS_A_REQUEST", 1)
    return Folder(f"s3://{bucket}/runs/r1/train", patience_s=2)


def updates(root: Folder) -> list[int]:
    return [found.update for found in checkpoints(root)]


@pytest.mark.slow
def test_a_checkpoint_comes_back_from_s3_bit_for_bit_and_leaves_no_local_file(root: Folder, tmp_path: Path) -> None:
    state, other, own = fresh(0, 1), fresh(50, 1), Checkpointer(root, 2, scratch=tmp_path)
    for _ in range(3):
        advance(state, 1)
        own.save(state, wait=True)
    assert updates(root) == [3, 2]
    restored = Checkpointer(root, 2, scratch=tmp_path).restore(other)
    assert restored is not None and restored.update == 3 and restored.folder.uri.startswith(root.uri)
    assert same(contents(state), contents(other))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def save_at_two(rank: int, uri: str, url: str) -> dict[str, Tensor]:
    os.environ.update(environment(url))
    state = fresh(0, 2)
    advance(state, 4)
    Checkpointer(Folder(uri), 2).save(state, wait=True)
    return contents(state)


def restore_at_two(rank: int, uri: str, url: str) -> dict[str, Tensor]:
    os.environ.update(environment(url))
    state = fresh(70, 2)
    Checkpointer(Folder(uri), 2).restore(state)
    return contents(state)


@pytest.mark.slow
def test_a_checkpoint_on_s3_of_two_ranks_loads_at_one_and_that_one_loads_at_two(
    two_ranks: Ranks, bucket: str, s3_server: S3Server
) -> None:
    uris = [f"s3://{bucket}/two", f"s3://{bucket}/one"]
    before = two_ranks.run(save_at_two, uris[0], s3_server.url)[0]
    one = fresh(30, 1)
    assert Checkpointer(Folder(uris[0]), 2).restore(one) is not None
    assert same(before, contents(one), ignoring="rng")
    Checkpointer(Folder(uris[1]), 2).save(one, wait=True)
    for two in two_ranks.run(restore_at_two, uris[1], s3_server.url):
        assert same(before, two, ignoring="rng")


@pytest.mark.slow
def test_training_goes_on_during_an_outage_and_the_save_is_whole_after_it(
    root: Folder, faulty_s3: FaultyProxy, tmp_path: Path
) -> None:
    patient = Folder(root.uri, patience_s=DEADLINE_S)
    state, own = fresh(0, 1), Checkpointer(patient, 2, scratch=tmp_path)
    advance(state, 1)
    before, down = contents(state), faulty_s3.outage_for(1.5)
    own.save(state)
    advance(state, 1)
    own.save(state)
    assert down.is_alive() and own.skipped == 1 and state.update == 2
    own.finish()
    assert updates(root) == [1]
    Checkpointer(patient, 2, scratch=tmp_path).restore(other := fresh(50, 1))
    assert same(before, contents(other))


@pytest.mark.slow
def test_a_storage_that_stays_away_ends_training_with_an_error_that_names_the_folder(
    root: Folder, faulty_s3: FaultyProxy, tmp_path: Path
) -> None:
    state, own = fresh(0, 1), Checkpointer(root, 2, scratch=tmp_path)
    own.save(state, wait=True)
    state.update = 7
    faulty_s3.fail(method="PUT", key="update-00000007")
    own.save(state)
    with pytest.raises(CheckpointError, match=r"s3://.*/update-00000007.*could not be written: .*could not upload"):
        own.finish()
    faulty_s3.mend()
    assert updates(root) == [0]
    for lost in ("", ".distcp"):  # an outage is no reason to take an older one, or to begin anew
        faulty_s3.fail(method="GET", key=lost)
        with pytest.raises(StorageError, match="could not"):
            Checkpointer(root, 2, scratch=tmp_path).restore(state)
        faulty_s3.mend()


@pytest.mark.slow
@pytest.mark.parametrize("lost", [".distcp", ".metadata", name_of(0)])
def test_an_upload_that_loses_any_file_does_not_count_and_is_cleared_away_later(
    root: Folder, faulty_s3: FaultyProxy, tmp_path: Path, lost: str
) -> None:
    state, own = fresh(0, 1), Checkpointer(root, 1, scratch=tmp_path)
    own.save(state, wait=True)
    faulty_s3.fail(method="PUT", key=lost)
    state.update = 7
    with pytest.raises(CheckpointError, match="could not be written"):
        own.save(state, wait=True)
    faulty_s3.mend()
    again = Checkpointer(root, 1, scratch=tmp_path)
    restored = again.restore(state)
    assert restored is not None and restored.update == 0
    state.update = 7
    again.save(state, wait=True)
    assert updates(root) == [7] and len(root.children()) == 1


@pytest.mark.slow
def test_an_altered_object_is_refused_and_the_checkpoint_before_it_taken(root: Folder, tmp_path: Path) -> None:
    state, own = fresh(0, 1), Checkpointer(root, 2, scratch=tmp_path)
    for state.update in (1, 2):
        own.save(state, wait=True)
    newest = checkpoints(root)[0].folder
    content = bytearray(newest.read("__0_0.distcp"))
    content[len(content) // 2] ^= 1
    newest.write("__0_0.distcp", bytes(content))
    restored = own.restore(state)
    assert restored is not None and restored.update == 1
    assert "__0_0.distcp is altered" in restored.refused[0].reason


@pytest.mark.slow
def test_a_cut_off_download_is_asked_for_again(root: Folder, faulty_s3: FaultyProxy, tmp_path: Path) -> None:
    state, own = fresh(0, 1), Checkpointer(root, 2, scratch=tmp_path)
    own.save(state, wait=True)
    faulty_s3.truncate(key=".distcp", times=1)
    began_s = time.monotonic()
    assert own.restore(state) is not None
    assert time.monotonic() - began_s < DEADLINE_S
