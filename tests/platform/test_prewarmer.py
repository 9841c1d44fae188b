"""The controller's request to the autoscaler: made, held and let go of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mini_jobs import mini_job, wait_until

from ringworld_jobs.spec import JobSpec
from ringworld_platform.capacity import Cluster, NodeRoom
from ringworld_platform.job_queue import PLAN_SECONDS, JobQueue
from ringworld_platform.prewarm import FIRST_GUESS_SECONDS, MARGIN_SECONDS
from ringworld_platform.prewarmer import Prewarmer
from ringworld_platform.room import Bundle, Room
from ringworld_platform.scheduler import Demand

CPU = Bundle(1)
STAGES = (("1k", 1, 100), ("4k", 2, 100), ("8k", 1, 100))


class World:
    """A line, runs and an autoscaler whose time stands until it is moved."""

    def __init__(self, folder: Path, *, there: int = 1, most: int = 4) -> None:
        self.now, self.there, self.most, self.folder = 1000.0, there, most, folder
        self.requests: list[int] = []
        self.cleared = 0
        self.runs: dict[str, Any] = {}
        self.events: list[str] = []
        self.line = JobQueue(self.cluster, lambda: self.now)
        self.prewarmer = Prewarmer(self.line, lambda: list(self.runs.values()), self)

    def cluster(self) -> Cluster:
        rooms = {f"n{n}": NodeRoom(Room(1), Room(1)) for n in range(self.there)}
        growth = {f"new {n}": Room(1) for n in range(self.most - self.there)}
        return Cluster(rooms, growth, autoscaled=True)

    def hold(self, bundles: Sequence[Mapping[str, float]]) -> None:
        assert all(bundle == {"CPU": 1.0} for bundle in bundles)
        self.requests.append(len(bundles))

    def clear_left(self) -> None:
        self.cleared += 1

    def add(self, name: str, prewarm: str = "auto", **fields: Any) -> Any:
        spec = mini_job(self.folder, name, **{"stages": STAGES, "prewarm": prewarm, **fields})
        record = SimpleNamespace(
            **{"stages_done": 0, "evaluated": 0, "attempt": 1, "prepared": {}, "step": 0},
            **{"priority": 0, "submitted": self.now},
        )
        self.runs[name] = SimpleNamespace(
            run_id=name,
            spec=spec,
            record=record,
            event=lambda kind, text, **more: self.events.append(text),
        )
        return record

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.prewarmer.look(self.now)

    def take(self, name: str, size: int) -> None:
        """Wait in the line and get room."""
        self.line.ask(Demand(name, 0, self.now, size, CPU))
        self.pass_time(PLAN_SECONDS)
        places = self.line.answer(name).places
        assert places and self.line.hold(name, places)
        self.prewarmer.look(self.now)

    def train(self, name: str, steps: int, seconds: float = 1.0) -> None:
        for _ in range(steps):
            self.runs[name].record.step += 1
            self.pass_time(seconds)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_nodes_are_asked_for_before_the_stage_and_let_go_when_it_has_them(world: World) -> None:
    record = world.add("a", prewarm="30s")
    world.take("a", 1)
    world.train("a", 69)
    assert world.requests == []
    world.train("a", 2)
    assert world.requests == [2]
    assert world.events == [
        "asked the autoscaler to add 1 node for stage 4k, expected to begin in 30 s"
    ]
    world.there = 2
    world.train("a", 29)
    world.line.pause("a")
    world.pass_time(1.0)
    record.stages_done, record.step = 1, 0
    world.pass_time(1.0)
    assert world.requests == [2], "held until the stage has its room"
    world.take("a", 2)
    assert world.requests == [2, 0]
    world.train("a", 99)
    world.line.pause("a")
    record.stages_done, record.step = 2, 0
    world.pass_time(1.0)
    assert world.requests == [2, 0], "the third stage wants fewer"


def test_auto_asks_as_early_as_nodes_took_to_come(world: World) -> None:
    world.there = 0
    world.add("a")
    world.line.ask(Demand("a", 0, 0.0, 1, CPU))
    for _ in range(8):
        world.line.answer("a")
        world.pass_time(1.0)
    world.there = 1
    world.take("a", 1)
    assert world.prewarmer._starts.expected_seconds == pytest.approx(8.0 + MARGIN_SECONDS, abs=2.0)
    world.train("a", 85)
    assert world.requests == []
    world.train("a", 10)
    assert world.requests == [2]


def test_the_first_guess_serves_until_nodes_have_come(world: World) -> None:
    world.add("a")
    world.take("a", 1)
    world.train("a", 20, seconds=2.0)
    assert world.requests == []
    world.train("a", 20, seconds=2.0)
    assert world.requests == [2]
    world.there = 2
    world.train("a", 1)
    assert world.prewarmer._starts.expected_seconds < FIRST_GUESS_SECONDS


def test_a_stage_that_does_not_end_gives_the_nodes_back_and_the_end_of_a_run_does(
    world: World,
) -> None:
    world.add("a", prewarm="10s")
    world.take("a", 1)
    world.train("a", 95)
    assert world.requests == [2]
    world.pass_time(10.0)
    assert world.requests == [2]
    world.pass_time(10.0)
    assert world.requests == [2, 0], "it has stalled: the nodes would idle"
    world.train("a", 1)
    world.train("a", 2)
    assert world.requests[-1] == 2
    del world.runs["a"]
    world.line.leave("a")
    world.pass_time(1.0)
    assert world.requests[-1] == 0


def test_off_asks_for_nothing_and_a_wish_above_the_limits_neither(tmp_path: Path) -> None:
    world = World(tmp_path, there=1, most=3)
    world.add("off", prewarm="off")
    world.take("off", 1)
    world.train("off", 99)
    wide = World(tmp_path, there=2, most=2)
    stages = (("1k", 2, 100), ("4k", 4, 100))
    wide.add("wide", prewarm="30s", stages=stages, workers=(2, 4))
    wide.take("wide", 2)
    wide.train("wide", 99)
    assert (world.requests, wide.requests) == ([], [])


def test_two_runs_share_one_request(tmp_path: Path) -> None:
    world = World(tmp_path, there=2, most=4)
    world.add("a", prewarm="30s")
    world.add("b", prewarm="30s")
    for name in "ab":
        world.take(name, 1)
    world.train("a", 20)
    for requests, steps in (([3], 55), ([3, 4], 20)):
        for _ in range(steps):
            world.runs["b"].record.step += 1
            world.train("a", 1)
        assert world.requests == requests, "what both have, and one more for each that is due"


def test_without_an_autoscaler_nobody_is_asked(world: World) -> None:
    world.there = 4
    found = world.cluster()
    world.line = JobQueue(lambda: Cluster(found.nodes, {}), lambda: world.now)
    world.prewarmer = Prewarmer(world.line, lambda: list(world.runs.values()), world)
    world.add("a", prewarm="30s")
    world.take("a", 1)
    world.train("a", 99)
    assert world.requests == []


def test_what_an_earlier_controller_left_is_cleared_and_the_own_at_the_end(world: World) -> None:
    world.add("a", prewarm="30s")
    world.take("a", 1)
    world.train("a", 80)
    world.prewarmer.start()
    wait_until(lambda: world.cleared, "it looks for what was left")
    world.prewarmer.close()
    assert world.requests == [2, 0]


def evaluated(spec: JobSpec, *indices: int) -> JobSpec:
    data = spec.model_dump(mode="json", exclude_none=True)
    for index in indices:
        data["stages"][index]["evaluate"] = ["needle"]
    return JobSpec.model_validate(data)


def test_evaluations_before_the_next_stage_keep_its_nodes_and_are_counted(world: World) -> None:
    stages = (("1k", 1, 100), ("4k", 2, 100), ("8k", 3, 100))
    record = world.add("a", prewarm="30s", stages=stages)
    world.runs["a"].spec = evaluated(world.runs["a"].spec, 0, 1)
    world.take("a", 1)
    world.train("a", 71)
    assert world.requests == [2], "how long the first one takes, nobody knows"
    world.there = 2
    world.train("a", 29)
    record.stages_done = 1
    for _ in range(20):
        world.pass_time(1.0)
    assert world.requests == [2], "they are there when the evaluation ends"
    record.evaluated, record.step = 1, 0
    world.line.pause("a")
    world.take("a", 2)
    assert world.requests == [2, 0]

    world.train("a", 85)
    assert world.requests == [2, 0], "15 s of training, and 20 s of evaluation"
    world.train("a", 8)
    assert world.requests == [2, 0, 3]
    world.train("a", 7)
    record.stages_done = 2
    for _ in range(25):
        world.pass_time(1.0)
    assert world.requests == [2, 0, 3]
    record.evaluated, record.step = 2, 0
    world.line.pause("a")
    world.there = 3
    world.take("a", 3)
    assert world.requests == [2, 0, 3, 0]
