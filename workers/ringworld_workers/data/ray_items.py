"""The tasks of a build on a Ray cluster, through Ray Data: no other file of a build knows Ray."""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from ringworld_workers.data.files import DataError
from ringworld_workers.data.work import Item, Result


class RayMapper:
    """Spreads tasks over the CPUs of the connected cluster that are free.

    A worker that dies is replaced and its task done again: tasks leave whole files or none.
    """

    place = "on the cluster"

    def map(
        self,
        function: Callable[[Item], Result],
        items: Sequence[Item],
        *,
        accelerated: bool = False,
    ) -> Iterator[Result]:
        """Results as they come; see ``Mapper``.

        Raises:
            DataError: the function raised it.
        """
        # Imported here: it takes a second, and a cached build needs none of it.
        import ray.data

        resources: dict[str, Any] = {"num_cpus": 1}
        most = _free("CPU")
        if accelerated and (gpus := _free("GPU")):
            resources, most = {"num_cpus": 1, "num_gpus": 1}, min(most, gpus)
        ray.data.DataContext.get_current().enable_progress_bars = False
        _quiet()
        # As bytes: of Python objects, Arrow would first try to make columns.
        rows = [{"item": pickle.dumps(item)} for item in items]
        worker: Any = _Worker
        tasks = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
            worker,
            fn_constructor_args=(function,),
            compute=ray.data.ActorPoolStrategy(
                min_size=1,
                max_size=max(1, min(most, len(rows))),
                # One at a time and one in waiting: tasks are long, and none should lie with a slow
                # worker while another has nothing to do.
                max_tasks_in_flight_per_actor=2,
            ),
            **resources,
        )
        for row in tasks.iter_rows():
            found = pickle.loads(row["result"])
            if isinstance(found, _Failed):
                raise found.error
            yield found


def _quiet() -> None:
    """Keep Ray Data's plans from the terminal, where a build shows its own progress.

    Its log files keep them.
    """
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler) and not isinstance(
            handler, logging.FileHandler
        ):
            handler.setLevel(logging.ERROR)


@dataclass(frozen=True, slots=True)
class _Failed:
    """What a task says to the user; raised there, Ray Data would wrap it in its own errors."""

    error: DataError | OSError


class _Worker:
    """Holds the function in one process, with whatever it has loaded."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        # The tokenizer's threads are as many as Ray has counted; read when it starts its first.
        os.environ["RAYON_NUM_THREADS"] = "1"
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        self._function = function

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            found = self._function(pickle.loads(row["item"]))
        except (DataError, OSError) as error:
            found = _Failed(error)
        return {"result": pickle.dumps(found)}


def connected_mapper() -> RayMapper | None:
    """Ray, where this process is connected to a cluster with room for another worker."""
    if ray.is_initialized() and _free("CPU") >= 1:
        return RayMapper()
    return None


def _free(resource: str) -> int:
    return int(ray.available_resources().get(resource, 0))
