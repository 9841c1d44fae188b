"""Generation over a ring: text and clips in one pass, token by token, for a batch of prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from ringworld_model.decode import DecodeSession
from ringworld_model.running_batch import Cancelled, RunningBatch
from ringworld_model.sampling.answer import Event
from ringworld_model.sampling.draw import DrawError
from ringworld_model.sampling.grammar import Grammar
from ringworld_model.sampling.prompt import Prompt
from ringworld_model.sampling.settings import SamplingSettings
from ringworld_model.sampling.text_stream import Decode

__all__ = ["Cancelled", "generate"]


def generate(
    session: DecodeSession,
    prompts: Sequence[Prompt],
    settings: SamplingSettings | Sequence[SamplingSettings],
    *,
    grammar: Grammar | Sequence[Grammar] | None = None,
    decode: Decode | None = None,
    rows: Sequence[int] | None = None,
    unguided_ids: Sequence[int] = (),
    cancelled: Cancelled | None = None,
    on_chunk: Callable[[int, int], None] | None = None,
) -> Iterator[Event]:
    """Write answers to prompts, all at the same time; rows end when they end.

    A collective: every rank of the session's ring iterates with the same arguments, to the end. The
    first rank draws, and its tokens are sent to the others, so that all go on alike. Draws depend
    on the row's seed and logits alone, not on the ring or on the other rows.

    Args:
        session: takes the prompts; its ``max_length`` bounds prompt and answer.
        prompts: at least one.
        settings: for all prompts, or one for each.
        grammar: for all prompts, or one for each; None: text only.
        decode: of the tokenizer; None: events carry ids and frames, no text.
        rows: rows of the session that the prompts continue, such as forks of a document; what they
            hold must end outside a clip. They stay when the answers are done, and hold all tokens
            but each answer's last. None: new rows, which are dropped at the end.
        unguided_ids: text ids before ``<vision>`` in the row without the prompt, mostly bos; for
            settings with guidance.
        cancelled: asked by the first rank before each token: prompts to end now. It is how an
            asker who is gone frees the ring; leaving the loop on one rank would leave the others
            waiting.
        on_chunk: told (tokens done, tokens in all) while prompts are read.

    Yields:
        An event for each token, in the order of the prompts; each prompt's last has its ``end``.

    Raises:
        ValueError: before anything is computed, on every rank: a prompt breaks the grammar or does
            not fit, no such row.
        DrawError: on every rank, while drawing: the logits are NaN.
    """
    count = len(prompts)
    given = Grammar() if grammar is None else grammar
    batch = RunningBatch(session, decode=decode, unguided_ids=unguided_ids)
    try:
        batch.add(
            prompts,
            [settings] * count if isinstance(settings, SamplingSettings) else settings,
            [given] * count if isinstance(given, Grammar) else given,
            numbers=range(count),
            rows=rows,
        )
        batch.read(on_chunk=on_chunk)
        while batch:
            for event in batch.draw(cancelled):
                if event.end == "failed":
                    other = "the first rank of the ring could not draw a token; see its error"
                    raise DrawError(event.problem or other)
                yield event
    finally:
        batch.close()
