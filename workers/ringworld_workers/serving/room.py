"""How many tokens a ring's cache may hold."""

from __future__ import annotations

import psutil
import torch

from ringworld_workers.generation.asker import Asker

_GPU_SHARE, _HOST_SHARE = 0.8, 0.5
"""Of the memory that is free when the weights are loaded. The rest is for passes over prompts."""


def cache_room(asker: Asker) -> int:
    """Tokens whose keys and values fit into what is free now, on the whole ring.

    Ranks are taken to be alike; on the CPU, to be on one machine.

    Args:
        asker: of the first rank, its weights loaded.
    """
    session = asker.session
    if session.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(session.device)
        return int(free * _GPU_SHARE * session.ring.size / session.token_bytes)
    return int(psutil.virtual_memory().available * _HOST_SHARE / session.token_bytes)
