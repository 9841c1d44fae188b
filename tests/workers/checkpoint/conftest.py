"""What the tests of checkpoints share; see ``checkpoint_jobs`` for what their ranks do, too."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch.distributed as dist

from ringworld_workers.mesh import Mesh, build_mesh


@pytest.fixture
def mesh() -> Iterator[Mesh]:
    """Of one rank, in this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield build_mesh(1, 1)
    dist.destroy_process_group()
