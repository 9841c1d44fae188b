"""What to say of a stage that ran out of memory: what it used, and what would make it use less."""

from __future__ import annotations

import os
from pathlib import Path

from ringworld_jobs.any_job import Job
from ringworld_jobs.spec import CheckpointSpec, StageSpec
from ringworld_platform.recovery import NODE_MEMORY, Failure
from ringworld_platform.run_records import METRICS_FILE, Record, read_lines
from ringworld_platform.run_state import JobRecord

_TAIL_BYTES = 1 << 16
_GIB = 2**30


def describe_memory(run_folder: Path, spec: Job, record: JobRecord, failure: Failure) -> str:
    """One sentence for the error line.

    Args:
        run_folder: has the metric log.
        spec: of the run.
        record: of the run: its stage and mesh.
        failure: tells whether a node was short of memory, which GPUs' levers do not help.
    """
    if not record.trains(len(spec.stages)):
        return (
            f"each of {record.ring_size * record.data_parallel_size} workers had the whole model, "
            f"and 1 / {record.ring_size} of what it reads; make its ring longer "
            "(mesh.sequence_parallel), take precision: bf16, or ask for shorter contexts"
        )
    stage = spec.stages[record.stage_index]
    step = _last_step(run_folder, stage.name)
    of_host = failure.facts.get(NODE_MEMORY) and step.get("memory_device_bytes")
    found = host_levers(stage, spec.checkpoint) if of_host else levers(stage, record)
    ring = record.ring_size * record.heads_size
    return (
        f"stage {stage.name} trains {stage.context_length:,} tokens of context on "
        f"{ring} {'worker' if ring == 1 else 'workers'}{_used(step)}; the cheapest "
        f"remedies are {', then '.join(found)}"
    )


def host_levers(stage: StageSpec, saving: CheckpointSpec) -> list[str]:
    """What takes less of a node's memory where GPUs compute, the cheapest first; three at most."""
    memory = stage.memory
    found = []
    if saving.max_host_bytes is None:
        found.append("checkpoint.max_host_bytes: 4Gi")
    if memory.activation_offload and memory.activation_checkpointing != "full":
        found.append("memory.activation_checkpointing: full")
    for name in ("parameter_offload", "activation_offload", "optimizer_offload"):
        if getattr(memory, name):
            found.append(f"memory.{name}: false")
    found.append("nodes with more memory, or fewer workers on each")
    return found[:3]


def levers(stage: StageSpec, record: JobRecord) -> list[str]:
    """What the stage may still turn on, the cheapest first; three at most."""
    memory = stage.memory
    found = []
    if memory.activation_checkpointing == "none":
        found.append("memory.activation_checkpointing: full")
    if memory.mlp_tile_tokens is None:
        found.append("memory.mlp_tile_tokens: 4096")
    if stage.loss.tile_tokens > 1024:
        found.append("loss.tile_tokens: 1024")
    if stage.zero_stage < 3 and record.ring_size * record.data_parallel_size > 1:
        found.append(f"zero_stage: {stage.zero_stage + 1}")
    if memory.activation_checkpointing != "none" and not memory.activation_offload:
        found.append("memory.activation_offload: true")
    if not memory.optimizer_offload and stage.zero_stage > 0:
        found.append("memory.optimizer_offload: true")
    if stage.micro_batch_size > 1:
        found.insert(0, "micro_batch_size: 1")
    if len(found) < 3:
        found.append(f"mesh.sequence_parallel: {2 * record.ring_size * record.heads_size}")
    return found[:3]


def _last_step(run_folder: Path, stage: str) -> Record:
    """The newest step that the metric log has of a stage."""
    path = run_folder / METRICS_FILE
    size = os.path.getsize(path) if path.exists() else 0
    records = read_lines(path, max(0, size - _TAIL_BYTES)).records
    steps = [each for each in records if each.get("kind") == "step" and each.get("stage") == stage]
    return steps[-1] if steps else {}


def _used(step: Record) -> str:
    """What rank 0 had in use."""
    parts = [
        f"{value / _GIB:.1f} GiB of {name} memory"
        for name in ("device", "host")
        if (value := step.get(f"memory_{name}_bytes"))
    ]
    if not parts:
        return ", and has done no step yet"
    return f", where rank 0 used {' and '.join(parts)} at step {step.get('step')}"
