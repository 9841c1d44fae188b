"""What each rank of an evaluation's gang is told: plain data that travels from the controller."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ringworld_jobs.evaluate_spec import EvaluateSpec
from ringworld_jobs.spec import DataSpec
from ringworld_workers.generation.source import ModelSource
from ringworld_workers.reporter import Record


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationJob:
    """The evaluations of one model, the same on every rank.

    Attributes:
        run_id: the run, such as ``quickstart-1``.
        attempt: see ``StageJob``.
        world_size: ranks of the gang.
        sequence_parallel_size: ranks of one ring.
        data_parallel_size: rings; each takes its share of the items.
        device: what the ranks compute on.
        precision: of the weights, and of what is computed.
        stage_name: the stage whose model it is, or the name of a job that has no stages.
        stage_index: of that stage.
        step: steps of the stage that are done.
        global_step: steps of the job that are done.
        model: where the weights are.
        evaluations: what is asked.
        seed: of the job.
        context_length: longest row that is asked for.
        sources: folder or URL of each prepared dataset.
        mixture: share of each source in the stage.
        first_mixture: that of the job's first stage.
        first_context_length: of the job's first stage.
        data: which examples are drawn, and where remote shards are kept.
        earlier: figures of the stages before; see ``Subject``.
        files_url: of the store that files of answers go to.
        answers: records that there are already, each with its ``task``; their items are not asked
            again.
        heads_size: ranks that split the heads: none do, in an evaluation.
    """

    run_id: str
    attempt: int
    world_size: int
    sequence_parallel_size: int
    data_parallel_size: int
    device: Literal["cpu", "cuda"]
    precision: Literal["fp32", "bf16"]
    stage_name: str
    stage_index: int
    step: int
    global_step: int
    model: ModelSource
    evaluations: EvaluateSpec
    seed: int
    context_length: int
    sources: Mapping[str, str] = field(default_factory=dict)
    mixture: Mapping[str, float] = field(default_factory=dict)
    first_mixture: Mapping[str, float] = field(default_factory=dict)
    first_context_length: int = 0
    data: DataSpec = field(default_factory=DataSpec)
    earlier: tuple[Record, ...] = ()
    files_url: str = ""
    answers: tuple[Record, ...] = ()
    heads_size: int = 1

    @property
    def group_name(self) -> str:
        """Name of this gang's rendezvous: unlike for any two attempts."""
        return f"{self.run_id}/{self.stage_name}/evaluate/attempt-{self.attempt}"

    def record(self, kind: str, **values: Any) -> Record:
        """A line of the metric log, with what every line carries."""
        return {
            "kind": kind,
            "stage": self.stage_name,
            "stage_index": self.stage_index,
            "step": self.step,
            "global_step": self.global_step,
            "attempt": self.attempt,
            "time": time.time(),
            **values,
        }
