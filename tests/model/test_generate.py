"""Generation: text and clips in one pass, the same tokens on any ring, and no hang at the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from small_models import SMALL

from ringworld_model.batch import TEXT, VISION
from ringworld_model.decode import DecodeSession
from ringworld_model.generate import generate
from ringworld_model.sampling.answer import Answer, collect
from ringworld_model.sampling.grammar import Grammar
from ringworld_model.sampling.guidance import guided
from ringworld_model.sampling.prompt import Prompt
from ringworld_model.sampling.settings import DrawSettings, SamplingSettings
from ringworld_model.tokens import Span, vision_tokens
from ringworld_model.transformer import WorldModel, causal_attention, init_weights

START, END, CODES = (1, 2), (3,), 6
GREEDY = DrawSettings(temperature=0)


def model() -> WorldModel:
    built = WorldModel(SMALL, rope_theta=1e4)
    init_weights(built, 5)
    return built.double()


def decode(ids: Sequence[int]) -> str:
    return "".join(chr(ord("A") + id_) for id_ in ids).replace("BC", "<vision>")


def text(*ids: int) -> Prompt:
    return Prompt.of(Span(ids, TEXT))


def grammar(**changes: Any) -> Grammar:
    shape = {"codebook_size": 32, "codes_per_frame": CODES, "start_ids": START, "end_ids": END}
    return Grammar(**shape | changes)


@torch.no_grad()
def next_logits(built: WorldModel, tokens: list[int], modality: list[int]) -> torch.Tensor:
    """Of one full forward pass; the head by what the grammar would ask for."""
    length = torch.arange(len(tokens))[None]
    attends = [causal_attention] * SMALL.num_layers
    given = torch.tensor([tokens]), torch.tensor([modality])
    hidden = built.hidden_states(*given, length, attends)[0, -1]
    # After <vision>, and until eov.
    vision = modality[-1] == VISION or tuple(tokens[-2:]) == START
    head = built.vision_head if vision and tokens[-1] != 33 else built.text_head
    assert head is not None
    return head.logits(hidden)


def test_greedy_text_is_what_full_forward_passes_say() -> None:
    built = model()
    prompts = [text(5), text(7, 8, 9, 10, 11, 12, 13)]
    session = DecodeSession(built, max_length=64, chunk=4)
    asked = SamplingSettings(text=GREEDY, max_new_tokens=9)
    events = list(generate(session, prompts, asked, decode=decode))
    for number, prompt in enumerate(prompts):
        tokens = prompt.tokens.tolist()
        for event in (each for each in events if each.prompt == number):
            assert event.token == int(next_logits(built, tokens, [TEXT] * len(tokens)).argmax())
            tokens.append(event.token)
    answers = collect(events, 2)
    assert [answer.tokens for answer in answers] == [9, 9]
    assert [answer.end for answer in answers] == ["length", "length"]
    assert session.rows == [] and session.held_bytes == 0


def test_a_guided_clip_is_what_two_full_forward_passes_say() -> None:
    built = model()
    first = vision_tokens(np.arange(CODES)[None], 32).tolist()
    first[-1] = 32  # eof: the clip goes on
    prompt = Prompt.of(Span([0, 9, 8, *START], TEXT), Span(first, VISION))
    session = DecodeSession(built, max_length=64, chunk=4)
    asked = SamplingSettings(text=GREEDY, vision=GREEDY, guidance_scale=3.0, max_new_tokens=20)
    rules = grammar(clip_frames=3)
    events = list(generate(session, [prompt], asked, grammar=rules, unguided_ids=[0]))
    with_prompt = (prompt.tokens.tolist(), prompt.modality.tolist())
    without = ([0, *START, *first], [TEXT] * 3 + [VISION] * len(first))
    for event in events[: 2 * (CODES + 1)]:
        logits = guided(next_logits(built, *with_prompt), next_logits(built, *without), 3.0)
        place = (len(without[0]) - 3) % (CODES + 1)
        last = len(without[0]) - 3 > 2 * (CODES + 1)
        expected = (33 if last else 32) if place == CODES else int(logits[:32].argmax())
        assert event.token == expected
        for tokens, modality in (with_prompt, without):
            tokens.append(expected)
            modality.append(VISION)
    frames = [event.frame for event in events if event.frame is not None]
    assert len(frames) == 2 and frames[0].tolist() == without[0][3 + 7 : 3 + 13]
    (answer,) = collect(events, 1)
    assert answer.clips[0].shape == (2, CODES)
    assert [event.token for event in events[14:15]] == [3], "</vision> is forced"
    assert session.rows == []


def many(session: DecodeSession) -> list[tuple[Any, ...]]:
    """A batch of everything at once."""
    opened = Prompt.of(Span([0, 6, *START], TEXT))
    prompts = [text(4, 5), opened, opened, text(*range(5, 30))]
    asked = [
        SamplingSettings(max_new_tokens=11, seed=1, stop_ids=(7, 8, 9)),
        SamplingSettings(max_new_tokens=40, seed=2, guidance_scale=2.0),
        SamplingSettings(max_new_tokens=16, seed=2),
        SamplingSettings(text=DrawSettings(repetition_penalty=1.3), seed=3, max_new_tokens=30),
    ]
    events = generate(session, prompts, asked, grammar=grammar(), decode=decode, unguided_ids=[0])
    return [(e.prompt, e.token, e.modality, e.text, e.clip_done, e.end) for e in events]


def on_a_ring(rank: int, world_size: int) -> dict[str, Any]:
    group = dist.group.WORLD if world_size > 1 else None
    built = model()
    session = DecodeSession(built, group, max_length=64, chunk=16)
    found: dict[str, Any] = {"events": many(session), "rows": session.rows}
    # An asker goes away, which the first rank alone knows.
    calls = iter(range(100))
    gone = (lambda: {1} if next(calls) > 2 else ()) if rank == 0 else None
    events = generate(
        session, [text(4), text(5)], SamplingSettings(max_new_tokens=6), cancelled=gone
    )
    found["ends"] = [(answer.tokens, answer.end) for answer in collect(events, 2)]
    # Many questions on one document, in one batch.
    session.prefill(torch.arange(20)[None])
    forks = session.fork(session.rows[0], 3)
    asked = SamplingSettings(text=GREEDY, max_new_tokens=4)
    questions = [text(3 + at) for at in range(3)]
    answers = collect(generate(session, questions, asked, rows=forks, decode=decode), 3)
    found["answers"] = [answer.text for answer in answers]
    found["kept"] = [session.length(row) for row in session.rows]
    # Weights that went bad: the error is everybody's.
    with torch.no_grad():
        built.norm.weight.fill_(torch.nan)
    try:
        list(generate(session, [text(4)], SamplingSettings()))
    except ValueError as wrong:
        found["nan"] = str(wrong)
    return found


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return on_a_ring(0, 1)


def test_rows_end_at_different_times_for_their_own_reasons(alone: dict[str, Any]) -> None:
    answers = [Answer() for _ in range(4)]
    ends: dict[int, int] = {}
    for at, (number, token, *_, end) in enumerate(alone["events"]):
        answers[number].tokens += token is not None
        assert number not in ends, "nothing comes after the end"
        if end is not None:
            ends[number] = at
            answers[number].end = end
    assert sorted(ends) == [0, 1, 2, 3] and alone["rows"] == []
    assert answers[1].end == "length" and answers[1].tokens == 40
    assert answers[2].tokens == 16 and answers[3].tokens == 30
    written = {n: [e[1:3] for e in alone["events"] if e[0] == n] for n in range(4)}
    for number in (1, 2):
        codes = [token for token, modality in written[number][:CODES]]
        assert all(modality == VISION for _, modality in written[number][:CODES])
        assert all(code < 32 for code in codes)
    assert written[1][:CODES] != written[2][:CODES], "guidance changes the draws"
    assert alone["ends"] == [(6, "length"), (3, "cancelled")]
    assert alone["kept"] == [20, 24, 24, 24], "all but each answer's last token"
    assert "the largest logit is nan" in alone["nan"]


def test_forks_answer_as_if_each_had_read_the_document(alone: dict[str, Any]) -> None:
    session = DecodeSession(model(), max_length=64)
    asked = SamplingSettings(text=GREEDY, max_new_tokens=4)
    for at, answer in enumerate(alone["answers"]):
        events = generate(session, [text(*range(20), 3 + at)], asked, decode=decode)
        assert collect(events, 1)[0].text == answer


@pytest.mark.parametrize("ring_size", [2, 3])
def test_any_ring_writes_the_same(
    ring_size: int, alone: dict[str, Any], run_gang: Callable[..., list[Any]]
) -> None:
    ranks = run_gang(on_a_ring, ring_size, timeout=100.0)
    for rank, found in enumerate(ranks):
        if rank:
            assert "the first rank of the ring could not draw" in found.pop("nan")
            assert found == {key: alone[key] for key in found}
        else:
            assert found == alone


def test_stop_texts_and_stop_ids() -> None:
    built = model()
    session = DecodeSession(built, max_length=64)
    asked = SamplingSettings(text=GREEDY, max_new_tokens=12)
    (whole,) = collect(generate(session, [text(5)], asked, decode=decode), 1)
    assert len(whole.text) == 12
    stop = whole.text[4:6]
    at = whole.text.find(stop)
    asked = SamplingSettings(text=GREEDY, max_new_tokens=12, stop=(stop,))
    (answer,) = collect(generate(session, [text(5)], asked, decode=decode), 1)
    assert (answer.text, answer.end) == (whole.text[:at], "stop")
    eos = ord(whole.text[3]) - ord("A")
    asked = SamplingSettings(text=GREEDY, max_new_tokens=12, stop_ids=(eos,))
    (answer,) = collect(generate(session, [text(5)], asked, decode=decode), 1)
    assert (answer.text, answer.end) == (whole.text[: whole.text.index(whole.text[3])], "stop")


def test_the_model_opens_clips_itself() -> None:
    """Weights under which <vision> is likely: frames come, and text goes on after them."""
    built = model()
    with torch.no_grad():
        built.text_head.weight[[1, 2]] *= 3
    session = DecodeSession(built, max_length=300)
    asked = SamplingSettings(seed=4, max_new_tokens=250)
    rules = grammar(max_frames=5)
    events = list(generate(session, [text(5)], asked, grammar=rules, decode=decode))
    (answer,) = collect(events, 1)
    assert 0 < sum(len(clip) for clip in answer.clips) <= 5
    assert all(clip.shape[1] == CODES and clip.max() < 32 for clip in answer.clips)
    assert "<vision>" not in answer.text and isinstance(answer.parts[-1], str)


def test_bad_requests() -> None:
    session = DecodeSession(model(), max_length=16)
    asked = SamplingSettings()
    clip = Prompt.of(Span([0, *START], TEXT))
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: generate(session, [], asked), "there is no prompt"),
        (lambda: generate(session, [text(*range(16))], asked), "leaves none for an answer"),
        (lambda: generate(session, [text(1)], SamplingSettings(stop=("a",))), "needs the token"),
        (
            lambda: generate(session, [clip], asked, grammar=grammar(clip_frames=2)),
            r"takes 15 more tokens \(2 frames of 7",
        ),
        (lambda: generate(session, [text(1)], asked, grammar=grammar(codebook_size=8)), "of 8"),
        (lambda: generate(session, [text(1)], [asked, asked]), "2 settings for 1 prompts"),
        (lambda: generate(session, [text(1)], asked, rows=[3]), "row 3 is not one"),
        (lambda: generate(session, [text(99)], asked), "text id 99, outside"),
    ]
    for case, words in cases:
        with pytest.raises(ValueError, match=words):
            list(case())
        assert session.rows == []
    with pytest.raises(ValueError, match="a prompt is empty"):
        text()
