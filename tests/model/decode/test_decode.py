"""Prefill and decode on rings of real processes, against the model's own full forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from small_models import SMALL

from ringworld_model.config import ModelConfig
from ringworld_model.decode import DecodeSession
from ringworld_model.transformer import WorldModel, causal_attention, init_weights

# Logits reach 3.4; in half precision both sides round every layer's tensors to 2^-9 of theirs.
LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.1}
CHUNK, STEPS = 24, 3
LENGTHS = [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 53, 97]
WAYS = ("copied", "queries", "keys", None)


def build(dtype: torch.dtype, config: ModelConfig = SMALL) -> WorldModel:
    model = WorldModel(config, rope_theta=1e4)
    init_weights(model, 5)
    return model.to(dtype)


def prompts(rows: int, length: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and modality [rows, length]: a third of the tokens is vision."""
    generator = torch.Generator().manual_seed(seed)
    modality = (torch.rand(rows, length, generator=generator) < 1 / 3).long()
    return torch.randint(0, 32, (rows, length), generator=generator), modality


@torch.no_grad()
def whole(model: WorldModel, tokens: torch.Tensor, modality: torch.Tensor) -> list[torch.Tensor]:
    """Both heads' logits after the last token of one row [S], of one full forward pass."""
    positions = torch.arange(len(tokens))[None]
    attends = [causal_attention] * SMALL.num_layers
    hidden = model.hidden_states(tokens[None], modality[None], positions, attends)[0, -1]
    assert model.vision_head is not None
    return [head.logits(hidden) for head in (model.text_head, model.vision_head)]


def error(found: Any, row: int, expected: list[torch.Tensor]) -> float:
    each = (found.text()[row] - expected[0]).abs().max(), (found.vision()[row] - expected[1]).abs()
    return max(float(each[0]), float(each[1].max()))


def unequal_prompts(rank: int, ranks: int, group: Any, dtype: torch.dtype, way: Any) -> float:
    """The worst error after the prefill and after each of a few steps, of this rank's rows."""
    model = build(dtype)
    session = DecodeSession(model, group, max_length=200, chunk=CHUNK, way=way)
    tokens, modality = prompts(len(LENGTHS), max(LENGTHS) + STEPS)
    found = session.prefill(tokens[:, : max(LENGTHS)], LENGTHS, modality=modality[:, :97])
    worst = 0.0
    for step in range(STEPS + 1):
        # All ranks have all logits, and must have the same: each checks its part of the rows.
        for row in range(rank, len(LENGTHS), ranks):
            upto = LENGTHS[row] + step
            expected = whole(model, tokens[row, :upto], modality[row, :upto])
            worst = max(worst, error(found, row, expected))
        if step < STEPS:
            at = torch.tensor(LENGTHS)[:, None] + step
            found = session.step(tokens.gather(1, at)[:, 0], modality.gather(1, at)[:, 0])
    return worst


def shared_document(group: Any) -> tuple[float, list[int]]:
    """Questions on one document, by rewinding and by forking; the bytes that the rank keeps."""
    model = build(torch.float64)
    session = DecodeSession(model, group, max_length=200, chunk=CHUNK)
    document, kinds = prompts(1, 61, seed=1)
    questions, question_kinds = prompts(3, 30, seed=2)
    session.prefill(document, modality=kinds)
    kept, mark, worst, lengths = [session.held_bytes], session.mark(), 0.0, [30, 7, 1]

    def expected(at: int, length: int) -> list[torch.Tensor]:
        return whole(
            model,
            torch.cat([document[0], questions[at, :length]]),
            torch.cat([kinds[0], question_kinds[at, :length]]),
        )

    for at, length in enumerate(lengths):
        asked = questions[at : at + 1, :length]
        found = session.prefill(asked, modality=question_kinds[at : at + 1, :length])
        worst = max(worst, error(found, 0, expected(at, length)))
        session.rewind(mark)
    forks = session.fork(0, 3)
    kept.append(session.held_bytes)
    # The parent goes on in memory of its own, also behind a part that its forks read.
    session.prefill(questions[:1], rows=[0])
    session.rewind({0: 40} | dict.fromkeys(forks, 61))
    session.prefill(questions[1:2], rows=[0])
    found = session.prefill(questions, lengths, modality=question_kinds, rows=forks)
    for at, length in enumerate(lengths):
        worst = max(worst, error(found, at, expected(at, length)))
    found = session.step(questions[1:, 7], question_kinds[1:, 7], rows=forks[1:])
    worst = max(worst, error(found, 0, expected(1, 8)))
    session.drop(forks)
    session.rewind({0: 0})
    kept.append(session.held_bytes)
    return worst, kept


def balance(group: Any) -> tuple[int, list[int]]:
    """Bytes of a token, and what this rank keeps of a row while it grows."""
    model = build(torch.float32)
    session = DecodeSession(model, group, max_length=4096, chunk=512, block=8)
    kept = []
    for _ in range(3):
        session.prefill(prompts(1, 640)[0])
        kept.append(session.held_bytes)
    return session.token_bytes, kept


def refusals(rank: int, group: Any) -> list[str]:
    """What is said to bad input, on this rank."""
    session = DecodeSession(build(torch.float32), group, max_length=32, chunk=CHUNK)
    good = torch.ones(1, 4, dtype=torch.int64)
    session.prefill(good)
    cases: list[Callable[[], object]] = [
        lambda: session.prefill(torch.ones(1, 29, dtype=torch.int64)),
        lambda: session.prefill(good, [0]),
        lambda: session.prefill(good[:, :0]),
        lambda: session.prefill(good.int()),
        lambda: session.prefill(good * 40),
        lambda: session.prefill(good, modality=good * 2),
        lambda: session.prefill(good, rows=[7]),
        lambda: session.prefill(good.to("meta")),
        lambda: session.step(torch.ones(2, dtype=torch.int64)),
        # Wrong on one rank alone, and different on each.
        lambda: session.prefill(good.int() if rank else good),
        lambda: session.step(torch.tensor([rank])),
    ]
    said = []
    for case in cases:
        try:
            case()
            said.append("")
        except ValueError as wrong:
            said.append(str(wrong))
    # Alone, the last two are right.
    assert session.length(0) == (9 if group is None else 4)
    return said


def on_a_ring(rank: int, world_size: int) -> dict[str, Any]:
    group = dist.group.WORLD if world_size > 1 else None
    return {
        "errors": {
            (str(dtype), way): unequal_prompts(rank, world_size, group, dtype, way)
            for dtype in LIMITS
            for way in (WAYS if world_size > 1 and dtype == torch.float64 else (None,))
        },
        "shared": shared_document(group),
        "balance": balance(group),
        "refusals": refusals(rank, group) if world_size in (1, 2) else [],
    }


@pytest.mark.parametrize("ring_size", [1, 2, 3, 5])
def test_a_ring_gives_the_logits_of_one_forward_pass(
    ring_size: int, run_gang: Callable[..., list[Any]]
) -> None:
    """One gang a ring size does all: starting it takes longer than the cases."""
    ranks = [on_a_ring(0, 1)] if ring_size == 1 else run_gang(on_a_ring, ring_size, timeout=100.0)
    for found in ranks:
        for (dtype, way), worst in found["errors"].items():
            limit = {str(each): bound for each, bound in LIMITS.items()}[dtype]
            assert worst <= limit, f"{dtype} {way}: off by {worst:.1e}"
        worst, (document, forked, left) = found["shared"]
        assert worst <= LIMITS[torch.float64]
        assert forked == document and left == 0, "forks share, and memory returns"
    token_bytes, _ = ranks[0]["balance"]
    for grown in range(3):
        kept = [found["balance"][1][grown] for found in ranks]
        tokens = 640 * (grown + 1)
        assert sum(kept) <= 2 * tokens * token_bytes
        assert max(kept) - min(kept) <= 2 * 8 * token_bytes, "a block, and room for one more"
    if ring_size > 2:
        return
    wanted = [
        "row 0: 29 tokens after 4 are 33, more than max_length=32",
        "lengths[0]=0: an empty prompt",
        "an empty prompt",
        "prompts are torch.int32; give token ids as an int64 tensor",
        "prompts[0] hold text id 40, outside the model's 40 text ids",
        "other numbers than 0 (text) and 1 (vision)",
        "row 7 is not one of the session's: [0]",
        "on meta",
        "2 tokens for rows [0]; give one for each row",
    ]
    if ring_size == 2:
        wanted += ["ring rank 1: prompts are torch.int32", "with different inputs"]
    for found in ranks:
        for words, said in zip(wanted, found["refusals"], strict=False):
            assert words in said
