"""Generation over a ring: text and clips in one pass, token by token, for a batch of prompts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ringworld_model.batch import TEXT, VISION
from ringworld_model.decode import DecodeSession, NextLogits
from ringworld_model.sampling.answer import Event
from ringworld_model.sampling.grammar import Grammar
from ringworld_model.sampling.guidance import guided
from ringworld_model.sampling.prompt import Prompt, padded
from ringworld_model.sampling.settings import SamplingSettings
from ringworld_model.sampling.text_stream import Decode
from ringworld_model.sampling.writer import Writer
from ringworld_model.tokens import Span

_CANCELLED, _FAILED = -1, -2
"""What the drawing rank sends in place of a token."""
Cancelled = Callable[[], Collection[int]]
Place = tuple[NextLogits, int]
"""Where the logits of a session's row are."""


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
            not fit, no such row. Or while drawing: the logits are NaN.
    """
    made: list[int] = []
    try:
        with session.agreement() as terms:
            writers = _writers(session, prompts, settings, grammar, decode, rows)
            asked = [(writer.settings, writer.left) for writer in writers]
            terms.append(f"generate, unguided ids {list(unguided_ids)}, {asked}")
        if rows is None:
            rows = session.add_rows(len(writers))
            made += rows
        for writer, row in zip(writers, rows, strict=True):
            writer.row = row
        device = session.device
        tokens, lengths, modality = padded(prompts, device)
        found = session.prefill(
            tokens,
            lengths,
            modality=modality,
            rows=[writer.row for writer in writers],
            on_chunk=on_chunk,
        )
        places = {writer.row: (found, at) for at, writer in enumerate(writers)}
        while writers:
            _add_unguided(session, writers, unguided_ids, places, made)
            chosen = _choose(session, writers, places, cancelled)
            steps: list[tuple[int, int, int]] = []
            for writer, token in zip(writers, chosen, strict=True):
                event = writer.cancel() if token == _CANCELLED else writer.take(token)
                if event.end is None:
                    steps.append((writer.row, token, event.modality))
                if writer.unguided is not None and event.end is None and writer.guided:
                    steps.append((writer.unguided, token, event.modality))
                elif writer.unguided is not None:
                    session.drop([writer.unguided])
                    writer.unguided = None
                if event.end is not None and writer.row in made:
                    session.drop([writer.row])
                yield event
            writers = [writer for writer in writers if writer.end is None]
            if writers:
                stepped = [row for row, _, _ in steps]
                ids, kinds = (
                    torch.tensor([step[at] for step in steps], device=device) for at in (1, 2)
                )
                found = session.step(ids, kinds, stepped)
                places = {row: (found, at) for at, row in enumerate(stepped)}
    finally:
        session.drop([row for row in session.rows if row in made])


def _writers(
    session: DecodeSession,
    prompts: Sequence[Prompt],
    settings: SamplingSettings | Sequence[SamplingSettings],
    grammar: Grammar | Sequence[Grammar] | None,
    decode: Decode | None,
    rows: Sequence[int] | None,
) -> list[Writer]:
    if not prompts:
        raise ValueError("there is no prompt; give one at least")
    count = len(prompts)
    grammar = Grammar() if grammar is None else grammar
    each_settings = [settings] * count if isinstance(settings, SamplingSettings) else list(settings)
    each_grammar = [grammar] * count if isinstance(grammar, Grammar) else list(grammar)
    for name, given in (("settings", each_settings), ("grammars", each_grammar), ("rows", rows)):
        if given is not None and len(given) != count:
            raise ValueError(f"{len(given)} {name} for {count} prompts; give one a prompt")
    codes = session.model.config.vision_codebook_size
    for at, one in enumerate(each_grammar):
        if one.codebook_size not in (0, codes):
            raise ValueError(
                f"grammar of prompts[{at}] has a codebook of {one.codebook_size}, the model of "
                f"{codes}; take the model's own codebook"
            )
    return [
        Writer(
            at,
            prompts[at],
            each_settings[at],
            each_grammar[at],
            decode,
            session.max_length if rows is None else session.room(rows[at]),
        )
        for at in range(count)
    ]


def _add_unguided(
    session: DecodeSession,
    writers: Sequence[Writer],
    unguided_ids: Sequence[int],
    places: dict[int, Place],
    made: list[int],
) -> None:
    """Give rows that have come into a guided clip their second one, which has only the clip."""
    new = [writer for writer in writers if writer.guided and writer.unguided is None]
    if not new:
        return
    rows = session.add_rows(len(new))
    made += rows
    for writer, row in zip(new, rows, strict=True):
        writer.unguided = row
    prompts = [
        Prompt.of(Span([*unguided_ids, *writer.beginning], TEXT), Span(writer.clip, VISION))
        for writer in new
    ]
    tokens, lengths, modality = padded(prompts, session.device)
    found = session.prefill(tokens, lengths, modality=modality, rows=rows)
    places.update({row: (found, at) for at, row in enumerate(rows)})


def _choose(
    session: DecodeSession,
    writers: Sequence[Writer],
    places: dict[int, Place],
    cancelled: Cancelled | None,
) -> list[int]:
    """The next token of each row, drawn on the first rank and sent to all."""
    ring = session.ring
    problem: Exception | None = None
    tokens = [_FAILED] * len(writers)
    if ring.rank == 0:
        try:
            gone = cancelled() if cancelled is not None else ()
            tokens = _drawn(writers, places, gone)
        # The other ranks are waiting for tokens: they must hear of it first.
        except Exception as error:
            problem = error
    if ring.group is not None:
        sent = torch.tensor(tokens, device=session.device)
        dist.broadcast(sent, dist.get_process_group_ranks(ring.group)[0], group=ring.group)
        tokens = sent.tolist()
    if problem is not None:
        raise problem
    if _FAILED in tokens:
        raise ValueError("the first rank of the ring could not draw a token; see its error")
    return tokens


def _drawn(writers: Sequence[Writer], places: dict[int, Place], gone: Collection[int]) -> list[int]:
    """The next token of each row; heads are computed for the rows that need them, at once."""
    allowed = [writer.allowed for writer in writers]
    needed: dict[tuple[int, int], list[int]] = {}
    for writer, may in zip(writers, allowed, strict=True):
        if writer.number in gone or _forced(may.ids):
            continue
        for row in (writer.row, writer.unguided if writer.guided else None):
            if row is not None:
                needed.setdefault((id(places[row][0]), may.modality), []).append(row)
    logits: dict[int, Tensor] = {}
    for (_, modality), rows in needed.items():
        found, ats = places[rows[0]][0], [places[row][1] for row in rows]
        logits.update(
            zip(rows, found.vision(ats) if modality == VISION else found.text(ats), strict=True)
        )
    tokens = []
    for writer, may in zip(writers, allowed, strict=True):
        if writer.number in gone:
            tokens.append(_CANCELLED)
        elif may.ids is not None and _forced(may.ids):
            tokens.append(may.ids[0])
        else:
            here = logits[writer.row]
            if writer.guided and writer.unguided is not None:
                here = guided(here, logits[writer.unguided], writer.settings.guidance_scale)
            tokens.append(writer.choose(may, here))
    return tokens


def _forced(ids: Sequence[int] | None) -> bool:
    """Whether there is no choice."""
    return ids is not None and len(ids) == 1
