"""How a controller's runs behave."""

from __future__ import annotations

from dataclasses import dataclass, field

from ringworld_platform.worker_actors import RingWorkers, Workers


@dataclass(frozen=True, slots=True)
class RunnerConfig:
    """How a controller's runs behave.

    Attributes:
        stage_function: ``module:function`` that trains a stage on a rank.
        prepare_function: ``module:function`` that builds a data recipe.
        one_shot: a job that the cluster can never hold fails, instead of waiting for nodes.
        workers: what gangs are made of.
    """

    stage_function: str = "ringworld_workers.train_loop:run_stage"
    prepare_function: str = "ringworld_workers.data.prepare:build"
    one_shot: bool = False
    workers: Workers = field(default_factory=RingWorkers)
