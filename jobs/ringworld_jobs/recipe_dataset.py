"""What every dataset of a recipe may say, whatever its kind."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ringworld_jobs.spec import DocumentsSpec, Spec

HeldOutShare = Annotated[float, Field(ge=0, lt=1)]
Longer = Literal["split", "drop", "refuse"]


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
    """Which examples are kept, by their length; the others are counted."""
    longer: Longer = "refuse"
    """What a stage does with an example longer than its context: split cuts it into rows, drop
    leaves it out and counts it, refuse stops with an error."""
    pack_apart: bool = False
    """Rows hold examples of this dataset alone, never mixed with another's: for sparse losses that
    dense ones would drown."""
    credit: str = ""
    """Author and licence, copied into the dataset."""
