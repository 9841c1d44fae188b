"""What the planner expected of a stage, beside what its first steps measured."""

from __future__ import annotations

import logging
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ringworld_jobs.mesh import MeshSize
from ringworld_jobs.planner.cpu import cpu_device
from ringworld_jobs.planner.hardware import Device, Hardware, gpu_named
from ringworld_jobs.planner.predict import Prediction, predict
from ringworld_jobs.spec import JobSpec
from ringworld_platform.formatting import bytes_text, step_duration
from ringworld_platform.run_records import Record

log = logging.getLogger(__name__)

EVENT = "plan"
MEASURED_STEPS = 5
"""Steps that are measured, after a first one that also warms caches up."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One stage's prediction and measurement.

    Attributes:
        stage: the stage's name.
        predicted: by the planner.
        step_seconds: median of the measured steps, checkpoints left out.
        memory_bytes: the most of one worker in them.
    """

    stage: str
    predicted: Prediction
    step_seconds: float
    memory_bytes: float

    @property
    def text(self) -> str:
        """``stage 4k: step 0.43s (predicted 0.45s), memory 735 MiB a worker (...)``."""
        step, memory = self.predicted.step_seconds, self.predicted.memory_bytes
        return (
            f"stage {self.stage}: step {step_duration(self.step_seconds)} (predicted "
            f"{step_duration(step)}), memory {bytes_text(self.memory_bytes)} a worker (predicted "
            f"{bytes_text(memory)})"
        )

    @property
    def fields(self) -> dict[str, Any]:
        """The same as data."""
        return {
            "stage": self.stage,
            "step_seconds": self.step_seconds,
            "predicted_step_seconds": self.predicted.step_seconds,
            "memory_bytes": self.memory_bytes,
            "predicted_memory_bytes": self.predicted.memory_bytes,
        }


@dataclass(slots=True)
class Predictions:
    """Compares once each time that a stage begins. One run's; used by one thread."""

    spec: JobSpec
    _start: Record = field(default_factory=dict)
    _nodes: tuple[str, ...] = ()
    _prepared: Mapping[str, Any] = field(default_factory=dict)
    _steps: list[Record] = field(default_factory=list)
    _waiting: bool = False
    predicted: Prediction | None = None
    """Of the stage at hand; None where the planner does not know the hardware."""

    def begin(
        self, start: Record, nodes: Iterable[str], prepared: Mapping[str, Any] | None
    ) -> None:
        """Take note that a stage begins.

        Args:
            start: its ``stage_start`` record.
            nodes: of each worker.
            prepared: what the data's preparation returned: its vocabularies.
        """
        self._start, self._nodes, self._prepared = start, tuple(nodes), prepared or {}
        self._steps, self.predicted = [], None
        if "device_name" in start:
            try:
                self.predicted = self._predict()
            except Exception as error:
                # A prediction is nice to have; the run goes on without it.
                log.warning("no prediction of stage %s: %s", start.get("stage"), error)
        self._waiting = self.predicted is not None

    def step(self, record: Record) -> Comparison | None:
        """Take a ``step`` record.

        Returns:
            The comparison, with the last of the steps that are measured; None before and after,
            and where the planner does not know the hardware.
        """
        if not self._waiting:
            return None
        self._steps.append(record)
        if len(self._steps) <= MEASURED_STEPS:
            return None
        self._waiting = False
        predicted, steps = self.predicted, self._steps[1:]
        if predicted is None:
            return None
        on = "device" if "device_total_bytes" in self._start else "host"
        try:
            return Comparison(
                self.spec.stages[self._index].name,
                predicted,
                statistics.median(
                    float(step.get("step_seconds", 0.0))
                    - float(step.get("checkpoint_stall_seconds", 0.0))
                    for step in steps
                ),
                max(float(step.get(f"memory_{on}_bytes", 0.0)) for step in steps),
            )
        except Exception as error:
            log.warning("stage %s is not compared: %s", self._start.get("stage"), error)
            return None

    @property
    def _index(self) -> int:
        return int(self._start.get("stage_index", 0))

    def _predict(self) -> Prediction | None:
        start = self._start
        device = device_of_record(start, self._nodes)
        if device is None:
            return None
        mesh = MeshSize(
            int(start.get("ring_size", 1)),
            int(start.get("data_parallel_size", 1)),
            int(start.get("heads_size", 1)),
        )
        hardware = Hardware(device, mesh.world_size, "the run's workers")
        model = self.spec.model.config(
            text_vocab_size=self._prepared.get("tokenizer_size"),
            codebook_size=self._prepared.get("codebook_size"),
        )
        return predict(self.spec, self._index, hardware, model=model, mesh=mesh)


def device_of_record(start: Record, nodes: Iterable[str]) -> Device | None:
    """The device that a ``stage_start`` record tells of; None where the planner knows none such.

    Args:
        start: the record.
        nodes: the node of each worker.
    """
    name = str(start.get("device_name", ""))
    if name != "CPU":
        total = start.get("device_total_bytes")
        return gpu_named(name, None if total is None else float(total))
    rate = start.get("matmul_flops")
    on_one = max(Counter(nodes).values(), default=1)
    return None if rate is None else cpu_device(float(rate), on_one)


def comparison_lines(events: Iterable[Record]) -> list[str]:
    """What was predicted and measured, by stage: the newest of each, in order."""
    newest = {
        str(event.get("stage")): str(event.get("text"))
        for event in events
        if event.get("kind") == EVENT and "predicted_step_seconds" in event
    }
    return list(newest.values())
