"""What the model says of the next token, in each modality."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ringworld_model.loss import VocabularyHead
from ringworld_model.transformer import WorldModel


@dataclass(frozen=True, eq=False)
class NextLogits:
    """Logits after each row's last token, computed by the head that is asked for.

    Every rank of the ring has the same; whoever draws the token asks, the others need not.

    Attributes:
        hidden: [n, E], one a row, in the order in which the rows were given.
        model: whose heads are meant.
    """

    hidden: Tensor
    model: WorldModel

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.hidden)

    def text(self, at: Sequence[int] | None = None) -> Tensor:
        """Logits of the text ids.

        Args:
            at: which of the rows; all where None.

        Returns:
            float32 (float64 of a model in double precision) [n, V].
        """
        return self._of(self.model.text_head, at)

    def vision(self, at: Sequence[int] | None = None) -> Tensor:
        """Logits of the vision ids, eof, eov and spare ones included.

        Args:
            at: which of the rows; all where None.

        Raises:
            ValueError: the model has no vision head.
        """
        if self.model.vision_head is None:
            raise ValueError(
                "the model has no vision head (model.vision.codebook_size is 0), so it writes text "
                "only; take a model that was trained with a codebook"
            )
        return self._of(self.model.vision_head, at)

    @torch.no_grad()
    def _of(self, head: VocabularyHead, at: Sequence[int] | None) -> Tensor:
        return head.logits(self.hidden if at is None else self.hidden[list(at)])
