"""DecodeSession: rows that grow token by token, their keys and values spread over a ring.

B prompts, S tokens of the longest, n rows of a step, E hidden size, R ring size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from ringworld_model.decode.check import (
    check_ids,
    check_lengths,
    check_room,
    check_tokens,
    describe,
)
from ringworld_model.decode.deal import Deal
from ringworld_model.decode.next_logits import NextLogits
from ringworld_model.decode.pages import CacheShape, RowCache
from ringworld_model.decode.passes import CachePass, Way, choose_way
from ringworld_model.decode.visible import Segment, cut_passes
from ringworld_model.ring.check import agree
from ringworld_model.ring.comm import Ring, RingStats
from ringworld_model.transformer import WorldModel

DEFAULT_CHUNK = 8192
"""Tokens of a prefill pass: enough to keep a kernel busy, few enough for their MLP to be small."""
MOST_BLOCK = 256

Mark = Mapping[int, int]
"""Length of each row at some moment, by the row's number."""


class DecodeSession:
    """Rows of one model on one ring, for generation and for questions.

    A row's tokens are dealt to the ranks in blocks; a rank keeps 1 / R of each row's keys and
    values, un-expanded, in pages that grow with the row, and never more. Prompts go through the
    model in passes of ``chunk`` tokens, so that beside the cache memory is bounded by the chunk.
    Every rank has the whole model (parameters that are not sharded).

    ``prefill`` and ``step`` are collectives: all ranks call them with the same arguments, and what
    is wrong on one rank is an error on all. The others are local, but all ranks must call them
    alike, as the same program does.

    Attributes:
        max_length: tokens that a row may have.
        chunk: tokens of a pass, over all rows and ranks.
        stats: where the ring's time went.
    """

    def __init__(
        self,
        model: WorldModel,
        group: dist.ProcessGroup | None = None,
        *,
        max_length: int,
        chunk: int = DEFAULT_CHUNK,
        block: int | None = None,
        way: Way | None = None,
    ) -> None:
        """Make a session without rows; it takes no memory yet.

        Args:
            model: with whole parameters, on the device where the cache shall be.
            group: the ring; None: this process alone.
            max_length: tokens that a row may have: the context that the model was trained for.
            chunk: tokens of a prefill pass, over all rows and ranks.
            block: tokens that a rank keeps in a row; by the chunk where None, so that all ranks
                have a share of each pass.
            way: how prefill passes attend, see ``passes``; None: whichever sends the least.

        Raises:
            ValueError: a length below 1, or this rank is not in the group.
        """
        size = 1 if group is None else dist.get_world_size(group)
        for name, value in (("max_length", max_length), ("chunk", chunk), ("block", block)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} is below 1")
        if group is not None and dist.get_rank(group) < 0:
            raise ValueError("this rank is not in the group; pass each rank its own ring")
        self.model, self.max_length, self.chunk = model, max_length, chunk
        self.stats = RingStats()
        self._ring = Ring.over(group, size)
        self._deal = Deal(block or max(1, min(MOST_BLOCK, chunk // size)), size)
        self._way = way
        config, weight = model.config, model.text_embed.weight
        self._shape = CacheShape(
            config.num_layers, config.num_kv_heads, config.head_dim, weight.dtype, weight.device
        )
        self._rows: dict[int, RowCache] = {}
        self._next_row = 0

    @property
    def ring(self) -> Ring:
        """This rank's place in the ring."""
        return self._ring

    @property
    def device(self) -> torch.device:
        """Where tokens must be: the model's."""
        return self._shape.device

    @property
    def rows(self) -> list[int]:
        """Numbers of the rows, in the order in which they were made."""
        return list(self._rows)

    def length(self, row: int) -> int:
        """Tokens of a row."""
        return self._row(row).length

    def room(self, row: int) -> int:
        """Tokens that a row may still take."""
        return self.max_length - self._row(row).length

    @property
    def held_bytes(self) -> int:
        """Bytes of keys and values that this rank keeps; what rows share counts once."""
        rows = list(self._rows.values())  # another thread may make rows meanwhile
        return sum(dict(each for row in rows for each in row.storages()).values())

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values; 1 / R of a row's are on this rank."""
        return self._shape.token_bytes

    def add_rows(self, count: int = 1, most: Sequence[int] | None = None) -> list[int]:
        """Make empty rows; they begin at different ranks, so that short ones are balanced.

        Args:
            count: of them.
            most: tokens that each may have, for which room is made; None: max_length.

        Returns:
            Their numbers.
        """
        made = range(self._next_row, self._next_row + count)
        for row, ends in zip(made, most or [self.max_length] * count, strict=True):
            ring, first = self._ring, row % self._ring.size
            self._rows[row] = RowCache(self._shape, self._deal, ring.rank, first, ends)
        self._next_row += count
        return list(made)

    def reserve(self, row: int, count: int) -> None:
        """Make room for as many tokens more at once, for a prompt that comes in parts."""
        cache = self._row(row)
        cache.reserve(min(cache.length + count, self.max_length))

    def fork(self, row: int, count: int = 1) -> list[int]:
        """Make rows that go on from where ``row`` is, and share its memory so far.

        Many questions on one document: prefill the document, fork, give each fork its question. In
        a step the shared part is read once for all of them.

        Returns:
            Their numbers.
        """
        made = range(self._next_row, self._next_row + count)
        for number in made:
            self._rows[number] = self._row(row).fork()
        self._next_row += count
        return list(made)

    def drop(self, rows: Iterable[int]) -> None:
        """Forget rows and free the memory that no other row shares."""
        for row in rows:
            self._row(row)
            del self._rows[row]

    def mark(self) -> Mark:
        """How long every row is now, for ``rewind``."""
        return {number: row.length for number, row in self._rows.items()}

    def rewind(self, mark: Mark) -> None:
        """Go back to a mark: rows lose what came after it, and rows made since are dropped.

        Copies nothing.

        Raises:
            ValueError: a row of the mark is gone, or shorter than it was.
        """
        for number, length in mark.items():
            if self._row(number).length < length:
                raise ValueError(
                    f"row {number} has {self._rows[number].length:,} tokens and had {length:,} at "
                    "the mark; it was rewound further since, so take that mark, or prefill again"
                )
        self.drop([number for number in self._rows if number not in mark])
        for number, length in mark.items():
            self._rows[number].truncate(length)

    def prefill(
        self,
        tokens: Tensor,
        lengths: Sequence[int] | None = None,
        *,
        modality: Tensor | None = None,
        rows: Sequence[int] | None = None,
        on_chunk: Callable[[int, int], None] | None = None,
    ) -> NextLogits:
        """Put prompts behind what rows hold, in passes of at most ``chunk`` tokens.

        Args:
            tokens: int64 [B, S], ids in the space of ``modality``, padded behind.
            lengths: tokens of each prompt; S of all where None.
            modality: [B, S], 0 text, 1 vision; all text where None.
            rows: the rows that the prompts continue; None: all rows, made if there are none.
            on_chunk: told (tokens done, tokens in all) after each pass.

        Returns:
            Of the token after each prompt, in the order of the prompts.

        Raises:
            ValueError: no tokens, ids that the model does not know, more than ``max_length``, no
                such row, another dtype or device; on every rank, before anything is computed.
        """
        before, before_next = list(self._rows), self._next_row
        try:
            with self.agreement() as terms:
                modality = check_tokens("prompts", tokens, modality, (-1, -1), self._shape.device)
                counts = check_lengths(lengths, len(tokens), tokens.shape[1])
                if rows is None and not self._rows:
                    rows = self.add_rows(len(tokens))
                numbers = self._numbers(rows, len(tokens), "prompts")
                for at, (number, count) in enumerate(zip(numbers, counts, strict=True)):
                    check_room(number, self.length(number), count, self.max_length)
                    check_ids(
                        f"prompts[{at}]",
                        tokens[at, :count],
                        modality[at, :count],
                        self.model.config,
                    )
                terms.append(describe(f"prefill {counts}", numbers, tokens, modality))
        except BaseException:
            self._rows = {number: self._rows[number] for number in before}
            self._next_row = before_next
            raise
        caches = [self._rows[number] for number in numbers]
        starts = [cache.length for cache in caches]
        last = torch.zeros(
            len(caches),
            self.model.config.hidden_size,
            dtype=self._shape.dtype,
            device=tokens.device,
        )
        done, total = 0, sum(counts)
        try:
            for cache, start, count in zip(caches, starts, counts, strict=True):
                cache.reserve(start + count)
            for passing in cut_passes(starts, counts, self.chunk):
                segments = [Segment(caches[at], start, stop) for at, start, stop in passing]
                places = [(at, starts[at], starts[at] + counts[at]) for at, *_ in passing]
                self._run(segments, places, tokens, modality, last)
                done += sum(stop - start for _, start, stop in passing)
                if on_chunk is not None:
                    on_chunk(done, total)
        except BaseException:
            for cache, start in zip(caches, starts, strict=True):
                cache.truncate(start)
            self._rows = {number: self._rows[number] for number in before}
            self._next_row = before_next
            raise
        return NextLogits(self._summed(last), self.model)

    def step(
        self,
        tokens: Tensor,
        modality: Tensor | None = None,
        rows: Sequence[int] | None = None,
    ) -> NextLogits:
        """Put one token behind each of some rows.

        Args:
            tokens: int64 [n].
            modality: [n], 0 text, 1 vision; all text where None.
            rows: which rows; all where None. The others stay as they are.

        Returns:
            Of the tokens after these, in the order of the rows.

        Raises:
            ValueError: as ``prefill``.
        """
        with self.agreement() as terms:
            modality = check_tokens("tokens", tokens, modality, (-1,), self._shape.device)
            numbers = self._numbers(rows, len(tokens), "tokens")
            for number in numbers:
                check_room(number, self.length(number), 1, self.max_length)
            check_ids("tokens", tokens, modality, self.model.config)
            terms.append(describe("step", numbers, tokens, modality))
        caches = [self._rows[number] for number in numbers]
        for cache in caches:
            cache.reserve(cache.length + 1)
        segments = [Segment(cache, cache.length, cache.length + 1) for cache in caches]
        places = [(at, cache.length, cache.length + 1) for at, cache in enumerate(caches)]
        found = torch.empty(
            len(caches),
            self.model.config.hidden_size,
            dtype=self._shape.dtype,
            device=tokens.device,
        )
        self._run(segments, places, tokens[:, None], modality[:, None], found, "copied")
        return NextLogits(found, self.model)

    @torch.no_grad()
    def _run(
        self,
        segments: Sequence[Segment],
        places: Sequence[tuple[int, int, int]],
        tokens: Tensor,
        modality: Tensor,
        last: Tensor,
        way: Way | None = None,
    ) -> None:
        """One pass: the tokens of ``segments`` through the model, and into the cache.

        Args:
            segments: new tokens.
            places: of each segment, its row of ``tokens``, and where that prompt begins and ends
                in the row of the cache.
            tokens: [B, S].
            modality: [B, S].
            last: [B, E], takes the prompts' last tokens as far as this rank keeps them (all of them
                where ``way`` is "copied").
            way: see ``passes``.
        """
        if self._ring.size == 1:
            way = "copied"
        heads = self.model.config.num_heads
        chosen = way or self._way or choose_way(self._shape, heads, self._deal, segments)
        passing = CachePass(self._ring, self._deal, self._shape, segments, chosen, self.stats)
        device = tokens.device
        ats, positions, ends = [], [], []
        for segment, at, start, stop, owner in passing.queries:
            prompt, base, end = places[segment]
            ats.append(torch.arange(start - base, stop - base) + prompt * tokens.shape[1])
            positions.append(torch.arange(start, stop))
            if stop == end and (way == "copied" or owner == self._ring.rank):
                ends.append((prompt, at + stop - start - 1))
        nothing = torch.empty(0, dtype=torch.int64)
        chosen_at = torch.cat([*ats, nothing]).to(device)
        hidden = self.model.hidden_states(
            tokens.flatten()[chosen_at][None],
            modality.flatten()[chosen_at][None],
            torch.cat([*positions, nothing]).to(device)[None],
            [partial(passing.attend, layer) for layer in range(self._shape.layers)],
        )
        if ends:
            prompts, found = (list(each) for each in zip(*ends, strict=True))
            last[prompts] = hidden[0, found].to(last.dtype)
        for row, _, stop in segments:
            row.length = stop

    def _summed(self, last: Tensor) -> Tensor:
        """Each row's last hidden state, which one rank has and the others have as zeros."""
        if self._ring.size == 1:
            return last
        # Adding zeros rounds nothing, and gloo adds no half types.
        whole = last.to(torch.promote_types(last.dtype, torch.float32))
        with self.stats.waiting(whole.device):
            dist.all_reduce(whole, group=self._ring.group)
        return whole.to(last.dtype)

    @contextmanager
    def agreement(self) -> Iterator[list[str]]:
        """Raise what is wrong within on every rank; a collective.

        Gives a list for words that must be the same on all ranks, which else say how they differ.

        Raises:
            ValueError: something within raised on some rank, or the words differ.
        """
        terms: list[str] = []
        problem = None
        try:
            yield terms
        # Whatever is wrong with one rank's arguments: the others are waiting to hear of it.
        except Exception as error:
            problem = str(error)
        agree(self._ring.group, None, problem, "".join(terms))

    def _numbers(self, rows: Sequence[int] | None, count: int, what: str) -> list[int]:
        numbers = self.rows if rows is None else [int(row) for row in rows]
        for number in numbers:
            self._row(number)
        if len(numbers) != count or len(set(numbers)) != count:
            raise ValueError(f"{count} {what} for rows {numbers}; give one for each row, once")
        return numbers

    def _row(self, number: int) -> RowCache:
        if number not in self._rows:
            raise ValueError(f"row {number} is not one of the session's: {self.rows}")
        return self._rows[number]
