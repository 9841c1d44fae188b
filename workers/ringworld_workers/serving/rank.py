"""One rank of a ring whose processes somebody else starts, such as Ray."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.distributed import Store

from ringworld_workers.generation.asker import Asker, make_asker
from ringworld_workers.generation.source import ModelSource


def join_ring(
    source: ModelSource,
    rank: int,
    size: int,
    *,
    device: str,
    dtype: str,
    chunk: int,
    threads: int,
    meeting: Callable[[], Store],
    together: Callable[[], None] = lambda: None,
) -> Asker:
    """Load this process's copy of a model, and meet the other ranks.

    Args:
        source: of the model.
        rank: of this process.
        size: of the ring.
        device: cpu or cuda; this process sees its own GPU only.
        dtype: auto, or a key of ``loading.DTYPES``.
        chunk: tokens of a pass over prompts.
        threads: of one operation on the CPU.
        meeting: the store at which the ranks meet, see ``rendezvous``; called if there are several.
        together: called when the weights are loaded, before the ranks meet, if there are several.
    """
    torch.set_num_threads(threads)
    place = torch.device("cuda", 0) if device == "cuda" else torch.device("cpu")
    return make_asker(source, rank, size, place, dtype, chunk, meeting, together=together)
