from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from ringworld_jobs.spec import OptimizerSpec, StageSpec
from ringworld_workers.engine.build import build_engine
from ringworld_workers.engine.config import engine_config
from ringworld_workers.engine.parameter_groups import make_optimizer, split_parameters


def stage_of(**changes: Any) -> StageSpec:
    return StageSpec.model_validate(
        {
            "name": "a",
            "context_length": "128",
            "rope_theta": 1e4,
            "steps": 1,
            "global_batch_tokens": 128 * 12,
            "mixture": {"a": 1},
            "learning_rate": {"peak": 0.25},
            **changes,
        }
    )


def mesh_of(data_parallel_size: int) -> Any:
    return SimpleNamespace(data_parallel_size=data_parallel_size)


def test_accumulation_makes_up_for_rings() -> None:
    for rings, micro_batch_size, accumulation in ((1, 1, 12), (2, 3, 2), (12, 1, 1)):
        stage = stage_of(micro_batch_size=micro_batch_size)
        config = engine_config(OptimizerSpec(), stage, mesh_of(rings))
        assert (config.accumulation, config.learning_rate) == (accumulation, 0.25)


def test_rows_that_do_not_split_are_refused() -> None:
    with pytest.raises(ValueError, match="12 rows a step .* on 5 rings; .* multiple of 640"):
        engine_config(OptimizerSpec(), stage_of(), mesh_of(5))


def test_bf16_at_stage_0_runs_as_stage_1_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    stage = stage_of(zero_stage=0, precision="bf16")
    with caplog.at_level(logging.WARNING):
        assert engine_config(OptimizerSpec(), stage, mesh_of(1)).zero_stage == 1
    assert "zero_stage 0 with bf16 runs as zero_stage 1" in caplog.text
    assert engine_config(OptimizerSpec(), stage_of(zero_stage=0), mesh_of(1)).zero_stage == 0


def net() -> nn.Module:
    return nn.Sequential(nn.Embedding(5, 3), nn.LayerNorm(3), nn.Linear(3, 2))


def test_offloads_need_their_zero_stage_and_engine() -> None:
    def config_of(**changes: Any) -> Any:
        return engine_config(OptimizerSpec(), stage_of(**changes), mesh_of(1))

    with pytest.raises(ValueError, match="parameter_offload needs zero_stage 3, not 2"):
        config_of(zero_stage=2, memory={"parameter_offload": True})
    with pytest.raises(ValueError, match="optimizer_offload needs zero_stage 1, 2 or 3, not 0"):
        config_of(zero_stage=0, memory={"optimizer_offload": True})
    stage = stage_of(memory={"optimizer_offload": True})
    assert config_of(memory=stage.memory).optimizer_offload
    with pytest.raises(ValueError, match="the torch engine keeps all on the device; use the deep"):
        build_engine("torch", net(), OptimizerSpec(), stage, mesh_of(1))


def test_matrices_decay_and_norms_do_not() -> None:
    decay, no_decay = split_parameters(net(), OptimizerSpec(weight_decay=0.3))
    assert (decay.name, list(decay.parameters)) == ("decay", ["0.weight", "2.weight"])
    assert list(no_decay.parameters) == ["1.weight", "1.bias", "2.bias"]
    assert (decay.weight_decay, no_decay.weight_decay) == (0.3, 0.0)
    (everything,) = split_parameters(net(), OptimizerSpec(decay_norms=True))
    assert len(everything.parameters) == 5
    optimizer = make_optimizer([decay, no_decay], OptimizerSpec(betas=(0.8, 0.9)), 0.5)
    assert [group["betas"] for group in optimizer.param_groups] == [(0.8, 0.9)] * 2


def test_what_cannot_train_is_refused() -> None:
    frozen = net()
    frozen[1].weight.requires_grad_(False)
    with pytest.raises(ValueError, match="parameter 1.weight has requires_grad=False"):
        split_parameters(frozen, OptimizerSpec())
    with pytest.raises(ValueError, match="no parameters"):
        split_parameters(nn.Identity(), OptimizerSpec())
    half = net().to(torch.bfloat16)
    with pytest.raises(ValueError, match="0.weight is torch.bfloat16; hand over fp32"):
        build_engine("torch", half, OptimizerSpec(), stage_of(), mesh_of(1))
    with pytest.raises(ValueError, match="unknown engine 'jax'"):
        build_engine("jax", net(), OptimizerSpec(), stage_of(), mesh_of(1))  # type: ignore[arg-type]


BARE = """
import torch, torch.distributed as dist
from torch import nn
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
from ringworld_jobs.spec import OptimizerSpec, StageSpec
from ringworld_workers.engine.build import build_engine
from ringworld_workers.mesh import build_mesh
stage = StageSpec.model_validate({
    "name": "a", "context_length": "128", "rope_theta": 1e4, "steps": 1,
    "global_batch_tokens": 128, "mixture": {"a": 1}, "learning_rate": {"peak": 0.1},
    "zero_stage": 1, "precision": "bf16", "memory": {"optimizer_offload": OFFLOAD},
})
module = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 1))
engine = build_engine("deepspeed", module, OptimizerSpec(), stage, build_mesh(1, 1))
engine.backward(engine(torch.ones(2, 3, dtype=torch.bfloat16)).float().sum())
assert engine.step() > 0
with engine.evaluate():
    engine(torch.ones(2, 3, dtype=torch.bfloat16))
engine.close()
dist.destroy_process_group()
"""


@pytest.mark.parametrize("offload", ["False", "True"])
def test_deepspeed_starts_bare_silent_and_compiles_nothing(tmp_path: Path, offload: str) -> None:
    """No launcher's variables, no output, no compiled extension, no compiler in reach."""
    ranks = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
    environment = {name: value for name, value in os.environ.items() if name not in ranks}
    environment["TORCH_EXTENSIONS_DIR"] = str(tmp_path / "extensions")
    environment["PATH"] = str(tmp_path)
    said = subprocess.run(
        [sys.executable, "-c", BARE.replace("OFFLOAD", offload)],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        cwd=tmp_path,
    )
    assert (said.returncode, said.stdout, said.stderr) == (0, "", "")
    assert not (tmp_path / "extensions").exists()
