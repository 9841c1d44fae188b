"""The tiny model of ``asked_model`` as an exported folder, with its vocabularies."""

from __future__ import annotations

from pathlib import Path

import asked_model

from ringworld_model.hf import save_pretrained
from ringworld_workers.generation.folder import CODEBOOK, write_about

CONTEXT_LENGTH = 256


def write_folder(folder: Path, *, vision: bool = True) -> Path:
    """Write it; returns the folder.

    Args:
        folder: new.
        vision: whether the codebook lies beside it, as an export of ours has it.
    """
    loaded = asked_model.make_subject(CONTEXT_LENGTH).loaded
    save_pretrained(
        loaded.model,
        folder,
        context_length=CONTEXT_LENGTH,
        bos_token_id=loaded.tokenizer.bos_id,
        eos_token_id=loaded.tokenizer.eos_id,
    )
    loaded.tokenizer.save(folder)
    if vision and loaded.codebook is not None:
        (folder / CODEBOOK).mkdir(parents=True)
        loaded.codebook.save(folder / CODEBOOK)
        about = {
            "tokenizer": {"digest": loaded.tokenizer.digest()},
            "codebook": loaded.codebook.describe(),
        }
        write_about(folder, about)
    return folder
