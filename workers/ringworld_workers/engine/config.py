"""What an engine needs to know of a stage."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal

from ringworld_jobs.spec import OptimizerSpec, StageSpec
from ringworld_workers.mesh import Mesh

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineConfig:
    """What an engine needs to know of the spec."""

    optimizer: OptimizerSpec
    learning_rate: float
    """Rate until ``set_learning_rate`` is called."""
    accumulation: int
    """Micro-batches of one optimizer step on this rank."""
    zero_stage: int
    precision: Literal["fp32", "bf16"]
    optimizer_offload: bool
    """Masters and moments live in host memory."""
    parameter_offload: bool
    """So do the shards of stage 3."""


def engine_config(optimizer: OptimizerSpec, stage: StageSpec, mesh: Mesh) -> EngineConfig:
    """Count the micro-batches and settle the ZeRO stage.

    Raises:
        ValueError: the step's rows do not split evenly over the rings and micro-batches, or an
            offload that the ZeRO stage has not.
    """
    rows_at_once = stage.micro_batch_size * mesh.data_parallel_size
    if stage.rows_per_step % rows_at_once:
        raise ValueError(
            f"stage {stage.name}: {stage.rows_per_step} rows a step do not split into "
            f"micro-batches of {stage.micro_batch_size} on {mesh.data_parallel_size} rings; make "
            f"global_batch_tokens a multiple of {rows_at_once * stage.context_length}"
        )
    zero_stage: int = stage.zero_stage
    if zero_stage == 0 and stage.precision == "bf16":
        log.warning(
            "stage %s: zero_stage 0 with bf16 runs as zero_stage 1: DeepSpeed's stage 0 takes an "
            "optimizer step of its own at start, and keeps no fp32 master weights apart",
            stage.name,
        )
        zero_stage = 1
    if stage.memory.optimizer_offload and zero_stage == 0:
        raise ValueError(f"stage {stage.name}: optimizer_offload needs zero_stage 1, 2 or 3, not 0")
    if stage.memory.parameter_offload and zero_stage != 3:
        raise ValueError(
            f"stage {stage.name}: parameter_offload needs zero_stage 3, not {zero_stage}"
        )
    return EngineConfig(
        optimizer=optimizer,
        learning_rate=stage.learning_rate.peak,
        accumulation=stage.rows_per_step // rows_at_once,
        zero_stage=zero_stage,
        precision=stage.precision,
        optimizer_offload=stage.memory.optimizer_offload,
        parameter_offload=stage.memory.parameter_offload,
    )
