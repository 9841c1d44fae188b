"""Needles in haystacks as training examples, in the words of the needle evaluation.

{system} USER: {haystack with needles} {question} ASSISTANT: {answer}<eos>USER: {question} ...
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from ringworld_jobs.recipe_needles import NeedlesDataset
from ringworld_workers.data.chat_template import ChatTemplate, Turn
from ringworld_workers.data.draft import Draft, Refused, WorkItem
from ringworld_workers.data.files import DataError
from ringworld_workers.data.text_sources import Document, documents, format_of, parts
from ringworld_workers.data.tokenizer import TextTokenizer, load_tokenizer
from ringworld_workers.evaluate.cities import draw_cities, draw_numbers
from ringworld_workers.evaluate.haystack import haystack_files
from ringworld_workers.evaluate.needle_documents import NeedleDocument, check_room, make_documents
from ringworld_workers.evaluate.needle_prompt import Wording, template_of

_ITEM_DOCUMENTS = 64
"""Documents of an item at most: a lost task makes so many anew."""


class NeedleReader:
    """The documents of one needles dataset, each an example."""

    def __init__(
        self, name: str, dataset: NeedlesDataset, base: Path, tokenizer_file: Path
    ) -> None:
        """Remember what to make; nothing is read yet.

        Args:
            name: of the dataset.
            dataset: what to make.
            base: folder of the recipe.
            tokenizer_file: what ``load_tokenizer`` takes: lengths are counted in its tokens.
        """
        self._name, self._spec, self._base = name, dataset.make, base
        self._tokenizer_file = tokenizer_file

    def items(self) -> Sequence[WorkItem]:
        """Numbers of documents, dealt out over the haystack's files: each file is in an item.

        Raises:
            DataError: a pattern of the haystack matches no file.
        """
        files = haystack_files(self._spec.haystack, self._base)
        count = self._spec.documents
        shares = max(len(files), -(-count // _ITEM_DOCUMENTS))
        edges = [count * share // shares for share in range(shares + 1)]
        return [
            WorkItem(self._name, at, files[at % len(files)], edges[at], edges[at + 1], at + 1)
            for at in range(shares)
        ]

    def training_texts(self, item: WorkItem) -> Iterator[str]:
        """Needles and questions as such documents have them, and the item's file."""
        words, chat = self._spec.format, template_of(self._spec.format, ChatTemplate())
        for number in range(_ITEM_DOCUMENTS):
            random_ = random.Random(f"{self._spec.seed} words {item.number} {number}")
            (city,) = draw_cities(random_, 1, self._spec.made_up)
            (code,) = draw_numbers(random_, 1, words.digits, evaluated=False)
            yield words.needle_of(city, code)
            question, answer = words.question_of([city], of_many=False), words.answer_of(city, code)
            yield f"{chat.user_prefix} {question} {chat.assistant_prefix} {answer}"
        for part in parts(item.file, format_of(item.file)):
            whole = WorkItem(item.dataset, 0, item.file, part.start, part.stop, part.first)
            for found in documents(whole, format_of(item.file), self._spec.haystack.text_field):
                if isinstance(found, Document):
                    yield found.text

    def check(self) -> None:
        """Tell at once what else would be told once the haystack is read; see ``check_readers``.

        Raises:
            DataError: needles and questions leave a haystack no room.
        """
        with self._named():
            check_room(self._spec, _tokenizer(self._tokenizer_file))

    def drafts(self, item: WorkItem) -> Iterator[Draft | Refused]:
        """The examples of the item's numbers.

        Raises:
            DataError: the haystack's files hold too little text, or needles and questions leave it
                no room.
        """
        tokenizer = _tokenizer(self._tokenizer_file)
        template = Wording(self._spec.format, tokenizer).template
        numbers = range(item.start, self._spec.documents if item.stop is None else item.stop)
        for number, made in zip(numbers, self._made(tokenizer, numbers), strict=True):
            turns: list[Turn] = []
            for at, (question, answer) in enumerate(made.turns):
                asked = question if at else f"{made.context} {question}"
                turns += [Turn("user", (asked,)), Turn("assistant", (answer,))]
            name = f"{self._name} {number + 1}"
            yield Draft(name, name, template.parts(turns))

    def _made(self, tokenizer: TextTokenizer, numbers: Iterable[int]) -> Iterator[NeedleDocument]:
        with self._named():
            yield from make_documents(self._spec, self._base, tokenizer, numbers)

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except ValueError as error:  # DataError is one
            raise DataError(f"datasets.{self._name}.make: {error}") from error


@lru_cache(maxsize=4)
def _tokenizer(path: Path) -> TextTokenizer:
    return load_tokenizer(path)
