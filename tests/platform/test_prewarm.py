"""When the next stage's nodes are asked for, and how many."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringworld_platform.prewarm import (
    FIRST_GUESS_SECONDS,
    LONGEST_SECONDS,
    MARGIN_SECONDS,
    NOTHING,
    STARTS_SEEN,
    Coming,
    StagePace,
    StartTimes,
    plan_request,
)
from ringworld_platform.room import Bundle, Places, Room
from ringworld_platform.scheduler import Holding

CPU, GPU = Bundle(1), Bundle(8, 1)


def coming(run_id: str, *sizes: int, left: float = 5.0, at: float = 0.0, **more: Bundle) -> Coming:
    bundle = more.get("bundle", CPU)
    return Coming(run_id, (0, at, run_id), sizes, bundle, left, lead_seconds=10.0)


def holds(run_id: str, places: Places, bundle: Bundle = CPU) -> Holding:
    return Holding(run_id, 0, 0.0, bundle, places)


def by_run(*holdings: Holding) -> dict[str, Holding]:
    return {holding.run_id: holding for holding in holdings}


def small(number: int, name: str = "new") -> dict[str, Room]:
    return {f"{name}{n}": Room(1) for n in range(number)}


@pytest.mark.parametrize(
    ("left", "due"), [(10.1, False), (10.0, True), (0.0, True), (-10.0, True), (-10.1, False)]
)
def test_nodes_are_asked_for_so_long_before_and_held_no_longer_after(
    left: float, due: bool
) -> None:
    held = by_run(holds("a", {"n0": 1}))
    request = plan_request([coming("a", 2, left=left)], held, small(1, "n"), small(3))
    assert bool(request.bundles) == due
    if due:
        assert (request.bundles, request.runs, request.new_nodes) == ({CPU: 2}, {"a": 2}, 1)


def test_an_estimate_that_moves_does_not_call_back_nodes() -> None:
    asked = replace(coming("a", 2, left=15.0), asked=True)
    assert asked.due and not replace(asked, asked=False).due
    assert not replace(asked, left_seconds=20.1).due


def test_one_request_holds_what_the_others_have_and_what_comes() -> None:
    nodes = {"n0": Room(1), "n1": Room(1), "big": Room(64, 8)}
    held = by_run(holds("a", {"n0": 1}), holds("b", {"n1": 1}), holds("c", {"big": 3}, GPU))
    request = plan_request([coming("a", 3), coming("b", 2, left=99)], held, nodes, small(4))
    assert request.bundles == {CPU: 4, GPU: 3}
    # 40 CPUs of the GPU node are nobody's, and the request may be met by them.
    assert (request.runs, request.new_nodes) == ({"a": 3}, 0)


def test_what_no_node_can_hold_is_left_out_and_a_smaller_mesh_tried() -> None:
    held = by_run(holds("a", {"n0": 1}), holds("b", {"n1": 1}))
    nodes = small(2, "n")
    both = [coming("a", 4, 2, at=1), coming("b", 3, at=2)]
    request = plan_request(both, held, nodes, small(1))
    assert (request.bundles, request.runs, request.new_nodes) == ({CPU: 3}, {"a": 2}, 1)
    assert plan_request([coming("a", 4)], held, nodes, small(1)) == NOTHING
    assert plan_request([coming("a", 4)], held, nodes, None).runs == {"a": 4}, "the limits unknown"


def test_the_first_in_the_line_is_served_first() -> None:
    held = by_run(holds("a", {"n0": 1}), holds("b", {"n1": 1}))
    both = [coming("b", 2, at=2), coming("a", 2, at=1)]
    assert plan_request(both, held, small(2, "n"), small(1)).runs == {"a": 2}
    assert plan_request(both, held, small(2, "n"), small(2)).runs == {"a": 2, "b": 2}


@given(
    st.lists(st.tuples(st.integers(1, 6), st.integers(0, 3)), max_size=6),
    st.integers(0, 8),
    st.integers(0, 8),
)
def test_a_request_is_never_larger_than_what_there_may_be(
    runs: list[tuple[int, int]], there: int, may_come: int
) -> None:
    nodes, comings = small(there, "n"), []
    held: dict[str, Holding] = {}
    free = list(nodes)
    for number, (size, has) in enumerate(runs):
        run_id = f"r{number}"
        places = {free.pop(): 1 for _ in range(min(has, len(free)))}
        if places:
            held[run_id] = holds(run_id, places)
        if size > len(places):
            comings.append(coming(run_id, size))
    request = plan_request(comings, held, nodes, small(may_come))
    assert sum(request.bundles.values()) <= there + may_come
    assert request.new_nodes is not None and request.new_nodes <= may_come


def test_the_lead_is_the_longest_of_the_last_starts() -> None:
    starts = StartTimes()
    assert starts.expected_seconds == FIRST_GUESS_SECONDS + MARGIN_SECONDS
    starts.add(400.0)
    for seconds in range(STARTS_SEEN):
        starts.add(10.0 + seconds)
    assert starts.expected_seconds == 10.0 + STARTS_SEEN - 1 + MARGIN_SECONDS
    starts.add(1e6)
    assert starts.expected_seconds == LONGEST_SECONDS + MARGIN_SECONDS


def test_the_end_of_a_stage_is_reckoned_from_the_steps_that_were_seen() -> None:
    pace = StagePace()
    pace.see("first", 0, 100.0)
    pace.see("first", 1, 130.0)
    assert pace.end(10) is None, "the first step warms up"
    pace.see("first", 2, 132.0)
    pace.see("first", 2, 133.0)
    pace.see("first", 4, 136.0)
    assert pace.end(10) == 136.0 + 6 * 2.0
    pace.see("second", 4, 137.0)
    assert pace.end(10) is None
