"""A checkpoint of any ZeRO stage and world size goes on at any other."""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from ringworld_jobs.spec import CheckpointSpec, OptimizerSpec, StageSpec
from ringworld_workers.checkpoint.layout import TrainState
from ringworld_workers.checkpoint.reader import load, newest
from ringworld_workers.checkpoint.writer import CheckpointWriter
from ringworld_workers.engine.build import build_engine
from ringworld_workers.mesh import build_mesh
from ringworld_workers.store.opening import open_store

ROWS = 12
STEPS = 3
"""That each engine takes before it saves, and then once more."""

Gang = Callable[..., list[Any]]
Config = tuple[str, int, int, int]
"""Engine (of "host", DeepSpeed with all its state on the host), ZeRO stage, rings, ring size."""


class Net(nn.Module):
    """A table that is too large to stay whole at stage 3, odd sizes, and two parameter groups."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(401, 307) * 0.05)
        self.up = nn.Linear(307, 53)
        self.norm = nn.LayerNorm(53)
        self.tiny = nn.Parameter(torch.ones(1))  # smaller than the world: some ranks own none
        self.down = nn.Linear(53, 7, bias=False)

    def forward(self, ids: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(torch.tanh(self.up(self.table[ids]))) * self.tiny
        return ((self.down(hidden).float() - wanted) ** 2).sum()


def rows_of(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return (
        torch.randint(0, 401, (ROWS,), generator=generator),
        torch.randn(ROWS, 7, generator=generator),
    )


def rate_of(step: int) -> float:
    return 2e-4 * (step % 6 + 1)


def make_engine(config: Config, seed: int, optimizer: str, precision: str) -> tuple[Any, Any]:
    gc.freeze()  # what the fork inherited need not be searched by DeepSpeed's collections
    name, zero_stage, rings, ring_size = config
    on_host = name == "host"
    mesh = build_mesh(ring_size, rings)
    torch.manual_seed(seed)
    stage = StageSpec.model_validate(
        {
            "name": "a",
            "context_length": "128",
            "rope_theta": 1e4,
            "steps": 100,
            "global_batch_tokens": 128 * rings,
            "mixture": {"a": 1},
            "learning_rate": {"peak": 1.0},
            "zero_stage": zero_stage,
            "precision": precision,
            "memory": {
                "optimizer_offload": on_host,
                "parameter_offload": on_host and zero_stage == 3,
            },
        }
    )
    spec = OptimizerSpec(name=optimizer, clip_norm=1.0)
    return build_engine("deepspeed" if on_host else name, Net(), spec, stage, mesh), mesh


def train(engine: Any, mesh: Any, first: int, last: int) -> list[float]:
    norms = []
    for step in range(first, last):
        ids, wanted = rows_of(step)
        mine = slice(mesh.rank * ROWS // mesh.world_size, (mesh.rank + 1) * ROWS // mesh.world_size)
        engine.set_learning_rate(rate_of(step))
        engine.backward(engine(ids[mine], wanted[mine]) / ROWS * engine.loss_factor)
        norms.append(engine.step())
    return norms


def copy_of(engine: Any) -> list[tuple[Any, ...]]:
    return [(r.tensor, r.kind, r.shape, r.start, r.data.clone()) for r in engine.owned_ranges()]


def state_at(step: int) -> TrainState:
    return TrainState(
        stage="a",
        stage_index=0,
        step=step,
        tokens=step * 1000,
        cursor=step * ROWS,
        rng="cmFuZG9t",
        learning_rate=1e-3,
        spec_digest="digest",
        metrics={"loss": 1.5},
        final=False,
    )


def job(attempt: int = 1) -> Any:
    return SimpleNamespace(
        run_id="run-1",
        run_uid="uid-1",
        attempt=attempt,
        stage_index=0,
        spec=SimpleNamespace(checkpoint=CheckpointSpec()),
    )


def go_on(
    rank: int,
    world_size: int,
    url: str,
    config: Config,
    optimizer: str,
    precision: str,
    environment: dict[str, str],
    with_optimizer: bool = True,
) -> dict[str, Any]:
    """Load the newest checkpoint, if there is one, train, save, and train on during the upload."""
    os.environ.update(environment)
    engine, mesh = make_engine(config, 99, optimizer, precision)
    store = open_store(url)
    ref = newest(store)
    found: dict[str, Any] = {}
    step = 0
    if ref is not None:
        found["state"] = load(store, ref, engine, mesh, with_optimizer=with_optimizer)
        found |= {"loaded": copy_of(engine), "optimizer": engine.optimizer_state()}
        step = ref.step
        found["norms"] = train(engine, mesh, step, step + STEPS)
        step += STEPS
    found["saved"] = copy_of(engine)
    writer = CheckpointWriter(store, mesh, job(attempt=step + 1))
    writer.open()
    writer.snapshot(engine, state_at(step))
    found["norms_ahead"] = train(engine, mesh, step, step + STEPS)
    found["committed"] = writer.commit()["key"]
    writer.close()
    found["ahead"] = copy_of(engine)
    engine.close()
    return found


def assemble(results: list[dict[str, Any]], which: str) -> dict[tuple[str, str], torch.Tensor]:
    """All ranks' ranges as whole tensors; fails if they overlap or leave a gap."""
    whole: dict[tuple[str, str], torch.Tensor] = {}
    for result in results:
        for tensor, kind, shape, start, data in result[which]:
            flat = whole.setdefault((tensor, kind), torch.full((math.prod(shape),), math.nan))
            assert torch.isnan(flat[start : start + data.numel()]).all(), f"{tensor} overlaps"
            flat[start : start + data.numel()] = data
    assert not any(torch.isnan(flat).any() for flat in whole.values()), "a gap"
    return whole


def apart(a: dict[Any, torch.Tensor], b: dict[Any, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[key] - b[key]).abs().max()) for key in a)


def same(a: dict[Any, torch.Tensor], b: dict[Any, torch.Tensor], start: Any) -> None:
    """Different meshes add in other orders: in fp32 that shows in the last bits only."""
    assert apart(a, b) <= 1e-6


def nearly_the_same(a: dict[Any, torch.Tensor], b: dict[Any, torch.Tensor], start: Any) -> None:
    """bf16 gradients differ by world size in their last bits, and Adam takes the sign of the small
    ones for a row's first update; a moment that is lost or misplaced shows as 1 and more.
    """
    for key, values in start.items():
        assert float((a[key] - b[key]).norm()) <= 0.06 * float((b[key] - values).norm()), key


def follow(
    run_gang: Gang, url: str, chain: list[Config], optimizer: str = "adamw", precision: str = "fp32"
) -> None:
    """Each engine goes on from the one before: from just its state, and then as it went on."""
    before: dict[str, Any] = {}
    # Ranks are forked from a server that was started before a test had its way to S3.
    environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    for number, config in enumerate(chain):
        args = (url, config, optimizer, precision, environment)
        found = run_gang(go_on, config[2] * config[3], *args)
        name = f"{chain[number - 1]} -> {config}"
        saved, ahead = assemble(found, "saved"), assemble(found, "ahead")
        assert apart(saved, ahead) > 1e-5
        if before:
            assert apart(assemble(found, "loaded"), before["saved"]) == 0.0, name
            if config == chain[number - 1]:
                assert apart(saved, before["ahead"]) == 0.0, name
            else:
                alike = same if precision == "fp32" else nearly_the_same
                alike(saved, before["ahead"], before["saved"])
            tolerance = 2e-6 if precision == "fp32" else 0.02
            for result in found:
                assert result["norms"] == pytest.approx(before["norms"], rel=tolerance), name
                assert result["state"] == state_at((number - 1) * STEPS)
                state = result["optimizer"]
                assert [group.weight_decay for group in state.groups] == [0.1, 0.0]
                steps = (number - 1) * STEPS if optimizer == "adamw" else 0
                assert state.step == steps, name
        assert {result["committed"] for result in found} == {f"00-a/step-{number * STEPS:08d}"}
        before = {"saved": saved, "ahead": ahead, "norms": found[0]["norms_ahead"]}


def ds(zero_stage: int, rings: int, ring_size: int = 1) -> Config:
    return ("deepspeed", zero_stage, rings, ring_size)


def host(zero_stage: int, rings: int) -> Config:
    return ("host", zero_stage, rings, 1)


# All 16 pairs of ZeRO stages, the same one on the same mesh; world sizes 1 to 4 on both sides.
@pytest.mark.slow
@pytest.mark.parametrize(
    "chain",
    [
        [ds(0, 2), ds(0, 2), ds(1, 3), ds(1, 3), ds(2, 1, 4), ds(2, 1, 4), ds(3, 2), ds(3, 2)],
        [ds(3, 2), ds(0, 1), ds(2, 3), ds(0, 1, 3), ds(3, 2, 2), ds(1, 1)],
        [ds(1, 4), ds(3, 3), ds(2, 1, 2), ds(1, 1), ds(0, 1, 4)],
    ],
)  # fmt: skip
def test_adamw_goes_on_anywhere(run_gang: Gang, tmp_path: Path, chain: list[Config]) -> None:
    follow(run_gang, f"file://{tmp_path}", chain)


def test_adamw_goes_on_in_host_memory_and_without_deepspeed(run_gang: Gang, tmp_path: Path) -> None:
    torch_engine: Config = ("torch", 0, 2, 1)
    chain = [host(3, 2), host(3, 2), ds(1, 1), host(2, 3), torch_engine, ds(3, 2), host(3, 1)]
    follow(run_gang, f"file://{tmp_path}", chain)


def test_sgd_goes_on_anywhere_on_s3(run_gang: Gang, s3_url: str) -> None:
    follow(run_gang, s3_url, [ds(3, 3), ds(3, 3), ds(1, 1), ds(0, 2), ds(2, 2, 2)], "sgd")


@pytest.mark.parametrize(
    ("optimizer", "chain"),
    [
        ("adamw", [ds(1, 2), ds(1, 2), ds(2, 3), ds(3, 1, 2), ds(3, 1, 2), ds(0, 3)]),
        ("sgd", [ds(3, 2), ds(1, 3)]),
    ],
)
def test_bf16_keeps_its_fp32_masters(
    run_gang: Gang, tmp_path: Path, optimizer: str, chain: list[Config]
) -> None:
    follow(run_gang, f"file://{tmp_path}", chain, optimizer, "bf16")


def test_weights_alone_start_the_optimizer_afresh(run_gang: Gang, tmp_path: Path) -> None:
    saved: dict[tuple[str, str], torch.Tensor] = {}
    for number, config in enumerate([("torch", 0, 1, 1), ds(1, 2), ds(3, 2), ("torch", 0, 2, 1)]):
        args = (f"file://{tmp_path}", config, "adamw", "fp32", {}, False)
        found = run_gang(go_on, config[2] * config[3], *args)
        if number:
            for (name, kind), values in assemble(found, "loaded").items():
                wanted = saved[name, "param"] if kind == "param" else torch.zeros_like(values)
                assert torch.equal(values, wanted), (name, kind)
            assert found[0]["optimizer"].step == 0
        saved = assemble(found, "saved")
