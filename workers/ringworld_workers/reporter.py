"""What a training rank tells the outside, without knowing who listens."""

from __future__ import annotations

from typing import Any, Protocol

Record = dict[str, Any]


class RingPlace(Protocol):
    """Where a rank is in its ring, kept up to date by what computes there: ``RingStats`` is one."""

    @property
    def hops(self) -> int:
        """Exchanges that have ended, of all rounds."""

    @property
    def hop(self) -> int:
        """Of these, the ones of the present round."""

    @property
    def awaits(self) -> int | None:
        """The rank that it waits for at this moment, if it does."""


class Reporter(Protocol):
    """The rank's only way out: plain dicts, never a tracking client."""

    def phase(self, name: str, step: int, ring: RingPlace | None = None) -> None:
        """Say what this rank is about to do; the heartbeat shows it.

        Args:
            name: such as ``forward``.
            step: of the stage.
            ring: its place in the ring meanwhile, where the phase goes round one.
        """

    def metrics(self, record: Record) -> None:
        """Hand over one line of the metric log. Called on rank 0 alone."""

    def answer(self, record: Record) -> None:
        """Hand over a model's answer to one item of an evaluation. Called on any rank."""

    def event(self, record: Record) -> None:
        """Hand over something worth a line in the event log (``text``, and what belongs to it)."""

    def should_stop(self) -> bool:
        """Whether somebody asked this rank to stop at the next step."""

    def position(self) -> int:
        """Number of the last record that was handed over."""

    def stored(self, position: int) -> bool:
        """Whether all records up to that one are in the run's logs, which outlive this rank."""
