"""The ring on its own: it needs torch only, and a small model trains on two ranks as on one."""

import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from ringworld_model.ring import plan_ring, ring_attention

_IMPORT = """
import sys
import torch
before = set(sys.modules)
import ringworld_model.ring
new = {name.partition(".")[0] for name in set(sys.modules) - before}
foreign = new - set(sys.stdlib_module_names) - {"torch", "ringworld_model"}
sys.exit(" ".join(sorted(foreign)) or 0)
"""


def test_importing_the_ring_needs_torch_only():
    source = Path(__file__).parents[3] / "model"
    done = subprocess.run(
        [sys.executable, "-c", _IMPORT],
        env={"PYTHONPATH": str(source), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


class Layer(nn.Module):
    """The least that trains: projections around attention."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(32, 4 * 16, dtype=torch.float64)
        self.out = nn.Linear(32, 1, dtype=torch.float64)

    def forward(self, tokens, plan, group):
        heads = self.qkv(tokens).unflatten(-1, (4, 16))
        q, k, v = heads.split((2, 1, 1), 2)
        return self.out(ring_attention(q, k, v, plan=plan, group=group).flatten(2))


def train(rank, world_size):
    """Parameters after three steps of plain gradient descent on one packed row."""
    plan = plan_ring([300, 1, 129], 440, world_size)
    tokens = torch.randn(440, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    indices = plan.local_indices(rank)
    real = indices < 430
    mine = torch.zeros(1, plan.local_length, 32, dtype=torch.float64)
    mine[0, real] = tokens[indices[real]]
    layer = Layer()
    for _ in range(3):
        layer.zero_grad()
        # The mean over all documents' tokens; each rank adds up its own.
        (layer(mine, plan, dist.group.WORLD)[0, real].square().sum() / 430).backward()
        for parameter in layer.parameters():
            dist.all_reduce(parameter.grad)
            parameter.data -= 0.1 * parameter.grad
    return [parameter.detach() for parameter in layer.parameters()]


def test_two_ranks_train_as_one(run_gang):
    (alone,) = run_gang(train, 1, timeout=60.0)
    for rank in run_gang(train, 2, timeout=60.0):
        for one, other in zip(rank, alone, strict=True):
            assert torch.allclose(one, other, rtol=0, atol=1e-12)
    assert not torch.equal(alone[0], Layer().qkv.weight)
