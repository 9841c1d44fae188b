"""LWM's chat strings, piece by piece, and where the loss lies."""

from __future__ import annotations

import numpy as np
import pytest

from ringworld_workers.data.chat_template import ChatTemplate, Content, Role, Turn
from ringworld_workers.data.draft import Part, SpecialPart, TextPart, VisionPart

CODES = np.arange(4, dtype=np.int32).reshape(2, 2)


def turns(*pairs: tuple[Role, Content]) -> list[Turn]:
    return [Turn(role, (content,)) for role, content in pairs]


def spelled(parts: tuple[Part, ...]) -> list[tuple[str, bool]]:
    """Each part in short, and whether it carries loss."""
    shown = []
    for part in parts:
        if isinstance(part, TextPart):
            shown.append((part.spelled(marks_words=False), part.loss))
        elif isinstance(part, SpecialPart):
            shown.append((f"<{part.token}>", part.loss))
        else:
            shown.append((f"clip{part.codes.shape}", part.loss))
    return shown


def test_one_question_is_spelled_as_lwm_does() -> None:
    parts = ChatTemplate().parts(turns(("user", "Why?"), ("assistant", "Because.")))
    assert spelled(parts) == [
        ("<bos>", False),
        ("You are a helpful assistant. USER: Why? ASSISTANT:", False),
        (" Because.", True),
        ("<eos>", True),
    ]
    # A tokenizer that marks words writes the space itself.
    assert isinstance(parts[2], TextPart) and parts[2].spelled(marks_words=True) == "Because."


def test_the_system_line_comes_once_and_every_answer_carries_loss() -> None:
    talk = turns(("user", "A?"), ("assistant", "a"), ("user", "B?"), ("assistant", "b"))
    assert spelled(ChatTemplate().parts(talk)) == [
        ("<bos>", False),
        ("You are a helpful assistant. USER: A? ASSISTANT:", False),
        (" a", True),
        ("<eos>", True),
        ("USER: B? ASSISTANT:", False),
        (" b", True),
        ("<eos>", True),
    ]
    own = ChatTemplate().parts(
        turns(("system", "Be terse."), *[(t.role, t.content[0]) for t in talk])
    )
    assert spelled(own)[1] == ("Be terse. USER: A? ASSISTANT:", False)
    bare = ChatTemplate(system="", user_prefix="Q:", assistant_prefix="A:").parts(talk)
    assert spelled(bare)[1] == ("Q: A? A:", False)


def test_a_clip_in_a_question_stands_where_lwm_puts_it() -> None:
    talk = [Turn("user", ("What is this?", CODES)), Turn("assistant", ("A ring.",))]
    assert spelled(ChatTemplate().parts(talk)) == [
        ("<bos>", False),
        ("You are a helpful assistant. USER: What is this?\n", False),
        ("<vision>", False),
        ("clip(2, 2)", False),
        ("</vision>", False),
        (" ASSISTANT:", False),
        (" A ring.", True),
        ("<eos>", True),
    ]


def test_clips_first_and_in_a_row_and_as_the_answer() -> None:
    talk = [Turn("user", (CODES, CODES, "Draw it.")), Turn("assistant", ("Here:", CODES))]
    parts = ChatTemplate(system="").parts(talk)
    clip = lambda loss: [("<vision>", loss), ("clip(2, 2)", loss), ("</vision>", loss)]  # noqa: E731
    assert spelled(parts) == [
        ("<bos>", False),
        ("USER:", False),
        *clip(False),
        *clip(False),
        (" Draw it. ASSISTANT:", False),
        (" Here:", True),
        *clip(True),
        ("<eos>", True),
    ]
    assert sum(isinstance(part, VisionPart) for part in parts) == 3


@pytest.mark.parametrize(
    ("talk", "message"),
    [
        ([], "no message of role 'assistant'"),
        ([("user", "A?")], "no message of role 'assistant'"),
        ([("assistant", "a")], "message 1 is of role 'assistant', expected 'user'"),
        ([("user", "A?"), ("user", "B?"), ("assistant", "b")], "message 2 .*expected 'assistant'"),
        ([("user", "A?"), ("system", "s"), ("assistant", "b")], "message 2 is of role 'system'"),
        ([("user", "A?"), ("assistant", "a"), ("user", "B?")], "message 3, the last"),
        ([("user", " "), ("assistant", "a")], r"message 1 \(user\) is empty"),
        ([("system", "s"), ("user", "A?"), ("assistant", "")], r"message 3 \(assistant\) is empty"),
        ([("system", CODES), ("user", "A?"), ("assistant", "a")], "message 1 .*holds media"),
    ],
)
def test_conversations_out_of_order_are_refused(
    talk: list[tuple[Role, Content]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ChatTemplate().parts(turns(*talk))
