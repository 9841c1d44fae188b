"""An engine is built around a model without memory, and gets the weights that a whole one has."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ringworld_jobs.spec import OptimizerSpec, StageSpec
from ringworld_model.batch import TrainBatch
from ringworld_model.config import ModelConfig
from ringworld_model.hf import WeightsError, save_pretrained
from ringworld_model.live_tensors import LiveTensors
from ringworld_model.packing import pack_row
from ringworld_model.ring import RingContext, plan_rows
from ringworld_model.tokens import text_example
from ringworld_model.transformer import WorldModel, draw_weight, init_weights
from ringworld_workers.engine.base import OwnedRange
from ringworld_workers.engine.build import build_engine
from ringworld_workers.engine.weights import copy_weights, materialise
from ringworld_workers.initial_weights import set_initial_weights
from ringworld_workers.mesh import build_mesh

Gang = Callable[..., list[Any]]

# Matrices of more than 100 000 elements: stage 3 keeps smaller ones whole on every rank.
CONFIG = ModelConfig(
    hidden_size=320,
    ffn_size=448,
    num_layers=3,
    num_heads=4,
    num_kv_heads=4,
    text_vocab_size=401,
    vision_codebook_size=0,
    tie_text_embeddings=True,
)
SEED = 3
LENGTH = 48


def build_model(config: ModelConfig = CONFIG) -> WorldModel:
    return WorldModel(config, rope_theta=1e4)


def row() -> tuple[TrainBatch, RingContext]:
    ids = np.random.default_rng(0).integers(0, CONFIG.text_vocab_size, LENGTH + 1)
    batch = pack_row([text_example(ids.astype(np.int32))], LENGTH + 1, "token")
    plans = plan_rows(batch.document_lengths, LENGTH + 1, 1)
    return batch, RingContext(plans=plans, group=None)


def stage_of(
    zero_stage: int, precision: str, memory: dict[str, bool], world_size: int
) -> StageSpec:
    return StageSpec.model_validate(
        {
            "name": "a",
            "context_length": "128",
            "rope_theta": 1e4,
            "steps": 1,
            "global_batch_tokens": 128 * world_size,
            "mixture": {"a": 1},
            "learning_rate": {"peak": 1.0},
            "zero_stage": zero_stage,
            "precision": precision,
            "memory": memory,
        }
    )


class WholeParameters(LiveTensors):
    """Counts tensors that have room for one of the model's matrices in fp32, and no others."""

    def count(self, tensor: torch.Tensor) -> None:
        if not tensor.is_meta and tensor.untyped_storage().nbytes() in MATRIX_BYTES:
            super().count(tensor)


with torch.device("meta"):
    SHAPES = {name: tuple(p.shape) for name, p in build_model().named_parameters()}
MATRIX_BYTES = {4 * shape[0] * shape[1] for shape in SHAPES.values() if len(shape) == 2}


def begin(
    rank: int, world_size: int, zero_stage: int, precision: str, memory: dict[str, bool]
) -> tuple[float, int, int]:
    gc.freeze()
    mesh = build_mesh(1, world_size)
    stage = stage_of(zero_stage, precision, memory, world_size)
    job: Any = SimpleNamespace(
        model_config=CONFIG,
        spec=SimpleNamespace(seed=SEED, model=SimpleNamespace(init_from=None)),
    )
    beats: list[str] = []
    reporter: Any = SimpleNamespace(phase=lambda name, _: beats.append(name))
    with WholeParameters() as whole:
        with torch.device("meta"):
            model = build_model()
        engine = build_engine("deepspeed", model, OptimizerSpec(), stage, mesh)
        set_initial_weights(engine, job, mesh, reporter)
    assert len(beats) == len(SHAPES)
    owned = 0
    for held in engine.owned_ranges():
        if held.kind == "param":
            wanted = draw_weight(held.tensor, held.shape, CONFIG, SEED).view(-1)
            assert torch.equal(held.data, wanted[held.start :][: held.data.numel()]), held.tensor
            owned += held.data.numel()
    with engine.evaluate():
        loss = float(engine(*row()).nll[0])
    engine.close()
    return loss, owned, whole.peak_bytes


@pytest.mark.parametrize(
    ("zero_stage", "world_size", "precision", "memory"),
    [
        (3, 1, "bf16", {}),
        (3, 2, "fp32", {}),
        (3, 2, "bf16", {"optimizer_offload": True, "parameter_offload": True}),
        (3, 3, "bf16", {}),
        (1, 2, "bf16", {}),
        (1, 3, "fp32", {}),
    ],
)
def test_a_rank_holds_one_whole_parameter_and_its_share_of_all(
    run_gang: Gang, zero_stage: int, world_size: int, precision: str, memory: dict[str, bool]
) -> None:
    """Masters are the drawn values to the bit, and what is computed with are their roundings."""
    results = run_gang(begin, world_size, zero_stage, precision, memory)
    model = build_model()
    init_weights(model, SEED)
    with torch.no_grad():
        batch, ring = row()
        wanted = model.to(torch.bfloat16 if precision == "bf16" else torch.float32)(batch, ring)
    assert {loss for loss, _, _ in results} == {float(wanted.nll[0])}
    assert sum(owned for _, owned, _ in results) == sum(p.numel() for p in model.parameters())
    if zero_stage == 3 or precision == "bf16":  # else the weights themselves are whole fp32
        # At one time: the parameter that is cut up, or drawn, and a copy of it.
        assert max(peak for _, _, peak in results) <= 2 * max(MATRIX_BYTES)


def read_on_one_node(rank: int, world_size: int, folder: str) -> str:
    mesh = build_mesh(1, world_size)
    with torch.device("meta"):
        model = build_model()
    engine = build_engine("torch", model, OptimizerSpec(), stage_of(0, "fp32", {}, 2), mesh)
    source = folder if rank == 0 else f"{folder}-absent"
    job: Any = SimpleNamespace(
        model_config=CONFIG,
        spec=SimpleNamespace(seed=SEED, model=SimpleNamespace(init_from=f"hf:{source}")),
    )
    with pytest.raises(WeightsError) as caught:
        set_initial_weights(engine, job, mesh, SimpleNamespace())  # type: ignore[arg-type]
    return str(caught.value)


def test_a_source_that_one_node_lacks_stops_all(run_gang: Gang, tmp_path: Path) -> None:
    model = build_model()
    init_weights(model, SEED)
    save_pretrained(model, tmp_path / "in")
    here, there = run_gang(read_on_one_node, 2, str(tmp_path / "in"))
    assert there.startswith(f"{tmp_path / 'in-absent'}: no such folder")
    assert here == f"rank 1: {there}"


def test_shared_parameters_stay_shared_and_buffers_keep_their_values() -> None:
    first, second = nn.Linear(3, 2, bias=False), nn.Linear(3, 2)
    second.weight = first.weight
    first.register_buffer("constant", torch.arange(3.0))
    second.bias.requires_grad_(False)
    model = nn.Sequential(first, second)
    order: list[tuple[int, ...]] = []
    materialise(
        model, torch.bfloat16, torch.device("cpu"), then=lambda p: order.append(tuple(p.shape))
    )
    assert first.weight is second.weight and order == [(2, 3), (2,)]
    assert first.weight.dtype == torch.bfloat16 and not first.weight.any()
    assert first.weight.requires_grad and not second.bias.requires_grad
    assert first.constant.tolist() == [0, 1, 2]
    first.register_buffer("lost", torch.zeros(3, device="meta"))
    with pytest.raises(ValueError, match=r"buffer 0\.lost is on the meta device"):
        materialise(model, torch.float32, torch.device("cpu"))


def test_weights_that_do_not_fit_are_refused() -> None:
    held = [
        OwnedRange("a", "param", (2, 3), 2, torch.zeros(3)),
        OwnedRange("b", "param", (4,), 0, torch.zeros(4)),
    ]
    whole = torch.arange(6).view(3, 2).T  # of another layout and dtype
    copy_weights([("other", torch.ones(9)), ("a", whole), ("b", torch.ones(4))], held)
    assert held[0].data.tolist() == [4, 1, 3] and held[1].data.tolist() == [1] * 4
    with pytest.raises(ValueError, match="no weights came for b"):
        copy_weights([("a", whole)], held)
    with pytest.raises(ValueError, match=r"a is \[2, 3\] in the engine, .* it are \[3, 2\]"):
        copy_weights([("a", whole.T)], held)
