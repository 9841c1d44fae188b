"""Work ahead of the step: bounded, in order, its errors where they belong, and closed cleanly."""

from __future__ import annotations

import threading

import pytest

from ringworld_workers.data.prefetch import Prefetcher

WAIT_SECONDS = 20.0


def test_items_come_in_order_and_no_more_than_a_few_ahead() -> None:
    made: list[int] = []
    reached = {number: threading.Event() for number in range(10)}

    def make(item: int) -> int:
        made.append(item)
        reached[item].set()
        return item * item

    with Prefetcher(make, range(3, 10), ahead=2) as ahead:
        # Two wait, and the third is in the thread's hands.
        assert reached[5].wait(WAIT_SECONDS)
        assert made == [3, 4, 5]
        for item in range(3, 10):
            assert ahead.take(item) == item * item
            assert item + 3 not in reached or reached[item + 3].wait(WAIT_SECONDS)
            assert max(made) <= item + 3
    assert made == list(range(3, 10))


def test_an_error_comes_out_at_its_own_item() -> None:
    def make(item: int) -> int:
        if item == 2:
            raise OSError("the disk is gone")
        return item

    with Prefetcher(make, range(5), ahead=4) as ahead:
        assert [ahead.take(0), ahead.take(1)] == [0, 1]
        with pytest.raises(OSError, match="the disk is gone"):
            ahead.take(2)
        with pytest.raises(OSError, match="the disk is gone"):
            ahead.take(3)
    with Prefetcher(make, range(2)) as ahead:
        with pytest.raises(ValueError, match="item 1 was asked for, and 0 comes next"):
            ahead.take(1)


def test_closing_ends_the_thread_whatever_it_does() -> None:
    going, may_go = threading.Event(), threading.Event()

    def make(item: int) -> int:
        if item == 4:
            going.set()
            may_go.wait(WAIT_SECONDS)
        return item

    full = Prefetcher(make, range(4))
    full.close()
    busy = Prefetcher(make, range(4, 100))
    assert going.wait(WAIT_SECONDS)
    may_go.set()
    busy.close()
    for thread in threading.enumerate():
        assert thread.name != "rows"
