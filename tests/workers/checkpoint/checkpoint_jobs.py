"""A small job, engine and state to save: functions that ranks in other processes import too."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ringworld_jobs.spec import JobSpec, OptimizerSpec, StageSpec
from ringworld_model.config import ModelConfig
from ringworld_workers.checkpoint.layout import TrainState
from ringworld_workers.engine.build import build_engine
from ringworld_workers.mesh import Mesh
from ringworld_workers.stage_job import StageJob

STEPS = 1000


def stage_job(url: str, *, attempt: int = 1, world_size: int = 1, **checkpoint: Any) -> StageJob:
    """A job of one stage that saves every step.

    Args:
        url: of its checkpoints.
        attempt: of its gang.
        world_size: rings of one rank.
        checkpoint: fields of the spec's ``checkpoint``.
    """
    stage = {
        "name": "a",
        "context_length": "128",
        "rope_theta": 1e4,
        "steps": STEPS,
        "global_batch_tokens": 256,
        "mixture": {"a": 1},
        "learning_rate": {"peak": 0.01},
    }
    spec = {
        "kind": "train",
        "name": "job",
        "data": {},
        "checkpoint": {"every": "1 steps", **checkpoint},
        "stages": [stage],
    }
    return StageJob(
        run_id="job-1",
        run_uid="uid-1",
        spec=JobSpec.model_validate(spec),
        stage_index=0,
        attempt=attempt,
        world_size=world_size,
        sequence_parallel_size=1,
        data_parallel_size=world_size,
        device="cpu",
        data_dir="",
        sources={},
        model_config=ModelConfig(
            hidden_size=8,
            ffn_size=8,
            num_layers=1,
            num_heads=1,
            num_kv_heads=1,
            text_vocab_size=8,
        ),
        checkpoint_url=url,
        spec_digest="d",
    )


def make_engine(mesh: Mesh, *, seed: int = 0, width: int = 5, optimizer: str = "adamw") -> Any:
    """A plain torch engine of six tensors in both parameter groups."""
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(3, width), nn.LayerNorm(width), nn.Linear(width, 1))
    stage = StageSpec.model_validate(
        {
            "name": "a",
            "context_length": "128",
            "rope_theta": 1e4,
            "steps": 1,
            "global_batch_tokens": 128 * mesh.data_parallel_size,
            "mixture": {"a": 1},
            "learning_rate": {"peak": 0.1},
        }
    )
    return build_engine("torch", module, OptimizerSpec(name=optimizer), stage, mesh)


def state_at(
    step: int, *, stage_index: int = 0, final: bool = False, rows_per_step: int = 1
) -> TrainState:
    """What a checkpoint of the step says besides its tensors."""
    return TrainState(
        stage=f"s{stage_index}",
        stage_index=stage_index,
        step=step,
        tokens=step,
        cursor=step * rows_per_step,
        rng=None,
        learning_rate=0.1,
        spec_digest="d",
        metrics={},
        final=final,
    )
