"""The record of a stage: every update once, whatever was lost and done again."""

from pathlib import Path

import pytest

from diagonal.storage import Folder
from jobs.runs.update_log import UPDATES, FolderSync, Journal, read_journal

FIGURES = {"critic": 0.1, "update_s": 1.0, "data_wait_s": 0.5}


def outbox(folder: Path) -> FolderSync:
    return FolderSync(Folder(str(folder)))


def test_lines_of_lost_updates_are_superseded_by_the_start_that_goes_on_before_them(tmp_path: Path) -> None:
    journal = Journal(outbox(tmp_path))
    journal.start(0, refused=[])
    for update in range(1, 6):
        journal.write(update, {**FIGURES, "critic": float(update)})
    journal.start(3, refused=["update 4: altered"])
    journal.write(4, {**FIGURES, "critic": 40.0})
    record = journal.record()
    assert [(entry["update"], entry["critic"]) for entry in record.updates] == [(1, 1), (2, 2), (3, 3), (4, 40.0)]
    assert (record.restarts, record.refused, record.seconds) == (1, 1, 6.0)


def test_a_line_that_a_killed_process_left_unfinished_spoils_no_other(tmp_path: Path) -> None:
    (tmp_path / UPDATES).write_text('{"start_after": 0, "refused": []}\n{"update": 1}\n{"upda')
    journal = Journal(outbox(tmp_path))
    journal.start(1, refused=[])
    journal.write(2, FIGURES)
    journal.close()
    record = read_journal((tmp_path / UPDATES).read_text().splitlines())
    assert [entry["update"] for entry in record.updates] == [1, 2]
    assert record.restarts == 1


def test_figures_come_back_to_the_last_bit(tmp_path: Path) -> None:
    journal, value = Journal(outbox(tmp_path)), 0.1 + 0.2
    journal.write(1, {"critic": value})
    assert journal.record().updates[0]["critic"] == value


def test_a_journal_knows_at_its_start_what_earlier_ones_wrote(tmp_path: Path) -> None:
    Journal(outbox(tmp_path)).start(0, refused=[])
    second = Journal(outbox(tmp_path))
    assert len(second.known.starts) == 1
    second.start(0, refused=[])
    assert all((tmp_path / UPDATES).read_text().splitlines()), "an empty line stops strict readers"


def test_an_outbox_uploads_what_changed_and_at_its_end_everything(bucket: str) -> None:
    remote = Folder(f"s3://{bucket}/run")
    box = FolderSync(remote)
    (box.local / UPDATES).write_text("one")
    box.send()
    (box.local / "samples").mkdir()
    (box.local / "samples" / "b").write_text("b")
    (box.local / UPDATES).write_text("one two")
    box.close()
    assert (remote.read(UPDATES), remote.read("samples/b")) == (b"one two", b"b")
    assert not box.local.exists()


@pytest.mark.slow
def test_a_journal_on_s3_goes_on_in_what_an_earlier_start_uploaded(bucket: str) -> None:
    for start in (0, 1):
        box = FolderSync(Folder(f"s3://{bucket}/run"))
        journal = Journal(box)
        journal.start(start, refused=[])
        journal.write(start + 1, FIGURES)
        journal.close()
        box.close()
    record = read_journal(Folder(f"s3://{bucket}/run").read(UPDATES).decode().splitlines())
    assert ([entry["update"] for entry in record.updates], record.restarts) == ([1, 2], 1)
