"""What a step costs, counted by hand."""

from __future__ import annotations

import pytest
import torch

from ringworld_model.config import ModelConfig
from ringworld_workers.metrics import (
    StepTimer,
    memory_bytes,
    peak_flops,
    training_flops,
    visible_pairs,
)


def test_visible_pairs_are_causal_and_inside_a_document() -> None:
    assert visible_pairs([4, 1, 2]) == 10 + 1 + 3
    assert visible_pairs([]) == 0


def test_flops_count_each_matrix_where_a_token_passes_it() -> None:
    config = ModelConfig(
        hidden_size=8,
        ffn_size=16,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        text_vocab_size=100,
        vision_codebook_size=44,
    )
    rows = [[3, 2], [4]]  # 9 tokens, and padding that nobody counts
    layer = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16  # q, k and v, o, MLP
    heads = 8 * (100 * 5 + 300 * 2)
    pairs = 6 + 3 + 10
    # A multiplication and an addition each, once forward and twice backward.
    dense = 6 * (3 * layer * 9 + heads)
    attention = 6 * 3 * 2 * 4 * 2 * pairs
    assert training_flops(config, rows, [5, 2]) == dense + attention


def test_a_timer_adds_up_and_starts_anew() -> None:
    timer = StepTimer(torch.device("cpu"))
    with pytest.raises(KeyError), timer.phase("a"):
        raise KeyError
    with timer.phase("a"):
        pass
    with timer.phase("b"):
        pass
    found = timer.take()
    assert set(found) == {"a", "b"}
    assert all(seconds > 0 for seconds in found.values())
    assert timer.take() == {}


def test_a_cpu_has_memory_and_no_peak() -> None:
    cpu = torch.device("cpu")
    assert memory_bytes(cpu)["memory_host_bytes"] > 1 << 20
    assert memory_bytes(cpu)["memory_device_bytes"] == 0
    assert peak_flops(cpu) is None
