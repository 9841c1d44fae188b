"""From a stage's spec to its engine."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from ringworld_jobs.spec import OptimizerSpec, StageSpec
from ringworld_workers.engine.base import Engine
from ringworld_workers.engine.config import engine_config
from ringworld_workers.mesh import Mesh

EngineName = Literal["deepspeed", "torch"]


def build_engine(
    name: EngineName, model: nn.Module, optimizer: OptimizerSpec, stage: StageSpec, mesh: Mesh
) -> Engine:
    """Take over ``model`` (fp32, equal on all ranks) and train it. One engine a process.

    A model that was built on the meta device has no weights yet: its parameters are zero until
    ``load_ranges`` fills them. At ZeRO stage 3 no rank ever holds the whole of it.

    Args:
        name: ``deepspeed`` (ZeRO), or ``torch`` (replicated weights: the oracle of the tests).
        model: any module; the engine gives it parameters of its own, on the mesh's device, and
            copies the values of those that are not on the meta device.
        optimizer: hyper-parameters.
        stage: precision, ZeRO stage and batch arithmetic.
        mesh: this rank's place.

    Raises:
        ValueError: an unknown engine, uneven batch arithmetic, an offload that the engine or the
            ZeRO stage has not, or a parameter that cannot train.
    """
    config = engine_config(optimizer, stage, mesh)
    for parameter_name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32:
            raise ValueError(
                f"parameter {parameter_name} is {parameter.dtype}; hand over fp32 weights, the "
                "engine makes the lower precision itself"
            )
    if name == "torch":
        if config.optimizer_offload or config.parameter_offload:
            raise ValueError(
                f"stage {stage.name}: the torch engine keeps all on the device; use the deepspeed "
                "engine, or leave optimizer_offload and parameter_offload out"
            )
        from ringworld_workers.engine.torch_engine import TorchEngine

        return TorchEngine(model, config, mesh)
    if name == "deepspeed":
        # Imported here: the import takes seconds, and the torch engine runs without it.
        from ringworld_workers.engine.deepspeed_engine import DeepSpeedEngine

        return DeepSpeedEngine(model, config, mesh)
    raise ValueError(f"unknown engine {name!r}; use deepspeed or torch")
