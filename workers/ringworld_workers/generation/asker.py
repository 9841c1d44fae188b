"""One rank's part in answering: its model and its share of the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from ringworld_model.decode import DEFAULT_CHUNK, DecodeSession, Mark
from ringworld_model.generate import Cancelled, generate
from ringworld_model.running_batch import RunningBatch
from ringworld_model.sampling.answer import Event
from ringworld_model.sampling.prompt import Prompt, padded
from ringworld_workers.generation.asks import Ask
from ringworld_workers.generation.coder import Coder
from ringworld_workers.generation.loading import LoadedModel, choose_dtype, load_model
from ringworld_workers.generation.source import ModelSource

OnChunk = Callable[[int, int], None]
_TIMEOUT = timedelta(hours=1)
"""Of one collective: a pass over a million tokens takes minutes on a CPU. A rank that dies is
noticed at once, for its connections end with it."""


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
        self._running = RunningBatch(
            self.session,
            decode=loaded.tokenizer.decode,
            unguided_ids=(loaded.tokenizer.bos_id,),
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

    def admit(self, numbers: Sequence[int], asks: Sequence[Ask]) -> None:
        """Let asks join those that are being answered; see ``turns``.

        Args:
            numbers: what their events are told by.
            asks: at least one.

        Raises:
            ValueError: one cannot be answered; none has joined.
        """
        self._running.add(
            [ask.prompt for ask in asks],
            [ask.settings for ask in asks],
            [ask.grammar for ask in asks],
            numbers=numbers,
        )

    def turns(
        self, *, cancelled: Cancelled | None = None, pause: Callable[[], bool] | None = None
    ) -> Iterator[list[Event]]:
        """Read and write all that was admitted, turn by turn, until it is done or a pause.

        A turn reads one pass of the prompts that are not read yet, and writes a token of the
        others: a long prompt does not keep them waiting.

        Args:
            cancelled: numbers of those to end now; of the first rank alone.
            pause: whether to return after this turn; of the first rank alone.

        Yields:
            A turn's events.
        """
        while self._running:
            self._running.read(self.session.chunk)
            yield list(self._running.draw(cancelled, pause))
            if self._running.paused:
                return

    def clear(self) -> None:
        """Forget all that was admitted."""
        self._running.close()

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


def make_asker(
    source: ModelSource,
    rank: int,
    size: int,
    device: torch.device,
    dtype: str,
    chunk: int,
    meeting: Callable[[], dist.Store],
    *,
    coder: Coder | None = None,
    on_tensor: Callable[[int, int], None] = lambda *_: None,
    together: Callable[[], None] = lambda: None,
) -> Asker:
    """Load a rank's model, and join its ring as this process's process group.

    Args:
        source: of the model.
        rank: of this process.
        size: of the ring.
        device: of the weights.
        dtype: auto, or a key of ``loading.DTYPES``.
        chunk: tokens of a prefill pass.
        meeting: where the ranks meet; called if there are several.
        coder: the model's, if it is loaded already.
        on_tensor: told how the weights are read.
        together: called when they are, before the ranks meet.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    loaded = load_model(
        source, device=device, dtype=choose_dtype(dtype, device), coder=coder, on_tensor=on_tensor
    )
    group = None
    if size > 1:
        together()
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=meeting(),
            rank=rank,
            world_size=size,
            timeout=_TIMEOUT,
        )
        group = dist.group.WORLD
    return Asker(loaded, group, chunk)
