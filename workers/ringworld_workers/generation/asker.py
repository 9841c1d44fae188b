"""One rank's part in answering: its model and its share of the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch.distributed as dist

from ringworld_model.decode import DEFAULT_CHUNK, DecodeSession, Mark
from ringworld_model.generate import Cancelled, generate
from ringworld_model.sampling.answer import Event
from ringworld_model.sampling.prompt import Prompt, padded
from ringworld_workers.generation.asks import Ask
from ringworld_workers.generation.loading import LoadedModel

OnChunk = Callable[[int, int], None]


class Asker:
    """Answers on one rank; the methods are collectives: every rank calls them alike.

    Attributes:
        loaded: the model.
        session: its rows, the ring's cache.
    """

    def __init__(
        self, loaded: LoadedModel, group: dist.ProcessGroup | None, chunk: int = DEFAULT_CHUNK
    ) -> None:
        """Take a model and a ring; None: this process alone."""
        self.loaded = loaded
        self.session = DecodeSession(
            loaded.model, group, max_length=loaded.context_length, chunk=chunk
        )

    def answer(
        self,
        asks: Sequence[Ask],
        row: int | None = None,
        *,
        cancelled: Cancelled | None = None,
        on_chunk: OnChunk | None = None,
    ) -> Iterator[Event]:
        """Answers to some asks at the same time; see ``generate``.

        Args:
            asks: at least one.
            row: of the session that the only ask goes on with; None: rows of their own.
            cancelled: which asks to end now; of the first rank alone.
            on_chunk: told the tokens read, and in all; of the first rank alone.
        """
        yield from generate(
            self.session,
            [ask.prompt for ask in asks],
            [ask.settings for ask in asks],
            grammar=[ask.grammar for ask in asks],
            decode=self.loaded.tokenizer.decode,
            rows=None if row is None else [row],
            unguided_ids=(self.loaded.tokenizer.bos_id,),
            cancelled=cancelled,
            on_chunk=on_chunk,
        )

    def open(self) -> int:
        """A new row that stays."""
        return self.session.add_rows(1)[0]

    def read(self, row: int, prompt: Prompt, *, on_chunk: OnChunk | None = None) -> None:
        """Put a prompt behind a row."""
        tokens, lengths, modality = padded([prompt], self.session.device)
        self.session.prefill(tokens, lengths, modality=modality, rows=[row], on_chunk=on_chunk)

    def mark(self) -> Mark:
        """How long the rows are."""
        return self.session.mark()

    def rewind(self, mark: Mark) -> None:
        """Take back what came after a mark."""
        self.session.rewind(mark)
