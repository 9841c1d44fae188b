"""Which parameters decay, and the torch optimizer over them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from ringworld_jobs.spec import OptimizerSpec


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share hyper-parameters."""

    name: str
    """``decay`` or ``no_decay``."""
    weight_decay: float
    parameters: dict[str, nn.Parameter]

    def in_module(self, module: nn.Module) -> ParameterGroup:
        """The group with what the module now has by these names."""
        now = dict(module.named_parameters())
        return replace(self, parameters={name: now[name] for name in self.parameters})


def split_parameters(module: nn.Module, spec: OptimizerSpec) -> list[ParameterGroup]:
    """Decay matrices and tables (two axes or more); norms and biases only if ``decay_norms``.

    Groups without a parameter are left out.

    Raises:
        ValueError: the module has no parameter, or one that does not train: the engine could not
            save what the optimizer does not hold.
    """
    decay: dict[str, nn.Parameter] = {}
    no_decay: dict[str, nn.Parameter] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            raise ValueError(
                f"parameter {name} has requires_grad=False; every parameter must train, keep "
                "constants in buffers"
            )
        (decay if parameter.ndim >= 2 or spec.decay_norms else no_decay)[name] = parameter
    groups = [
        ParameterGroup("decay", spec.weight_decay, decay),
        ParameterGroup("no_decay", 0.0, no_decay),
    ]
    groups = [group for group in groups if group.parameters]
    if not groups:
        raise ValueError("the module has no parameters; there is nothing to train")
    return groups


def make_optimizer(
    groups: list[ParameterGroup], spec: OptimizerSpec, learning_rate: float, on_host: bool = False
) -> torch.optim.Optimizer:
    """AdamW, or plain SGD whose weight decay is the decoupled one too (without momentum the two
    forms are the same).

    ``on_host`` says that a CPU will update what a GPU trains: AdamW then goes over each element
    once, in torch's own fused kernel, rather than once an operation.
    """
    arguments = [
        {
            "params": list(group.parameters.values()),
            "name": group.name,
            "weight_decay": group.weight_decay,
        }
        for group in groups
    ]
    if spec.name == "sgd":
        return torch.optim.SGD(arguments, lr=learning_rate)
    return torch.optim.AdamW(
        arguments, lr=learning_rate, betas=spec.betas, eps=spec.eps, fused=on_host or None
    )
