"""Packed rows: their fields, and that they train as their examples would alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ringworld_model.batch import TrainBatch
from ringworld_model.loss import combine
from ringworld_model.packing import Example, example_weights, pack_row, stack_rows
from ringworld_model.tokens import text_example


def test_fields_of_a_row() -> None:
    row = pack_row([text_example([5, 6, 7]), text_example([8, 9], following_id=4)], 7, "token")
    assert row.tokens.tolist() == [[5, 6, 7, 8, 9, 0, 0]]
    assert row.targets.tolist() == [[6, 7, 0, 9, 4, 0, 0]]
    assert row.segment_ids.tolist() == [[1, 1, 1, 2, 2, 0, 0]]
    assert row.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 0]]
    assert row.loss_weights.tolist() == [[1, 1, 0, 1, 1, 0, 0]]
    assert row.document_lengths == ((3, 2),)
    assert (row.tokens.dtype, row.targets.dtype) == (torch.int64, torch.int64)
    assert (row.segment_ids.dtype, row.position_ids.dtype) == (torch.int32, torch.int32)
    assert row.modality.dtype == row.target_modality.dtype == torch.uint8
    assert row.loss_weights.dtype == torch.float32


def test_example_weights_sum_to_one_in_each_modality(examples: list[Example]) -> None:
    for example in (examples[0], examples[2]):
        weights = example_weights(example, "example", 100)
        for modality in (0, 1):
            of_modality = weights[example.target_modality == modality]
            assert of_modality.sum() == pytest.approx(1)
            assert len(np.unique(of_modality[of_modality > 0])) == 1
    assert set(example_weights(examples[0], "token", 100)) == {0, 1}
    assert example_weights(examples[0], "token", 100).sum() == len(examples[0]) - 1


@given(st.integers(2, 300), st.lists(st.integers(1, 299), max_size=6, unique=True))
def test_pieces_of_an_example_weigh_what_it_does(length: int, cuts: list[int]) -> None:
    context_length = 100
    rng = np.random.default_rng(length)
    modality = (rng.random(length) < 0.3).astype(np.uint8)
    loss = (rng.random(length) < 0.8).astype(np.uint8)
    tokens = np.zeros(length, np.int32)
    whole_targets = tuple(int(((modality == m) & (loss == 1)).sum()) for m in (0, 1))
    edges = [0, *sorted(cut for cut in cuts if cut < length), length]
    weights = np.concatenate(
        [
            example_weights(
                Example(
                    *(a[start:stop] for a in (tokens, modality, tokens, modality, loss)),
                    whole_targets=whole_targets,
                ),
                "example",
                context_length,
            )
            for start, stop in zip(edges, edges[1:], strict=False)
        ]
    )
    for m, targets in enumerate(whole_targets):
        counted = weights[(modality == m) & (loss == 1)]
        assert len(np.unique(counted)) <= 1
        # One example, or as many as the rows that its targets fill.
        assert counted.sum() == pytest.approx(max(1, targets / context_length) if targets else 0)
    assert not weights[loss == 0].any()


def test_what_cannot_be_packed_is_refused(examples: list[Example]) -> None:
    with pytest.raises(ValueError, match="tokens exceed context_length=20"):
        pack_row(examples, 20, "token")
    with pytest.raises(ValueError, match=r"examples\[1\] has no tokens"):
        pack_row([examples[0], text_example([])], 100, "token")
    with pytest.raises(ValueError, match="weight_mode='row' is unknown"):
        pack_row(examples, 100, "row")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"lengths \[90, 91\] cannot be stacked"):
        stack_rows([pack_row(examples, 90, "token"), pack_row(examples, 91, "token")])
    with pytest.raises(ValueError, match="loss_mask has 2 entries for 3 tokens"):
        Example(*[np.zeros(3, np.int32)] * 4, loss_mask=np.zeros(2, np.uint8))  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["token", "example"])
def test_packed_and_unpacked_give_the_same_gradients(mode, examples, build, ring_of, gradients):
    model = build()
    packed = pack_row(examples, 90, mode)
    alone = stack_rows([pack_row([example], 45, mode) for example in examples])

    def run(batch: TrainBatch):
        sums = model(batch, ring_of(batch))
        loss = combine(sums, sums.weight, (0.5, 0.5), 1.0)
        loss.backward()
        return loss.item(), gradients(model)

    loss, grads = run(packed)
    loss_alone, grads_alone = run(alone)
    assert loss == pytest.approx(loss_alone, rel=1e-13)
    for name, grad in grads.items():
        assert grad.abs().max() > 0, name
        torch.testing.assert_close(grad, grads_alone[name], rtol=1e-10, atol=1e-13, msg=name)


def test_example_mode_is_the_mean_of_each_examples_mean(examples, build, ring_of):
    model = build()
    packed = model(pack_row(examples, 90, "example"), ring_of(pack_row(examples, 90, "example")))
    means = []
    for example in examples:
        row = pack_row([example], 45, "token")
        sums = model(row, ring_of(row))
        means.append(sums.nll / sums.weight)
    text, vision = (torch.stack(means)[:, m] for m in (0, 1))
    expected = torch.stack([text.mean(), vision[[0, 2]].mean()])
    torch.testing.assert_close(packed.nll / packed.weight, expected, rtol=1e-6, atol=0)
