"""A model of a few thousand parameters, and examples of both modalities for it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from small_models import SMALL

from ringworld_model.batch import TrainBatch
from ringworld_model.config import ModelConfig
from ringworld_model.packing import Example
from ringworld_model.ring import RingContext, plan_ring
from ringworld_model.tokens import clip_example, text_example
from ringworld_model.transformer import WorldModel, init_weights

CODES_PER_FRAME = 6


@pytest.fixture
def config() -> ModelConfig:
    """GQA, two layers, a vision table of 32 codes (and LWM's 256 spare ids)."""
    return SMALL


@pytest.fixture
def build(config: ModelConfig) -> Callable[..., WorldModel]:
    """Build a model in double precision; keyword arguments replace the defaults."""

    def build_model(**changes: object) -> WorldModel:
        arguments = {"config": config, "rope_theta": 1e4, "loss_tile_tokens": 7} | changes
        model = WorldModel(**arguments)  # type: ignore[arg-type]
        init_weights(model, seed=3)
        return model.double()

    return build_model


@pytest.fixture
def examples() -> list[Example]:
    """Two clips and a text, of 5 to 40 tokens."""
    return make_examples()


def make_examples(seed: int = 0) -> list[Example]:
    rng = np.random.default_rng(seed)

    def clip(words: int, frames: int, layout: str) -> Example:
        return clip_example(
            rng.integers(0, 40, words),
            rng.integers(0, 32, (frames, CODES_PER_FRAME)),
            layout=layout,  # type: ignore[arg-type]
            start_ids=[1, 2],
            end_ids=[3],
            codebook_size=32,
        )

    return [
        clip(5, 2, "text,vision"),
        text_example(rng.integers(0, 40, 5)),
        clip(9, 4, "vision,text"),
    ]


@pytest.fixture
def ring_of() -> Callable[[TrainBatch], RingContext]:
    """The ring of one device for whole rows."""

    def make(batch: TrainBatch) -> RingContext:
        length = batch.tokens.shape[1]
        plans = [
            plan_ring(
                document_lengths=list(lengths),
                context_length=length,
                ring_size=1,
                layout="contiguous",
            )
            for lengths in batch.document_lengths
        ]
        return RingContext(plans=plans, group=None)

    return make


@pytest.fixture
def gradients() -> Callable[[WorldModel], dict[str, torch.Tensor]]:
    """Take a model's gradients by parameter name, and clear them."""

    def take(model: WorldModel) -> dict[str, torch.Tensor]:
        found = {}
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, f"{name} has no gradient"
            found[name] = parameter.grad
            parameter.grad = None
        return found

    return take
