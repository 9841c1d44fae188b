"""A tiny model with random weights that reads bytes and small frames, to be asked."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ringworld_model.config import ModelConfig
from ringworld_model.sampling.grammar import Grammar
from ringworld_model.tokens import VISION_END, VISION_START
from ringworld_model.transformer import WorldModel, init_weights
from ringworld_model.vision.patch_codebook import PatchCodebook
from ringworld_workers.data.chat_template import ChatTemplate
from ringworld_workers.data.tokenizer import train_tokenizer
from ringworld_workers.evaluate.task import EvaluationRing, Subject
from ringworld_workers.generation.loading import LoadedModel
from ringworld_workers.generation.source import ModelSource

CONTEXT_LENGTH = 1024


def make_subject(context_length: int = CONTEXT_LENGTH) -> Subject:
    """The same on every rank."""
    tokenizer = train_tokenizer([], 258)
    codebook = _codebook()
    config = ModelConfig(
        hidden_size=32,
        ffn_size=48,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        text_vocab_size=tokenizer.size,
        vision_codebook_size=codebook.codebook_size,
        init_std=0.2,
    )
    model = WorldModel(config, rope_theta=10_000.0)
    init_weights(model, seed=0)
    model.eval().requires_grad_(False)
    source = ModelSource(
        label="tiny", config=config, rope_theta=10_000.0, context_length=context_length
    )
    grammar = Grammar(
        codebook_size=codebook.codebook_size,
        codes_per_frame=codebook.codes_per_frame,
        start_ids=tuple(tokenizer.encode(VISION_START)),
        end_ids=tuple(tokenizer.encode(VISION_END)),
    )
    loaded = LoadedModel(
        source=source,
        tokenizer=tokenizer,
        codebook=codebook,
        grammar=grammar,
        template=ChatTemplate(),
        model=model,
    )
    return Subject(loaded=loaded, stage_name="1k", seed=3, context_length=context_length)


def make_ring(subject: Subject) -> EvaluationRing:
    """All ranks of the default group as one ring; this process alone where there is none."""
    size = dist.get_world_size() if dist.is_initialized() else 1
    return EvaluationRing(
        loaded=subject.loaded,
        group=dist.group.WORLD if size > 1 else None,
        rank=dist.get_rank() if size > 1 else 0,
        size=size,
        device=torch.device("cpu"),
    )


def answers(task: Any, subject: Subject, first: int = 0) -> list[dict[str, Any]]:
    """The records of a task's items from ``first`` on."""
    with torch.no_grad():
        return list(task.run(task.items()[first:], make_ring(subject)))


def _codebook() -> PatchCodebook:
    """8x8 pixels in 4x4 patches: the corners of the colour cube, and greys between."""
    corners = [(r, g, b) for r in (0, 1) for g in (0, 1) for b in (0, 1)]
    greys = [(level / 9,) * 3 for level in range(1, 9)]
    colours = np.array([*corners, *greys], np.float32)
    return PatchCodebook(np.tile(colours, (1, 16)), frame_size=8, patch_size=4)
