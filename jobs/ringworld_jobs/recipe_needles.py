"""Dataset kind needles: long documents that a small model learns retrieval from."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from ringworld_jobs.needle_format import NeedleDocumentsSpec
from ringworld_jobs.recipe_dataset import DatasetBase


class NeedlesDataset(DatasetBase):
    """Texts with needles in them and questions after them, as a chat; answers alone carry loss.

    Worded as the evaluation `needle` words them, with other cities and numbers: a model that
    answers there has looked them up.
    """

    kind: Literal["needles"]
    """needles"""
    make: NeedleDocumentsSpec
    """The documents to make."""

    @model_validator(mode="after")
    def _chat(self) -> NeedlesDataset:
        if self.make.format.template != "chat":
            raise ValueError(
                "make.format.template: plain makes no conversation, and this kind no other; leave "
                "it out, or write the documents with `ringworld data needles` and take kind: lwm"
            )
        return self
