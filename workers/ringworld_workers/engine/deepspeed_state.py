"""Where DeepSpeed keeps the fp32 master of each parameter on this rank, at every ZeRO stage.

The public accessors gather whole tensors, or fail on padded shards and on several parameter groups
(stages 1 and 2 link Adam's state after the first group's step only). Addresses alone are enough:
the optimizer's state is keyed by the flat tensors that the addresses point into.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ringworld_workers.engine.base import Fragment


def zero_fragments(module: nn.Module, zero: Any, zero_stage: int) -> list[Fragment]:
    """This rank's fragments of every parameter, in parameter order; padding is left out.

    Args:
        module: the module that the engine trains.
        zero: the engine's optimizer: torch's own at stage 0, DeepSpeed's wrapper above.
        zero_stage: 0 to 3.
    """
    fragments = []
    for name, parameter in module.named_parameters():
        if zero_stage == 0:
            shape = tuple(parameter.shape)
            fragments.append(Fragment(name, shape, 0, parameter.numel(), parameter, 0))
        elif zero_stage < 3:
            fragments += _flat_fragment(name, parameter, zero)
        else:
            fragments += _shard_fragment(name, parameter, zero)
    return fragments


def _flat_fragment(name: str, parameter: Any, zero: Any) -> list[Fragment]:
    """Stages 1 and 2: one flat tensor a group, cut evenly over ranks, across parameters."""
    link = parameter._hp_mapping
    if link is None:  # no element of it falls into this rank's cut
        return []
    high, low = link.hp_fragment_address, link.lp_fragment_address
    owner = _flat_masters(zero)[link.param_group_index]
    shape = tuple(parameter.shape)
    return [Fragment(name, shape, low.start, low.numel, owner, high.start)]


def _flat_masters(zero: Any) -> list[torch.Tensor]:
    # bf16 with fp32 accumulation at stage 1 is another class of DeepSpeed's, with other names.
    if hasattr(zero, "fp32_groups_flat_partition"):
        return list(zero.fp32_groups_flat_partition)
    return list(zero.single_partition_of_fp32_groups)


def _shard_fragment(name: str, parameter: Any, zero: Any) -> list[Fragment]:
    """Stage 3: every parameter cut evenly over ranks; the last cuts are padded."""
    sub_group, offset, padded = zero.grad_position[zero.get_param_id(parameter)]
    start = padded * zero._get_param_partition_rank(parameter)
    numel = min(padded, parameter.ds_numel - start)
    if numel <= 0:
        return []
    owner = zero.fp32_partitioned_groups_flat[sub_group]
    return [Fragment(name, tuple(parameter.ds_shape), start, numel, owner, offset)]


def zero_owners(module: nn.Module, zero: Any, zero_stage: int) -> list[torch.Tensor]:
    """Every tensor that the optimizer updates on this rank, also those that hold padding only."""
    if zero_stage == 0:
        return list(module.parameters())
    if zero_stage < 3:
        return _flat_masters(zero)
    return list(zero.fp32_partitioned_groups_flat)


def refresh_copies(zero: Any, zero_stage: int) -> None:
    """Bring the weights that the module computes with in line with the masters. A collective."""
    if zero_stage in (1, 2):
        zero.update_lp_params()
    elif zero_stage == 3:
        # As at the end of a step: release what is gathered, copy masters to shards, and gather
        # again the small parameters that stay whole between steps.
        zero._partition_all_parameters()
        for sub_group in range(len(zero.fp32_partitioned_groups_flat)):
            zero._reassign_or_swap_out_partitioned_parameters(sub_group)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
