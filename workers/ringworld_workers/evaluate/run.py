"""The evaluations of one model on one rank: the stage function of an evaluation's gang.

The rings take the items in turn, a round at a time: after each round all ranks agree whether to go
on, so that none waits for another longer than an item takes. Each answer is handed over as soon as
it is there, and what has one is not asked again by the next gang.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist

from ringworld_workers.evaluate.job import EvaluationJob
from ringworld_workers.evaluate.no_tokenizer import coder_of
from ringworld_workers.evaluate.registry import make_tasks
from ringworld_workers.evaluate.task import EvaluationRing, Item, Record, Subject, Task
from ringworld_workers.generation.loading import DTYPES, LoadedModel, load_model
from ringworld_workers.mesh import Mesh
from ringworld_workers.reporter import Reporter

log = logging.getLogger(__name__)

RECORD_LIMIT_BYTES = 64 * 1024
"""Of one answer: all of them travel to the next gang after a failure."""


def run_evaluation(job: EvaluationJob, mesh: Mesh, reporter: Reporter) -> dict[str, Any]:
    """Do every task of the job, or go on with what is left of them.

    Args:
        job: what to ask of which model; the same on every rank.
        mesh: this rank's place and its process groups.
        reporter: takes answers (on the first rank of each ring) and phases.

    Returns:
        ``{"status": "finished", "evaluations": [{"task", "model", "items", "figures"}]}``, or
        ``{"status": "stopped", "kept": answers that there are}``.

    Raises:
        RequestError, DataError: the model or the data cannot be had.
        CheckpointError, StoreError: the checkpoint is damaged, or its store does not answer.
        ValueError: a task cannot be done on this model; says why.
    """
    reporter.phase("load", 0)
    loaded = load_model(
        job.model,
        device=mesh.device,
        dtype=DTYPES[job.precision],
        coder=coder_of(job.model, str(mesh.device)),
        on_tensor=lambda done, total: reporter.phase(f"load {done}/{total}", done),
    )
    subject = subject_of(job, loaded)
    ring = EvaluationRing(
        loaded=loaded,
        group=mesh.sequence_parallel_group if mesh.sequence_parallel_size > 1 else None,
        rank=mesh.sequence_parallel_rank,
        size=mesh.sequence_parallel_size,
        device=mesh.device,
    )
    run = EvaluationRun(job, mesh, reporter, ring)
    done = []
    for task in make_tasks(job.evaluations, subject):
        figures = run.task(task)
        if figures is None:
            return {"status": "stopped", "kept": run.kept}
        done.append(figures)
    reporter.phase("finished", 0)
    return {"status": "finished", "evaluations": done}


def subject_of(job: EvaluationJob, loaded: LoadedModel) -> Subject:
    """What a job's tasks are made with."""
    return Subject(
        loaded=loaded,
        stage_name=job.stage_name,
        seed=job.seed,
        context_length=job.context_length,
        sources=job.sources,
        mixture=job.mixture,
        first_mixture=job.first_mixture,
        first_context_length=job.first_context_length,
        data=job.data,
        earlier=job.earlier,
        files_url=job.files_url,
    )


@dataclass
class EvaluationRun:
    """One rank's part in the tasks of a job.

    Attributes:
        kept: answers that there are by now, over all tasks and rings.
    """

    job: EvaluationJob
    mesh: Mesh
    reporter: Reporter
    ring: EvaluationRing
    kept: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        """Count what there is."""
        self.kept = len(self.job.answers)

    def task(self, task: Task) -> dict[str, Any] | None:
        """Ask what has not been answered yet, and sum up. A collective of the gang.

        Returns:
            ``task``, ``model``, ``items`` and ``figures``; None where a stop was asked for.
        """
        self.reporter.phase(f"{task.name}: preparing", 0)
        items = task.items()
        answers = {
            record["id"]: record for record in self.job.answers if record["task"] == task.name
        }
        left = [item for item in items if item.id not in answers]
        if self.mesh.rank == 0:
            there = len(items) - len(left)
            text = f"asks {task.name} of {self.job.model.label}: {len(items)} items"
            text += f", {there} of them answered already" if there else ""
            about = {"task": task.name, "items": len(items), "answered": there}
            self.reporter.event({"kind": "evaluation_start", "text": text, **about})
        mine = left[self.mesh.data_parallel_rank :: self.mesh.data_parallel_size]
        progress = _Progress(self.reporter, task.name, len(items), len(items) - len(left))
        new = self._ask(task, mine, progress)
        if new is None:
            return None
        gathered: list[Any] = [None] * self.mesh.world_size
        dist.all_gather_object(gathered, new, group=self.mesh.control_group)
        answers.update((record["id"], record) for part in gathered for record in part)
        missing = [item.id for item in items if item.id not in answers]
        if missing:
            raise ValueError(
                f"evaluate.{task.name}: {len(missing)} of {len(items)} items have no record, the "
                f"first of them {missing[0]!r}; the task's run() must give one for each"
            )
        figures = task.summarize([answers[item.id] for item in items])
        log.info("%s of %s: %s", task.name, self.job.model.label, figures)
        about = {"task": task.name, "model": self.job.model.label, "items": len(items)}
        return {**about, "figures": figures}

    def _ask(self, task: Task, items: Sequence[Item], progress: _Progress) -> list[Record] | None:
        """This ring's answers, on its first rank; None where all ranks have agreed to stop."""
        leads = self.ring.rank == 0
        new: list[Record] = []
        with closing(
            _answers(task, items, replace(self.ring, progress=progress.within))
        ) as answers:
            while True:
                progress.item()
                record = next(answers, None)
                if record is not None and leads:
                    record = {**record, "task": task.name}
                    _check(record, self.job.record("answer"))
                    self.reporter.answer(self.job.record("answer", **record))
                    new.append(record)
                given, stop = self._agree(record is not None and leads)
                self.kept += given
                progress.done += given
                if stop:
                    return None
                if not given:
                    return new

    def _agree(self, given: bool) -> tuple[int, bool]:
        """How many answers the rings have given in this round, and whether to stop after it."""
        flags = torch.tensor([int(given), int(self.reporter.should_stop())])
        dist.all_reduce(flags, group=self.mesh.control_group)
        return int(flags[0]), bool(flags[1])


@dataclass
class _Progress:
    """Says where a task is: every word of it is a sign of life."""

    reporter: Reporter
    name: str
    total: int
    done: int

    def item(self) -> None:
        self.reporter.phase(f"{self.name} {self.done}/{self.total}", self.done)

    def within(self, text: str) -> None:
        self.reporter.phase(f"{self.name} {self.done}/{self.total}: {text}", self.done)


def _answers(
    task: Task, items: Sequence[Item], ring: EvaluationRing
) -> Generator[Record, None, None]:
    """The task's records, each with its item's facts."""
    facts: Mapping[str, Mapping[str, Any]] = {item.id: item.facts for item in items}
    if items:
        with torch.no_grad():
            for record in task.run(items, ring):
                yield {**facts[record["id"]], **record}


def _check(record: Record, line: Record) -> None:
    """Refuse what cannot be kept.

    Args:
        record: a task's.
        line: what its line in the log says besides.
    """
    if taken := sorted(record.keys() & line.keys()):
        raise ValueError(
            f"evaluate.{record['task']}: the record of {record['id']!r} has {taken[0]!r}, which "
            "its line in the log says already; let the task call it by another name"
        )
    size = len(json.dumps(record))
    if size > RECORD_LIMIT_BYTES:
        raise ValueError(
            f"evaluate.{record['task']}: the record of {record['id']!r} has {size:,} bytes, more "
            f"than {RECORD_LIMIT_BYTES:,}; let the task keep a summary of what it asked"
        )
