"""RoPE against complex rotation, in both pairings, at positions up to a million."""

from __future__ import annotations

import cmath
import math

import pytest
import torch

from ringworld_model.config import PRESETS, RopeForm, RopeScaling
from ringworld_model.rope import apply_rope, reorder_pairs, rope_tables

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


def test_llama_3_scaling_slows_only_the_slow_pairs() -> None:
    scaling = PRESETS["llama3.2-1b"].rope_scaling
    assert scaling == RopeScaling(
        factor=32.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )
    dim, theta = 64, 5e5
    positions = torch.tensor([[1]])
    plain, scaled = (
        rope_tables(positions, dim, theta, torch.float64, chosen) for chosen in (None, scaling)
    )
    found = {"fast": 0, "mixed": 0, "slow": 0}
    for i in range(dim // 2):
        frequency = theta ** (-2 * i / dim)
        wavelength = 2 * math.pi / frequency
        if wavelength > 8192 / 1.0:
            kind, expected = "slow", frequency / 32
        elif wavelength < 8192 / 4.0:
            kind, expected = "fast", frequency
        else:
            smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
            kind, expected = "mixed", (1 - smooth) * frequency / 32 + smooth * frequency
        found[kind] += 1
        angle = math.atan2(scaled[1][0, 0, 0, i].item(), scaled[0][0, 0, 0, i].item())
        assert angle == pytest.approx(expected, rel=1e-12)
        same = scaled[0][0, 0, 0, i] == plain[0][0, 0, 0, i]
        assert bool(same) == (kind == "fast")
    assert all(found.values()), found


def test_scaling_refuses_numbers_that_order_no_pairs() -> None:
    sound = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    for field, value in (
        ("factor", 0.5),
        ("low_freq_factor", 4.0),
        ("low_freq_factor", 0.0),
        ("original_max_position_embeddings", 0),
    ):
        with pytest.raises(ValueError, match=rf"model\.rope_scaling\.{field}={value:g}"):
            RopeScaling(**sound | {field: value})  # type: ignore[arg-type]


def test_reordered_projections_give_the_other_pairing_the_same_scores() -> None:
    heads, dim, width = 3, 8, 10
    q, k = torch.randn(2, heads * dim, width, dtype=torch.float64)
    x = torch.randn(1, 5, width, dtype=torch.float64)
    positions = torch.tensor([[0, 3, 40, 41, 9000]])

    def scores(q: torch.Tensor, k: torch.Tensor, form: RopeForm) -> torch.Tensor:
        turned = [
            rotated((x @ weight.T).unflatten(-1, (heads, dim)), positions, form)
            for weight in (q, k)
        ]
        return torch.einsum("bqhd,bkhd->bhqk", *turned)

    half = scores(q, k, "half")
    interleaved = [reorder_pairs(weight, dim, to="interleaved") for weight in (q, k)]
    torch.testing.assert_close(scores(*interleaved, "interleaved"), half, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(scores(q, k, "interleaved"), half)
    assert torch.equal(reorder_pairs(interleaved[0], dim, to="half"), q)
