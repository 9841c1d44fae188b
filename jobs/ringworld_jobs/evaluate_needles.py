"""Settings of the needle tests: one needle, many, and a marked frame in a clip."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ringworld_jobs.evaluate_base import TaskSpec, absolute_pattern, too_long
from ringworld_jobs.needle_format import HaystackSpec, NeedleFormat
from ringworld_jobs.problem import KeyPath
from ringworld_jobs.spec_base import Auto, Share, Size
from ringworld_jobs.units import ContextLength, Tokens, format_tokens

Percent = Annotated[float, Field(ge=0, le=100)]
Depths = Annotated[list[Percent], Field(min_length=1)]
Lengths = Annotated[list[ContextLength], Field(min_length=1)]
_SHORTEST_AUTO = 256
"""Least of the lengths that are chosen by themselves: words and answer leave less no text."""
_CHEAPEST = 64
"""Fewest tokens that question and words could ever take beside the answer."""


class HaystackTask(TaskSpec):
    """What the tests with needles in text share."""

    depths: Annotated[int, Field(ge=1, le=101)] | Depths = 10
    """How deep needles stand, in percent of the text: so many depths, evenly from 0 to 100, or a
    list of them. A needle goes to the end of the last sentence before its depth."""
    rounds: Size = 1
    """How often each case is asked, in other text and with other numbers."""
    answer_tokens: Size = 32
    """Tokens of an answer at most. Prompt and answer together have exactly the length that is
    tested."""
    batch_tokens: Tokens | None = None
    """Tokens of prompts that are asked at one time, at most, over the ring; empty: twice the
    context length. More is faster where short prompts are asked, and takes memory."""
    haystack: HaystackSpec = HaystackSpec()
    """The text."""
    format: NeedleFormat = NeedleFormat()
    """The words."""
    seed: Annotated[int, Field(ge=0)] | None = None
    """Of text, cities and numbers; empty: the job's."""

    def depth_list(self) -> list[float]:
        """The depths, in percent."""
        if isinstance(self.depths, list):
            return self.depths
        if self.depths == 1:
            return [50.0]
        return [round(100 * at / (self.depths - 1), 2) for at in range(self.depths)]

    def patterns(self) -> Iterator[tuple[KeyPath, str]]:
        """See ``TaskSpec.patterns``."""
        for index, pattern in enumerate(self.haystack.files):
            yield ("haystack", "files", index), pattern

    def absolute(self, base: Path) -> Self:
        """See ``TaskSpec.absolute``."""
        files = [absolute_pattern(pattern, base) for pattern in self.haystack.files]
        haystack = self.haystack.model_copy(update={"files": files})
        return self.model_copy(update={"haystack": haystack})

    def _fitting(self, lengths: list[int] | Auto, context_length: int) -> Iterator[tuple[str, str]]:
        if lengths == "auto":
            lengths = [context_length]
        else:
            yield from too_long("lengths", lengths, context_length)
        shortest = min(lengths)
        if self.answer_tokens + _CHEAPEST > shortest:
            yield (
                "answer_tokens",
                f"{self.answer_tokens} tokens for an answer leave less than {_CHEAPEST} of "
                f"{format_tokens(shortest)} for the text; lower it, or test greater lengths",
            )


class NeedleTask(HaystackTask):
    """One needle in a long text: whether the model finds it, by context length and depth.

    The score is the paper's: 1 where the number is part of the answer, else 0; no half points.
    """

    lengths: Lengths | Auto = "auto"
    """Context lengths. auto: an eighth, a quarter, half and all of the context, from 256 tokens
    on."""
    min_accuracy: Share | None = None
    """Least share of right answers, over all lengths and depths, that passes."""

    def length_list(self, context_length: int) -> list[int]:
        """The lengths for a model of some context."""
        if self.lengths != "auto":
            return self.lengths
        parts = [context_length // part for part in (8, 4, 2)]
        return [part for part in parts if part >= _SHORTEST_AUTO] + [context_length]

    def problems(self, context_length: int) -> Iterator[tuple[str, str]]:
        """See ``TaskSpec.problems``."""
        yield from self._fitting(self.lengths, context_length)


class MultiNeedleTask(HaystackTask):
    """Several needles in a long text, of which some are asked for, each of another city.

    An answer's score is the share of the numbers asked for that are part of it.
    """

    lengths: Lengths | Auto = "auto"
    """Context lengths. auto: all of the context."""
    cases: Annotated[
        list[Annotated[list[Size], Field(min_length=2, max_length=2)]], Field(min_length=1)
    ] = [[2, 1], [2, 2], [4, 1], [4, 2]]
    """How many needles are hidden and how many of them are asked for, in each case."""
    rounds: Size = 10
    """How often each case is asked, in other text, of other depths, with other numbers."""
    answer_tokens: Size = 64
    """Tokens of an answer at most. Prompt and answer together have exactly the length that is
    tested."""
    min_accuracy: Share | None = None
    """Least mean score, over all cases and lengths, that passes."""

    @model_validator(mode="after")
    def _cases(self) -> MultiNeedleTask:
        for hidden, asked in self.cases:
            if asked > hidden:
                raise ValueError(
                    f"cases: {asked} of {hidden} needles are asked for; write [hidden, asked], the "
                    f"second at most the first"
                )
            if hidden > len(self.depth_list()):
                raise ValueError(
                    f"cases: {hidden} needles need different depths, and there are "
                    f"{len(self.depth_list())}; raise depths"
                )
        return self

    def length_list(self, context_length: int) -> list[int]:
        """The lengths for a model of some context."""
        return [context_length] if self.lengths == "auto" else self.lengths

    def problems(self, context_length: int) -> Iterator[tuple[str, str]]:
        """See ``TaskSpec.problems``."""
        yield from self._fitting(self.lengths, context_length)


class VideoNeedleTask(TaskSpec):
    """Marked frames in a long clip: frames of one colour among others.

    Asked for what they show, a right answer names the colour of the frame at a position; asked for
    where they are, the position of the frame of a colour.
    """

    frames: Annotated[list[Size], Field(min_length=1)] | Auto = "auto"
    """Frames of a clip. auto: a quarter, half and all of what the context holds."""
    depths: Annotated[int, Field(ge=1, le=101)] | Depths = 5
    """Where the frame that is asked for stands, in percent of the clip: so many depths, evenly from
    the first frame to the last, or a list of them."""
    marked: Annotated[int, Field(ge=1, le=8)] = 2
    """Marked frames of a clip, each of another colour; one is asked for."""
    ask: Annotated[list[Literal["colour", "position"]], Field(min_length=1)] = [
        "colour",
        "position",
    ]
    """What is asked: the colour of the frame at a position, or the position of a colour's frame."""
    colour_question: str = "What colour is frame {position} of the video?"
    """Asks for a colour, by {position}, counted from 1."""
    position_question: str = "Which frame of the video is {colour}? Answer with its number."
    """Asks for a position, by {colour}."""
    background: str | None = None
    """A video whose frames are the others, relative to the job; it is begun again where it is too
    short. Empty: grey patterns that move."""
    fps: Annotated[float, Field(gt=0)] = 4.0
    """Frames taken per second of the background."""
    rounds: Size = 1
    """How often each case is asked, with other colours and positions."""
    answer_tokens: Size = 16
    """Tokens of an answer at most."""
    seed: Annotated[int, Field(ge=0)] | None = None
    """Of colours, positions and patterns; empty: the job's."""
    min_accuracy: Share | None = None
    """Least share of right answers that passes."""

    @model_validator(mode="after")
    def _placeholders(self) -> VideoNeedleTask:
        for name, wanted in (
            ("colour_question", "{position}"),
            ("position_question", "{colour}"),
        ):
            if wanted not in getattr(self, name):
                raise ValueError(f"{name} holds no {wanted}, so it would ask for nothing")
        return self

    def depth_list(self) -> list[float]:
        """The depths, in percent."""
        if isinstance(self.depths, list):
            return self.depths
        if self.depths == 1:
            return [50.0]
        return [round(100 * at / (self.depths - 1), 2) for at in range(self.depths)]

    def patterns(self) -> Iterator[tuple[KeyPath, str]]:
        """See ``TaskSpec.patterns``."""
        if self.background is not None:
            yield ("background",), self.background

    def absolute(self, base: Path) -> Self:
        """See ``TaskSpec.absolute``."""
        if self.background is None:
            return self
        return self.model_copy(update={"background": absolute_pattern(self.background, base)})
