"""The tiled loss against the whole one, and how sums combine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ringworld_model.loss import LossSums, VocabularyHead, combine

VOCABULARY, HIDDEN, TARGETS = 31, 12, 23


def problem(dtype: torch.dtype = torch.float64, tile: int = 5):
    torch.manual_seed(0)
    head = VocabularyHead(HIDDEN, VOCABULARY, tile)
    torch.nn.init.normal_(head.weight)
    hidden = torch.randn(TARGETS, HIDDEN, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, VOCABULARY, (TARGETS,))
    return head.to(dtype), hidden, targets, torch.rand(TARGETS) + 0.1


@pytest.mark.parametrize("tile", [1, 5, TARGETS, 2048])
def test_sums_and_gradients_equal_the_whole_loss(tile: int) -> None:
    head, hidden, targets, weights = problem(tile=tile)
    nll, weight, correct, count = head(hidden, targets, weights)
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
        return torch.func.functional_call(head, parameters, (hidden, targets, weights))[0]

    weight = head.weight.detach().requires_grad_()
    assert torch.autograd.gradcheck(loss, (hidden, weight))


def test_zero_rows_still_depend_on_the_weight() -> None:
    head, hidden, targets, weights = problem()
    sums = head(hidden[:0], targets[:0], weights[:0])
    assert [value.item() for value in sums] == [0, 0, 0, 0]
    sums[0].backward()
    assert head.weight.grad is not None
    assert head.weight.grad.abs().max() == 0
    assert hidden.grad is not None


def test_without_gradients_the_sums_are_the_same() -> None:
    head, hidden, targets, weights = problem()
    with torch.no_grad():
        quiet = head(hidden, targets, weights)
    assert not quiet[0].requires_grad
    torch.testing.assert_close(quiet[0], head(hidden, targets, weights)[0].detach())


class LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor that any operator returned."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return result


def test_logits_exist_for_one_tile_only() -> None:
    head = VocabularyHead(4, 50, 8)
    torch.nn.init.normal_(head.weight)
    hidden = torch.randn(640, 4, requires_grad=True)
    with LargestTensor() as largest:
        sums = head(hidden, torch.randint(0, 50, (640,)), torch.ones(640))
        sums[0].backward()
    assert largest.elements == hidden.numel()
    assert largest.elements < 640 * 50


def test_bf16_sums_in_fp32() -> None:
    head, hidden, targets, weights = problem(torch.bfloat16)
    nll, *_ = head(hidden, targets, weights)
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


def test_huge_logits_stay_finite() -> None:
    head, hidden, targets, weights = problem(torch.float32)
    nll, *_ = head(hidden * 1e4, targets, weights)
    nll.backward()
    assert torch.isfinite(nll)
    assert torch.isfinite(hidden.grad).all()


def sums_of(nll: tuple[float, float]) -> LossSums:
    zero = torch.zeros(2)
    return LossSums(
        torch.tensor(nll, requires_grad=True), zero.double(), zero.double(), zero.long()
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
