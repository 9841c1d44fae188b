"""The tiled loss against the whole one, and how sums combine."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ringworld_model.live_tensors import LiveTensors
from ringworld_model.loss import POSITION_BUCKETS, LossSums, VocabularyHead, bucket_edges, combine
from ringworld_model.packing import pack_row
from ringworld_model.tokens import text_example

VOCABULARY, HIDDEN, TARGETS = 31, 12, 23


def problem(dtype: torch.dtype = torch.float64, tile: int = 5):
    torch.manual_seed(0)
    head = VocabularyHead(HIDDEN, VOCABULARY, tile)
    torch.nn.init.normal_(head.weight)
    hidden = torch.randn(TARGETS, HIDDEN, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, VOCABULARY, (TARGETS,))
    return head.to(dtype), hidden, targets, torch.rand(TARGETS) + 0.1


def positions(targets: torch.Tensor) -> torch.Tensor:
    return torch.arange(len(targets)) * 40


@pytest.mark.parametrize("tile", [1, 5, TARGETS, 2048])
def test_sums_and_gradients_equal_the_whole_loss(tile: int) -> None:
    head, hidden, targets, weights = problem(tile=tile)
    nll, weight, correct, count, _ = head(hidden, targets, weights, positions(targets))
    (3.7 * nll + 1).backward()  # a factor put on afterwards must reach both gradients
    got = hidden.grad, head.weight.grad
    hidden.grad = head.weight.grad = None
    logits = hidden @ head.weight.T
    whole = (weights.double() * F.cross_entropy(logits, targets, reduction="none")).sum()
    (3.7 * whole + 1).backward()
    torch.testing.assert_close(nll, whole, rtol=1e-13, atol=0)
    torch.testing.assert_close(got, (hidden.grad, head.weight.grad), rtol=1e-12, atol=1e-13)
    right = logits.argmax(1) == targets
    assert correct.item() == pytest.approx((right * weights.double()).sum().item())
    assert weight.item() == pytest.approx(weights.double().sum().item())
    assert count.item() == TARGETS
    assert not (weight.requires_grad or correct.requires_grad or count.requires_grad)


def test_gradcheck() -> None:
    head, hidden, targets, weights = problem(tile=4)

    def loss(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        parameters = {"weight": weight}
        return torch.func.functional_call(
            head, parameters, (hidden, targets, weights, positions(targets))
        )[0]

    weight = head.weight.detach().requires_grad_()
    assert torch.autograd.gradcheck(loss, (hidden, weight))


def test_zero_rows_still_depend_on_the_weight() -> None:
    head, hidden, targets, weights = problem()
    sums = head(hidden[:0], targets[:0], weights[:0], targets[:0])
    assert not any(value.any() for value in sums)
    sums[0].backward()
    assert head.weight.grad is not None
    assert head.weight.grad.abs().max() == 0
    assert hidden.grad is not None


def test_without_gradients_the_sums_are_the_same() -> None:
    head, hidden, targets, weights = problem()
    with torch.no_grad():
        quiet = head(hidden, targets, weights, positions(targets))
    assert not quiet[0].requires_grad
    torch.testing.assert_close(
        quiet[0], head(hidden, targets, weights, positions(targets))[0].detach()
    )


def test_logits_exist_for_one_tile_only() -> None:
    head = VocabularyHead(4, 50, 8)
    torch.nn.init.normal_(head.weight)
    hidden = torch.randn(640, 4, requires_grad=True)
    with LiveTensors() as live:
        sums = head(hidden, torch.randint(0, 50, (640,)), torch.ones(640), torch.arange(640))
        sums[0].backward()
    assert live.largest_bytes == hidden.nbytes
    assert live.peak_bytes < 640 * 50 * 4


def test_bf16_sums_in_fp32() -> None:
    head, hidden, targets, weights = problem(torch.bfloat16)
    nll, *_ = head(hidden, targets, weights, positions(targets))
    assert nll.dtype == torch.float32
    nll.backward()
    assert hidden.grad.dtype == head.weight.grad.dtype == torch.bfloat16
    exact_hidden = hidden.detach().double().requires_grad_()
    exact_weight = head.weight.detach().double().requires_grad_()
    nlls = F.cross_entropy(exact_hidden @ exact_weight.T, targets, reduction="none")
    exact = (weights.double() * nlls).sum()
    exact.backward()
    assert nll.item() == pytest.approx(exact.item(), rel=2e-3)
    for got, wanted in ((hidden.grad, exact_hidden.grad), (head.weight.grad, exact_weight.grad)):
        error = (got.double() - wanted).norm() / wanted.norm()
        assert error < 1e-2


def test_sums_by_position_are_those_of_each_bucket_alone() -> None:
    """23 targets at 0, 40, ..., 880 fall into 0-255, 256-511 and 512-1023."""
    head, hidden, targets, weights = problem()
    by_position = head(hidden, targets, weights, positions(targets))[-1]
    assert by_position.shape == (POSITION_BUCKETS, 2)
    assert bucket_edges(900) == [0, 256, 512, 900]
    for bucket, (start, stop) in enumerate([(0, 7), (7, 13), (13, TARGETS)]):
        mine = slice(start, stop)
        nll, weight, *_ = head(hidden[mine], targets[mine], weights[mine], targets[mine])
        torch.testing.assert_close(by_position[bucket], torch.stack([nll.detach(), weight]))
    assert not by_position[3:].any()
    assert not by_position.requires_grad
    far = head(hidden, targets, weights, torch.full((TARGETS,), 2**40))[-1]
    assert far[:-1].eq(0).all()  # the last bucket is open to the end
    assert far[-1, 1] == weights.double().sum()


def test_huge_logits_stay_finite() -> None:
    head, hidden, targets, weights = problem(torch.float32)
    nll, *_ = head(hidden * 1e4, targets, weights, positions(targets))
    nll.backward()
    assert torch.isfinite(nll)
    assert torch.isfinite(hidden.grad).all()


def sums_of(nll: tuple[float, float]) -> LossSums:
    zero = torch.zeros(2)
    return LossSums(
        torch.tensor(nll, requires_grad=True),
        zero.double(),
        zero.double(),
        zero.long(),
        torch.zeros(2, POSITION_BUCKETS, 2),
    )


@pytest.mark.parametrize(
    ("global_weight", "modality_weights", "expected"),
    [
        ((4.0, 8.0), (0.5, 0.5), 0.5 * 6 / 4 + 0.5 * 4 / 8),
        ((4.0, 8.0), (3.0, 1.0), 0.75 * 6 / 4 + 0.25 * 4 / 8),
        ((4.0, 0.0), (0.5, 0.5), 6 / 4),
        ((0.0, 8.0), (0.5, 0.5), 4 / 8),
        ((4.0, 8.0), (0.0, 0.5), 4 / 8),
        ((4.0, 0.0), (0.0, 0.5), 0.0),
        ((0.0, 0.0), (0.5, 0.5), 0.0),
    ],
)
def test_combine(global_weight, modality_weights, expected) -> None:
    sums = sums_of((6.0, 4.0))
    weight = torch.tensor(global_weight, dtype=torch.float64)
    loss = combine(sums, weight, modality_weights, factor=8.0)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(8 * expected)
    loss.backward()
    assert torch.isfinite(sums.nll.grad).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["none", "full"])
def test_no_pass_of_the_model_holds_all_logits(
    dtype: torch.dtype, mode: str, build, ring_of, config
) -> None:
    """The largest tensor of a training step is one that the model needs anyway."""
    config = replace(config, text_vocab_size=2000)
    texts = [text_example(np.arange(299) % 2000) for _ in range(2)]
    batch = pack_row(texts, 600, "example")
    model = build(config=config, activation_checkpointing=mode, loss_tile_tokens=32).to(dtype)
    with LiveTensors() as live:
        sums = model(batch, ring_of(batch))
        combine(sums, sums.weight, (0.5, 0.5)).backward()
    assert live.largest_bytes <= max(
        4 * 2000 * config.hidden_size,  # the head's gradient, summed in fp32
        4 * 32 * 2000,  # one tile's logits
    )
    assert live.largest_bytes < 600 * 2000 * dtype.itemsize / 8
