"""A tiny model in a folder of weights, for servers: it writes noise, and its caches are real."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ringworld_model.config import ModelConfig
from ringworld_model.hf import save_pretrained
from ringworld_model.transformer import WorldModel, init_weights
from ringworld_model.vision.patch_codebook import PatchCodebook
from ringworld_workers.data.tokenizer import train_tokenizer
from ringworld_workers.generation.folder import CODEBOOK, write_about

CONTEXT_LENGTH = 2048
CODES = 16
"""Of the codebook; a frame has four."""


def write_folder(folder: Path) -> Path:
    """Write weights, tokenizer and codebook; returns the folder."""
    tokenizer = train_tokenizer(["the king of the ring asks the king of the world"], 262)
    config = ModelConfig(
        hidden_size=32,
        ffn_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        text_vocab_size=tokenizer.size,
        vision_codebook_size=CODES,
        init_std=0.2,
    )
    model = WorldModel(config, rope_theta=1e4)
    init_weights(model, 5)
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    save_pretrained(model, folder, context_length=CONTEXT_LENGTH, **ids)
    tokenizer.save(folder)
    levels = np.linspace(0, 1, CODES, dtype=np.float32)[:, None].repeat(48, 1)
    codebook = PatchCodebook(levels, 8, 4)
    (folder / CODEBOOK).mkdir(parents=True)
    codebook.save(folder / CODEBOOK)
    about = {"tokenizer": {"digest": tokenizer.digest()}, "codebook": codebook.describe()}
    write_about(folder, about)
    return folder
