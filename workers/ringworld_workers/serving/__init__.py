"""Answering requests that come at any time: one engine over one ring."""

from ringworld_workers.serving.engine import Engine, EngineClosed, Ring, Ticket
from ringworld_workers.serving.room import cache_room

__all__ = ["Engine", "EngineClosed", "Ring", "Ticket", "cache_room"]
