"""What rings that are asked share, whatever their other ranks are: one call on every rank.

No torch here: the platform's ring is made of this, too.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ringworld_workers.generation.asker import Asker


class AskedRing(ABC):
    """This process is the first rank; the others do as they are told.

    Attributes:
        asker: this process's.
    """

    asker: Asker

    @abstractmethod
    def _tell(self, method: str, args: tuple[Any, ...]) -> None:
        """Have every other rank call a method of its asker."""

    @abstractmethod
    def _loss(self) -> Exception | None:
        """Which rank is gone, once a connection has broken; None: none that is known of."""

    def call(self, method: str, *args: Any, **own: Any) -> Any:
        """Call a method of ``Asker`` on every rank.

        Args:
            method: its name.
            *args: for all ranks; plain data.
            **own: for this one alone.

        Returns:
            What it returns here. An iterator must be iterated to its end, or the ring be closed.

        Raises:
            ValueError: what is asked is wrong; the ring goes on.
            RuntimeError: a rank is gone; of the ring's own class where it is known which.
        """
        with self._losses():
            self._tell(method, args)
            found = getattr(self.asker, method)(*args, **own)
        return self._watched(found) if isinstance(found, Iterator) else found

    def _watched(self, found: Iterator[Any]) -> Iterator[Any]:
        with self._losses():
            yield from found

    @contextmanager
    def _losses(self) -> Iterator[None]:
        """Say which rank was lost, where a collective only says that a connection is."""
        try:
            yield
        except ValueError:
            raise
        except (RuntimeError, OSError) as error:
            lost = self._loss()
            if lost is None:
                raise
            raise lost from error
