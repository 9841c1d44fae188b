"""RoPE against complex rotation, in both pairings, at positions up to a million."""

from __future__ import annotations

import cmath

import pytest
import torch

from ringworld_model.config import RopeForm
from ringworld_model.rope import apply_rope, rope_tables

THETA = 5e7


def rotated(heads: torch.Tensor, positions: torch.Tensor, form: RopeForm) -> torch.Tensor:
    cos, sin = rope_tables(positions, heads.shape[-1], THETA, heads.dtype)
    return apply_rope(heads, cos, sin, form)


@pytest.mark.parametrize("form", ["half", "interleaved"])
def test_each_pair_is_a_complex_number_turned(form: RopeForm) -> None:
    dim = 8
    heads = torch.randn(1, 3, 2, dim, dtype=torch.float64)
    positions = torch.tensor([[0, 17, 1_048_575]], dtype=torch.int32)
    got = rotated(heads, positions, form)
    for i in range(dim // 2):
        a, b = (i, i + dim // 2) if form == "half" else (2 * i, 2 * i + 1)
        for t, position in enumerate([0, 17, 1_048_575]):
            turn = cmath.exp(1j * position * THETA ** (-2 * i / dim))
            for h in range(2):
                wanted = complex(heads[0, t, h, a], heads[0, t, h, b]) * turn
                assert got[0, t, h, a].item() == pytest.approx(wanted.real, abs=1e-9)
                assert got[0, t, h, b].item() == pytest.approx(wanted.imag, abs=1e-9)


def test_fp32_tables_hold_at_a_million_positions() -> None:
    positions = torch.arange(1_048_000, 1_048_576)[None]
    exact, _ = rope_tables(positions, 64, THETA, torch.float64)
    cos, _ = rope_tables(positions, 64, THETA, torch.float32)
    assert (cos - exact).abs().max() < 1e-7


@pytest.mark.parametrize("form", ["half", "interleaved"])
def test_only_the_distance_matters(form: RopeForm) -> None:
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)
    scores = [
        (rotated(q, torch.tensor([[t + 9]]), form) * rotated(k, torch.tensor([[t]]), form)).sum()
        for t in (0, 5, 100_000)
    ]
    torch.testing.assert_close(scores[0], scores[1])
    torch.testing.assert_close(scores[0], scores[2])


def test_bf16_is_turned_in_fp32_and_laid_out_plainly() -> None:
    heads = torch.randn(1, 4, 2, 8).bfloat16()
    positions = torch.tensor([[0, 300, 301, 70_000]])
    cos, sin = rope_tables(positions, 8, 1e4, torch.float32)
    for form in ("half", "interleaved"):
        got = apply_rope(heads, cos, sin, form)  # type: ignore[arg-type]
        exact = apply_rope(heads.float(), cos, sin, form)  # type: ignore[arg-type]
        assert got.dtype == torch.bfloat16
        assert got.is_contiguous()
        assert torch.equal(got, exact.bfloat16())
