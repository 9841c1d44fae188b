"""Many prompts on one ring, each prefix that neighbours share read once.

Prompts of a batch form a tree by what they begin with: a row is read as far as all of a branch go
together, and forked where they part. One row stays from batch to batch, cut back to what the next
one begins with too. It is exact: the keys and values of a token depend on what stands before it
alone. Only their last digits depend on how passes are cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from ringworld_model.decode import DecodeSession
from ringworld_model.sampling.answer import Answer
from ringworld_model.sampling.prompt import Prompt, padded
from ringworld_workers.evaluate.task import EvaluationRing

LEAST_SHARED = 64
"""Fewer tokens are read again rather than forked: a fork is a kernel call in each later step."""
MOST_PROMPTS = 32
"""Prompts of a batch: a step makes a kernel call for each row, so more gain little."""

T = TypeVar("T")
Key = npt.NDArray[np.int64]
"""A prompt as numbers that tell text and vision ids apart."""


@dataclass
class Asker:
    """Greedy answers to prompts, in batches of bounded size. All ranks of the ring act alike.

    Attributes:
        ring: that answers.
        max_length: tokens of a prompt and its answer at most.
        answer_tokens: of an answer at most.
        batch_tokens: of the prompts and answers of a batch at most; one prompt is always taken,
            and never more than ``MOST_PROMPTS``.
        stop: texts that end an answer.
        read: tokens that were read, of prompts that had ``asked`` in all.
        asked: tokens of all prompts so far.
    """

    ring: EvaluationRing
    max_length: int
    answer_tokens: int
    batch_tokens: int
    stop: tuple[str, ...] = ()
    read: int = field(init=False, default=0)
    asked: int = field(init=False, default=0)
    _session: DecodeSession = field(init=False)
    _kept: tuple[int, Key] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        """Begin without a row."""
        self._session = self.ring.session(self.max_length)

    def ask_all(self, asked: Iterable[tuple[T, Prompt]]) -> Iterator[tuple[T, Answer]]:
        """The answers, in order.

        Args:
            asked: prompts, each with what names it; neighbours should begin alike.
        """
        batch: list[tuple[T, Prompt]] = []
        held = 0
        for name, prompt in asked:
            needed = len(prompt) + self.answer_tokens
            full = held + needed > self.batch_tokens or len(batch) == MOST_PROMPTS
            if batch and full:
                yield from self._named(batch)
                batch, held = [], 0
            batch.append((name, prompt))
            held += needed
        if batch:
            yield from self._named(batch)

    def _named(self, batch: Sequence[tuple[T, Prompt]]) -> Iterator[tuple[T, Answer]]:
        answers = self.ask([prompt for _, prompt in batch])
        yield from ((name, answer) for (name, _), answer in zip(batch, answers, strict=True))

    def ask(self, prompts: Sequence[Prompt]) -> list[Answer]:
        """The answers to one batch.

        Args:
            prompts: at least one.
        """
        session = self._session
        keys = [_key(prompt) for prompt in prompts]
        self.asked += sum(map(len, keys))
        row, start = self._begin(keys)
        order = sorted(range(len(keys)), key=lambda at: keys[at].tobytes())
        tree = _Tree(session, prompts, keys, order)
        leaves = dict(tree.grow(row, start, 0, len(order)))
        self.read += tree.read
        rows = [leaves[at][0] for at in range(len(prompts))]
        self._fill(prompts, leaves)
        last = [_part(prompt, len(prompt) - 1, len(prompt)) for prompt in prompts]
        answers = self.ring.ask(
            last, self.answer_tokens, stop=self.stop, session=session, rows=rows
        )
        session.drop(rows[:-1])
        self._kept = rows[-1], keys[-1]
        return answers

    def _begin(self, keys: Sequence[Key]) -> tuple[int, int]:
        """The row that the batch begins with, and how many of its tokens all prompts share."""
        if self._kept is not None:
            row, kept = self._kept
            shared = min(_common(kept, key) for key in keys)
            if shared >= LEAST_SHARED:
                self._session.rewind({row: shared})
                return row, shared
        self._session.rewind({})
        return self._session.add_rows(1)[0], 0

    def _fill(self, prompts: Sequence[Prompt], leaves: dict[int, tuple[int, int]]) -> None:
        """Read what each row lacks of its prompt, but for the last token."""
        left = [
            (row, _part(prompts[at], have, len(prompts[at]) - 1))
            for at, (row, have) in sorted(leaves.items())
            if have < len(prompts[at]) - 1
        ]
        if not left:
            return
        tokens, lengths, modality = padded([part for _, part in left], self._session.device)
        self._session.prefill(
            tokens,
            lengths,
            modality=modality,
            rows=[row for row, _ in left],
            on_chunk=lambda done, total: self.ring.progress(f"{done:,}/{total:,} tokens"),
        )
        self.read += sum(lengths)


@dataclass
class _Tree:
    """The rows of one batch, grown along what its prompts share."""

    session: DecodeSession
    prompts: Sequence[Prompt]
    keys: Sequence[Key]
    order: Sequence[int]
    read: int = 0
    _common: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self._common = [
            _common(self.keys[one], self.keys[other])
            for one, other in zip(self.order, self.order[1:], strict=False)
        ]

    def grow(
        self, row: int, have: int, first: int, stop: int
    ) -> Iterator[tuple[int, tuple[int, int]]]:
        """Rows for the prompts ``order[first:stop]``, which all begin with what ``row`` holds.

        Yields:
            The prompt, and its row and how many of its tokens that holds.
        """
        if stop - first == 1:
            yield self.order[first], (row, have)
            return
        shared = min(self._common[first : stop - 1])
        if shared - have >= LEAST_SHARED:
            tokens, _, modality = padded(
                [_part(self.prompts[self.order[first]], have, shared)], self.session.device
            )
            self.session.prefill(tokens, modality=modality, rows=[row])
            self.read += shared - have
            have = shared
        # Equal prompts share all but the last token, and each has a row of its own.
        cuts = [at + 1 for at in range(first, stop - 1) if self._common[at] == shared]
        bounds = [first, *cuts, stop]
        more = len(bounds) - 2
        # Rows of their own begin at different ranks; a fork begins where its origin does.
        others = self.session.fork(row, more) if have else self.session.add_rows(more)
        for branch, (begin, end) in zip(
            [row, *others], zip(bounds, bounds[1:], strict=False), strict=True
        ):
            yield from self.grow(branch, have, begin, end)


def _key(prompt: Prompt) -> Key:
    return prompt.tokens * 2 + prompt.modality.astype(np.int64)


def _common(one: Key, other: Key) -> int:
    """Tokens that two prompts begin with alike, all but the last at most."""
    length = min(len(one), len(other)) - 1
    differ = np.flatnonzero(one[:length] != other[:length])
    return int(differ[0]) if len(differ) else length


def _part(prompt: Prompt, start: int, stop: int) -> Prompt:
    return Prompt(prompt.tokens[start:stop], prompt.modality[start:stop])
