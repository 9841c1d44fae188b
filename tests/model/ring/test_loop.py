"""What the ring loop holds in memory. What it computes is in test_ring_attention.py."""

import weakref

import torch

from ringworld_model.ring import RingStats, plan_ring
from ringworld_model.ring.backend import ring_kernel
from ringworld_model.ring.comm import Ring
from ringworld_model.ring.kernel import group_rows
from ringworld_model.ring.loop import RingCall, ring_backward, ring_forward


class WatchedPass:
    def __init__(self, inner, steps):
        self.inner, self.steps = inner, steps

    def step(self, step, *tensors):
        self.steps.append([tensor.data_ptr() for tensor in tensors])
        self.inner.step(step, *tensors)

    def finish(self):
        return self.inner.finish()


class WatchedKernel:
    """The cpu kernel; counts its living passes when another begins, and notes what steps get."""

    def __init__(self):
        self.inner, self.passes, self.steps, self.alive = ring_kernel("cpu"), [], [], []

    def forward(self, *arguments):
        return self._watched(self.inner.forward(*arguments))

    def backward(self, *arguments):
        return self._watched(self.inner.backward(*arguments))

    def _watched(self, inner):
        self.alive.append(sum(seen() is not None for seen in self.passes))
        self.steps.append([])
        watched = WatchedPass(inner, self.steps[-1])
        self.passes.append(weakref.ref(watched))
        return watched


def forward_and_backward(plan, ring, heads, width):
    torch.manual_seed(0)
    kernel = WatchedKernel()
    call = RingCall(ring, kernel, group_rows([plan]), width**-0.5, RingStats())
    q, k, v, grad_out = (torch.randn(1, plan.ring_length, heads, width) for _ in range(4))
    out, lse = ring_forward(call, q, k, v)
    ring_backward(call, grad_out, q, k, v, out, lse, q.dtype)
    return kernel


def test_a_chunk_of_heads_is_gone_when_the_next_begins():
    plan = plan_ring([1024], 1024, 1)
    kernel = forward_and_backward(plan, Ring(0, 1, None), heads=5, width=1024)
    assert kernel.alive == [0] * 6


def test_steps_of_documents_that_stay_at_home_take_no_memory():
    # Every document lies inside one block, so nothing is sent, and no group is needed.
    plan = plan_ring([64] * 32, 2048, 4, "block_cyclic")
    kernel = forward_and_backward(plan, Ring(1, 4, None), heads=2, width=32)
    for steps in kernel.steps:
        assert len(steps) == 4
        assert all(tensors == steps[0] for tensors in steps)
