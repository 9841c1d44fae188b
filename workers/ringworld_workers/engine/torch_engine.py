"""Plain torch: replicated weights, gradients summed over the world. The oracle of the others."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ringworld_workers.checkpoint.layout import OptimizerState
from ringworld_workers.engine.base import (
    Fill,
    Fragment,
    OwnedRange,
    clip_gradients,
    ensure_moments,
    evaluating,
    even_shares,
    has_moments,
    ranges_of,
    read_optimizer_state,
    write_optimizer_state,
)
from ringworld_workers.engine.config import EngineConfig
from ringworld_workers.engine.parameter_groups import make_optimizer, split_parameters
from ringworld_workers.engine.weights import materialise
from ringworld_workers.mesh import Mesh

_BUCKET_ELEMENTS = 4 * 1024 * 1024


class TorchEngine:
    """Implements ``Engine``; see there for what the methods promise."""

    def __init__(self, model: nn.Module, config: EngineConfig, mesh: Mesh) -> None:
        """Take over ``model``; in bf16, fp32 master weights are kept apart."""
        if any(parameter.is_meta for parameter in model.parameters()):
            materialise(model, torch.float32, mesh.device)
        self.module = model.to(mesh.device)
        self._config, self._mesh = config, mesh
        self.loss_factor = float(mesh.world_size * config.accumulation)
        self._num_backwards = 0
        groups = split_parameters(self.module, config.optimizer)
        self._parameters = dict(self.module.named_parameters())
        self._masters = dict(self._parameters)
        self._optimizer = make_optimizer(groups, config.optimizer, config.learning_rate)
        if config.precision == "bf16":
            self._keep_masters_apart()

    def _keep_masters_apart(self) -> None:
        names = {id(parameter): name for name, parameter in self._parameters.items()}
        for name, parameter in self._parameters.items():
            self._masters[name] = nn.Parameter(parameter.detach().clone())
        for group in self._optimizer.param_groups:
            group["params"] = [self._masters[names[id(p)]] for p in group["params"]]
        for parameter in self._parameters.values():
            parameter.data = parameter.data.to(torch.bfloat16)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Forward."""
        return self.module(*args, **kwargs)

    def backward(self, loss: torch.Tensor) -> None:
        """Add one micro-batch's gradients to the masters, in fp32."""
        if self._num_backwards == self._config.accumulation:
            raise RuntimeError(
                f"backward was called more than accumulation={self._config.accumulation} times "
                "before step"
            )
        (loss / self.loss_factor).backward()
        self._num_backwards += 1
        for name, parameter in self._parameters.items():
            master = self._masters[name]
            if master is parameter or parameter.grad is None:
                continue
            gradient = parameter.grad.float()
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> float:
        """Sum the gradients over the world, clip, update; returns the norm before clipping."""
        if self._num_backwards != self._config.accumulation:
            raise RuntimeError(
                f"step after {self._num_backwards} backward calls; this stage accumulates "
                f"{self._config.accumulation}"
            )
        self._num_backwards = 0
        self._reduce_gradients()
        norm = clip_gradients(self._masters.values(), self._config.optimizer.clip_norm)
        if math.isfinite(norm):
            self._optimizer.step()
            self._refresh()
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    def _reduce_gradients(self) -> None:
        for master in self._masters.values():
            if master.grad is None:
                master.grad = torch.zeros_like(master)
        gradients = [m.grad for m in self._masters.values() if m.grad is not None]
        if self._mesh.world_size > 1:
            for bucket in _buckets(gradients):
                flat = torch.cat([gradient.view(-1) for gradient in bucket])
                dist.all_reduce(flat, group=self._mesh.world_group)
                for gradient, part in zip(
                    bucket, flat.split([g.numel() for g in bucket]), strict=True
                ):
                    gradient.copy_(part.view_as(gradient))

    def _refresh(self) -> None:
        for name, parameter in self._parameters.items():
            if self._masters[name] is not parameter:
                parameter.data.copy_(self._masters[name].data)

    def set_learning_rate(self, value: float) -> None:
        """Use this rate in every group from the next step on."""
        for group in self._optimizer.param_groups:
            group["lr"] = value

    def _fragments(self) -> list[Fragment]:
        return [
            Fragment(name, tuple(master.shape), 0, master.numel(), master, 0)
            for name, master in self._masters.items()
        ]

    def owned_ranges(self) -> list[OwnedRange]:
        """An even share of every tensor: the weights are replicated."""
        ensure_moments(self._optimizer, self._masters.values())
        shares = even_shares(self._fragments(), self._mesh.rank, self._mesh.world_size)
        return ranges_of(shares, self._optimizer, has_moments(self._optimizer))

    def optimizer_state(self) -> OptimizerState:
        """Step count and group hyper-parameters."""
        ensure_moments(self._optimizer, self._masters.values())
        return read_optimizer_state(self._optimizer, self._masters.values())

    def load_ranges(self, fill: Fill, optimizer: OptimizerState | None) -> None:
        """Every rank fills in everything."""
        ensure_moments(self._optimizer, self._masters.values())
        moments = optimizer is not None and has_moments(self._optimizer)
        fill(ranges_of(self._fragments(), self._optimizer, moments))
        write_optimizer_state(self._optimizer, self._masters.values(), optimizer)
        self._refresh()

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every parameter."""
        return {name: tuple(master.shape) for name, master in self._masters.items()}

    def evaluate(self) -> AbstractContextManager[None]:
        """Forward without gradients."""
        return evaluating(self.module)

    def close(self) -> None:
        """Drop gradients and optimizer state."""
        self._optimizer.zero_grad(set_to_none=True)
        self._optimizer.state.clear()


def _buckets(gradients: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Runs of gradients that travel in one message each."""
    bucket: list[torch.Tensor] = []
    elements = 0
    for gradient in gradients:
        bucket.append(gradient)
        elements += gradient.numel()
        if elements >= _BUCKET_ELEMENTS:
            yield bucket
            bucket, elements = [], 0
    if bucket:
        yield bucket
