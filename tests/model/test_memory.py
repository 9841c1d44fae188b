"""Recomputation: the same numbers from less memory, and none that ZeRO-3 would make wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from ringworld_model.config import ModelConfig
from ringworld_model.loss import combine
from ringworld_model.packing import pack_row
from ringworld_model.transformer import WorldModel


@pytest.mark.parametrize("mode", ["attention_saved", "full"])
def test_recomputation_changes_nothing(mode, build, ring_of, examples, gradients) -> None:
    batch = pack_row(examples, 90, "example")
    found = {}
    for name in ("none", mode):
        model = build(activation_checkpointing=name)
        calls = []
        ring = ring_of(batch)
        attend = ring.attend
        ring.attend = lambda q, k, v, attend=attend, calls=calls: calls.append(1) or attend(q, k, v)
        sums = model(batch, ring)
        combine(sums, sums.weight, (0.5, 0.5)).backward()
        found[name] = (sums.nll.detach(), gradients(model))
        # Two layers: only full runs the ring's forward again in the backward pass.
        assert len(calls) == (4 if name == "full" else 2)
    torch.testing.assert_close(found[mode], found["none"], rtol=0, atol=0)


def test_recomputation_keeps_less(build, ring_of, examples) -> None:
    batch = pack_row(examples, 90, "example")
    kept = {}
    for mode in ("none", "attention_saved", "full"):
        model = build(activation_checkpointing=mode)
        storages: dict[int, int] = {}

        def note(tensor: torch.Tensor, storages: dict[int, int] = storages) -> torch.Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            sums = model(batch, ring_of(batch))
        kept[mode] = sum(storages.values())
        assert sums.nll.requires_grad
    assert kept["full"] < kept["attention_saved"] < kept["none"]


def test_unknown_recomputation_is_refused(config: ModelConfig) -> None:
    with pytest.raises(ValueError, match="activation_checkpointing='some' is unknown; use one of"):
        WorldModel(config, rope_theta=1e4, activation_checkpointing="some")


class ReleasedParameters:
    """ZeRO-3 in small: a module's parameters exist only while it is called or differentiated.

    They come back before its forward and before its backward, and are emptied after each; so a
    gradient that is made while a recomputation has released its parameter fails as it would there.
    """

    def __init__(self, model: nn.Module) -> None:
        self.whole: dict[torch.Tensor, torch.Tensor] = {}
        for module in model.modules():
            if not (own := list(module.parameters(recurse=False))):
                continue
            for parameter in own:
                self.whole[parameter] = parameter.data
            module.register_forward_pre_hook(lambda module, _: self.fetch(module))
            module.register_forward_hook(lambda module, *_: self.release(module))
            module.register_full_backward_pre_hook(lambda module, _: self.fetch(module))
            for parameter in own:
                parameter.register_post_accumulate_grad_hook(self.empty)
        for parameter in self.whole:
            self.empty(parameter)

    def fetch(self, module: nn.Module) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = self.whole[parameter]

    def release(self, module: nn.Module) -> None:
        for parameter in module.parameters(recurse=False):
            self.empty(parameter)

    @staticmethod
    def empty(parameter: torch.Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        parameter.data = parameter.data.new_empty(0)
        parameter.kept = gradient if gradient is not None else getattr(parameter, "kept", None)


@pytest.mark.parametrize("mode", ["none", "attention_saved", "full"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_parameters_may_be_released_outside_their_modules(
    mode: str, tied: bool, build, ring_of, examples, config: ModelConfig
) -> None:
    batch = pack_row(examples, 90, "example")
    config = replace(config, tie_text_embeddings=tied)
    plain = build(config=config)
    sums = plain(batch, ring_of(batch))
    combine(sums, sums.weight, (0.5, 0.5)).backward()
    model = build(config=config, activation_checkpointing=mode)
    ReleasedParameters(model)
    sums = model(batch, ring_of(batch))
    assert all(parameter.numel() == 0 for parameter in model.parameters())
    combine(sums, sums.weight, (0.5, 0.5)).backward()
    for (name, expected), parameter in zip(
        plain.named_parameters(), model.parameters(), strict=True
    ):
        torch.testing.assert_close(
            parameter.kept,
            expected.grad,
            rtol=1e-10,
            atol=1e-13,
            msg=lambda text, name=name: f"{name}: {text}",
        )
