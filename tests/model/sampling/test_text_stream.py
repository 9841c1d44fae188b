"""Text as it comes is the text as it would be decoded at the end, and never shows a stop text."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from ringworld_model.sampling import TextStream


def decode(ids: Sequence[int]) -> str:
    """A tokenizer of single bytes."""
    return bytes(ids).decode("utf-8", errors="replace")


def sentence_piece(ids: Sequence[int]) -> str:
    """One whose words bring their space along, which the first word of a text loses."""
    return "".join([" ab", " c", "d"][id_] for id_ in ids).removeprefix(" ")


TEXTS = st.text(st.sampled_from("ab<é\U0001f600\n"), max_size=30)


@settings(max_examples=200, deadline=None)
@given(TEXTS, st.lists(st.sampled_from(["ab", "b<", "éa", "aab", "\U0001f600"]), max_size=2))
def test_pieces_join_to_the_text_before_the_first_stop(text: str, stop: list[str]) -> None:
    stream = TextStream(decode, stop=stop)
    pieces = []
    for byte in text.encode():
        pieces.append(stream.push(byte))
        assert not any(word in "".join(pieces) for word in stop)
    pieces.append(stream.finish())
    at = [text.find(word) for word in stop if word in text]
    assert "".join(pieces) == (text[: min(at)] if at else text)
    assert (stream.stopped is not None) == bool(at)


def test_only_what_may_become_a_stop_is_held_back() -> None:
    stream = TextStream(decode, stop=["STOP"])
    assert [stream.push(byte) for byte in b"aSTSTOx"] == ["a", "", "", "ST", "", "", "STOx"]
    assert [stream.push(byte) for byte in "é".encode()] == ["", "é"]


def test_spaces_depend_on_what_stands_before() -> None:
    alone = TextStream(sentence_piece)
    assert [alone.push(id_) for id_ in (0, 1, 2)] == ["ab", " c", "d"]
    behind = TextStream(sentence_piece, before=[0])
    assert [behind.push(id_) for id_ in (1, 2, 0)] == [" c", "d", " ab"]


def test_a_held_text_is_cut_out() -> None:
    stream = TextStream(decode, held=["<vision>"])
    assert "".join(stream.push(byte) for byte in b"see <vision>") == "see "
    assert stream.cut("<vision>", b"</vision>") == ""
    assert "".join(stream.push(byte) for byte in b" <visit>") == " <visit>"
