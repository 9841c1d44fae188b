"""How often each id is a target, and the entropy that follows: the score of guessing blindly."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ringworld_model.batch import TEXT, VISION

MODALITIES = {"text": TEXT, "vision": VISION}


class TargetCounts:
    """Counts the targets of one split that carry loss, by modality."""

    def __init__(self, num_text_ids: int, num_vision_ids: int) -> None:
        """Start at zero.

        Args:
            num_text_ids: ids of the text tokenizer.
            num_vision_ids: codes plus eof and eov; 0 without a codebook.
        """
        self.counts = {
            "text": np.zeros(num_text_ids, dtype=np.int64),
            "vision": np.zeros(num_vision_ids, dtype=np.int64),
        }
        self.examples = 0
        self.longest = 0
        self.tokens = {"text": 0, "vision": 0}

    def add(
        self,
        tokens: npt.NDArray[np.int32],
        modality: npt.NDArray[np.uint8],
        loss: npt.NDArray[np.uint8],
        lengths: npt.NDArray[np.int64],
    ) -> None:
        """Count examples.

        Args:
            tokens: [T] of the examples, joined.
            modality: [T].
            loss: [T]; of an example's first token, which is nobody's target, it is ignored.
            lengths: [n] tokens of each example, at least one; T together.
        """
        if len(lengths) == 0:
            return
        self.examples += len(lengths)
        self.longest = max(self.longest, int(lengths.max()))
        counted = loss != 0
        counted[np.cumsum(lengths) - lengths] = False
        for name, number in MODALITIES.items():
            of_this = modality == number
            self.tokens[name] += int(of_this.sum())
            targets = tokens[of_this & counted]
            self.counts[name] += np.bincount(targets, minlength=len(self.counts[name]))

    def summary(self) -> dict[str, Any]:
        """Sizes of the split, for meta.json."""
        return {
            "examples": self.examples,
            "tokens": sum(self.tokens.values()),
            "text_tokens": self.tokens["text"],
            "vision_tokens": self.tokens["vision"],
            "longest_example_tokens": self.longest,
        }

    def entropy(self) -> dict[str, float | None]:
        """Entropy of the targets in nats a token, by modality; None where there is no target.

        No model that is blind to context can score below it on these targets, even one that knows
        how often each occurs.
        """
        return {name: entropy(counts) for name, counts in self.counts.items()}


def entropy(counts: npt.NDArray[np.int64]) -> float | None:
    """Entropy in nats of the distribution that counts stand for; None without any."""
    total = int(counts.sum())
    if total == 0:
        return None
    shares = counts[counts > 0] / total
    return float(-(shares * np.log(shares)).sum())
