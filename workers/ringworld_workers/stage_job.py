"""What one rank is told: plain data that travels from the controller to every worker of a gang."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from ringworld_jobs.spec import JobSpec, StageSpec
from ringworld_model.config import ModelConfig


class GangJob(Protocol):
    """What a worker needs to know to take its place in a gang, whatever the gang does."""

    @property
    def run_id(self) -> str:
        """The run, such as ``quickstart-1``."""

    @property
    def stage_name(self) -> str:
        """The stage that it is about."""

    @property
    def attempt(self) -> int:
        """See ``StageJob``."""

    @property
    def group_name(self) -> str:
        """Name of the gang's rendezvous: unlike for any two attempts."""

    @property
    def world_size(self) -> int:
        """Ranks of the gang."""

    @property
    def sequence_parallel_size(self) -> int:
        """Ranks that share one sequence."""

    @property
    def heads_size(self) -> int:
        """Of these, the ranks of one ring place."""

    @property
    def data_parallel_size(self) -> int:
        """Rings."""

    @property
    def device(self) -> Literal["cpu", "cuda"]:
        """What the ranks compute on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageJob:
    """One stage of one run, the same on every rank.

    Attributes:
        run_id: the run, such as ``quickstart-1``.
        spec: the whole resolved job.
        stage_index: which of ``spec.stages`` to train.
        attempt: 1 for the run's first gang, one more for each gang that had to be built again
            after a failure, a stop or a restart of the controller.
        world_size: ranks of the gang: sequence_parallel_size * data_parallel_size.
        sequence_parallel_size: ranks that share one sequence: places of a ring * heads_size.
        data_parallel_size: rings.
        device: what the ranks compute on.
        data_dir: folder of the prepared data recipe; empty when the job names none.
        sources: folder or URL of the dataset by source name: the recipe's and the spec's.
        model_config: the model's shape, table sizes filled in from the data.
        checkpoint_url: where the run's checkpoints lie, such as
            ``file:///abs/runs/quickstart-1/checkpoints``.
        heads_size: ranks of one ring place, which split the attention heads.
        spec_digest: digest of the resolved spec; checkpoints carry it.
        proved: the run has proof already that this stage's ring is right on this mesh.
        run_uid: unlike for any two runs, also of the same name on different machines; the store
            holds it, and a run of another uid does not write there.
        take_older: take an older checkpoint if the newest is damaged, whatever the spec says.
        skip_steps: steps of this stage, counted from 1, whose rows are left out: training diverged
            there. They are counted, and the learning rate goes by them, but no weight changes.
    """

    run_id: str
    spec: JobSpec
    stage_index: int
    attempt: int
    world_size: int
    sequence_parallel_size: int
    data_parallel_size: int
    device: Literal["cpu", "cuda"]
    data_dir: str
    sources: dict[str, str]
    model_config: ModelConfig
    checkpoint_url: str
    spec_digest: str
    heads_size: int = 1
    proved: bool = False
    run_uid: str = ""
    take_older: bool = False
    skip_steps: tuple[int, ...] = ()

    @property
    def stage(self) -> StageSpec:
        """The stage to train."""
        return self.spec.stages[self.stage_index]

    @property
    def stage_name(self) -> str:
        """Name of the stage."""
        return self.stage.name

    @property
    def group_name(self) -> str:
        """Name of this gang's rendezvous: unlike for any two attempts."""
        return f"{self.run_id}/{self.stage.name}/attempt-{self.attempt}"

    def record(self, kind: str, step: int, **values: Any) -> dict[str, Any]:
        """A line of the metric log, with what every line carries.

        Args:
            kind: what sort of line, such as ``step``.
            step: steps of the stage that are done.
            **values: what it says.
        """
        done = sum(stage.num_steps for stage in self.spec.stages[: self.stage_index])
        return {
            "kind": kind,
            "stage": self.stage.name,
            "stage_index": self.stage_index,
            "step": step,
            "global_step": done + step,
            "attempt": self.attempt,
            "time": time.time(),
            **values,
        }
