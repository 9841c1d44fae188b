"""Rows that join and leave while others are written: each as if it were alone."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from small_models import SMALL

from ringworld_model.batch import TEXT
from ringworld_model.decode import DecodeSession
from ringworld_model.generate import generate
from ringworld_model.running_batch import RunningBatch, _shares
from ringworld_model.sampling.answer import Event, collect
from ringworld_model.sampling.grammar import Grammar
from ringworld_model.sampling.prompt import Prompt
from ringworld_model.sampling.settings import DrawSettings, SamplingSettings
from ringworld_model.tokens import Span
from ringworld_model.transformer import WorldModel, init_weights

SHORT, LONG = Prompt.of(Span((5, 6, 7), TEXT)), Prompt.of(Span([9, 8, 7, 6] * 9, TEXT))
HOT = SamplingSettings(text=DrawSettings(temperature=1.5), max_new_tokens=12, seed=3)


def model() -> WorldModel:
    built = WorldModel(SMALL, rope_theta=1e4)
    init_weights(built, 5)
    return built.double()


def alone(built: WorldModel, prompt: Prompt) -> list[int | None]:
    session = DecodeSession(built, max_length=64)
    return [event.token for event in generate(session, [prompt], HOT)]


def joined(group: Any = None) -> dict[str, Any]:
    """A short prompt is being written when a long one comes, and a third that is cancelled."""
    session = DecodeSession(model(), group, max_length=64, chunk=8)
    batch = RunningBatch(session)
    events: list[Event] = []

    def turns(count: int | None, **asked: Any) -> None:
        while batch and count != 0:
            batch.read(8)
            events.extend(batch.draw(**asked))
            count = None if count is None else count - 1
            if batch.paused:
                return

    def add(number: int, prompt: Prompt) -> None:
        batch.add([prompt], [HOT], [Grammar()], numbers=[number])

    add(0, SHORT)
    turns(4)
    before = len(events)
    add(1, LONG)
    add(2, LONG)
    turns(2)
    # The long ones take several turns to read, and the short one is written meanwhile.
    while_reading = [event.prompt for event in events[before:]]
    turns(None, cancelled=lambda: {2}, pause=lambda: True)
    paused = batch.paused
    turns(None)
    tokens = {n: [e.token for e in events if e.prompt == n] for n in range(3)}
    ends = [answer.end for answer in collect(events, 3)]
    return {
        "tokens": tokens,
        "ends": ends,
        "while_reading": while_reading,
        "paused": paused,
        "held": session.held_bytes,
        "rows": session.rows,
    }


def test_a_row_that_joins_is_written_as_if_it_were_alone() -> None:
    built = model()
    found = joined()
    assert found["tokens"] == {0: alone(built, SHORT), 1: alone(built, LONG), 2: [None]}
    assert found["ends"] == ["length", "length", "cancelled"]
    assert found["while_reading"] == [0, 0] and found["paused"]
    assert found["held"] == 0 and found["rows"] == []


def broken(group: Any = None) -> dict[str, Any]:
    """Two rows, of which the second holds a token whose weights are damaged."""
    built = model()
    built.text_embed.weight.data[9] = float("nan")
    session = DecodeSession(built, group, max_length=64, chunk=8)
    batch = RunningBatch(session)
    batch.add([SHORT, LONG], [HOT, HOT], [Grammar()] * 2, numbers=[0, 1])
    events: list[Event] = []
    held = []
    while batch:
        batch.read(64)
        events.extend(batch.draw())
        held.append(session.rows)
    answers = collect(events, 2)
    return {
        "tokens": [event.token for event in events if event.prompt == 0],
        "ends": [answer.end for answer in answers],
        "problem": [event.problem for event in events if event.end == "failed"],
        "rows": [len(rows) for rows in held],
        "held": session.held_bytes,
    }


def test_a_row_that_cannot_go_on_ends_alone() -> None:
    found = broken()
    assert found["tokens"] == alone(model(), SHORT) and 9 not in found["tokens"]
    assert found["ends"] == ["length", "failed"] and "NaN" in found["problem"][0]
    assert found["rows"] == [1] * 11 + [0] and found["held"] == 0


def on_a_ring(rank: int, world_size: int) -> dict[str, Any]:
    import torch.distributed as dist

    return {"joined": joined(dist.group.WORLD), "broken": broken(dist.group.WORLD)}


def test_all_ranks_go_on_alike(run_gang: Callable[..., list[Any]]) -> None:
    here, other = run_gang(on_a_ring, 2, timeout=100.0)
    assert here["joined"] == other["joined"] == joined()
    assert here["broken"] == broken() and other["broken"] == broken() | {"problem": [""]}


def test_rows_take_no_more_memory_than_they_may_have_tokens() -> None:
    session = DecodeSession(model(), max_length=64, chunk=8)
    batch = RunningBatch(session)
    batch.add([SHORT, LONG], [HOT, HOT], [Grammar()] * 2, numbers=[0, 1])
    held = []
    while batch:
        batch.read(8)
        list(batch.draw())
        held.append(session.held_bytes)
    assert max(held) <= (len(SHORT) + len(LONG) + 2 * 12) * session.token_bytes


def test_another_thread_may_ask_how_much_is_held() -> None:
    session = DecodeSession(model(), max_length=64)
    session.add_rows(300)
    ended, before = threading.Event(), sys.getswitchinterval()

    def ask() -> None:
        while not ended.is_set():
            assert session.held_bytes == 0

    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(1) as pool:
            asking = pool.submit(ask)
            for _ in range(2000):
                session.drop(session.add_rows(3))
            ended.set()
            asking.result(60.0)
    finally:
        ended.set()
        sys.setswitchinterval(before)


def test_no_prompt_waits_for_a_long_one() -> None:
    assert _shares([100, 3, 5], 16) == [8, 3, 5]
    assert _shares([100, 100], 7) == [4, 3]
    assert _shares([4, 6], None) == [4, 6]
    assert _shares([9, 9, 9], 2) == [1, 1, 0]
    assert _shares([], 8) == []
