"""Activation offload: the same numbers, less on the device, and host memory that is used again."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from ringworld_model import offload
from ringworld_model.config import ModelConfig
from ringworld_model.host_pool import PIECE_BYTES, HostPool
from ringworld_model.live_tensors import LiveTensors
from ringworld_model.loss import combine
from ringworld_model.packing import pack_row
from ringworld_model.tokens import text_example
from ringworld_model.transformer import WorldModel

LAYERS = 4
MODES = ["attention_saved", "full"]


@pytest.fixture(autouse=True)
def no_collection() -> Iterator[None]:
    """Memory must come free without the garbage collector's help."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def config(config: ModelConfig) -> ModelConfig:
    return replace(config, num_layers=LAYERS)


def loss_of(model: WorldModel, batch: Any, ring: Any) -> torch.Tensor:
    sums = model(batch, ring)
    return combine(sums, sums.weight, (0.5, 0.5))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mlp_tile_tokens", [None, 32])
def test_offload_changes_nothing(
    mode: str, mlp_tile_tokens: int | None, build: Any, ring_of: Any, examples: Any, gradients: Any
) -> None:
    """Two micro-batches of different lengths, the first one's graph alive during the second."""
    batches = [pack_row(examples, 90, "example"), pack_row(examples[:2], 50, "token")]
    found = []
    for moved in (False, True):
        model = build(
            activation_checkpointing=mode, activation_offload=moved, mlp_tile_tokens=mlp_tile_tokens
        )
        steps = []
        for _ in range(2):
            losses = [loss_of(model, batch, ring_of(batch)) for batch in batches]
            losses[0].backward(retain_graph=True)
            for loss in reversed(losses):
                loss.backward()
            steps.append(([loss.detach() for loss in losses], gradients(model)))
            del losses, loss
        found.append(steps)
        if moved:
            assert model.offload.pool.held_bytes > model.offload.pool.used_bytes == 0
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


@pytest.mark.parametrize("mode", MODES)
def test_what_the_layers_keep_leaves_the_device(
    mode: str, build: Any, ring_of: Any, examples: Any, config: ModelConfig
) -> None:
    batch = pack_row(examples * 8, 600, "example")
    kept, peaks = {}, {}
    with torch.no_grad():
        build()(batch, ring_of(batch))  # the ring's tables are made once
    for moved in (False, True):
        model = build(activation_checkpointing=mode, activation_offload=moved)

        def elsewhere(address: int, model: WorldModel = model) -> bool:
            pool = model.offload.pool if model.offload else None
            return pool is not None and pool.holds(address)

        with LiveTensors(elsewhere) as live:
            loss = loss_of(model, batch, ring_of(batch))
            kept[moved] = live.live_bytes
            loss.backward()
            peaks[moved] = live.peak_bytes
            del loss
    tokens, width = 600 * 8, config.hidden_size
    keys = config.num_kv_heads * config.head_dim
    a_layer = tokens * width
    if mode == "attention_saved":
        a_layer += tokens * (2 * width + 2 * keys) + tokens * config.num_heads  # q, out, k, v, lse
    # The last layer's stay. One [T, E] of each layer is the next one's input too.
    assert kept[False] - kept[True] == (LAYERS - 1) * a_layer
    assert peaks[True] < peaks[False]


def test_host_memory_is_used_again(build: Any, ring_of: Any, examples: Any) -> None:
    model = build(activation_checkpointing="attention_saved", activation_offload=True)
    held = set()
    for _ in range(4):
        batch = pack_row(examples, 90, "example")
        loss = loss_of(model, batch, ring_of(batch))
        in_use = model.offload.pool.used_bytes
        loss.backward()
        del loss
        assert model.offload.pool.used_bytes == 0
        held.add((in_use, model.offload.pool.held_bytes))
    assert held == {(in_use, in_use)}


def test_a_forward_pass_that_fails_keeps_nothing(build: Any, ring_of: Any, examples: Any) -> None:
    batch = pack_row(examples, 90, "example")
    model = build(activation_checkpointing="full", activation_offload=True)
    plain = build(activation_checkpointing="full")
    calls = []
    ring = ring_of(batch)

    def fail(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        calls.append(model.offload.pool.used_bytes)
        if len(calls) == 3:
            raise FloatingPointError("third layer")
        return ring_of(batch).attend(q, k, v)

    ring.attend = fail
    try:
        model(batch, ring)
    except FloatingPointError:
        pass
    gc.collect()  # an exception and its frames refer to each other
    assert calls[-1] > 0
    assert model.offload.pool.used_bytes == 0
    with torch.no_grad():
        model(batch, ring_of(batch))
    assert model.offload.pool.used_bytes == 0
    loss_of(model, batch, ring_of(batch)).backward()
    loss_of(plain, batch, ring_of(batch)).backward()
    for found, wanted in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found.grad, wanted.grad, rtol=0, atol=0)


def test_tensors_come_back_one_layer_ahead(
    build: Any, ring_of: Any, examples: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each layer's recomputation finds the layer below on its way already, and none further."""
    batch = pack_row(examples, 90, "example")
    model = build(activation_checkpointing="full", activation_offload=True)
    ring, events = ring_of(batch), []
    attend, fetch = ring.attend, offload._Kept.fetch

    def noted_attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        events.append("compute")
        return attend(q, k, v)

    def noted_fetch(kept: Any) -> None:
        events.append("fetch")
        fetch(kept)

    ring.attend = noted_attend
    monkeypatch.setattr(offload._Kept, "fetch", noted_fetch)
    loss_of(model, batch, ring).backward()
    assert events == ["compute"] * LAYERS + ["fetch", "compute"] * (LAYERS - 1) + ["compute"]


def test_offload_without_checkpointing_is_refused(config: ModelConfig) -> None:
    with pytest.raises(ValueError, match="activation_checkpointing is none; use full or"):
        WorldModel(config, rope_theta=1e4, activation_offload=True)


def test_the_pool_holds_no_more_than_was_used_at_once() -> None:
    pool = HostPool(pinned=False)
    for size in (700, 5000, 40, 3 * PIECE_BYTES + 10):
        pieces = [pool.take(size), pool.take(size)]
        assert sum(piece.numel() for piece in pieces[0]) >= size
        most = pool.used_bytes
        for taken in pieces:
            pool.give(taken)
        assert pool.used_bytes == 0
        assert pool.held_bytes <= most or size == 40  # the smaller one fits into what there is
    again = pool.take(3 * PIECE_BYTES)
    assert [piece.numel() for piece in again] == [PIECE_BYTES] * 3
    assert all(pool.holds(piece.data_ptr()) for piece in again)
    assert pool.held_bytes == most


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("mode", MODES)
def test_a_gpu_holds_less_and_computes_the_same(
    mode: str, build: Any, ring_of: Any, config: ModelConfig
) -> None:
    """Over many steps: a copy that is overtaken, either way, would change a gradient."""
    config = replace(config, hidden_size=512, ffn_size=1024, num_layers=8)
    batch = pack_row([text_example(np.arange(8192) % 40)], 8192, "example").to("cuda")
    found, peaks, kept = {}, {}, {}
    for moved in (False, True):
        model = build(config=config, activation_checkpointing=mode, activation_offload=moved)
        model.to("cuda", torch.bfloat16)
        for step in range(6):
            model.zero_grad()
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            loss = loss_of(model, batch, ring_of(batch))
            kept[moved] = torch.cuda.memory_allocated() - before
            loss.backward()
            peaks[moved] = torch.cuda.max_memory_allocated() - before
            del loss
            for name, parameter in model.named_parameters():
                gradient = parameter.grad.float()
                wanted = found.setdefault(name, gradient)  # sums of atomics differ a little
                error = (gradient - wanted).norm() / wanted.norm().clamp(min=1e-12)
                assert error <= 1e-2, (name, moved, step)
    pool = model.offload.pool
    assert pool.pinned and pool.used_bytes == 0
    a_layer = 8192 * 512 * 2
    assert kept[False] - kept[True] >= (config.num_layers - 1) * a_layer * 0.99
    assert peaks[True] < peaks[False]
