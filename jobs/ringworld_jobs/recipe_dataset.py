"""What every dataset of a recipe may say, whatever its kind."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ringworld_jobs.spec import Spec
from ringworld_jobs.units import Tokens

HeldOutShare = Annotated[float, Field(ge=0, lt=1)]
Longer = Literal["split", "drop", "refuse"]


class DocumentsSpec(Spec):
    """Which examples are kept, by their length."""

    min_tokens: Tokens | None = None
    """Shorter examples are left out, and counted."""
    max_tokens: Tokens | None = None
    """Examples of this length and longer ones are left out, and counted."""

    @model_validator(mode="after")
    def _ordered(self) -> DocumentsSpec:
        least, most = self.min_tokens, self.max_tokens
        if least is not None and most is not None and most <= least:
            raise ValueError(
                f"max_tokens {most:,} is not above min_tokens {least:,}; nothing would be left"
            )
        return self

    def keeps(self, length: int) -> bool:
        """Whether an example of so many tokens is kept."""
        return (self.min_tokens or 0) <= length and (
            self.max_tokens is None or length < self.max_tokens
        )


class DatasetBase(Spec):
    """Base of the dataset kinds."""

    held_out: list[str] = []
    """Glob patterns, matched against file names: all of those files is kept for validation."""
    held_out_share: HeldOutShare = 0.0
    """Share of the other documents kept for validation, chosen by a digest of the document and the
    recipe's seed: whole documents, the same whatever else changes."""
    deduplicate: bool = True
    """Leave out examples that are equal to an earlier one, and count them."""
    documents: DocumentsSpec = DocumentsSpec()
    """Which examples are kept, by their length."""
    longer: Longer = "refuse"
    """What a stage does with an example longer than its context: split cuts it into rows, drop
    leaves it out and counts it, refuse stops with an error."""
    pack_apart: bool = False
    """Rows hold examples of this dataset alone, never mixed with another's: for sparse losses that
    dense ones would drown."""
    credit: str = ""
    """Author and licence, copied into the dataset."""
