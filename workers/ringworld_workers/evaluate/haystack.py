"""Haystacks: text of an exact number of tokens, and where its sentences end.

Text is put together from pieces that are tokenized apart, so that lengths are exact and prompts
that begin alike have the same first tokens. White space within it is made one space.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ringworld_jobs.needle_format import HaystackSpec
from ringworld_workers.data.chunks import sentences
from ringworld_workers.data.draft import WorkItem
from ringworld_workers.data.files import DataError, InputFile, resolve
from ringworld_workers.data.text_sources import Document, documents, format_of, parts
from ringworld_workers.data.tokenizer import TextTokenizer

_ANCHOR = "."
_FIRST_BATCH, _BATCH = 8, 512
"""Sentences that are tokenized at once: few at first, since a short haystack needs no more."""
_KEPT_BYTES = 64 << 20
"""Of texts that are kept for the next haystack."""


@dataclass(frozen=True, slots=True, eq=False)
class Haystack:
    """Sentences, each with a space before it.

    Attributes:
        tokens: int64 [n].
        ends: where sentences end, ascending: numbers of tokens, the first 0, the last n. The last
            sentence may be cut short.
        texts: the sentences; of the last maybe more than ``tokens`` holds.
    """

    tokens: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]
    texts: tuple[str, ...]

    def cut(self, tokens: int) -> Haystack:
        """Its first tokens.

        Raises:
            ValueError: it has not so many.
        """
        if not 0 <= tokens <= len(self.tokens):
            raise ValueError(
                f"a haystack of {len(self.tokens):,} tokens cannot be cut to {tokens:,}"
            )
        whole = int(np.searchsorted(self.ends, tokens, side="left"))
        ends = np.append(self.ends[:whole], tokens)
        return Haystack(self.tokens[:tokens], ends, self.texts[:whole])

    def place(self, depth: float) -> int:
        """Where a needle goes: the end of the last sentence that ends by then.

        Args:
            depth: 0 the beginning, 100 the end; percent of the tokens.

        Returns:
            A number of tokens, one of ``ends``.
        """
        wanted = int(depth / 100 * len(self.tokens))
        return int(self.ends[np.searchsorted(self.ends, wanted, side="right") - 1])

    def nearest(self, depth: float) -> int:
        """As ``place``, but the end of the sentence that ends nearest, be it later.

        In texts of a few sentences the earlier end is nearly always the beginning, never the end.
        """
        return int(self.ends[np.abs(self.ends - depth / 100 * len(self.tokens)).argmin()])


def haystack_files(spec: HaystackSpec, base: Path) -> list[InputFile]:
    """The files by label, each once.

    Args:
        spec: which files.
        base: folder that patterns are relative to.

    Raises:
        DataError: a pattern matches no file.
    """
    found: dict[str, InputFile] = {}
    for pattern in spec.files:
        try:
            found.update((file.label, file) for file in resolve(pattern, base))
        except DataError as error:
            raise DataError(f"haystack.files: {error}") from error
    return [found[label] for label in sorted(found)]


class Haystacks:
    """Draws haystacks from text files. The same seed gives the same one."""

    def __init__(self, spec: HaystackSpec, base: Path, tokenizer: TextTokenizer) -> None:
        """Find the files; none is read yet.

        Args:
            spec: which files.
            base: folder that patterns are relative to.
            tokenizer: the model's.

        Raises:
            DataError: a pattern matches no file.
        """
        self._items = [
            WorkItem("haystack", number, file, part.start, part.stop, part.first)
            for number, file in enumerate(haystack_files(spec, base))
            for part in parts(file, format_of(file))
        ]
        self._kept: dict[int, list[list[str]]] = {}
        self._room = _KEPT_BYTES
        self._spec, self._tokenizer = spec, tokenizer

    def draw(self, tokens: int, seed: str) -> Haystack:
        """A haystack of exactly so many tokens.

        Files come in an order drawn by the seed, and the first document begins at a sentence drawn
        from its first half.

        Raises:
            DataError: the files hold less text, and it is not to be repeated.
        """
        random_ = random.Random(seed)
        held: list[list[int]] = []
        texts: list[str] = []
        count = 0
        for batch in self._batches(random_):
            for text, ids in zip(batch, self._encoded(batch), strict=True):
                held.append(ids)
                texts.append(text)
                count += len(ids)
                if count >= tokens:
                    ends = np.cumsum([0, *map(len, held)])
                    joined = np.concatenate([np.asarray(one, np.int64) for one in held])
                    return Haystack(joined, ends, tuple(texts)).cut(tokens)
        raise DataError(
            f"haystack.files hold {count:,} tokens from where the draw began, and {tokens:,} are "
            f"needed; name more text, or set haystack.repeat: true"
        )

    def _encoded(self, batch: Sequence[str]) -> list[list[int]]:
        return encode_within(self._tokenizer, batch)

    def _batches(self, random_: random.Random) -> Iterator[list[str]]:
        """Sentences in order, each with its space; endless where text is repeated."""
        first, something, size = True, True, _FIRST_BATCH
        while something:
            something = False
            for found in self._documents(random_):
                begin = random_.randrange(len(found) // 2 + 1) if first else 0
                first = False
                while begin < len(found):
                    something = True
                    yield found[begin : begin + size]
                    begin, size = begin + size, min(2 * size, _BATCH)
            something = something and self._spec.repeat

    def _documents(self, random_: random.Random) -> Iterator[list[str]]:
        """Each document's sentences; parts of files in an order drawn at random."""
        order = list(range(len(self._items)))
        random_.shuffle(order)
        for number in order:
            kept = self._kept.get(number)
            if kept is not None:
                yield from kept
                continue
            item, read, size = self._items[number], [], 0
            for found in documents(item, format_of(item.file), self._spec.text_field):
                # What cannot be read is no haystack; if nothing can, `draw` finds no text.
                if isinstance(found, Document) and found.text.strip():
                    held = _sentences(found.text)
                    size += len(found.text)
                    if size <= self._room:
                        read.append(held)
                    yield held
            if size <= self._room:
                self._kept[number] = read
                self._room -= size


def _sentences(text: str) -> list[str]:
    """The sentences of a text, each with a space before it."""
    found = (text[begin:end].split() for begin, end in sentences(text))
    return [" " + " ".join(words) for words in found if words]


def encode_within(tokenizer: TextTokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Ids of texts as they are within a longer one, after a full stop.

    A tokenizer that marks words would else begin each with a mark of its own.
    """
    anchor = tokenizer.encode(_ANCHOR)
    found = tokenizer.encode_batch([_ANCHOR + text for text in texts])
    if all(ids[: len(anchor)] == anchor for ids in found):
        return [ids[len(anchor) :] for ids in found]
    # A tokenizer that joins a full stop and what follows it.
    return [
        ids[len(anchor) :] if ids[: len(anchor)] == anchor else tokenizer.encode(text)
        for ids, text in zip(found, texts, strict=True)
    ]
