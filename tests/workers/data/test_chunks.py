"""Chunks: they are the text, they fit, and they are cut between sentences."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringworld_workers.data.chunks import cut_chunks, sentences


def words(texts: Sequence[str]) -> list[int]:
    return [len(text.split()) for text in texts]


def characters(texts: Sequence[str]) -> list[int]:
    return [len(text) for text in texts]


def test_sentences_of_real_prose() -> None:
    text = (
        'Mr. A. B. Smith paid $3.50 in the U.S. yesterday. Did he? "Yes." He said so.\n\n'
        "A heading\n \nIt cost 2.5 million, i.e. a lot! \u4e00\u53e5\u3002\u53c8\u4e00\u53e5\u3002"
    )
    assert [text[start:stop].strip() for start, stop in sentences(text)] == [
        "Mr. A. B. Smith paid $3.50 in the U.S. yesterday.",
        "Did he?",
        '"Yes."',
        "He said so.",
        "A heading",
        "It cost 2.5 million, i.e. a lot!",
        "\u4e00\u53e5\u3002",
        "\u53c8\u4e00\u53e5\u3002",
    ]


def test_chunks_end_with_sentences_and_hold_as_many_as_fit() -> None:
    text = " ".join(f"This is the sentence of number {n}." for n in range(20))  # 7 words each
    chunks = cut_chunks(text, 30, words)
    assert [chunk.tokens for chunk in chunks] == [28] * 5
    assert all(text[chunk.start : chunk.stop].endswith(".") for chunk in chunks)


@pytest.mark.parametrize("text", ["", " \n\n "])
def test_blank_text_has_no_chunk(text: str) -> None:
    assert cut_chunks(text, 10, words) == []


def test_a_sentence_above_the_limit_is_cut_between_words_and_a_word_between_characters() -> None:
    chunks = cut_chunks("many words and no full stop at all in it", 12, characters)
    assert all(chunk.tokens <= 12 for chunk in chunks)
    text = "x" * 100
    chunks = cut_chunks(text, 12, characters)
    assert [chunk.tokens <= 12 for chunk in chunks] == [True] * len(chunks)
    assert "".join(text[chunk.start : chunk.stop] for chunk in chunks) == text


@settings(deadline=None, max_examples=60)
@given(st.text(st.sampled_from('aB .!?\n\u3002"'), max_size=200), st.integers(1, 20))
def test_whatever_the_text_chunks_are_all_of_it_and_fit(text: str, limit: int) -> None:
    chunks = cut_chunks(text, limit, characters)
    joined = "".join(text[piece.start : piece.stop] for chunk in chunks for piece in chunk.pieces)
    assert joined == (text if text.strip() else "")
    assert all(chunk.tokens <= limit for chunk in chunks)
