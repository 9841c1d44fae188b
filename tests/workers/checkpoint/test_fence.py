"""Two gangs on one run: one writes, the other says so. On files and on a real S3 server."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ringworld_workers.checkpoint.fence import WRITER, Fence, TakenOver, read_writer
from ringworld_workers.checkpoint.layout import CheckpointError
from ringworld_workers.store.base import Store
from ringworld_workers.store.opening import open_store


@pytest.fixture(params=["file", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    url = request.getfixturevalue("s3_url") if request.param == "s3" else f"file://{tmp_path}"
    return open_store(url)


def fence(store: Store, attempt: int = 1, stage_index: int = 0, uid: str = "one") -> Fence:
    return Fence(store, run_uid=uid, attempt=attempt, stage_index=stage_index)


def test_a_later_attempt_takes_over(store: Store) -> None:
    first, second = fence(store), fence(store, attempt=2)
    assert read_writer(store) is None
    first.take()
    first.take()
    first.check()
    second.take()
    second.check()
    with pytest.raises(TakenOver, match=r"attempt 2 on \S+, since .* has taken over .* attempt 1;"):
        first.check()
    with pytest.raises(TakenOver, match="attempt 2 on .*; stop this one"):
        fence(store).take()
    # Also once the later one has ended.
    second.release()
    with pytest.raises(TakenOver, match="attempt 2 on .*; stop this one"):
        fence(store).take()
    first.release()
    found = read_writer(store)
    assert found is not None and found.token == second.record.token and found.ended


def test_of_one_attempt_one_gang_writes(store: Store) -> None:
    first, twin = fence(store), fence(store)
    first.take()
    with pytest.raises(TakenOver, match="another gang of that attempt; stop one of the two"):
        twin.take()
    first.check()
    first.release()
    twin.take()
    # The next stage's gang follows within the attempt, also where the one before was killed.
    fence(store, stage_index=1).take()
    with pytest.raises(TakenOver):
        twin.check()
    with pytest.raises(TakenOver):
        fence(store).take()


def test_another_run_of_that_name_is_refused(store: Store) -> None:
    fence(store).take()
    with pytest.raises(TakenOver, match="another run of this name .*give the job another name"):
        fence(store, attempt=9, uid="two").take()
    fence(store, attempt=2, uid="").take()


def test_a_record_that_was_removed_is_written_again(store: Store) -> None:
    first = fence(store)
    first.take()
    store.delete(WRITER)
    first.check()
    assert read_writer(store) == first.record


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", json.dumps({"token": 1}).encode()])
def test_a_damaged_record_is_named(tmp_path: Path, data: bytes) -> None:
    store = open_store(f"file://{tmp_path}")
    (tmp_path / WRITER).write_bytes(data)
    for action in (fence(store).take, fence(store).check):
        with pytest.raises(CheckpointError, match=r"writer.json does not say who writes"):
            action()
    fence(store).release()  # never raises
    assert (tmp_path / WRITER).read_bytes() == data


def test_of_many_at_once_one_wins(store: Store) -> None:
    fences = [fence(store) for _ in range(6)]
    outcomes: list[Any] = []
    ready = threading.Barrier(len(fences))

    def run(action: Callable[[], None]) -> None:
        ready.wait(30)
        try:
            action()
            outcomes.append(None)
        except TakenOver as error:
            outcomes.append(error)

    threads = [threading.Thread(target=run, args=(one.take,)) for one in fences]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(outcomes) == 6 and outcomes.count(None) == 1
