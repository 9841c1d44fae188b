"""Text of tokens as they come: whole characters only, and nothing that a stop text may follow."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]
"""Text of ids; special tokens are left out."""

_BROKEN = "\N{REPLACEMENT CHARACTER}"
_CONTEXT = 8
"""Ids before the new ones that are decoded with them: spaces and bytes depend on neighbours."""


class TextStream:
    """Turns one row's text ids into text, piece by piece.

    Attributes:
        stopped: the stop text that was met, or None. Nothing after it is given out.
    """

    def __init__(
        self,
        decode: Decode,
        *,
        before: Sequence[int] = (),
        stop: Sequence[str] = (),
        held: Sequence[str] = (),
    ) -> None:
        """Begin after some text.

        Args:
            decode: of the tokenizer.
            before: ids that stand before the first one, such as the prompt's.
            stop: texts that end the stream.
            held: further texts that are held back while they may be coming, so that ``cut`` can
                take them out, such as ``<vision>``.
        """
        self.stopped: str | None = None
        self._decode, self._stop, self._held = decode, tuple(stop), (*stop, *held)
        self._ids = list(before)[-_CONTEXT:]
        self._given = len(self._ids)
        self._waiting = ""

    def push(self, token: int) -> str:
        """Text that is certain after one more id; empty while it is not."""
        if self.stopped is not None:
            return ""
        self._ids.append(token)
        known = self._decode(self._ids[: self._given])
        text = self._decode(self._ids)
        # Half a character decodes to a mark of its own, and later to something else.
        if text.endswith(_BROKEN) and len(self._ids) - self._given < _CONTEXT:
            return ""
        self._take(text[len(known) :])
        return self._release()

    def cut(self, text: str, after: Sequence[int]) -> str:
        """Take a text off the end that was held back; returns what stood before it.

        Args:
            text: one of ``held``.
            after: ids behind which the next ones stand, such as those of ``</vision>``.
        """
        found = self._waiting
        self._waiting = ""
        self._ids = list(after)[-_CONTEXT:]
        self._given = len(self._ids)
        return found.removesuffix(text)

    def finish(self) -> str:
        """What is left at the end of the row."""
        if self.stopped is not None:
            return ""
        known = self._decode(self._ids[: self._given])
        self._waiting += self._decode(self._ids)[len(known) :]
        self._given = len(self._ids)
        found = self._release(whole=True)
        self._waiting = ""
        return found

    def _take(self, text: str) -> None:
        self._waiting += text
        self._ids = self._ids[-_CONTEXT:]
        self._given = len(self._ids)

    def _release(self, whole: bool = False) -> str:
        """Give out what no stop text can reach any more; or all of it."""
        ends = {text: self._waiting.find(text) for text in self._stop if text in self._waiting}
        if ends:
            self.stopped = min(ends, key=lambda text: (ends[text], -len(text)))
            found, self._waiting = self._waiting[: ends[self.stopped]], ""
            return found
        keep = 0 if whole else max(map(self._overlap, self._held), default=0)
        cut = len(self._waiting) - keep
        found, self._waiting = self._waiting[:cut], self._waiting[cut:]
        return found

    def _overlap(self, text: str) -> int:
        """Characters at the end that ``text`` may begin with: all of it, if it is complete."""
        longest = min(len(text), len(self._waiting))
        ends = (size for size in range(longest, 0, -1) if self._waiting.endswith(text[:size]))
        return next(ends, 0)
