"""The feed-forward part of a layer, whole or in tiles of tokens.

In tiles, its inner tensors (three to six times the layer's width in LWM and Llama) exist for
``tile_tokens`` tokens at a time, in the forward and in the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ringworld_model.config import ModelConfig


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))``. Source: arXiv 2002.05202, section 2.

    Attributes:
        tile_tokens: tokens computed at a time; None computes all at once. With it, the three
            projections are used without being called, so ZeRO-3 must gather them for this module.
    """

    def __init__(self, config: ModelConfig, tile_tokens: int | None = None) -> None:
        """Build the three projections.

        Raises:
            ValueError: tile_tokens below 1.
        """
        super().__init__()
        if tile_tokens is not None and tile_tokens < 1:
            raise ValueError(f"memory.mlp_tile_tokens={tile_tokens} is below 1; 4096 is usual")
        self.tile_tokens = tile_tokens
        self.gate_proj = nn.Linear(config.hidden_size, config.ffn_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.ffn_size, bias=False)
        self.down_proj = nn.Linear(config.ffn_size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, T, E] -> [B, T, E]."""
        if self.tile_tokens is None:
            gated = F.silu(self.gate_proj(hidden)) * self.up_proj(hidden)
            return self.down_proj(gated)
        weights = (self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight)
        return _in_tiles(hidden.flatten(0, -2), weights, self.tile_tokens).view(hidden.shape)


def _in_tiles(rows: Tensor, weights: tuple[Tensor, Tensor, Tensor], tile_tokens: int) -> Tensor:
    """[N, E] -> [N, E], keeping ``rows`` alone for the backward pass.

    Two functions share the work. The first saves the inputs and makes the gradients, the second
    computes the result. So a recomputation, which stops at the last tensor that it must save, stops
    before the result is computed a second time.
    """
    gradients = _Gradients.apply(rows, *weights, tile_tokens)
    return _Result.apply(gradients, rows.detach(), *(w.detach() for w in weights), tile_tokens)


class _Result(torch.autograd.Function):
    """The values; their gradient goes to ``gradients`` as it is."""

    @staticmethod
    def forward(
        ctx: Any,
        gradients: Tensor,
        rows: Tensor,
        gate: Tensor,
        up: Tensor,
        down: Tensor,
        tile_tokens: int,
    ) -> Tensor:
        out = torch.empty_like(rows)
        for start in range(0, len(rows), tile_tokens):
            tile = rows[start : start + tile_tokens]
            gated = F.silu(tile @ gate.T).mul_(tile @ up.T)
            torch.mm(gated, down.T, out=out[start : start + tile_tokens])
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None, None, None, None, None


class _Gradients(torch.autograd.Function):
    """No values, only a place in the graph: it takes the result's gradient, tile by tile."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, gate: Tensor, up: Tensor, down: Tensor, tile_tokens: int
    ) -> Tensor:
        ctx.save_for_backward(rows, gate, up, down)
        ctx.tile_tokens = tile_tokens
        return rows.new_zeros(()).expand(rows.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, *weights = ctx.saved_tensors
        gate, up, down = weights
        rows_grad = torch.empty_like(rows)
        # Sums over tiles are no less exact than a product over all tokens, which adds in fp32 too.
        dtype = torch.promote_types(gate.dtype, torch.float32)
        sums = [torch.zeros_like(weight, dtype=dtype) for weight in weights]
        for start in range(0, len(rows), ctx.tile_tokens):
            tile = rows[start : start + ctx.tile_tokens]
            grad = grads[0][start : start + ctx.tile_tokens]
            gates, ups = tile @ gate.T, tile @ up.T
            activated = F.silu(gates)
            gated_grad = grad @ down
            _add_product(sums[2], grad, activated * ups)
            gates_grad = torch.ops.aten.silu_backward(ups.mul_(gated_grad), gates)
            ups_grad = activated.mul_(gated_grad)
            _add_product(sums[0], gates_grad, tile)
            _add_product(sums[1], ups_grad, tile)
            rows_grad[start : start + ctx.tile_tokens] = torch.mm(gates_grad, gate).addmm_(
                ups_grad, up
            )
        return rows_grad, *(s.to(gate.dtype) for s in sums), None


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left.T @ right``."""
    if total.dtype == left.dtype:
        total.addmm_(left.T, right)
    else:
        total += left.T @ right
