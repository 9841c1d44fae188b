"""Examples in the making: what the reader of a dataset kind yields, before it is tokenized.

A reader knows its files; it knows neither tokenizer nor shards. It yields drafts, and for what it
cannot use a refusal with the reason, so that nothing is lost in silence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from ringworld_workers.data.files import InputFile


@dataclass(frozen=True, slots=True)
class TextPart:
    """Text, tokenized by itself and joined to its neighbours as tokens.

    Attributes:
        text: the text.
        loss: whether the model learns to predict it.
        after_space: a space parts it from the text before it; see ``spelled``.
    """

    text: str
    loss: bool = True
    after_space: bool = False

    def spelled(self, marks_words: bool) -> str:
        """What to tokenize.

        A tokenizer that marks the start of a word (SentencePiece, as LWM's) writes the space of its
        own accord, so ``ASSISTANT:`` and ``Yes`` join to ``ASSISTANT: Yes``; for any other the
        space is part of the text, or it would be lost.

        Args:
            marks_words: the tokenizer's ``marks_words``.
        """
        return " " + self.text if self.after_space and not marks_words else self.text


@dataclass(frozen=True, slots=True)
class SpecialPart:
    """One of the tokenizer's document tokens."""

    token: Literal["bos", "eos"]
    loss: bool = True


@dataclass(frozen=True, slots=True)
class VisionPart:
    """Codes of a clip, int32 [F, C]; eof and eov are added, the <vision> delimiters are not."""

    codes: npt.NDArray[np.int32]
    loss: bool = True


Part = TextPart | SpecialPart | VisionPart


@dataclass(frozen=True, slots=True)
class Draft:
    """One example.

    Attributes:
        name: what messages and `inspect` call it: its file, its place there, its layout.
        document: which document it comes from. All examples of a document go to one split.
        parts: in order.
        held_out: True: its file or stretch is kept for validation; False: it is certainly for
            training; None: the recipe's held_out_share decides, by ``document``.
    """

    name: str
    document: str
    parts: tuple[Part, ...]
    held_out: bool | None = None


@dataclass(frozen=True, slots=True)
class Refused:
    """A file or a record that cannot be used.

    Attributes:
        name: the file as the recipe names it, and the place in it (``talks.jsonl line 7``).
        reason: why not, and what would help.
        unusable: False where the recipe itself left it out (too short, no caption): counted under
            ``reason``, not listed one by one, and no error with ``bad_files: refuse``.
    """

    name: str
    reason: str
    unusable: bool = True


@dataclass(frozen=True, slots=True)
class WorkItem:
    """What one task reads: a file, or a part of a large one. Items do not depend on the workers.

    Attributes:
        dataset: name of the dataset.
        number: place among the dataset's items; the examples are written in this order.
        file: the file.
        start: first byte, row group or record of the part; the reader knows which.
        stop: one past its last; None: to the end.
        first: number of the part's first line or row, counted from 1, for messages and names.
    """

    dataset: str
    number: int
    file: InputFile
    start: int = 0
    stop: int | None = None
    first: int = 1


class DatasetReader(Protocol):
    """One dataset kind. Picklable: it travels to the tasks."""

    def items(self) -> Sequence[WorkItem]:
        """All there is to read, in order.

        Raises:
            DataError: a pattern matches no file; names the recipe's entry.
        """

    def training_texts(self, item: WorkItem) -> Iterator[str]:
        """Texts of an item that a tokenizer may learn from: nothing that is certainly held out."""

    def drafts(self, item: WorkItem) -> Iterator[Draft | Refused]:
        """The item's examples, streamed; a file that is unreadable gives a refusal, no error.

        Raises:
            Unavailable: what the reader asks besides its files is not there; the build stops.
        """
