"""What a gang's workers are made of: Ray actors, one a rank."""

from __future__ import annotations

from typing import Any, Protocol

import ray

from ringworld_workers.actor import RingWorkerActor


class Workers(Protocol):
    """Makes and ends the workers of a gang; a load test's need no process each."""

    def make(self, stage_function: str, prepare_function: str, **options: Any) -> Any:
        """Start a worker.

        Args:
            stage_function: ``module:function`` that trains a stage.
            prepare_function: ``module:function`` that builds a data recipe.
            **options: Ray's, of the actor: name, resources and place.

        Returns:
            A handle with the methods of ``RingWorker``, each with a ``remote``.
        """

    def end(self, worker: Any) -> None:
        """End it at once."""


class RingWorkers:
    """Workers that train."""

    def make(self, stage_function: str, prepare_function: str, **options: Any) -> Any:
        """See ``Workers``."""
        return RingWorkerActor.options(**options).remote(stage_function, prepare_function)

    def end(self, worker: Any) -> None:
        """See ``Workers``."""
        ray.kill(worker)
