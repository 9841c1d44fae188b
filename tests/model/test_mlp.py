"""The tiled MLP against the whole one: the same numbers from tile-sized memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ringworld_model.config import ModelConfig
from ringworld_model.live_tensors import LiveTensors
from ringworld_model.mlp import SwiGLU

ROWS, TOKENS = 2, 30


def make(config: ModelConfig, dtype: torch.dtype, tile_tokens: int | None) -> SwiGLU:
    torch.manual_seed(0)
    return SwiGLU(config, tile_tokens).to(dtype)


def run(mlp: SwiGLU, tokens: int = TOKENS) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    dtype = mlp.gate_proj.weight.dtype
    hidden = torch.randn(ROWS, tokens, mlp.gate_proj.in_features, dtype=dtype, requires_grad=True)
    factors = torch.randn(hidden.shape, dtype=dtype)
    out = mlp(hidden)
    (out * factors).sum().backward()
    assert hidden.grad is not None
    found = {name: p.grad for name, p in mlp.named_parameters() if p.grad is not None}
    assert len(found) == 3
    return out.detach(), {"hidden": hidden.grad, **found}


@pytest.mark.parametrize("tile_tokens", [1, 16, 60, 4096])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 8e-3)]
)
def test_tiles_change_nothing(
    config: ModelConfig, tile_tokens: int, dtype: torch.dtype, tolerance: float
) -> None:
    out, gradients = run(make(config, dtype, tile_tokens))
    whole, wanted = run(make(config, dtype, None))
    assert out.dtype == dtype

    def apart(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a.double() - b.double()).abs().max() / b.double().abs().max())

    assert apart(out, whole) <= tolerance
    for name, gradient in gradients.items():
        assert gradient.dtype == dtype
        assert apart(gradient, wanted[name]) <= tolerance, name


def test_bf16_weight_gradients_are_summed_in_fp32(config: ModelConfig) -> None:
    """Many tiles are as near to the truth as one; summed in bf16 they would be 7 times as far."""

    def error(tile_tokens: int | None) -> float:
        _, gradients = run(make(config, torch.bfloat16, tile_tokens), tokens=2000)
        exact_mlp = make(config, torch.bfloat16, None).double()
        torch.manual_seed(1)
        hidden = torch.randn(ROWS, 2000, config.hidden_size, dtype=torch.bfloat16)
        factors = torch.randn(hidden.shape, dtype=torch.bfloat16)
        (exact_mlp(hidden.double()) * factors.double()).sum().backward()
        exact = exact_mlp.down_proj.weight.grad
        assert exact is not None
        return float((gradients["down_proj.weight"].double() - exact).norm() / exact.norm())

    assert error(8) <= 1.2 * error(None)


def test_no_tokens_still_give_every_weight_a_gradient(config: ModelConfig) -> None:
    out, gradients = run(make(config, torch.float32, 16), tokens=0)
    assert out.shape == (ROWS, 0, config.hidden_size)
    assert all(not gradient.any() for gradient in gradients.values())


def test_inner_tensors_exist_for_one_tile_only(config: ModelConfig) -> None:
    """Neither pass holds anything of the MLP's inner width for all tokens."""
    peaks, largest = {}, {}
    for tile_tokens in (None, 16):
        mlp = make(config, torch.float32, tile_tokens)
        hidden = torch.randn(1, 1024, config.hidden_size, requires_grad=True)
        with LiveTensors() as live:
            mlp(hidden).sum().backward()
        peaks[tile_tokens], largest[tile_tokens] = live.peak_bytes, live.largest_bytes
    assert largest[None] == 1024 * config.ffn_size * 4
    assert largest[16] == 1024 * config.hidden_size * 4
    assert peaks[16] < peaks[None] / 2


class Products(TorchDispatchMode):
    """Counts the products with one matrix."""

    def __init__(self, right: torch.Tensor) -> None:
        super().__init__()
        self.right, self.count = right, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.mm.default:
            right = args[1]
            same = right.data_ptr() == self.right.data_ptr() and right.shape == self.right.shape
            self.count += same
        return func(*args, **(kwargs or {}))


def test_a_recomputation_does_not_compute_the_result_again(build: Any, config: ModelConfig) -> None:
    """Under checkpointing, each tile's first product is formed twice, not three times."""
    tokens = torch.arange(20).reshape(1, 20)
    counts = {}
    for mode in ("none", "full", "attention_saved"):
        model = build(activation_checkpointing=mode, mlp_tile_tokens=4)
        gate = model.layers[0].mlp.gate_proj.weight

        with Products(gate.T) as products:
            model.text_logits(tokens).sum().backward()
        counts[mode] = products.count
    assert counts == dict.fromkeys(counts, 2 * 5)


def test_a_tile_of_no_tokens_is_refused(config: ModelConfig) -> None:
    with pytest.raises(ValueError, match="memory.mlp_tile_tokens=0 is below 1; 4096 is usual"):
        SwiGLU(config, 0)
