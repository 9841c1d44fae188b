"""`model.init_from: run:PLACE`: which checkpoint of which run is meant, as far as text tells.

``RUN``, ``RUN/STAGE`` and ``RUN/STAGE/STEP`` are of the job's own store; a url names another one.
A resolved spec names one checkpoint for good: ``STORE/RUN/checkpoints/NN-STAGE/step-NNNNNNNN``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ringworld_jobs.spec_model import ModelSpec
from ringworld_jobs.store_url import parse_store

HOW = "RUN[/STAGE[/STEP]] of this job's checkpoint.store, or a URL STORE/RUN[/STAGE[/STEP]]"
_STEP = re.compile(r"(?:step-)?\d{1,18}")
_FULL = re.compile(r"(.+/[^/]+)/checkpoints/(\d{2,})-([^/]+)/step-(\d{8,})")


@dataclass(frozen=True, slots=True)
class CheckpointPlace:
    """One checkpoint of a run, named for good.

    Attributes:
        run_url: where the run lies: its store's url and its id.
        stage_index: of the stage, from 0.
        stage: its name.
        step: of the stage.
    """

    run_url: str
    stage_index: int
    stage: str
    step: int

    @property
    def checkpoints_url(self) -> str:
        """The root of the run's checkpoints."""
        return f"{self.run_url}/checkpoints"

    @property
    def key(self) -> str:
        """The checkpoint's folder under that root."""
        return f"{self.stage_index:02d}-{self.stage}/step-{self.step:08d}"

    def __str__(self) -> str:
        """As a resolved spec has it, behind ``run:``."""
        return f"{self.checkpoints_url}/{self.key}"


@dataclass(frozen=True, slots=True)
class FoundWeights:
    """What is known of a run's checkpoint without reading its tensors.

    Attributes:
        place: which one it is.
        tensors: shape of every parameter, by name.
        optimizer: adamw or sgd.
        model: of the run's own spec; None where that is not there.
    """

    place: CheckpointPlace
    tensors: Mapping[str, tuple[int, ...]]
    optimizer: str
    model: ModelSpec | None


FindRun = Callable[[str, str], FoundWeights | None]
"""Looks a place up: (PLACE, url of the job's own store) -> what is there; None where it does not
ask that kind of store. Raises WeightsError where nothing fits."""


def checkpoint_place(place: str) -> CheckpointPlace | None:
    """The checkpoint that a resolved place names; None where it is not resolved yet."""
    found = _FULL.fullmatch(place) if "://" in place else None
    return CheckpointPlace(found[1], int(found[2]), found[3], int(found[4])) if found else None


def check_place(place: str) -> None:
    """Refuse a PLACE that can name no checkpoint, whatever the store holds.

    Raises:
        ValueError: too many parts, an empty one, a step that is no number, or a wrong url.
    """
    if "://" in place:
        if "/" not in parse_store(place).path and not place.startswith("s3://"):
            raise ValueError(f"{place!r} names no run in its store; write {HOW}")
        return
    parts = place.split("/")
    if len(parts) > 3 or any(not part or part.startswith(".") for part in parts):
        raise ValueError(f"{place!r} names no run; write {HOW}")
    if len(parts) == 3 and not _STEP.fullmatch(parts[2]):
        raise ValueError(f"{parts[2]!r} is no step; write 60 or step-00000060 behind the stage")
