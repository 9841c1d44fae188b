"""The model on one device: names and shapes, what it computes and recomputes, that it learns."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ringworld_model.config import PRESETS, ModelConfig, preset
from ringworld_model.loss import combine
from ringworld_model.packing import pack_row
from ringworld_model.tokens import Span, clip_example, join_spans, text_example
from ringworld_model.transformer import WorldModel, init_weights


def test_parameter_names_and_count(config: ModelConfig) -> None:
    names = {name for name, _ in WorldModel(config, rope_theta=1e4).named_parameters()}
    layer = {
        f"layers.{n}.{part}.weight"
        for n in range(2)
        for part in (
            *(f"attention.{p}_proj" for p in "qkvo"),
            *(f"mlp.{p}_proj" for p in ("gate", "up", "down")),
            "attention_norm",
            "mlp_norm",
        )
    }
    tables = {"text_embed", "vision_embed", "text_head", "vision_head", "norm"}
    assert names == layer | {f"{name}.weight" for name in tables}


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_have_the_parameters_they_state(name: str) -> None:
    with torch.device("meta"):
        model = WorldModel(PRESETS[name], rope_theta=1e4)
    assert sum(p.numel() for p in model.parameters()) == PRESETS[name].num_parameters()


@pytest.mark.parametrize("codes", [0, 32])
def test_tied_tables_are_one_parameter(codes: int) -> None:
    config = preset(
        "tiny",
        tie_text_embeddings=True,
        tie_vision_embeddings=True,
        vision_codebook_size=codes,
    )
    model = WorldModel(config, rope_theta=1e4)
    assert model.text_head.weight is model.text_embed.weight
    if codes:
        assert model.vision_head.weight is model.vision_embed.weight
    assert sum(p.numel() for p in model.parameters()) == config.num_parameters()


def test_weights_depend_on_name_and_seed_alone(config: ModelConfig) -> None:
    def weights(seed: int, model_config: ModelConfig = config) -> dict[str, torch.Tensor]:
        model = WorldModel(model_config, rope_theta=1e4)
        init_weights(model, seed)
        return dict(model.named_parameters())

    text_only = ModelConfig(
        hidden_size=32,
        ffn_size=48,
        num_layers=1,
        num_heads=4,
        num_kv_heads=2,
        text_vocab_size=40,
        vision_codebook_size=0,
        init_std=0.2,
    )
    first, again, other, smaller = weights(0), weights(0), weights(1), weights(0, text_only)
    for name, weight in first.items():
        assert torch.equal(weight, again[name]), name
        if "norm" in name:
            assert (weight == 1).all()
        else:
            assert not torch.equal(weight, other[name]), name
            assert weight.std().item() == pytest.approx(0.2, rel=0.15)
    for name, weight in smaller.items():
        assert torch.equal(weight, first[name]), name
    q, k = (first[f"layers.{n}.attention.q_proj.weight"] for n in (0, 1))
    assert not torch.equal(q, k)


def naive_trunk(model: WorldModel, hidden: torch.Tensor) -> torch.Tensor:
    """The Llama equations for one segment [T, E]: no shared code but the parameters."""
    weights, config, length = dict(model.named_parameters()), model.config, len(hidden)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        scale = (x.square().mean(-1, keepdim=True) + config.norm_eps).rsqrt()
        return x * scale * weights[name]

    def turn(x: torch.Tensor) -> torch.Tensor:
        half = config.head_dim // 2
        angles = torch.arange(length).double()[:, None] * model.rope_theta ** (
            -torch.arange(half).double() / half
        )
        pairs = torch.complex(x[..., :half], x[..., half:])
        pairs = pairs * torch.polar(torch.ones_like(angles), angles)[:, None]
        return torch.cat([pairs.real, pairs.imag], -1)

    causal = torch.ones(length, length).tril().bool()
    for n in range(config.num_layers):

        def linear(x: torch.Tensor, name: str, n: int = n) -> torch.Tensor:
            return x @ weights[f"layers.{n}.{name}_proj.weight"].T

        x = norm(hidden, f"layers.{n}.attention_norm.weight")
        q, k, v = (
            linear(x, f"attention.{part}").reshape(length, -1, config.head_dim) for part in "qkv"
        )
        share = config.num_heads // config.num_kv_heads
        k, v = (heads.repeat_interleave(share, 1) for heads in (turn(k), v))
        scores = torch.einsum("qhd,khd->hqk", turn(q), k) / config.head_dim**0.5
        seen = scores.masked_fill(~causal, -torch.inf).softmax(-1)
        out = torch.einsum("hqk,khd->qhd", seen, v).flatten(1)
        hidden = hidden + linear(out, "attention.o")
        x = norm(hidden, f"layers.{n}.mlp_norm.weight")
        gated = F.silu(linear(x, "mlp.gate")) * linear(x, "mlp.up")
        hidden = hidden + linear(gated, "mlp.down")
    return norm(hidden, "norm.weight")


def test_text_logits_are_llamas_and_the_loss_is_theirs(build, ring_of) -> None:
    model = build()
    tokens = torch.randint(0, 40, (21,), generator=torch.Generator().manual_seed(0))
    logits = model.text_logits(tokens[None])[0]
    naive = naive_trunk(model, model.text_embed.weight[tokens]) @ model.text_head.weight.T
    torch.testing.assert_close(logits, naive, rtol=1e-11, atol=1e-12)
    row = pack_row([text_example(tokens.numpy())], 30, "token")
    sums = model(row, ring_of(row))
    expected = F.cross_entropy(logits[:-1], tokens[1:], reduction="sum")
    assert sums.nll[0].item() == pytest.approx(expected.item(), rel=1e-12)
    right = (logits[:-1].argmax(1) == tokens[1:]).sum()
    assert sums.correct.tolist() == [right.item(), 0]
    assert sums.count.tolist() == [20, 0]


def test_each_modality_has_its_table_and_its_head(build, ring_of, examples) -> None:
    model = build()
    row = pack_row(examples, 90, "token")
    expected = torch.zeros(2, dtype=torch.float64)
    for example in examples:
        tables = (model.text_embed.weight, model.vision_embed.weight)
        pairs = zip(example.modality, example.tokens, strict=True)
        hidden = naive_trunk(model, torch.stack([tables[m][token] for m, token in pairs]))
        for t in np.flatnonzero(example.loss_mask):
            modality, target = example.target_modality[t], int(example.targets[t])
            head = (model.text_head, model.vision_head)[modality]
            expected[modality] -= (hidden[t] @ head.weight.T).log_softmax(0)[target].item()
    torch.testing.assert_close(model(row, ring_of(row)).nll, expected, rtol=1e-11, atol=0)


def test_rope_theta_and_form_reach_the_attention(build, config: ModelConfig) -> None:
    tokens = torch.arange(20)[None]
    base = build().text_logits(tokens)
    assert not torch.allclose(base, build(rope_theta=1e6).text_logits(tokens))
    interleaved = replace(config, rope_form="interleaved")
    assert not torch.allclose(base, build(config=interleaved).text_logits(tokens))


def test_no_gradient_without_grad_mode(build, ring_of, examples) -> None:
    batch = pack_row(examples, 90, "example")
    model = build(activation_checkpointing="full")
    with torch.no_grad():
        quiet = model(batch, ring_of(batch))
    assert not quiet.nll.requires_grad
    torch.testing.assert_close(quiet.nll, model(batch, ring_of(batch)).nll.detach())


@pytest.mark.parametrize("present", [0, 1])
def test_one_modality_alone(present: int, build, ring_of, gradients) -> None:
    rng = np.random.default_rng(0)
    span = Span(rng.integers(0, 32, 30), present)
    batch = pack_row([join_spans([span])], 37, "example")
    model = build()
    sums = model(batch, ring_of(batch))
    assert sums.count.tolist() == [29 * (present == 0), 29 * (present == 1)]
    combine(sums, sums.weight, (0.5, 0.5)).backward()
    for name, grad in gradients(model).items():
        absent = name.startswith("vision" if present == 0 else "text")
        assert bool(grad.any()) != absent, name


def test_a_row_of_padding_alone(build, ring_of, gradients) -> None:
    batch = pack_row([], 16, "example")
    model = build()
    sums = model(batch, ring_of(batch))
    assert sums.nll.tolist() == [0, 0]
    combine(sums, sums.weight, (0.5, 0.5)).backward()
    assert not any(grad.any() for grad in gradients(model).values())


def test_a_text_model_refuses_vision(ring_of, build, config, examples) -> None:
    model = build(config=replace(config, vision_codebook_size=0))
    text = pack_row([text_example([1, 2, 3])], 8, "token")
    sums = model(text, ring_of(text))
    assert sums.count.tolist() == [2, 0]
    clip = pack_row(examples, 90, "token")
    with pytest.raises(ValueError, match="the model has no vision table; set model.vision"):
        model(clip, ring_of(clip))
    into_vision = pack_row([join_spans([Span([1], 0)], following=Span([1], 1))], 8, "token")
    with pytest.raises(ValueError, match="the model has no vision table; set model.vision"):
        model(into_vision, ring_of(into_vision))


def test_bf16_stays_near_fp64(build, ring_of, examples, gradients) -> None:
    batch = pack_row(examples, 90, "example")
    found = []
    for dtype in (torch.float64, torch.bfloat16):
        model = build().to(dtype)
        sums = model(batch, ring_of(batch))
        combine(sums, sums.weight, (0.5, 0.5)).backward()
        found.append((sums.nll.detach().double(), gradients(model)))
        assert sums.nll.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found[1][0], found[0][0], rtol=0.03, atol=0)
    for name, exact in found[0][1].items():
        assert (found[1][1][name].double() - exact).norm() < 0.1 * exact.norm(), name


def test_a_short_training_lowers_both_losses(config, ring_of) -> None:
    rng = np.random.default_rng(0)
    story = np.arange(30) * 7 % 40
    codes = np.tile(rng.integers(0, 32, 6), (4, 1))
    arguments = {"start_ids": [1, 2], "end_ids": [3], "codebook_size": 32}
    clips = [
        clip_example(story[:6], codes, layout=layout, **arguments)
        for layout in ("text,vision", "vision,text")
    ]
    batch = pack_row([*clips, text_example(story)], 120, "example")
    model = WorldModel(config, rope_theta=1e4, activation_checkpointing="attention_saved")
    init_weights(model, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        sums = model(batch, ring_of(batch))
        losses.append((sums.nll.detach() / sums.weight).tolist())
        combine(sums, sums.weight, (0.5, 0.5)).backward()
        optimizer.step()
        optimizer.zero_grad()
    for modality in (0, 1):
        assert losses[-1][modality] < 0.5 * losses[0][modality]
    last = model(batch, ring_of(batch))
    assert (last.correct / last.weight).min() > 0.6
