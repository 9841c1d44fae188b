"""Rings of processes: the same answers on any, errors that leave them whole, a lost rank."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from ringworld_model.sampling.answer import Answer, collect
from ringworld_model.sampling.settings import DrawSettings, SamplingSettings
from ringworld_workers.generation.asks import Ask, clip_ask, text_ask
from ringworld_workers.generation.coder import Coder
from ringworld_workers.generation.conversation import Conversation, opening_prompt
from ringworld_workers.generation.local_ring import LocalRing, RingError
from ringworld_workers.generation.prompts import Clip, Image, Part
from ringworld_workers.generation.source import ModelSource, RequestError

GREEDY = DrawSettings(temperature=0.0)
SETTINGS = SamplingSettings(text=GREEDY, vision=DrawSettings(top_k=8), max_new_tokens=12)


@pytest.fixture(scope="module")
def three(source: ModelSource) -> Iterator[LocalRing]:
    """A ring of this process and two others."""
    with LocalRing(source, size=3, device="cpu", chunk=32) as made:
        yield made


def asked(ring: LocalRing, asks: list[Ask]) -> list[Answer]:
    return collect(ring.call("answer", asks), len(asks))


def talk(conversation: Conversation, *parts: Part) -> str:
    return "".join(event.text for event in conversation.ask(parts))


def test_an_image_and_a_video(ring: LocalRing, coder: Coder, film: Path) -> None:
    image = clip_ask("red", 1, coder, replace(SETTINGS, guidance_scale=5.0), video=False)
    (drawn,) = asked(ring, [image])
    assert [len(clip) for clip in drawn.clips] == [1] and drawn.text == ""
    assert coder.pictures(drawn.clips[0]).shape == (1, 8, 8, 3)
    on = clip_ask("grey", 3, coder, SETTINGS, video=True, given=Clip(film, num_frames=2))
    assert on.given is not None and len(on.given) == 2
    assert on.prompt.tokens[-1] == coder.grammar.eof_id
    (further,) = asked(ring, [on])
    assert [len(clip) for clip in further.clips] == [3] and further.end == "length"


def test_rings_answer_alike_and_survive_what_is_wrong(
    ring: LocalRing, three: LocalRing, coder: Coder, picture: Path
) -> None:
    asks = [
        text_ask(parts, coder, replace(SETTINGS, seed=seed), form="plain", max_frames=2)
        for seed, parts in enumerate(([Image(picture), "What?"], ["Once upon a time " * 5]))
    ]
    wrong = replace(asks[0], grammar=replace(asks[0].grammar, codes_per_frame=7))
    with pytest.raises(ValueError, match="does not fit"):
        list(three.call("answer", [wrong]))
    one, other = asked(ring, asks), asked(three, asks)
    assert [answer.text for answer in one] == [answer.text for answer in other]
    assert [answer.tokens for answer in one] == [answer.tokens for answer in other]
    draw = clip_ask("red", 2, coder, replace(SETTINGS, guidance_scale=3.0), video=True)
    (first,), (second,) = asked(ring, [draw]), asked(three, [draw])
    assert np.array_equal(first.clips[0], second.clips[0])


def test_a_conversation_on_a_ring(ring: LocalRing, three: LocalRing, coder: Coder) -> None:
    said = []
    for each in (ring, three):
        conversation = Conversation(each, SETTINGS, max_frames=0)
        opening = opening_prompt(["A long story. " * 5], coder)
        conversation.read(opening)
        assert conversation.length == len(opening)
        first = talk(conversation, "Who?")
        after_first, second = conversation.left, talk(conversation, "Where?")
        said.append((first, second))
        assert conversation.length == each.asker.session.length(conversation.row)
        assert conversation.undo() and conversation.left == after_first
        assert talk(conversation, "Where?") == second
        conversation.reset()
        assert conversation.length == len(opening) and not conversation.undo()
        assert talk(conversation, "Who?") == first
    assert said[0] == said[1]


def test_a_conversation_goes_on_as_one_prompt_would(ring: LocalRing, coder: Coder) -> None:
    conversation = Conversation(ring, SETTINGS, max_frames=0)
    events = list(conversation.ask(["Who?"]))
    talked = talk(conversation, "Where?")
    tokens = [event.token for event in events if event.token is not None]
    alone = text_ask(["Who?"], coder, SETTINGS, form="chat", max_frames=0)
    behind = coder.template.question(("Where?",), first=False)
    encoded = [coder.tokenizer.encode(part.text) for part in behind]  # type: ignore[union-attr]
    ids = [*alone.prompt.tokens, *tokens, *sum(encoded, [])]
    if events[-1].end != "stop":
        ids.insert(len(alone.prompt) + len(tokens), coder.tokenizer.eos_id)
    prompt = type(alone.prompt)(np.array(ids), np.zeros(len(ids), np.uint8))
    (whole,) = asked(ring, [replace(alone, prompt=prompt)])
    assert whole.text == talked


def test_a_stopped_answer_and_a_full_context(ring: LocalRing, coder: Coder) -> None:
    conversation = Conversation(ring, SETTINGS, max_frames=0)
    seen: list[str] = []
    gone = list(
        conversation.ask(
            ["Who?"], cancelled=lambda: (0,) if seen.append("x") or len(seen) > 3 else ()
        )
    )
    assert gone[-1].end == "cancelled" and len(gone) == 4
    assert conversation.length == ring.asker.session.length(conversation.row)
    with pytest.raises(
        RequestError, match=r"question has 2\d\d tokens, and .* of the 256 are left"
    ):
        talk(conversation, "x" * 190)
    assert talk(conversation, "Where?") is not None


def test_what_cannot_be_loaded_is_one_error(source: ModelSource) -> None:
    lost = replace(source, folder="nowhere")
    with pytest.raises(ValueError, match="nowhere: no such folder"), LocalRing(lost, device="cpu"):
        pass


def test_a_lost_rank_is_said_and_none_is_left(three: LocalRing, coder: Coder) -> None:
    """Last, for the ring is gone then."""
    ranks = [psutil.Process(process.pid) for process in three._processes]
    assert len(ranks) == 2
    settings = replace(SETTINGS, max_new_tokens=100)
    events = three.call("answer", [text_ask(["Hi"], coder, settings)])
    next(events)
    # The other one hears of broken connections, and ends too.
    three._processes[1].kill()
    with pytest.raises(RingError, match=r"rank 2 of the ring ended \(exit code -9\)$"):
        list(events)
    three.close()
    assert not any(rank.is_running() for rank in ranks)
