"""A model that is as small as its parts allow."""

from __future__ import annotations

from ringworld_model.config import ModelConfig

SMALL = ModelConfig(
    hidden_size=32,
    ffn_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    text_vocab_size=40,
    vision_codebook_size=32,
    init_std=0.2,
)
"""GQA, two layers, a vision table of 32 codes (and LWM's 256 spare ids)."""
