"""Rows that are written at the same time; more may come, and some may end, between two tokens."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ringworld_model.batch import TEXT, VISION
from ringworld_model.decode import DecodeSession, NextLogits
from ringworld_model.sampling.answer import Event
from ringworld_model.sampling.grammar import Allowed, Grammar
from ringworld_model.sampling.guidance import guided
from ringworld_model.sampling.prompt import Prompt, padded
from ringworld_model.sampling.settings import SamplingSettings
from ringworld_model.sampling.text_stream import Decode
from ringworld_model.sampling.writer import Writer
from ringworld_model.tokens import Span

_CANCELLED, _FAILED, _READING, _BROKEN = -1, -2, -3, -4
"""What the drawing rank sends in place of a token."""
Cancelled = Callable[[], Collection[int]]
Place = tuple[NextLogits, int]
"""Where the logits of a session's row are."""


@dataclass(slots=True, eq=False)
class _Reading:
    """A row whose prompt is being read, and how much of it is."""

    writer: Writer
    prompt: Prompt
    done: int = 0

    @property
    def left(self) -> int:
        return len(self.prompt) - self.done

    def part(self, count: int) -> Prompt:
        """Its next tokens."""
        stop = self.done + count
        return Prompt(self.prompt.tokens[self.done : stop], self.prompt.modality[self.done : stop])


class RunningBatch:
    """The rows of one session that answers are being written to.

    The methods are collectives: every rank of the session's ring calls them in the same order with
    the same arguments. The first rank draws, and its tokens are sent to the others, so that all go
    on alike. Draws depend on the row's seed and logits alone, not on the ring or the other rows.

    Attributes:
        paused: the first rank asked, at the last ``draw``, to be given the word; on every rank.
    """

    def __init__(
        self,
        session: DecodeSession,
        *,
        decode: Decode | None = None,
        unguided_ids: Sequence[int] = (),
    ) -> None:
        """Begin without rows.

        Args:
            session: its ``max_length`` bounds prompt and answer.
            decode: of the tokenizer; None: events carry ids and frames, no text.
            unguided_ids: see ``generate``.
        """
        self.paused = False
        self._session, self._decode = session, decode
        self._unguided_ids = list(unguided_ids)
        self._reading: list[_Reading] = []
        self._writers: list[Writer] = []
        self._places: dict[int, Place] = {}
        self._steps: list[tuple[int, int, int]] = []
        self._made: set[int] = set()
        self._problems: dict[int, str] = {}

    def __len__(self) -> int:
        """Rows that are read or written."""
        return len(self._reading) + len(self._writers)

    def add(
        self,
        prompts: Sequence[Prompt],
        settings: Sequence[SamplingSettings],
        grammars: Sequence[Grammar],
        *,
        numbers: Sequence[int],
        rows: Sequence[int] | None = None,
    ) -> None:
        """Take prompts; nothing is computed yet.

        Args:
            prompts: at least one.
            settings: one a prompt.
            grammars: one a prompt.
            numbers: what their events are told by, one a prompt.
            rows: of the session, which stay; None: new rows, which are dropped as they end.

        Raises:
            ValueError: on every rank, and nothing was taken: a prompt breaks the grammar or does
                not fit, no such row.
        """
        with self._session.agreement() as terms:
            writers = self._make(prompts, settings, grammars, numbers, rows)
            asked = [(writer.settings, writer.left) for writer in writers]
            terms.append(f"generate, unguided ids {self._unguided_ids}, {asked}")
        if rows is None:
            most = [len(prompt) + one.left for one, prompt in zip(writers, prompts, strict=True)]
            rows = self._session.add_rows(len(writers), most)
            self._made.update(rows)
        for writer, row, prompt in zip(writers, rows, prompts, strict=True):
            writer.row = row
            self._reading.append(_Reading(writer, prompt))

    def read(
        self, limit: int | None = None, *, on_chunk: Callable[[int, int], None] | None = None
    ) -> None:
        """Read on in the prompts that are not read yet.

        Args:
            limit: tokens at most, shared out evenly, so that no prompt waits for a long one; None:
                all.
            on_chunk: told (tokens done, tokens in all) of this call.
        """
        shares = _shares([each.left for each in self._reading], limit)
        chosen = [each for each in zip(self._reading, shares, strict=True) if each[1]]
        if not chosen:
            return
        rows = [each.writer.row for each, _ in chosen]
        for each, _ in chosen:
            # A row's prompt lies in one page, in however many parts it is read.
            self._session.reserve(each.writer.row, each.left)
        parts = [each.part(share) for each, share in chosen]
        tokens, lengths, modality = padded(parts, self._session.device)
        found = self._session.prefill(
            tokens, lengths, modality=modality, rows=rows, on_chunk=on_chunk
        )
        for at, (each, share) in enumerate(chosen):
            each.done += share
            if not each.left:
                self._writers.append(each.writer)
                self._places[each.writer.row] = found, at
        self._reading = [each for each in self._reading if each.left]

    def draw(
        self,
        cancelled: Cancelled | None = None,
        pause: Callable[[], bool] | None = None,
    ) -> Iterator[Event]:
        """Write the next token of every row that is read; iterate to the end.

        Args:
            cancelled: asked by the first rank alone: rows to end now, by their numbers.
            pause: asked by the first rank alone; the answer is ``paused`` on all.

        Yields:
            An event for each row that is read or cancelled; a row's last has its ``end``. A row
            whose next token cannot be drawn, as its logits are NaN, ends as ``failed``; the others
            go on.

        Raises:
            ValueError: on every rank but the first, which raises what it is: nothing was drawn.
        """
        self._step()
        self._add_unguided()
        writers = [*self._writers, *(each.writer for each in self._reading)]
        for writer, token in zip(writers, self._choose(writers, cancelled, pause), strict=True):
            if token == _READING:
                continue
            if token == _FAILED:
                event = writer.fail(self._problems.pop(writer.number, ""))
            else:
                event = writer.cancel() if token == _CANCELLED else writer.take(token)
            if event.end is None:
                self._steps.append((writer.row, token, event.modality))
            if writer.unguided is not None and event.end is None and writer.guided:
                self._steps.append((writer.unguided, token, event.modality))
            elif writer.unguided is not None:
                self._drop(writer.unguided)
                writer.unguided = None
            if event.end is not None:
                self._drop(writer.row)
            yield event
        self._writers = [writer for writer in self._writers if writer.end is None]
        self._reading = [each for each in self._reading if each.writer.end is None]

    def close(self) -> None:
        """Forget all rows, however far they are."""
        for row in self._session.rows:
            self._drop(row)
        self._reading, self._writers, self._steps, self._places = [], [], [], {}
        self._problems = {}

    def _drop(self, row: int) -> None:
        if row in self._made:
            self._made.remove(row)
            self._session.drop([row])

    def _make(
        self,
        prompts: Sequence[Prompt],
        settings: Sequence[SamplingSettings],
        grammars: Sequence[Grammar],
        numbers: Sequence[int],
        rows: Sequence[int] | None,
    ) -> list[Writer]:
        if not prompts:
            raise ValueError("there is no prompt; give one at least")
        count, session = len(prompts), self._session
        for name, given in (("settings", settings), ("grammars", grammars), ("rows", rows)):
            if given is not None and len(given) != count:
                raise ValueError(f"{len(given)} {name} for {count} prompts; give one a prompt")
        codes = session.model.config.vision_codebook_size
        for at, one in enumerate(grammars):
            if one.codebook_size not in (0, codes):
                raise ValueError(
                    f"grammar of prompts[{at}] has a codebook of {one.codebook_size}, the model "
                    f"of {codes}; take the model's own codebook"
                )
        rooms = (
            [session.max_length] * count if rows is None else [session.room(row) for row in rows]
        )
        asked = zip(numbers, prompts, settings, grammars, rooms, strict=True)
        return [
            Writer(number, prompt, its_settings, grammar, self._decode, room)
            for number, prompt, its_settings, grammar, room in asked
        ]

    def _step(self) -> None:
        """Put the tokens that were drawn last behind their rows."""
        steps, self._steps = self._steps, []
        if not steps:
            return
        rows = [row for row, _, _ in steps]
        ids, kinds = (
            torch.tensor([step[at] for step in steps], device=self._session.device) for at in (1, 2)
        )
        found = self._session.step(ids, kinds, rows)
        self._places.update({row: (found, at) for at, row in enumerate(rows)})
        kept = {row: place for row, place in self._places.items() if row in self._session.rows}
        self._places = kept

    def _add_unguided(self) -> None:
        """Give rows that have come into a guided clip their second one, which has only the clip."""
        new = [writer for writer in self._writers if writer.guided and writer.unguided is None]
        if not new:
            return
        rows = self._session.add_rows(len(new))
        self._made.update(rows)
        for writer, row in zip(new, rows, strict=True):
            writer.unguided = row
        prompts = [
            Prompt.of(
                Span([*self._unguided_ids, *writer.beginning], TEXT), Span(writer.clip, VISION)
            )
            for writer in new
        ]
        tokens, lengths, modality = padded(prompts, self._session.device)
        found = self._session.prefill(tokens, lengths, modality=modality, rows=rows)
        self._places.update({row: (found, at) for at, row in enumerate(rows)})

    def _choose(
        self,
        writers: Sequence[Writer],
        cancelled: Cancelled | None,
        pause: Callable[[], bool] | None,
    ) -> list[int]:
        """The next token of each row, drawn on the first rank and sent to all."""
        ring = self._session.ring
        problem: Exception | None = None
        tokens, paused = [_BROKEN] * len(writers), False
        if ring.rank == 0:
            try:
                gone = cancelled() if cancelled is not None else ()
                paused = pause is not None and pause()
                tokens = self._drawn(gone)
                tokens += [
                    _CANCELLED if each.writer.number in gone else _READING for each in self._reading
                ]
            # The other ranks are waiting for tokens: they must hear of it first.
            except Exception as error:
                problem = error
        if ring.group is not None:
            sent = torch.tensor([*tokens, int(paused)], device=self._session.device)
            dist.broadcast(sent, dist.get_process_group_ranks(ring.group)[0], group=ring.group)
            *tokens, paused = sent.tolist()
        self.paused = bool(paused)
        if problem is not None:
            raise problem
        if _BROKEN in tokens:
            raise ValueError("the first rank of the ring could not draw; see its error")
        return tokens

    def _drawn(self, gone: Collection[int]) -> list[int]:
        """The next tokens; heads are computed for the rows that need them, at once."""
        writers, places = self._writers, self._places
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
            heads = found.vision(ats) if modality == VISION else found.text(ats)
            logits.update(zip(rows, heads, strict=True))
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
                tokens.append(self._choice(writer, may, here))
        return tokens

    def _choice(self, writer: Writer, allowed: Allowed, logits: Tensor) -> int:
        """A row's next token; what goes wrong there is that row's alone."""
        try:
            return writer.choose(allowed, logits)
        # Whatever it was, the rows beside it have done nothing wrong.
        except Exception as error:
            self._problems[writer.number] = str(error) or type(error).__name__
            return _FAILED


def _forced(ids: Sequence[int] | None) -> bool:
    """Whether there is no choice."""
    return ids is not None and len(ids) == 1


def _shares(wanted: Sequence[int], limit: int | None) -> list[int]:
    """How much each gets of a limit: the same, but none more than it wants."""
    left = sum(wanted) if limit is None else limit
    shares = [0] * len(wanted)
    by_size = sorted(range(len(wanted)), key=lambda at: wanted[at])
    for place, at in enumerate(by_size):
        shares[at] = min(wanted[at], -(-left // (len(wanted) - place)))
        left -= shares[at]
    return shares
