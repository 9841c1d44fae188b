"""Who starts, who makes way, who waits: the decision alone, and the line that runners talk to."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ringworld_jobs.spec import JobSpec
from ringworld_platform.capacity import Cluster, NodeRoom
from ringworld_platform.errors import JobTooLarge
from ringworld_platform.fit import refuse_unfit
from ringworld_platform.job_queue import FOREIGN_SECONDS, PLAN_SECONDS, JobQueue
from ringworld_platform.room import Bundle, Places, Room, place
from ringworld_platform.scheduler import LOOK_PAST, Demand, Holding, Plan, decide

CPU = Bundle(1)
GPU = Bundle(8, 1)


def wants(run_id: str, size: int, priority: int = 0, at: float = 0.0, **more: object) -> Demand:
    about = {"bundle": CPU, **more}
    return Demand(run_id, priority, at, size, **about)  # type: ignore[arg-type]


def holds(
    run_id: str, priority: int = 0, at: float = 0.0, *, on: Places, **more: object
) -> Holding:
    about = {"bundle": CPU, **more}
    return Holding(run_id, priority, at, places=on, **about)  # type: ignore[arg-type]


def nodes(*cpus: int) -> dict[str, Room]:
    return {f"n{index}": Room(count) for index, count in enumerate(cpus)}


# --- where a gang goes ---


def test_a_gang_goes_to_one_node_if_one_holds_it_and_the_one_it_fills_best() -> None:
    assert place(3, CPU, nodes(8, 4, 2)) == {"n1": 3}
    assert place(9, CPU, nodes(8, 4, 2)) == {"n0": 8, "n1": 1}
    assert place(15, CPU, nodes(8, 4, 2)) is None
    assert place(2, CPU, nodes(8, 4, 2), {"n0": 2}) == {"n0": 2}, "it stays where it was"
    assert place(2, CPU, nodes(8, 4, 2), {"gone": 2}) == {"n2": 2}


def test_workers_without_gpus_leave_gpu_nodes_to_others() -> None:
    rooms = {"gpus": Room(16, 2), "cpus": Room(20)}
    assert place(4, Bundle(4), rooms) == {"cpus": 4}
    assert place(6, Bundle(4), rooms) == {"cpus": 5, "gpus": 1}
    assert place(3, GPU, rooms) is None, "two GPUs, however many CPUs"


# --- starting ---


def test_the_line_is_by_priority_then_by_submission() -> None:
    line = [wants("late", 2, at=2), wants("early", 2, at=1), wants("high", 2, 5, at=3)]
    plan = decide(nodes(4), line, [])
    assert plan.starts == {"high": {"n0": 2}, "early": {"n0": 2}}
    assert (plan.waits["late"].place, plan.yields) == (3, {})


def test_a_gang_starts_whole_or_not_at_all() -> None:
    plan = decide(nodes(2, 1), [wants("four", 4)], [])
    assert plan.starts == {}
    assert not plan.waits["four"].possible
    assert plan.waits["four"].reason == (
        "needs 4 CPU bundles of 1 CPU; the largest node has 2 CPUs; all nodes together hold 3, so "
        "that it will never start on these: add nodes, or shrink the stage's mesh or "
        "resources.cpus_per_worker"
    )


def test_a_run_that_can_never_start_stands_in_nobodys_way() -> None:
    plan = decide(nodes(4), [wants("huge", 5, 9), wants("small", 4)], [])
    assert plan.starts == {"small": {"n0": 4}}


def test_what_is_missing_is_said() -> None:
    rooms = {"a": Room(64, 8), "b": Room(64, 8)}
    line = [wants("lwm-2", 16, at=1, bundle=GPU), wants("lwm-3", 8, at=2, bundle=GPU)]
    held = [holds("lwm-1", bundle=GPU, on={"a": 8, "b": 5})]
    plan = decide(rooms, line, held)
    assert plan.waits["lwm-2"].reason == (
        "needs 16 GPU bundles of 8 CPUs; the largest node has 8 GPUs; 3 of 16 are free"
    )
    assert plan.waits["lwm-3"].reason == (
        "needs 8 GPU bundles of 8 CPUs; the largest node has 8 GPUs; 3 of 16 are free; behind lwm-2"
    )


def test_what_is_missing_may_be_cpus_beside_the_gpus_or_a_larger_kind_of_node() -> None:
    poor = decide({"a": Room(4, 8)}, [wants("one", 1, bundle=GPU)], [])
    none = decide({"a": Room(16)}, [wants("one", 1, bundle=GPU)], [])
    more = {"big 1": Room(64, 8)}
    grows = decide({"a": Room(16)}, [wants("many", 16, bundle=GPU)], [], more)

    few = "needs 1 GPU bundle of 8 CPUs; the largest node has 8 GPUs and 4 CPUs; all nodes"
    assert poor.waits["one"].reason.startswith(few)
    assert "the largest node has 0 GPUs; all nodes together hold 0" in none.waits["one"].reason
    assert "the largest node type has 8 GPUs; all nodes" in grows.waits["many"].reason


# --- letting others past ---


def test_a_smaller_run_does_not_pass_one_that_it_would_delay() -> None:
    held = [holds("now", on={"n0": 2})]
    plan = decide(nodes(4), [wants("big", 4, at=1), wants("small", 2, at=2)], held)
    assert plan.starts == {}
    assert "behind big" in plan.waits["small"].reason


def test_a_run_passes_on_what_the_one_ahead_cannot_use() -> None:
    rooms = {"gpus": Room(16, 2), "cpus": Room(4)}
    held = [holds("now", bundle=GPU, on={"gpus": 1})]
    line = [wants("big", 2, at=1, bundle=GPU), wants("small", 4, at=2)]
    plan = decide(rooms, line, held)
    assert plan.starts == {"small": {"cpus": 4}}
    assert not decide(rooms, [line[0], wants("wide", 5, at=2)], held).starts, "a GPU's CPUs"


def test_those_let_past_are_reckoned_with_together() -> None:
    held = [holds("now", on={"n0": 4})]
    line = [wants("big", 6, at=1), *(wants(f"s{n}", 1, at=2 + n) for n in range(4))]
    plan = decide(nodes(4, 4), line, held)
    assert sorted(plan.starts) == ["s0", "s1"], "six of eight stay for the one ahead"
    later = [*held, holds("s0", at=2, on={"n1": 1}), holds("s1", at=3, on={"n1": 1})]
    assert not decide(nodes(4, 4), [line[0], *line[3:]], later).starts, "nor one by one"


def test_only_so_many_are_looked_at_behind_one_that_waits() -> None:
    rooms = {"gpus": Room(8, 1), "cpus": Room(1000)}
    held = [holds("now", bundle=GPU, on={"gpus": 1})]
    line = [wants("big", 1, at=1, bundle=GPU), *(wants(f"s{n}", 1, at=2 + n) for n in range(99))]
    assert len(decide(rooms, line, held).starts) == LOOK_PAST


def test_the_room_between_two_gangs_of_a_run_is_kept() -> None:
    between = wants("first", 3, at=1, ready=False, places={"n0": 3})
    plan = decide(nodes(4), [between, wants("next", 2, at=2), wants("one", 1, at=3)], [])
    assert plan.starts == {"one": {"n0": 1}}, "next waits for first alone"
    high = decide(nodes(4), [between, wants("high", 2, 1, at=2)], [])
    assert "high" in high.starts, "it is kept from those behind only"


# --- making way ---


def test_the_last_in_the_lines_order_makes_way_and_no_more_than_it_takes() -> None:
    held = [
        holds("old", at=1, on={"n0": 2}),
        holds("young", at=2, on={"n0": 2}),
        holds("better", 1, at=3, on={"n1": 4}),
    ]
    assert decide(nodes(4, 4), [wants("high", 2, 5)], held).yields == {"young": "high"}
    assert decide(nodes(4, 4), [wants("high", 4, 5)], held).yields == {
        "young": "high",
        "old": "high",
    }


def test_one_whose_end_is_of_no_help_goes_on() -> None:
    rooms = {"gpus": Room(16, 2), "cpus": Room(8)}
    held = [
        holds("trains", at=1, bundle=GPU, on={"gpus": 2}),
        holds("prepares", at=2, on={"cpus": 8}),
    ]
    plan = decide(rooms, [wants("high", 2, 5, bundle=GPU)], held)
    assert plan.yields == {"trains": "high"}


@pytest.mark.parametrize("priority", [0, 1])
def test_nobody_makes_way_for_an_equal_or_lower_one(priority: int) -> None:
    plan = decide(nodes(4), [wants("asks", 4, priority, at=2)], [holds("has", 1, on={"n0": 1})])
    assert (plan.yields, plan.starts) == ({}, {})


def test_nobody_makes_way_where_it_would_not_help() -> None:
    held = [holds("low", on={"n0": 2}), holds("equal", 5, on={"n0": 2})]
    assert decide(nodes(4), [wants("high", 3, 5, at=9)], held).yields == {}
    assert decide(nodes(4), [wants("huge", 5, 9)], held).yields == {}


def test_a_run_that_ends_already_counts_as_gone() -> None:
    held = [holds("ends", on={"n0": 2}, leaving=True), holds("low", on={"n0": 2})]
    plan = decide(nodes(4), [wants("high", 2, 5)], held)
    assert plan.yields == {}
    assert plan.waits["high"].reason.endswith("ends makes way")
    both = decide(nodes(4), [wants("high", 2, 5), wants("next", 2, 4)], held)
    assert both.yields == {"low": "next"}, "the room of one is not promised twice"


def test_room_that_comes_free_for_one_is_not_given_to_another() -> None:
    held = [holds("low", on={"n0": 3})]
    plan = decide(nodes(4), [wants("high", 4, 5), wants("small", 1, at=2)], held)
    assert (plan.yields, plan.starts) == ({"low": "high"}, {})


# --- nodes that may come ---


def test_nodes_that_may_come_are_asked_for_rather_than_anyone_preempted() -> None:
    held = [holds("low", on={"n0": 4})]
    line = [wants("high", 4, 5), wants("also", 4, 4), wants("third", 1, 3)]
    plan = decide(nodes(4), line, held, {"new 1": Room(4), "new 2": Room(4)})
    assert plan.asks == {"high": 1, "also": 1} and plan.yields == {"low": "third"}
    assert plan.waits["high"].new_nodes == 1


def test_where_it_is_not_known_which_one_at_a_time_asks() -> None:
    line = [wants("huge", 8, 1), wants("huger", 9)]
    plan = decide(nodes(4), line, [], None)
    assert plan.asks == {"huge": 0}
    assert (plan.waits["huge"].possible, plan.waits["huger"].possible) == (True, False)
    high = decide(nodes(4), [wants("high", 4, 5)], [holds("low", on={"n0": 4})], None)
    assert (high.yields, high.asks) == ({"low": "high"}, {}), "a lower one first"


# --- estimates ---


def test_the_wait_is_estimated_where_those_ahead_know_their_time() -> None:
    held = [
        holds("soon", on={"n0": 2}, eta_seconds=60.0),
        holds("later", on={"n0": 2}, eta_seconds=600.0),
    ]
    waits = decide(nodes(4), [wants("a", 2, at=1), wants("b", 1, at=2), wants("c", 2, at=3)], held)
    found = {run_id: wait.start_seconds for run_id, wait in waits.waits.items()}
    assert found == {"a": 60.0, "b": 600.0, "c": None}


# --- any line at all ---


@st.composite
def situations(draw: st.DrawFn) -> tuple[dict[str, Room], list[Demand], list[Holding]]:
    rooms = {
        f"n{index}": Room(draw(st.integers(1, 8)), draw(st.integers(0, 2)))
        for index in range(draw(st.integers(1, 4)))
    }
    free, held, line = dict(rooms), [], []
    bundles = st.sampled_from([Bundle(1), Bundle(2), Bundle(1, 1)])
    for index in range(draw(st.integers(0, 6))):
        bundle, size = draw(bundles), draw(st.integers(1, 6))
        found = place(size, bundle, free)
        if found is None:
            continue
        for node, number in found.items():
            free[node] = free[node].plus(bundle, -number)
        rank = draw(st.integers(0, 3)), draw(st.integers(0, 9))
        if draw(st.integers(0, 4)):
            leaving = draw(st.booleans())
            held.append(Holding(f"h{index}", *rank, bundle, found, leaving=leaving))
        else:
            line.append(Demand(f"b{index}", *rank, size, bundle, ready=False, places=found))
    for index in range(draw(st.integers(0, 8))):
        rank = draw(st.integers(0, 3)), draw(st.integers(0, 9))
        line.append(Demand(f"d{index}", *rank, draw(st.integers(1, 8)), draw(bundles)))
    return rooms, line, held


def used(rooms: dict[str, Room], held: list[tuple[Bundle, Places]]) -> dict[str, Room]:
    left = dict(rooms)
    for bundle, places in held:
        for node, number in places.items():
            left[node] = left[node].plus(bundle, -number)
    return left


# Room that is made for the fourth in line must not go to the one before it.
IN_VAIN = (
    nodes(1, 8, 1, 2),
    [
        *(wants("d0", 1, 1), wants("d1", 6, 1), wants("d2", 2, 1, at=1), wants("d3", 1)),
        *(
            wants("d4", 2, 2),
            wants("d5", 2, 1, bundle=Bundle(2)),
            wants("d6", 1, 2, bundle=Bundle(2)),
        ),
    ],
    [holds("h0", on={"n1": 3}), holds("h1", on={"n1": 3}), holds("h2", 2, on={"n1": 2, "n3": 1})],
)


@settings(max_examples=300, deadline=None)
@example(IN_VAIN)
@given(situations())
def test_nothing_is_given_twice_and_nobody_makes_way_in_vain(
    situation: tuple[dict[str, Room], list[Demand], list[Holding]],
) -> None:
    rooms, line, held = situation
    by_id = {demand.run_id: demand for demand in line}
    holders = {holding.run_id: holding for holding in held}

    plan = decide(rooms, line, held)

    assert plan.starts.keys() | plan.waits.keys() == by_id.keys()
    assert not plan.starts.keys() & plan.waits.keys()
    given_out = [(by_id[run_id].bundle, places) for run_id, places in plan.starts.items()]
    left = used(rooms, [*((h.bundle, h.places) for h in held), *given_out])
    assert all(room.cpus >= 0 and room.gpus >= 0 for room in left.values())
    for run_id, places in plan.starts.items():
        assert sum(places.values()) == by_id[run_id].size and by_id[run_id].ready
    for victim, by in plan.yields.items():
        assert holders[victim].priority < by_id[by].priority
        assert not holders[victim].leaving
    for run_id in set(plan.yields.values()) if all(d.ready for d in line) else ():
        # Once they have gone, it starts; without any one of them it would not.
        mine = {victim for victim, by in plan.yields.items() if by == run_id}
        alone = [
            replace(d, places={**plan.starts, **plan.kept}.get(d.run_id, {}))
            for d in line
            if d.order <= by_id[run_id].order
        ]
        done = {v for v, by in plan.yields.items() if by_id[by].order <= by_id[run_id].order}
        stay = [h for h in held if h.run_id not in done and not h.leaving]
        assert run_id in decide(rooms, alone, stay).starts
        for spared in mine:
            assert run_id not in decide(rooms, alone, [*stay, holders[spared]]).starts
    first = min(line, key=lambda d: d.order, default=None)
    if first is not None and first.ready:
        fits = place(first.size, first.bundle, used(rooms, [(h.bundle, h.places) for h in held]))
        assert (first.run_id in plan.starts) == (fits is not None), "the first never waits for less"


@dataclass
class Run:
    demand: Demand
    arrives: int
    left: int


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_every_run_gets_its_turn(data: st.DataObject) -> None:
    """Random arrivals: a run waits for those ahead of it, or that held workers when it came."""
    rooms = nodes(*data.draw(st.lists(st.integers(2, 4), min_size=1, max_size=3)))
    total = int(sum(room.cpus for room in rooms.values()))
    runs = [
        Run(
            wants(f"r{n}", data.draw(st.integers(1, total)), data.draw(st.integers(0, 2)), at=n),
            arrives=n // 2,
            left=data.draw(st.integers(1, 4)),
        )
        for n in range(data.draw(st.integers(1, 25)))
    ]
    held: dict[str, Holding] = {}
    met: dict[str, frozenset[str]] = {}
    for moment in range(len(runs) * 5 + 20):
        here = [run for run in runs if run.arrives <= moment and run.left]
        line = [run.demand for run in here if run.demand.run_id not in held]
        for demand in line:
            # Those that were there first, or have come back since.
            met[demand.run_id] = met.get(demand.run_id, frozenset(held)) & held.keys()
        plan = decide(rooms, line, list(held.values()))
        for demand in line:
            if demand.run_id not in plan.starts and demand.run_id not in plan.yields.values():
                ahead = [run for run in here if run.demand.order < demand.order]
                assert ahead or met[demand.run_id]
        for demand in line:
            if (places := plan.starts.get(demand.run_id)) is not None:
                about = demand.priority, demand.submitted
                held[demand.run_id] = holds(demand.run_id, *about, on=places)
        left = used(rooms, [(holding.bundle, holding.places) for holding in held.values()])
        assert all(room.cpus >= 0 for room in left.values())
        for run_id in plan.yields:
            del held[run_id]
            met[run_id] = frozenset()
        for run in here:
            if run.demand.run_id in held:
                run.left -= 1
                if not run.left:
                    del held[run.demand.run_id]
    assert all(run.left == 0 for run in runs), "each has ended"


def test_a_big_run_starts_while_small_ones_keep_coming() -> None:
    rooms, held = nodes(4), {"s0": holds("s0", at=0, on={"n0": 1})}
    for moment in range(1, 50):
        line = [wants("big", 4, at=0.5), wants(f"s{moment}", 1, at=moment)]
        plan = decide(rooms, line, list(held.values()))
        if "big" in plan.starts:
            return
        held |= {run_id: holds(run_id, at=moment, on=on) for run_id, on in plan.starts.items()}
        held.pop(f"s{moment - 3}", None)
    raise AssertionError("big has starved")


def test_the_plan_for_many_is_made_in_no_time() -> None:
    rooms = {f"n{n}": Room(64, 8) for n in range(125)}
    held = [holds(f"h{n}", bundle=GPU, on={f"n{n}": 8}) for n in range(100)]
    line = [wants(f"d{n}", 16 * (1 + n % 40), n % 3, at=n, bundle=GPU) for n in range(200)]
    began = time.process_time()
    decide(rooms, line, held)
    assert time.process_time() - began < 1.0


# --- what can never start ---


def test_a_job_is_refused_only_where_no_mesh_that_it_permits_finds_room(
    recording: dict[str, Callable[..., Any]],
) -> None:
    spec = recording["spec"]()  # rings of one and two workers, or fewer

    def demanding(fewest: int, cpus: int = 1) -> JobSpec:
        workers = spec.resources.workers.model_copy(update={"min": fewest, "max": 2})
        more = {"workers": workers, "cpus_per_worker": cpus}
        return spec.model_copy(update={"resources": spec.resources.model_copy(update=more)})

    def here(cpus: int, growth: dict[str, Room] | None) -> Cluster:
        return Cluster({"n0": NodeRoom(Room(cpus), Room(0))}, growth)

    refuse_unfit(demanding(1), here(1, {}), gpus=False)
    with pytest.raises(JobTooLarge, match="needs 2 CPU bundles of 1 CPU, and all nodes together"):
        refuse_unfit(spec_of_pairs(demanding(2)), here(1, {}), gpus=False)
    with pytest.raises(JobTooLarge, match="cpus_per_worker = 4: the largest node has 2 CPUs"):
        refuse_unfit(demanding(1, cpus=4), here(2, {}), gpus=False)
    with pytest.raises(JobTooLarge, match="no node has a GPU"):
        refuse_unfit(demanding(1), here(4, {}), gpus=True)
    refuse_unfit(demanding(1, cpus=4), here(2, {"new 1": Room(4)}), gpus=False)
    refuse_unfit(demanding(1, cpus=4), here(2, None), gpus=True)


def spec_of_pairs(spec: JobSpec) -> JobSpec:
    """The stages that want two workers."""
    return spec.model_copy(update={"stages": spec.stages[1:]})


# --- the line that runners talk to ---


class Machine:
    """A cluster and a clock, set by hand."""

    def __init__(self, cpus: int) -> None:
        self.now, self.total, self.free = 0.0, Room(cpus), Room(cpus)
        self.queue = JobQueue(self.cluster, lambda: self.now)

    def cluster(self) -> Cluster:
        return Cluster({"n0": NodeRoom(self.total, self.free)}, {})

    def start(self, demand: Demand) -> None:
        self.queue.ask(demand)
        places = self.queue.answer(demand.run_id).places
        assert places is not None and self.queue.hold(demand.run_id, places)
        self.free = self.free.plus(CPU, -demand.size)

    def wait(self, seconds: float) -> None:
        self.now += seconds


def test_two_that_ask_at_once_do_not_get_the_same_room() -> None:
    queue = Machine(4).queue
    queue.ask(wants("a", 3))
    queue.ask(wants("b", 3, at=1))
    assert queue.answer("a").places == {"n0": 3}
    assert queue.answer("b").places is None
    assert queue.hold("a", {"n0": 3})
    assert not queue.hold("b", {"n0": 3})


def test_a_turn_that_has_passed_to_a_higher_one_is_not_taken() -> None:
    queue = Machine(4).queue
    queue.ask(wants("low", 3))
    assert queue.grants("low", {"n0": 3})
    queue.ask(wants("high", 3, 1))
    assert not queue.grants("low", {"n0": 3})
    assert not queue.hold("low", {"n0": 3})
    assert queue.grants("high", {"n0": 3})


def test_a_holder_is_asked_once_and_its_room_goes_to_who_asked() -> None:
    machine = Machine(4)
    queue = machine.queue
    machine.start(wants("low", 4))
    queue.ask(wants("high", 2, 5))
    assert queue.answer("high").places is None
    way = queue.asked_to_leave("low")
    assert way is not None and (way.run_id, way.priority) == ("high", 5)
    queue.leaving("low")
    queue.pause("low")
    assert queue.asked_to_leave("low") is None
    assert queue.answer("high").places == {"n0": 2}, "before Ray has counted anew"
    queue.ask(wants("low", 4))
    assert queue.answer("low").places is None


def test_nobody_makes_way_for_one_that_has_gone() -> None:
    machine = Machine(4)
    machine.start(wants("low", 4))
    machine.queue.ask(wants("high", 2, 5))
    machine.queue.answer("high")
    machine.queue.leave("high")
    assert machine.queue.asked_to_leave("low") is None


def test_the_room_of_a_gang_that_has_failed_waits_for_the_next() -> None:
    machine = Machine(4)
    machine.start(wants("first", 3))
    machine.queue.ask(wants("next", 3, at=1))
    machine.queue.pause("first")
    assert machine.queue.answer("next").places is None
    machine.queue.ask(wants("first", 3))
    assert machine.queue.answer("first").places == {"n0": 3}
    machine.queue.leave("first")
    assert machine.queue.answer("next").places == {"n0": 3}


def test_what_others_use_counts_once_it_has_stood_for_a_while() -> None:
    machine = Machine(4)
    machine.start(wants("ours", 1))
    machine.free = Room(0)
    machine.queue.ask(wants("next", 2, at=1))
    assert machine.queue.answer("next").places is not None, "it may be a gang that has just gone"
    for _ in range(int(FOREIGN_SECONDS / PLAN_SECONDS) + 2):
        machine.wait(PLAN_SECONDS)
        answer = machine.queue.answer("next")
    assert answer.places is None and answer.wait is not None
    assert answer.room == 4, "the nodes hold it all the same"
    machine.free = Room(3)
    machine.wait(PLAN_SECONDS)
    assert machine.queue.answer("next").places is not None


def test_a_closed_line_waits_for_all_to_come() -> None:
    queue = Machine(4).queue
    with queue.closed():
        queue.ask(wants("low", 4))
        assert queue.answer("low").places is None
        queue.ask(wants("high", 4, 1))
    assert queue.answer("low").places is None
    assert queue.answer("high").places == {"n0": 4}


def test_plans_hold_still() -> None:
    """The same situation gives the same plan, whatever order it is told in."""
    line = [wants(f"d{n}", 1 + n % 3, n % 2, at=n) for n in range(9)]
    held = [holds(f"h{n}", at=n, on={f"n{n}": 2}) for n in range(3)]
    plans: list[Plan] = [
        decide(nodes(4, 4, 4), line[shift:] + line[:shift], held[::-1]) for shift in range(9)
    ]
    assert all(plan.starts == plans[0].starts for plan in plans)
