"""What an engine is: a module, its gradients and its optimizer over the world's ranks.

An engine also gives its state as flat ranges of named logical tensors, which is all that a
checkpoint knows of it: neither the mesh nor the ZeRO stage shows in them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import nn

from ringworld_workers.checkpoint.layout import GroupState, OptimizerState

RangeKind = Literal["param", "exp_avg", "exp_avg_sq"]
MOMENTS: tuple[RangeKind, ...] = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class OwnedRange:
    """A run of consecutive elements of one logical tensor, in place."""

    tensor: str
    """Parameter name."""
    kind: RangeKind
    """The fp32 master weight, or one of Adam's moments."""
    shape: tuple[int, ...]
    """Shape of the whole logical tensor."""
    start: int
    """First element, in row-major order of the whole tensor."""
    data: torch.Tensor
    """1-D fp32, a view of the engine's own memory: writing to it changes the engine."""


@dataclass(frozen=True)
class Fragment:
    """A run of a parameter's elements inside a tensor that the optimizer updates on this rank."""

    tensor: str
    shape: tuple[int, ...]
    start: int
    numel: int
    owner: torch.Tensor
    """The optimizer's fp32 tensor, the key of its state."""
    offset: int
    """Where the run begins in the flattened owner."""

    def narrow(self, start: int, stop: int) -> Fragment:
        """The part [start, stop) of this run, counted from its own beginning."""
        return replace(
            self, start=self.start + start, numel=stop - start, offset=self.offset + start
        )


Fill = Callable[[Sequence[OwnedRange]], None]
"""Writes stored values into the ranges it is given; raises on every rank if any rank failed."""


class Engine(Protocol):
    """Trains one module over all ranks. One engine a process; all methods are collectives."""

    module: nn.Module
    loss_factor: float
    """``world_size * accumulation``: what a loss handed to ``backward`` must hold, so that the
    mean over ranks and micro-batches becomes the sum over the global batch."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Forward."""

    def backward(self, loss: torch.Tensor) -> None:
        """Add one micro-batch's gradients. ``loss`` is a scalar that holds ``loss_factor``."""

    def step(self) -> float:
        """Update the weights, once the step's micro-batches have gone through ``backward``.

        Returns:
            The global gradient norm before clipping. When it is not finite no weight is changed.

        Raises:
            RuntimeError: more or fewer micro-batches than the stage accumulates.
        """

    def set_learning_rate(self, value: float) -> None:
        """Use this rate in every parameter group from the next ``step`` on."""

    def owned_ranges(self) -> list[OwnedRange]:
        """This rank's share of the state; the shares of all ranks cover it once."""

    def optimizer_state(self) -> OptimizerState:
        """What the optimizer knows besides its tensors."""

    def load_ranges(self, fill: Fill, optimizer: OptimizerState | None) -> None:
        """Have the state that this rank computes with filled in, then refresh all copies of it.

        Args:
            fill: called once with every range to be written.
            optimizer: with it, moments and hyper-parameters are loaded too; without it only
                weights are, and the optimizer starts afresh.
        """

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and whole shape of every parameter."""

    def evaluate(self) -> AbstractContextManager[None]:
        """Forward without gradients inside the context."""

    def close(self) -> None:
        """Free the engine's memory and tear down what it started."""


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Have a module compute as in evaluation, without gradients; its mode comes back at the end."""
    training = module.training
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.train(training)


def ranges_of(
    fragments: Iterable[Fragment], optimizer: torch.optim.Optimizer, with_moments: bool
) -> list[OwnedRange]:
    """Views of the fragments' weights and, if asked, of the optimizer's moments for them.

    Kind after kind: a checkpoint's weights then lie together, and are read without the moments.
    """
    held = list(fragments)
    ranges = []
    kinds: tuple[RangeKind, ...] = ("param", *MOMENTS) if with_moments else ("param",)
    for kind in kinds:
        for fragment in held:
            owner = fragment.owner
            source = owner if kind == "param" else optimizer.state[owner][kind]
            data = source.detach().view(-1).narrow(0, fragment.offset, fragment.numel)
            ranges.append(OwnedRange(fragment.tensor, kind, fragment.shape, fragment.start, data))
    return ranges


def even_shares(fragments: Iterable[Fragment], rank: int, world_size: int) -> list[Fragment]:
    """Of replicated fragments, the even part that this rank writes to a checkpoint."""
    shares = []
    for fragment in fragments:
        start = fragment.numel * rank // world_size
        stop = fragment.numel * (rank + 1) // world_size
        if stop > start:
            shares.append(fragment.narrow(start, stop))
    return shares


@torch.no_grad()
def clip_gradients(parameters: Iterable[torch.Tensor], limit: float) -> float:
    """Scale replicated, reduced gradients to a global norm of at most ``limit`` (0: no limit).

    Returns:
        The norm before. When it is not finite, gradients are left as they are.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients]))
    if limit > 0 and bool(torch.isfinite(norm)):
        factor = torch.clamp(limit / (norm + 1e-6), max=1.0)
        for gradient in gradients:
            gradient.mul_(factor)
    return float(norm)


def has_moments(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer keeps exp_avg and exp_avg_sq."""
    return isinstance(optimizer, torch.optim.AdamW)


def ensure_moments(optimizer: torch.optim.Optimizer, owners: Iterable[torch.Tensor]) -> None:
    """Create Adam's state where it is not there yet: torch does so only in the first step."""
    if not has_moments(optimizer):
        return
    for owner in owners:
        state = optimizer.state[owner]
        if "exp_avg" not in state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(owner.detach())
            state["exp_avg_sq"] = torch.zeros_like(owner.detach())


def read_optimizer_state(
    optimizer: torch.optim.Optimizer, owners: Iterable[torch.Tensor]
) -> OptimizerState:
    """Step count and each group's hyper-parameters; ``owners`` hold the step count."""
    step = 0
    if has_moments(optimizer):
        step = max((int(optimizer.state[owner]["step"]) for owner in owners), default=0)
    groups = tuple(
        GroupState(group["name"], float(group["lr"]), float(group["weight_decay"]))
        for group in optimizer.param_groups
    )
    return OptimizerState("adamw" if has_moments(optimizer) else "sgd", step, groups)


def write_optimizer_state(
    optimizer: torch.optim.Optimizer,
    owners: Iterable[torch.Tensor],
    state: OptimizerState | None,
) -> None:
    """Restore step count and groups; without a state, reset the moments and the count to zero."""
    if has_moments(optimizer):
        for owner in owners:
            held = optimizer.state[owner]
            held["step"].fill_(float(state.step if state else 0))
            if state is None:
                held["exp_avg"].zero_()
                held["exp_avg_sq"].zero_()
    by_name = {group.name: group for group in state.groups} if state else {}
    for group in optimizer.param_groups:
        if group["name"] in by_name:
            group["lr"] = by_name[group["name"]].learning_rate
            group["weight_decay"] = by_name[group["name"]].weight_decay
