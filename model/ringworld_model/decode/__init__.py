"""Generation over a ring: the cache, prefill and decode steps."""

from ringworld_model.decode.next_logits import NextLogits
from ringworld_model.decode.session import DEFAULT_CHUNK, DecodeSession, Mark

__all__ = ["DEFAULT_CHUNK", "DecodeSession", "Mark", "NextLogits"]
