"""How tokens are drawn: what a request may ask for."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class DrawSettings:
    """How the next token of one modality is drawn from its logits.

    In this order: repetition, temperature, top_k, top_p, min_p.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest id (greedy).
        top_k: of so many likeliest ids; 0: of all.
        top_p: of the fewest likeliest ids that hold this share of the probability; 1: of all.
        min_p: of ids that are at least this share as likely as the likeliest; 0: of all.
        repetition_penalty: divides the positive logits and multiplies the negative ones of ids
            that the row holds already, those of the prompt included; 1: none, from 0.01 to 100.
            Source: CTRL, arXiv 1909.05858, section 4.1.
        presence_penalty: taken off the logits of ids that were drawn already; as OpenAI's.
        frequency_penalty: taken off them for each time; as OpenAI's.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    def __post_init__(self) -> None:
        """Refuse settings that mean nothing.

        Raises:
            ValueError: names the field, the value and the limits.
        """
        limits = {
            "temperature": (0.0, math.inf),
            "top_k": (0, math.inf),
            "top_p": (0.0, 1.0),
            "min_p": (0.0, 1.0),
            # Beyond, logits become infinite, and no token could be drawn.
            "repetition_penalty": (0.01, 100.0),
            "presence_penalty": (-math.inf, math.inf),
            "frequency_penalty": (-math.inf, math.inf),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            positive = name == "top_p"
            if not math.isfinite(value) or not low <= value <= high or (positive and value == 0):
                raise ValueError(
                    f"{name}={value}: give a number {'above' if positive else 'from'} {low:g}"
                    + (f" to {high:g}" if math.isfinite(high) else "")
                )

    @property
    def repeats(self) -> bool:
        """Whether what was written before changes what comes."""
        penalties = (self.presence_penalty, self.frequency_penalty)
        return self.repetition_penalty != 1 or any(penalties)


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingSettings:
    """What one row asks for.

    Attributes:
        text: how text is drawn.
        vision: how codes and frame ends are drawn.
        max_new_tokens: tokens at most, those of frames included; None: as many as the context has.
        stop_ids: text ids that end the row, such as the tokenizer's eos.
        stop: texts that end the row; they are not part of its text.
        seed: of the row's draws; of 64 bits.
        guidance_scale: of classifier-free guidance in clips; 1: none, see ``guidance``.
    """

    text: DrawSettings = field(default_factory=DrawSettings)
    vision: DrawSettings = field(default_factory=DrawSettings)
    max_new_tokens: int | None = None
    stop_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    seed: int = 0
    guidance_scale: float = 1.0

    def __post_init__(self) -> None:
        """Refuse settings that mean nothing.

        Raises:
            ValueError: names the field, the value and the remedy.
        """
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} is below 1; leave the row out")
        if "" in self.stop:
            raise ValueError("stop holds an empty text, which ends every answer at once")
        if not -(1 << 63) <= self.seed < 1 << 64:
            raise ValueError(f"seed={self.seed} has more than 64 bits; take a smaller one")
        if not math.isfinite(self.guidance_scale) or self.guidance_scale < 0:
            raise ValueError(f"guidance_scale={self.guidance_scale}: give a number from 0 on")
