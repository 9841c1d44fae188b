"""What comes out of a generation: events as they happen, and whole answers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

End = Literal["stop", "length", "cancelled", "failed"]
"""Why a row ended: a stop text or id, no more tokens, its asker, or no token could be drawn."""


@dataclass(frozen=True, slots=True, eq=False)
class Event:
    """One token of one row.

    Attributes:
        prompt: which prompt, from 0.
        token: the id; None where a row ends without one (cancelled, failed).
        modality: 0 text, 1 vision: the id's space.
        text: text that has become certain; it may lag behind the tokens.
        frame: int32 [C], the codes of the frame that this token ends; None within one.
        clip_done: whether the frame is its clip's last.
        end: why the row ends with this token; None: it goes on.
        problem: why no token could be drawn; empty where one was. Of the first rank alone.
    """

    prompt: int
    token: int | None
    modality: int
    text: str = ""
    frame: NDArray[np.int32] | None = None
    clip_done: bool = False
    end: End | None = None
    problem: str = ""


@dataclass(slots=True)
class Answer:
    """A row's answer so far.

    Attributes:
        parts: text, and clips as int32 [F, C], in order.
        tokens: number of tokens.
        end: why it ended; None: it has not.
    """

    parts: list[str | NDArray[np.int32]] = field(default_factory=list)
    tokens: int = 0
    end: End | None = None
    _frames: list[NDArray[np.int32]] = field(default_factory=list, repr=False)

    @property
    def text(self) -> str:
        """The text alone."""
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def clips(self) -> list[NDArray[np.int32]]:
        """The clips alone."""
        return [part for part in self.parts if not isinstance(part, str)]

    def add(self, event: Event) -> None:
        """Take in the next event of this row."""
        self.tokens += event.token is not None
        self.end = event.end
        if event.text:
            if self.parts and isinstance(self.parts[-1], str):
                self.parts[-1] += event.text
            else:
                self.parts.append(event.text)
        if event.frame is not None:
            self._frames.append(event.frame)
        if self._frames and (event.clip_done or event.end):
            self.parts.append(np.stack(self._frames))
            self._frames = []


def collect(events: Iterable[Event], prompts: int) -> list[Answer]:
    """Whole answers, one a prompt.

    Args:
        events: of ``generate``.
        prompts: number of prompts.
    """
    answers = [Answer() for _ in range(prompts)]
    for event in events:
        answers[event.prompt].add(event)
    return answers
