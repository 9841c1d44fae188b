"""How a controller's runs behave."""

from __future__ import annotations

from dataclasses import dataclass, field

from ringworld_platform.run_copy import STORE_LEASE_SECONDS
from ringworld_platform.worker_actors import RingWorkers, Workers


@dataclass(frozen=True, slots=True)
class RunnerConfig:
    """How a controller's runs behave.

    Attributes:
        stage_function: ``module:function`` that trains a stage on a rank.
        evaluate_function: ``module:function`` that evaluates a model on a rank.
        prepare_function: ``module:function`` that builds a data recipe.
        one_shot: a job that the cluster can never hold fails, instead of waiting for nodes.
        workers: what gangs are made of.
        store_lease_seconds: for how long a run on S3 is its controller's after each sign of life
            there. Other machines wait for that; a store may be away for as long.
    """

    stage_function: str = "ringworld_workers.train_loop:run_stage"
    evaluate_function: str = "ringworld_workers.evaluate.run:run_evaluation"
    prepare_function: str = "ringworld_workers.data.prepare:build"
    one_shot: bool = False
    workers: Workers = field(default_factory=RingWorkers)
    store_lease_seconds: float = STORE_LEASE_SECONDS
