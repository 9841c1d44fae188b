"""What an exported folder says of its vocabularies, beside the weights. No torch here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ringworld_model.hf_config import OWN_FOLDER

CODEBOOK = f"{OWN_FOLDER}/codebook"
"""The frame tokenizer of an exported folder."""
ABOUT = f"{OWN_FOLDER}/data.json"
"""Of the data that trained it: ``tokenizer``, ``codebook`` as in meta.json, and ``chat``."""


def read_about(folder: Path) -> dict[str, Any]:
    """What the folder says of the data that trained it; empty where it says nothing."""
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return about if isinstance(about, dict) else {}


def write_about(folder: Path, about: Mapping[str, Any]) -> None:
    """Write what ``read_about`` reads."""
    path = folder / ABOUT
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(about, indent=1), encoding="utf-8")
