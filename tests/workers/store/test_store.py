"""What every store promises. A new kind of store joins the suite through the fixture ``store``."""

from __future__ import annotations

import errno
import fcntl
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ringworld_workers.store.base import Conflict, NotFound, Store, StoreError
from ringworld_workers.store.file_store import FileStore
from ringworld_workers.store.opening import open_store
from ringworld_workers.store.retry import Patience


@pytest.fixture(params=["file", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "file":
        return open_store(f"file://{tmp_path}/store")
    return open_store(request.getfixturevalue("s3_url"))


def keys(store: Store, prefix: str = "") -> list[str]:
    return [info.key for info in store.list(prefix)]


def test_an_object_comes_back(store: Store) -> None:
    store.put("a/b.bin", [b"one", memoryview(b"two"), bytearray(b"three"), b""])
    assert store.get("a/b.bin") == b"onetwothree"
    assert [(info.key, info.size) for info in store.list()] == [("a/b.bin", 11)]
    store.put("a/b.bin", [b"new"])
    assert store.get("a/b.bin") == b"new"


def read(store: Store, key: str, offset: int, length: int) -> bytes:
    data = bytearray(length)
    store.read_into(key, offset, [memoryview(data)])
    return bytes(data)


def test_ranges(store: Store) -> None:
    store.put("x", [bytes(range(100))])
    assert read(store, "x", 10, 5) == bytes(range(10, 15))
    assert read(store, "x", 0, 100) == bytes(range(100))
    assert read(store, "x", 100, 0) == b""
    with pytest.raises(StoreError, match="x.*100 bytes.*truncated") as caught:
        read(store, "x", 90, 11)
    assert not caught.value.transient


def test_absent_objects_are_named(store: Store) -> None:
    for action in (
        lambda: store.get("no/such"),
        lambda: store.get_with_etag("no/such"),
        lambda: read(store, "no/such", 0, 1),
    ):
        with pytest.raises(NotFound, match="no/such: there is no such object"):
            action()
    store.delete("no/such")
    store.delete_prefix("no")
    assert store.list("no") == [] == store.list()
    assert store.remove_unfinished() == 0


def test_folders_are_named_without_what_they_hold(store: Store) -> None:
    before = time.time()
    for key in ("run/step-1/a", "run/step-1/deep/b", "run/step-10/a", "run/file", "other"):
        store.put(key, [b"."])
    assert list(store.folders()) == ["run"]
    assert list(store.folders("run")) == ["step-1", "step-10"]
    assert list(store.folders("run/step-10")) == list(store.folders("absent")) == []
    # A store tells whole seconds, and its clock is not ours.
    assert all(abs(info.modified - before) < 60 for info in store.list())


def test_a_prefix_is_a_folder(store: Store) -> None:
    for key in ("run/step-1/a", "run/step-1/deep/b", "run/step-10/a", "other"):
        store.put(key, [b"."])
    assert keys(store, "run/step-1") == ["run/step-1/a", "run/step-1/deep/b"]
    assert keys(store, "run/step-1/") == ["run/step-1/a", "run/step-1/deep/b"]
    assert keys(store) == ["other", "run/step-1/a", "run/step-1/deep/b", "run/step-10/a"]
    store.delete_prefix("run/step-1")
    assert keys(store) == ["other", "run/step-10/a"]
    store.delete("run/step-10/a")
    assert keys(store, "run") == []


@pytest.mark.parametrize(
    "key",
    ["", "/abs", "../x", "a/../../x", "a//b", "a/", ".hidden", "a/.lock", "a/\0"]
    + ["%2e%2e/x", "a/%2E%2E/%2e%2e/x", "a%2fb", "..\\x", "a\\..\\b", "a/\ud800", "a" * 901],
)
def test_keys_cannot_escape(store: Store, key: str) -> None:
    etag = "0"
    for action in (
        lambda: store.put(key, [b"x"]),
        lambda: store.put_if_absent(key, b"x"),
        lambda: store.put_if_match(key, b"x", etag),
        lambda: store.get(key),
        lambda: read(store, key, 0, 0),
        lambda: store.delete(key),
    ):
        with pytest.raises(StoreError, match="not a key"):
            action()
    for action in (store.list, store.folders, store.delete_prefix, store.unfinished):
        if key.strip("/") != "a" and key:
            with pytest.raises(StoreError, match="not a key"):
                action(key)


def test_odd_keys_come_back(store: Store) -> None:
    odd = ["a b/c+d", "a&b=c;d", "grün/日本", "q?x#y", "tilde~(1)'!*", "a:b@c,$", 'quo"te<>']
    for number, key in enumerate(odd):
        store.put(key, [b"%d" % number])
    assert keys(store) == sorted(odd)
    assert [store.get(key) for key in odd] == [b"%d" % number for number in range(len(odd))]
    assert keys(store, "grün") == ["grün/日本"]
    store.delete_prefix("a b")
    for key in odd[1:]:
        store.delete(key)
    assert keys(store) == []


def test_buffers_are_filled_in_order(store: Store) -> None:
    data = bytes(range(256)) * 5000
    store.put("x", [data])
    buffers = [bytearray(length) for length in (1, 0, 300_000, 7, 600_001)]
    store.read_into("x", 5, [memoryview(buffer) for buffer in buffers])
    assert b"".join(buffers) == data[5 : 5 + sum(len(buffer) for buffer in buffers)]
    store.read_into("x", 5, [])
    with pytest.raises(NotFound):
        store.read_into("no/such", 0, [])
    with pytest.raises(StoreError, match="holds 1280000 bytes.*truncated") as caught:
        store.read_into("x", 1_280_000, [memoryview(bytearray(1))])
    assert not caught.value.transient


def test_a_store_travels_between_processes(store: Store) -> None:
    store.put("a", [b"1"])
    travelled = pickle.dumps(store)
    assert pickle.loads(travelled).get("a") == b"1"
    secret = os.environ.get("AWS_SECRET_ACCESS_KEY", "no such").encode()
    assert secret not in travelled


def test_put_if_absent_has_one_winner(store: Store) -> None:
    assert store.put_if_absent("m", b"first")
    assert not store.put_if_absent("m", b"second")
    assert store.get("m") == b"first"
    wins = race(8, lambda number: store.put_if_absent("race/m", b"%d" % number))
    assert sum(wins) == 1
    assert store.get("race/m") == b"%d" % wins.index(True)


def test_put_if_match_loses_no_update(store: Store) -> None:
    etag = store.put_if_match("n", b"0", None)
    with pytest.raises(Conflict):
        store.put_if_match("n", b"0", None)
    with pytest.raises(Conflict, match="n"):
        store.put_if_match("n", b"5", "0123")
    with pytest.raises(Conflict):
        store.put_if_match("absent", b"5", etag)
    assert store.get_with_etag("n") == (b"0", etag)

    def add_one(_: int) -> int:
        tries = 0
        while True:
            tries += 1
            data, etag = store.get_with_etag("n")
            try:
                store.put_if_match("n", b"%d" % (int(data) + 1), etag)
            except Conflict:
                continue
            return tries

    race(8, add_one)
    assert store.get("n") == b"8"
    assert keys(store) == ["n"], "lock files must not show"


def race(number: int, action: Callable[[int], object]) -> list[object]:
    barrier = threading.Barrier(number)
    results: list[object] = [None] * number

    def run(index: int) -> None:
        barrier.wait(10)
        results[index] = action(index)

    threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return results


def test_a_failing_stream_leaves_nothing(store: Store) -> None:
    def chunks() -> Iterator[bytes]:
        yield b"half"
        raise ValueError("the source broke")

    store.put("k", [b"old"])
    for key in ("k", "fresh"):
        with pytest.raises(ValueError, match="the source broke"):
            store.put(key, chunks())
    assert store.get("k") == b"old"
    assert keys(store) == ["k"]
    assert store.remove_unfinished(older_than_seconds=-1) == 0


def test_check_writable(store: Store) -> None:
    store.check_writable()
    assert store.list() == []


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("gs://bucket/run", "no store for gs://"),
        ("/plain/path", "not a store url"),
        ("file://", "no folder is named"),
    ],
)
def test_other_urls_are_refused(url: str, reason: str) -> None:
    with pytest.raises(StoreError, match=reason):
        open_store(url)


def test_the_url_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = open_store("file://runs")
    assert store.url == f"file://{tmp_path}/runs"
    monkeypatch.chdir("/")
    store.put("a", [b"1"])
    assert open_store(store.url).get("a") == b"1"


# What only a file system does.


QUICK = Patience(attempts=4, first_pause_seconds=0.01)


@pytest.fixture
def failing_sync(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, float], None]:
    """Let so many of the system's syncs fail; that is where a disk's errors come out."""
    sync = os.fsync

    def fail(number: int, times: float) -> None:
        left = times

        def broken(descriptor: int) -> None:
            nonlocal left
            left -= 1
            if left >= 0:
                raise OSError(number, os.strerror(number))
            sync(descriptor)

        monkeypatch.setattr(os, "fsync", broken)

    return fail


def test_a_full_disk_is_said_to_be_full(
    tmp_path: Path, failing_sync: Callable[[int, float], None]
) -> None:
    failing_sync(errno.ENOSPC, 1)
    with pytest.raises(StoreError, match="put .*/k: the disk is full; free space") as caught:
        open_store(f"file://{tmp_path}").put("k", [b"x"])
    assert caught.value.transient and caught.value.attempts == 1, "somebody may make room, not soon"
    assert os.listdir(tmp_path) == []


def test_passing_faults_are_said_to_be_passing(
    tmp_path: Path, failing_sync: Callable[[int, float], None]
) -> None:
    failing_sync(errno.EIO, float("inf"))
    with pytest.raises(StoreError, match="trying again may help, tried 4 times") as caught:
        FileStore(tmp_path, patience=QUICK).put("k", [b"x"])
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (copy.operation, copy.transient, str(copy)) == ("put", True, str(caught.value))
    assert (copy.attempts, os.listdir(tmp_path)) == (4, [])


@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_stream_is_written_again_after_a_passing_fault(
    tmp_path: Path, failing_sync: Callable[[int, float], None], times: int
) -> None:
    store = FileStore(tmp_path, patience=QUICK)
    etag = store.put_if_match("held", b"old", None)
    failing_sync(errno.EIO, times)
    store.put("k", iter([b"one", b"two"]))
    assert store.get("k") == b"onetwo"
    # The second sync is of the folder: by then the object is there, and it is this call's.
    failing_sync(errno.EIO, times)
    assert store.put_if_absent("new", b"x")
    failing_sync(errno.EIO, times)
    store.put_if_match("held", b"new", etag)
    assert store.get("held") == b"new"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock-held", "held", "k", "new"]


def test_what_breaks_in_the_source_is_not_the_stores(tmp_path: Path) -> None:
    def chunks() -> Iterator[bytes]:
        yield b"x"
        raise OSError(errno.EIO, "the source's own")

    with pytest.raises(OSError, match="the source's own"):
        FileStore(tmp_path, patience=QUICK).put("k", chunks())
    assert os.listdir(tmp_path) == []


def test_nobody_else_may_read(tmp_path: Path) -> None:
    store = open_store(f"file://{tmp_path}/store")
    before = os.umask(0)
    try:
        store.put("a/b/c", [b"x"])
        store.put_if_match("a/n", b"x", None)
        store.put_if_match("a/n", b"y", store.get_with_etag("a/n")[1])
    finally:
        os.umask(before)
    modes = {path: path.stat().st_mode & 0o777 for path in (tmp_path / "store").rglob("*")}
    assert {mode for path, mode in modes.items() if path.is_dir()} == {0o700}
    assert {mode for path, mode in modes.items() if path.is_file()} == {0o600}
    assert (tmp_path / "store").stat().st_mode & 0o777 == 0o700


def test_what_no_key_can_name_is_not_listed(tmp_path: Path) -> None:
    """Such as the snapshots that some file servers keep in every folder."""
    store = open_store(f"file://{tmp_path}")
    store.put("a/b", [b"x"])
    for name in (".snapshot/a/b", "a/50%", "a/.b"):
        place = tmp_path / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.touch()
    assert [info.key for info in store.list()] == ["a/b"]


def test_a_lock_that_is_never_freed_ends_the_call(tmp_path: Path) -> None:
    quick = Patience(attempts=1, reply_seconds=0.2)
    store = FileStore(tmp_path, patience=quick)
    etag = store.put_if_match("n", b"0", None)
    with (tmp_path / ".lock-n").open("wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(StoreError, match="n: another process holds its lock file"):
            store.put_if_match("n", b"1", etag)
    store.put_if_match("n", b"1", etag)


def test_a_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("x")
    store = open_store(f"file://{tmp_path}/taken")
    with pytest.raises(StoreError, match="taken"):
        store.check_writable()


def test_no_permission_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    # Root, as which tests often run, may write anywhere.
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(StoreError, match="check_writable .*: no permission; give") as caught:
        open_store(f"file://{tmp_path}").check_writable()
    assert not caught.value.transient


KILLED = """
import sys, time
from ringworld_workers.store.opening import open_store
from ringworld_workers.store.retry import Patience

def chunks():
    yield b"x" * 100_000
    print("half", flush=True)
    sys.stdin.read()
    yield b"y"

open_store(sys.argv[1]).put("00-a/step-00000001/rank-00000.bin", chunks())
"""


def test_a_killed_writer_leaves_nothing_visible(tmp_path: Path) -> None:
    url = f"file://{tmp_path}"
    writer = subprocess.Popen(
        [sys.executable, "-c", KILLED, url], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert writer.stdout is not None and writer.stdin is not None
    with writer:
        assert writer.stdout.readline() == b"half\n"
        writer.send_signal(signal.SIGKILL)
        assert writer.wait(10) == -signal.SIGKILL
    store = open_store(url)
    assert store.list() == []
    with pytest.raises(NotFound):
        store.get("00-a/step-00000001/rank-00000.bin")
    assert store.remove_unfinished() == 0, "it may belong to a writer that is alive"
    assert store.remove_unfinished(older_than_seconds=0) == 1
    assert os.listdir(tmp_path) == []


def test_the_store_needs_no_torch() -> None:
    program = (
        "import sys, ringworld_workers.store.opening, ringworld_workers.checkpoint.catalog\n"
        "print('torch' in sys.modules)"
    )
    said = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert said.stdout.strip() == "False"


def test_the_folders_of_a_new_object_survive_a_power_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []
    sync = os.fsync

    def note(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    FileStore(tmp_path / "runs").put("00-a/step-1/rank-0.bin", [b"abc"])
    wanted = [tmp_path, tmp_path / "runs", tmp_path / "runs/00-a", tmp_path / "runs/00-a/step-1"]
    assert set(wanted) <= set(synced)
    synced.clear()
    FileStore(tmp_path / "runs").put("00-a/step-1/rank-1.bin", [b"abc"])
    assert wanted[0] not in synced
