"""One step over again, watched: where a number stops being finite, and how large gradients are.

For a step that has gone wrong, and after which the gang ends. It looks at every module's output, so
it waits for the device all the time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ringworld_model.loss import LossSums, combine
from ringworld_workers.engine.base import Engine
from ringworld_workers.micro_batch import MicroBatch

MOST_NAMES = 20


class StepProbe:
    """What this rank sees of a step; ``watch`` is a collective of the gang, as the step is.

    Attributes:
        first: where the first number that is not finite came out of a module:
            ``{"micro_batch", "order", "module"}``, None where all are. ``order`` counts the
            modules of a forward pass as they end, alike on all ranks.
    """

    def __init__(self, engine: Engine) -> None:
        """Watch nothing yet."""
        self._engine = engine
        self.first: dict[str, Any] | None = None
        self._squares: dict[str, float] = {}
        self._broken: dict[str, int] = {}
        self._micro_batch = self._order = 0
        self._forward = False
        self._scale = 1.0

    def watch(
        self, batches: Sequence[MicroBatch], weight: torch.Tensor, shares: tuple[float, float]
    ) -> None:
        """Forward and backward of the step's micro-batches, with the weights as they are now.

        No weight is changed. The engine can take no step afterwards.

        Args:
            batches: of the step.
            weight: [2], the step's loss weights over the whole global batch.
            shares: of text and vision in the loss.
        """
        hooks = [*self._watch_modules(), *self._watch_gradients()]
        try:
            for number, batch in enumerate(batches):
                self._micro_batch, self._order, self._forward = number, 0, True
                sums: LossSums = self._engine(batch.local, batch.ring)
                self._forward = False
                loss = combine(sums, weight, shares, self._engine.loss_factor)
                # How the engine scales what it is given: gradients are told in the loss's own.
                loss.register_hook(self._note_scale)
                self._engine.backward(loss)
        finally:
            for hook in hooks:
                hook.remove()

    def findings(self) -> dict[str, Any]:
        """What was seen, as plain JSON.

        ``gradient_norms`` by part of the model, of this rank's own gradient before it meets those
        of the others (the parts of the global gradient; of several micro-batches, their root sum of
        squares); ``broken_gradients``: parameters whose gradient was not finite, in the order of
        the backward pass; ``first``: see the attribute.
        """
        parts: dict[str, float] = {}
        for name, square in self._squares.items():
            part = _part_of(name)
            parts[part] = parts.get(part, 0.0) + square
        return {
            "first": self.first,
            "gradient_norms": {part: square**0.5 for part, square in parts.items()},
            "broken_gradients": list(self._broken)[:MOST_NAMES],
            "num_broken_gradients": len(self._broken),
        }

    def _watch_modules(self) -> Iterator[Any]:
        for name, module in self._engine.module.named_modules():
            yield module.register_forward_hook(self._output_hook(name or "the whole model"))

    def _output_hook(self, name: str) -> Any:
        def look(module: nn.Module, arguments: Any, output: Any) -> None:
            # Modules that are computed again for the backward pass were seen before.
            if not self._forward:
                return
            self._order += 1
            if self.first is None and not all(map(_is_finite, _tensors(output))):
                place = {"micro_batch": self._micro_batch, "order": self._order}
                self.first = {**place, "module": name}

        return look

    def _watch_gradients(self) -> Iterator[Any]:
        for name, parameter in self._engine.module.named_parameters():
            yield parameter.register_hook(self._gradient_hook(name))

    def _gradient_hook(self, name: str) -> Any:
        def look(gradient: torch.Tensor) -> None:
            norm = float(torch.linalg.vector_norm(gradient.detach().float())) / self._scale
            if norm * 0 == 0:  # finite
                self._squares[name] = self._squares.get(name, 0.0) + norm**2
            else:
                self._broken.setdefault(name, len(self._broken))

        return look

    def _note_scale(self, gradient: torch.Tensor) -> None:
        self._scale = float(gradient) * self._engine.loss_factor


def _is_finite(tensor: torch.Tensor) -> bool:
    # Detached: what autograd keeps of this would not be there when the layer is computed again.
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor.detach()).all())


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in what a module returns."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name))


def _part_of(name: str) -> str:
    """Of a parameter's name, the layer or the table that it belongs to."""
    parts = name.split(".")
    return ".".join(parts[:2] if parts[0] == "layers" else parts[:1])
