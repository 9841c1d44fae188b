"""Exact attention over a sequence that is spread around a ring of ranks."""

from ringworld_model.ring.attention import RingContext, ring_attention
from ringworld_model.ring.backend import choose_backend
from ringworld_model.ring.comm import RingStats
from ringworld_model.ring.plan import RingPlan, plan_ring, plan_rows

__all__ = [
    "RingContext",
    "RingPlan",
    "RingStats",
    "choose_backend",
    "plan_ring",
    "plan_rows",
    "ring_attention",
]
