"""Run folders on local disk and on S3: the same laws, and what a failing storage may and may not do."""

from __future__ import annotations

import errno
import logging
import pickle
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from diagonal.errors import FieldError
from diagonal.storage import Folder, StorageError, s3
from diagonal.storage.disk import PART_BYTES
from tests.s3 import ACCESS_KEY, SECRET_KEY, FaultyProxy, S3Server

MANY = 1_100  # more keys than a page of a listing holds


@pytest.fixture(params=["local", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    """An empty folder: on disk, or on S3."""
    if request.param == "local":
        return Folder(str(tmp_path / "runs" / "r1"))
    return Folder(f"s3://{request.getfixturevalue('bucket')}/runs/r1", patience_s=10)


@pytest.fixture
def remote(bucket: str, faulty_s3: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> Folder:
    """An empty folder on S3 behind the faulty proxy, impatient; the S3 client tries nothing again by itself."""
    monkeypatch.setattr(s3, "ATTEMPTS_A_REQUEST", 1)
    return Folder(f"s3://{bucket}/runs/r1", patience_s=4)


def local_files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# What holds on both


def test_what_is_written_is_read_and_listed(folder: Folder) -> None:
    assert not folder.exists() and folder.children() == [] and folder.files() == {} and not folder.has("a")
    folder.write("a", b"one")
    folder.write("deep/er/b", b"")
    assert folder.read("a") == b"one" and folder.read("deep/er/b") == b""
    assert folder.exists() and folder.has("a") and not folder.has("deep") and not folder.has("no")
    assert folder.children() == ["a", "deep"]
    assert folder.files() == {"a": 3, "deep/er/b": 0}
    assert (folder / "deep").files() == {"er/b": 0} and (folder / "deep").parent == folder
    folder.write("a", b"two!")
    assert folder.read("a") == b"two!" and folder.files()["a"] == 4


def test_json_is_read_as_it_was_written_and_refused_by_name(folder: Folder) -> None:
    folder.write_json("x.json", {"b": [1, 2.5, None], "a": "ü"})
    assert folder.read_json("x.json") == {"a": "ü", "b": [1, 2.5, None]}
    folder.write("bad.json", b"{")
    with pytest.raises(FieldError, match=r"r1/bad.json'.*JSON \(Expecting"):
        folder.read_json("bad.json")
    with pytest.raises(FieldError, match=r"r1/none.json'.*a file that exists"):
        folder.read_json("none.json")


def test_a_missing_file_is_refused_by_name_and_leaves_no_file(folder: Folder, tmp_path: Path) -> None:
    with pytest.raises(FieldError, match="r1/none': allowed is a file that exists"):
        folder.read("none")
    with pytest.raises(FieldError, match="r1/none': allowed is a file that exists"):
        folder.open("none")
    with pytest.raises(FieldError, match="r1/none': allowed is a file that exists"):
        folder.get("none", tmp_path / "got" / "x")
    assert local_files(tmp_path / "got") == []


def test_files_above_the_part_size_come_back_bit_for_bit(folder: Folder, tmp_path: Path) -> None:
    data = bytes(range(256)) * (PART_BYTES // 256) * 2 + b"the end"
    (tmp_path / "big").write_bytes(data)
    folder.put(tmp_path / "big", "deep/big")
    folder.get("deep/big", tmp_path / "new" / "big")
    assert (tmp_path / "new" / "big").read_bytes() == data == folder.read("deep/big")
    assert folder.files() == {"deep/big": len(data)}


def test_putting_a_file_that_is_not_there_raises_at_once(folder: Folder, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        folder.put(tmp_path / "nothing", "a")
    assert folder.files() == {}


def test_removing_ends_what_is_named_alone(folder: Folder) -> None:
    for name in ("a", "b", "sub/c"):
        folder.write(name, b"1")
    folder.remove("a")
    folder.remove("never-there")
    assert folder.files() == {"b": 1, "sub/c": 1}
    beside = folder.parent / "r10"
    beside.write("a", b"1")
    folder.delete()
    folder.delete()
    assert not folder.exists() and folder.files() == {} and beside.files() == {"a": 1}


@pytest.mark.slow
def test_more_keys_than_a_page_are_listed_and_deleted(folder: Folder, s3_server: S3Server) -> None:
    names = [f"shards/{number:05d}" for number in range(MANY)]
    if folder.is_local:
        (folder.path / "shards").mkdir(parents=True)
        for name in names:
            (folder.path / name).write_bytes(b"1")
    else:
        bucket, _, prefix = folder.uri.removeprefix("s3://").partition("/")
        client = s3_server.client()
        for name in names:
            client.put_object(Bucket=bucket, Key=f"{prefix}/{name}", Body=b"1")
    assert (folder / "shards").children() == [name.removeprefix("shards/") for name in names]
    assert folder.files() == dict.fromkeys(names, 1)
    folder.delete()
    assert folder.files() == {} and not folder.exists()


def test_a_replaced_folder_holds_the_new_files_alone(folder: Folder) -> None:
    for version, other in ((b"1", "old"), (b"22", "new")):
        with folder.replaced("last.json") as new:
            (new / "sub").mkdir()
            (new / "sub" / "a").write_bytes(version)
            (new / other).write_bytes(version)
            (new / "last.json").write_bytes(version)
    assert folder.files() == {"sub/a": 2, "new": 2, "last.json": 2}
    assert folder.parent.children() == ["r1"]


def test_a_replacement_that_fails_leaves_the_old_folder(folder: Folder) -> None:
    folder.write("last", b"old")
    with pytest.raises(RuntimeError, match="on the way"), folder.replaced("last") as new:
        (new / "last").write_bytes(b"new")
        raise RuntimeError("on the way")
    with pytest.raises(FieldError, match="'last': allowed is a file that the block wrote"), folder.replaced("last"):
        pass
    assert folder.files() == {"last": 3} and folder.read("last") == b"old"
    assert folder.parent.children() == ["r1"]


def test_a_probe_of_a_writable_folder_leaves_nothing(folder: Folder) -> None:
    folder.check_writable()
    assert folder.files() == {} and folder.children() == []


@pytest.mark.slow
def test_a_folder_is_sent_to_other_processes_without_its_client(folder: Folder) -> None:
    folder.write("a", b"1")
    sent = pickle.dumps(folder)
    assert SECRET_KEY.encode() not in sent and ACCESS_KEY.encode() not in sent
    assert pickle.loads(sent) == folder and pickle.loads(sent).read("a") == b"1"
    assert pickle.loads(sent).patience_s == folder.patience_s


def test_uris_are_checked_and_one_folder_has_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Folder("runs/x/").uri == str(tmp_path / "runs" / "x") and Folder("runs").is_local
    assert (Folder("/") / "a").uri == "/a" and Folder("/a").parent.uri == "/" and Folder("/a").name == "a"
    assert Folder("s3://b/x/").uri == "s3://b/x" and Folder("s3://b/x").parent.uri == "s3://b"
    assert (Folder("s3://b") / "x").uri == "s3://b/x" and not Folder("s3://b").is_local
    for uri in ("gs://b/x", "http://b", "s3://", "s3://b/x?region=us-east-1"):
        with pytest.raises(FieldError, match="storage = "):
            Folder(uri)
    with pytest.raises(FieldError, match="below a bucket"):
        _ = Folder("s3://b").parent
    with pytest.raises(FieldError, match="a local folder"):
        _ = Folder("s3://b/x").path
    with pytest.raises(FieldError, match="credentials come from") as refused:
        Folder("s3://key:hidden@b/x")
    assert "hidden" not in str(refused.value)


# Local disks


@contextmanager
def largest_file(size_bytes: int) -> Iterator[None]:
    """Files of this process may not grow above `size_bytes`: a full disk, as a write sees it."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_an_error_at_once_and_keeps_the_old_file(tmp_path: Path) -> None:
    folder, big = Folder(str(tmp_path / "r")), b"x" * 100_000
    folder.write("a", b"old")
    (tmp_path / "source").write_bytes(big)
    with largest_file(50_000):
        for write in (lambda: folder.write("a", big), lambda: folder.put(tmp_path / "source", "a")):
            with pytest.raises(OSError) as full:
                write()
            assert full.value.errno == errno.EFBIG
    assert folder.read("a") == b"old" and local_files(folder.path) == ["a"]


def test_a_full_disk_ends_a_download_at_once(remote: Folder, faulty_s3: FaultyProxy, tmp_path: Path) -> None:
    remote.write("a", b"x" * 100_000)
    with largest_file(50_000), pytest.raises(OSError) as full:
        remote.get("a", tmp_path / "got" / "a")
    assert full.value.errno == errno.EFBIG, "the system's own error, not one of a store that was asked again"
    assert faulty_s3.count("GET", "a") == 1 and local_files(tmp_path / "got") == []


def test_a_write_that_was_killed_is_not_listed(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path / "r"))
    folder.write("a", b"1")
    code = (
        "import os, pathlib, signal\n"
        "from diagonal import storage\n"
        "os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"storage.Folder({folder.uri!r}).write('a', b'22')\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], timeout=60)
    assert ended.returncode == -signal.SIGKILL and len(local_files(folder.path)) == 2, "killed in the middle"
    assert folder.files() == {"a": 1} and folder.children() == ["a"] and folder.read("a") == b"1"


def test_a_folder_that_cannot_be_written_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FieldError, match="storage = .*file/r': allowed is a folder that can be written"):
        Folder(str(tmp_path / "file" / "r")).check_writable()


# S3 that fails


def test_large_files_go_up_in_parts_and_come_down_in_ranges(
    remote: Folder, faulty_s3: FaultyProxy, tmp_path: Path
) -> None:
    (tmp_path / "big").write_bytes(bytes(3 * PART_BYTES))
    remote.put(tmp_path / "big", "big")
    assert faulty_s3.count("POST", query="uploads") == 1 and faulty_s3.count("PUT", query="partNumber") == 3
    remote.get("big", tmp_path / "got")
    assert faulty_s3.count("GET", "/big") == 4
    remote.write("small", b"1")
    assert faulty_s3.count("POST", "small") == 0 and faulty_s3.count("PUT", "small") == 1


@pytest.mark.slow
def test_a_file_that_is_written_again_and_again_is_read_in_one_version(remote: Folder, faulty_s3: FaultyProxy) -> None:
    """A journal is read while its run goes on; a large file that changes in the middle of a read is refused."""
    ended = threading.Event()

    def write() -> None:
        while not ended.is_set():
            for letter in (b"a", b"b" * 5):
                remote.write("journal", letter * 1000)

    remote.write("journal", b"a" * 1000)
    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(30):
            assert remote.read("journal") in (b"a" * 1000, b"b" * 5000)
    finally:
        ended.set()
        writer.join(20)
    remote.write("large", b"a" * (2 * PART_BYTES))
    with pytest.raises(StorageError, match="could not read .*PreconditionFailed"):
        for _ in remote._parts("large"):
            remote.write("large", b"b" * (2 * PART_BYTES))


@pytest.mark.slow
def test_an_outage_shorter_than_patience_is_only_slow(
    remote: Folder, faulty_s3: FaultyProxy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    remote.write("a", b"before")
    ends = faulty_s3.outage_for(2.0)
    with caplog.at_level(logging.WARNING):
        remote.write("a", b"after")
    assert remote.read("a") == b"after"
    assert f"could not write {remote}/a (try 1); goes on for" in caplog.text
    ends.join(10)
    ends = faulty_s3.outage_for(1.0)
    remote.get("a", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"after"
    ends.join(10)


@pytest.mark.slow
def test_an_outage_longer_than_patience_names_what_where_and_how_long(
    remote: Folder, faulty_s3: FaultyProxy, tmp_path: Path
) -> None:
    remote.write("a", b"1")
    started_s = time.monotonic()
    with faulty_s3.outage(), pytest.raises(StorageError) as given_up:
        remote.get("a", tmp_path / "got" / "a")
    assert remote.patience_s <= time.monotonic() - started_s < remote.patience_s + 60
    assert str(given_up.value).startswith(f"could not read {remote}/a (")
    assert " tries in " in str(given_up.value) and "Could not connect to the endpoint URL" in str(given_up.value)
    assert local_files(tmp_path / "got") == []
    assert remote.read("a") == b"1", "the same object works when the storage is back"


@pytest.mark.slow
@pytest.mark.parametrize("status", [500, 503])
def test_errors_of_the_server_are_tried_again(remote: Folder, faulty_s3: FaultyProxy, status: int) -> None:
    remote.write("sub/a", b"1")
    for call in (
        lambda: remote.has("sub/a"),
        lambda: remote.read("sub/a"),
        remote.files,
        remote.children,
        lambda: remote.write("sub/b", b"2"),
        lambda: remote.remove("sub/b"),
        remote.delete,
    ):
        faulty_s3.fail(status, "InternalError", times=2)
        before = len(faulty_s3.requests)
        call()
        assert [r.status for r in faulty_s3.requests[before:]].count(status) == 2
    assert remote.files() == {}


@pytest.mark.slow
def test_a_body_cut_short_is_never_taken_for_the_file(remote: Folder, faulty_s3: FaultyProxy, tmp_path: Path) -> None:
    data, impatient = bytes(range(256)) * 1000, Folder(remote.uri, patience_s=0.5)
    remote.write("a", data)
    faulty_s3.truncate(times=2)
    assert remote.read("a") == data and faulty_s3.count("GET", "/a") == 3
    faulty_s3.truncate(times=2)
    remote.get("a", tmp_path / "got" / "a")
    assert (tmp_path / "got" / "a").read_bytes() == data
    faulty_s3.truncate()
    (tmp_path / "got" / "a").write_bytes(b"old")
    with pytest.raises(StorageError, match=r"could not read s3://.*/r1/a \(.*IncompleteRead"):
        impatient.get("a", tmp_path / "got" / "a")
    assert (tmp_path / "got" / "a").read_bytes() == b"old" and local_files(tmp_path / "got") == ["a"]
    with pytest.raises(StorageError, match="could not read s3"):
        impatient.read("a")


@pytest.mark.slow
def test_a_server_that_answers_late_is_waited_for(remote: Folder, faulty_s3: FaultyProxy) -> None:
    faulty_s3.slow(1.0, times=2)
    remote.write("a", b"1")
    assert remote.read("a") == b"1"


@pytest.mark.slow
def test_a_server_that_never_answers_is_given_up(remote: Folder, faulty_s3: FaultyProxy) -> None:
    remote.write("a", b"1")
    faulty_s3.slow(60)
    impatient, started_s = Folder(remote.uri, patience_s=1), time.monotonic()
    with pytest.raises(StorageError, match=f"could not read {remote}/a .*timeout"):
        impatient.read("a")
    assert time.monotonic() - started_s < 45, "before it answered"


@pytest.mark.slow
def test_parts_that_are_lost_do_not_repeat_the_file(
    remote: Folder, faulty_s3: FaultyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "ATTEMPTS_A_REQUEST", 3)
    (tmp_path / "big").write_bytes(bytes(2 * PART_BYTES))
    faulty_s3.fail(503, times=2, method="PUT")
    remote.put(tmp_path / "big", "big")
    assert faulty_s3.count("POST", query="uploads") == 1
    assert remote.files() == {"big": 2 * PART_BYTES}


@pytest.mark.slow
def test_an_upload_that_fails_shows_no_part_of_the_file(remote: Folder, faulty_s3: FaultyProxy, tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(bytes(2 * PART_BYTES))
    faulty_s3.fail(500, "InternalError", method="PUT", key="partNumber=2")
    with pytest.raises(StorageError, match="could not upload s3"):
        Folder(remote.uri, patience_s=1).put(tmp_path / "big", "big")
    assert remote.files() == {} and not remote.has("big")


@pytest.mark.parametrize("code", ["InvalidAccessKeyId", "SignatureDoesNotMatch", "AccessDenied", "ExpiredToken"])
def test_wrong_credentials_are_refused_at_once(remote: Folder, faulty_s3: FaultyProxy, code: str) -> None:
    faulty_s3.fail(403, code)
    for call in (
        lambda: remote.write("a", b"1"),
        lambda: remote.read("a"),
        remote.files,
        remote.delete,
        lambda: remote.has("a"),
    ):
        with pytest.raises(StorageError, match=r"\(1 tries in"):
            call()
    with pytest.raises(FieldError, match=f"storage = '{remote}': allowed is a folder that can be written"):
        remote.check_writable()


def test_a_missing_bucket_is_refused_at_once(bucket: str) -> None:
    with pytest.raises(FieldError, match=r"storage = 's3://no-such-bucket/r'.*\(1 tries in .*bucket does not exist"):
        Folder("s3://no-such-bucket/r").check_writable()


@pytest.mark.slow
def test_a_reader_who_waits_for_the_last_file_never_takes_half_a_folder(remote: Folder, faulty_s3: FaultyProxy) -> None:
    """The upload is broken before each of its requests in turn: the folder is the old one, or is not there."""

    def replace(version: bytes) -> None:
        with remote.replaced("last") as new:
            for name in ("a", "b", "last", version.decode()):
                (new / name).write_bytes(version)

    def seen() -> set[bytes]:
        return {remote.read(name) for name in remote.files()} if remote.has("last") else set()

    replace(b"old")
    for method, key in (
        ("DELETE", "last"),
        ("DELETE", "old"),
        ("PUT", "/a"),
        ("PUT", "r1/b"),
        ("PUT", "/new"),
        ("PUT", "last"),
    ):
        faulty_s3.fail(403, "AccessDenied", method=method, key=f"{key}?")
        with pytest.raises(StorageError):
            replace(b"new")
        faulty_s3.mend()
        assert seen() in ({b"old"}, set()), key
        replace(b"new")
        assert seen() == {b"new"} and sorted(remote.files()) == ["a", "b", "last", "new"]
        replace(b"old")


@pytest.mark.slow
def test_no_message_and_no_log_holds_a_credential(
    remote: Folder, faulty_s3: FaultyProxy, caplog: pytest.LogCaptureFixture
) -> None:
    """Some services repeat the key, or the signature's input, in the text of an error."""
    impatient, said = Folder(remote.uri, patience_s=0.5), ""
    for status in (403, 500):
        faulty_s3.fail(status, "Odd", message=f"{ACCESS_KEY} {SECRET_KEY}")
        with caplog.at_level(logging.DEBUG, "diagonal"), pytest.raises(StorageError) as refused:
            impatient.write("a", b"1")
        faulty_s3.mend()
        error: BaseException | None = refused.value
        while error is not None:
            said, error = f"{said} {error!r} {error}", error.__cause__ or error.__context__
    assert "*** ***" in said and "goes on for" in caplog.text
    for secret in (ACCESS_KEY, SECRET_KEY):
        assert secret not in said and secret not in caplog.text and secret not in repr(impatient)
