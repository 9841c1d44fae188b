"""Parameters for a model that was built without memory, and the way of values into them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn

from ringworld_workers.engine.base import OwnedRange


def materialise(
    model: nn.Module,
    dtype: torch.dtype,
    device: torch.device,
    then: Callable[[nn.Parameter], None] = lambda _: None,
) -> None:
    """Give a model new parameters, all zero, one after another; buffers move to the device.

    Parameters that modules share stay shared. What a parameter was before is neither read nor
    written.

    Args:
        model: on any device, the meta device among them.
        dtype: of the parameters.
        device: of parameters and buffers.
        then: is given each parameter before the next one takes memory, in the model's order.

    Raises:
        ValueError: a buffer is on the meta device: nothing here knows its value.
    """
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module_name, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if parameter not in made:
                made[parameter] = nn.Parameter(
                    torch.zeros(parameter.shape, dtype=dtype, device=device),
                    requires_grad=parameter.requires_grad,
                )
                then(made[parameter])
            setattr(module, name, made[parameter])
        for name, buffer in list(module.named_buffers(recurse=False, remove_duplicate=False)):
            if buffer.is_meta:
                raise ValueError(
                    f"buffer {module_name}.{name} is on the meta device and has no value; build "
                    "buffers on the CPU, parameters alone on meta"
                )
            setattr(module, name, buffer.to(device))


def copy_weights(tensors: Iterable[tuple[str, torch.Tensor]], ranges: Sequence[OwnedRange]) -> None:
    """Copy out of whole tensors, one after another, what this rank holds of them.

    Args:
        tensors: every parameter's name and value, of any float dtype and layout; an iterator that
            reads or draws each when it is asked for keeps no more than one in memory.
        ranges: of an engine, see ``Engine.load_ranges``.

    Raises:
        ValueError: a range's parameter is not among the tensors, or of another size.
    """
    wanted: dict[str, list[OwnedRange]] = defaultdict(list)
    for owned in ranges:
        wanted[owned.tensor].append(owned)
    for name, tensor in tensors:
        for owned in wanted.pop(name, []):
            if tuple(tensor.shape) != owned.shape:
                raise ValueError(
                    f"parameter {name} is {list(owned.shape)} in the engine, and the weights for "
                    f"it are {list(tensor.shape)}"
                )
            flat = tensor.reshape(-1)
            owned.data.copy_(flat[owned.start : owned.start + owned.data.numel()])
        del tensor  # before the next one is made
    if wanted:
        raise ValueError(f"no weights came for {', '.join(sorted(wanted))}")
