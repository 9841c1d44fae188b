"""Whatever the logits say, what is written is in the grammar, within its budget, and finished."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringworld_model.batch import TEXT, VISION
from ringworld_model.sampling import Grammar, State
from ringworld_model.tokens import frames_of, vision_tokens

TEXT_IDS = 7
GRAMMARS = st.builds(
    Grammar,
    codebook_size=st.integers(1, 5),
    codes_per_frame=st.integers(1, 4),
    start_ids=st.sampled_from([(1,), (1, 2), (2, 2, 3), (1, 1), (1, 2, 1)]),
    end_ids=st.sampled_from([(4,), (4, 5), (1, 2)]),
    max_frames=st.none() | st.integers(0, 4),
    clip_frames=st.none() | st.integers(1, 3),
)


def write(grammar: Grammar, state: State, room: int, seed: int) -> list[tuple[int, int]]:
    """(modality, id) until no room is left: ids that open clips are likelier than others."""
    rng, found = random.Random(seed), []
    while room:
        allowed = grammar.allowed(state, room)
        size = grammar.codebook_size + 256 if allowed.modality == VISION else TEXT_IDS
        favoured = [*grammar.start_ids, grammar.eof_id, *range(size)]
        choices = [id_ for id_ in favoured if id_ < size and allowed.contains(id_)]
        token = rng.choice(choices)
        found.append((allowed.modality, token))
        state, room = grammar.advance(state, token), room - 1
    return found


def clips_of(grammar: Grammar, found: list[tuple[int, int]]) -> list[list[int]]:
    """Parses what was written, sharing nothing with the state machine; vision ids by clip."""
    clips, at = [], 0
    text: list[int] = []
    while at < len(found):
        modality, token = found[at]
        if modality == TEXT:
            text.append(token)
            at += 1
            opened = tuple(text[-len(grammar.start_ids) :]) == grammar.start_ids
            follows = at < len(found) and found[at][0] == VISION
            assert opened == follows, f"a clip begins behind <vision>, there alone: {found}"
            continue
        stop = at
        while stop < len(found) and found[stop][0] == VISION:
            stop += 1
        clips.append([token for _, token in found[at:stop]])
        closing = tuple(token for _, token in found[stop : stop + len(grammar.end_ids)])
        assert closing == grammar.end_ids
        text, at = [], stop + len(grammar.end_ids)
    return clips


@settings(max_examples=150, deadline=None)
@given(GRAMMARS, st.integers(1, 60), st.integers(0, 1_000_000))
def test_everything_written_is_in_the_grammar(grammar: Grammar, room: int, seed: int) -> None:
    clips = clips_of(grammar, write(grammar, State(), room, seed))
    frames = [frames_of(clip, grammar.codes_per_frame, grammar.codebook_size) for clip in clips]
    if grammar.max_frames is not None:
        assert sum(map(len, frames)) <= grammar.max_frames
    if grammar.clip_frames is not None:
        assert all(len(clip) == grammar.clip_frames for clip in frames)


@settings(max_examples=150, deadline=None)
@given(GRAMMARS, st.integers(0, 3), st.integers(0, 5), st.integers(0, 30), st.integers(0, 999))
def test_a_clip_of_the_prompt_is_continued_and_finished(
    grammar: Grammar, before: int, codes: int, room: int, seed: int
) -> None:
    given_codes = [0] * min(codes, grammar.codes_per_frame)
    clip = ([0] * grammar.codes_per_frame + [grammar.eof_id]) * before
    clip += given_codes
    tokens = [0, *grammar.start_ids, *clip]
    modality = [TEXT] * (1 + len(grammar.start_ids)) + [VISION] * len(clip)
    state = grammar.start(tokens, modality)
    if not clip and grammar.max_frames == 0:
        assert state.free
        return
    assert (state.clip, state.place, state.made) == (before, len(given_codes), 0)
    try:
        grammar.check_room(state, room)
    except ValueError:
        return
    found = [*zip(modality, tokens, strict=True), *write(grammar, state, room, seed)]
    clips = clips_of(grammar, found)
    frames = [frames_of(each, grammar.codes_per_frame, grammar.codebook_size) for each in clips]
    assert len(frames[0]) > before
    if grammar.max_frames is not None:
        assert sum(map(len, frames)) - before <= grammar.max_frames
    if grammar.clip_frames is not None:
        assert all(len(each) == grammar.clip_frames for each in frames)


def test_a_frame_begins_only_where_it_can_be_finished() -> None:
    grammar = Grammar(codebook_size=4, codes_per_frame=2, start_ids=(1, 2), end_ids=(3,))
    asked = grammar.start([1], [TEXT])
    # <vision>'s last id, 2 codes, eov, </vision>.
    assert grammar.allowed(asked, 5).banned == ()
    assert grammar.allowed(asked, 4).banned == (2,)
    assert grammar.allowed(State(), 4).banned == ()
    full = State(clip=0, place=2)
    assert grammar.allowed(full, 5).ids == (4, 5)
    assert grammar.allowed(full, 4).ids == (5,)


def test_text_models_open_nothing() -> None:
    allowed = Grammar().allowed(Grammar().start([1, 2], [TEXT, TEXT]), 1)
    assert (allowed.modality, allowed.ids, allowed.banned) == (TEXT, None, ())


def test_prompts_that_break_the_grammar_are_refused() -> None:
    grammar = Grammar(codebook_size=4, codes_per_frame=2, start_ids=(1, 2), end_ids=(3,))
    clip = vision_tokens([[0, 1], [2, 3]], 4).tolist()
    for tokens, modality, words in (
        ([1, 2, 4], [TEXT, TEXT, VISION], "token 2 (vision id 4) does not fit: code 0 of frame 0"),
        ([1, 2, 0, 9], [TEXT, TEXT, VISION, TEXT], "token 3 (text id 9) does not fit"),
        ([1, 0], [TEXT, VISION], "outside a clip there is text"),
        ([1, 2, 0, 4], [TEXT, TEXT, VISION, VISION], "code 1 of frame 0 must be a vision id below"),
        ([1, 2, 0, 1, 2], [TEXT, TEXT, *[VISION] * 3], "frame 0 must end in eof 4 or eov 5"),
    ):
        with pytest.raises(ValueError, match="does not fit") as refused:
            grammar.start(tokens, modality)
        assert words in str(refused.value)
    # What follows a clip is the user's: with </vision> or without.
    for rest in ([3, 6], [6]):
        tokens = [1, 2, *clip, *rest]
        modality = [TEXT, TEXT, *[VISION] * len(clip), *[TEXT] * len(rest)]
        assert grammar.start(tokens, modality).free
    # Who writes of <vision> opens no clip.
    for tokens in ([1, 2, 9], [1, 2, 1, 9], [1, 2, 3]):
        assert grammar.start(tokens, [TEXT] * len(tokens)).free
    assert grammar.start([1, 2, 1, 2, 0], [*[TEXT] * 4, VISION]).in_clip
    assert replace(grammar, max_frames=0).start([1, 2], [TEXT, TEXT]).free
    opened = grammar.start([1, 2], [TEXT, TEXT])
    with pytest.raises(ValueError, match=r"takes 4 more tokens \(1 frames of 3 and </vision>\)"):
        grammar.check_room(opened, 3)
    with pytest.raises(ValueError, match="start_ids and grammar.end_ids are empty"):
        Grammar(codebook_size=4)
    with pytest.raises(ValueError, match="clip_frames=0 is below 1"):
        Grammar(clip_frames=0)
