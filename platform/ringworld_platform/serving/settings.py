"""What an endpoint serves, and its limits: plain data that travels to the replica."""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeSettings:
    """How one model is served.

    Attributes:
        name: of the model, in ``/v1/models`` and in requests.
        max_concurrent: requests that are answered at the same time.
        max_queue: requests that wait beside them; one more is refused with 429.
        max_body_bytes: of one request, its media included.
        max_prompt_tokens: of one request; None: what the model's context has room for.
        max_answer_tokens: of one answer; what a request that names no number gets, too.
        media_seconds: for the images and videos of one request.
        timeout_seconds: from a request's first byte to its answer's last.
        cache_tokens: of all rows together; None: by the memory that is free.
        allowed_urls: hosts that media may be fetched from; empty: only data: URLs are taken.
        key_digest: SHA-256 of the bearer key; empty: none is asked for.
        loopback: it listens on loopback alone, so requests must name that as their host.
    """

    name: str
    max_concurrent: int = 8
    max_queue: int = 128
    max_body_bytes: int = 32 << 20
    max_prompt_tokens: int | None = None
    max_answer_tokens: int = 4096
    media_seconds: float = 120.0
    timeout_seconds: float = 600.0
    cache_tokens: int | None = None
    allowed_urls: tuple[str, ...] = ()
    key_digest: str = ""
    loopback: bool = True

    def is_key(self, given: str) -> bool:
        """Whether a key is the one that is asked for; takes as long for every wrong one."""
        return hmac.compare_digest(digest_of(given), self.key_digest)


def digest_of(key: str) -> str:
    """What is kept of a key: it opens nothing."""
    return hashlib.sha256(key.encode()).hexdigest()
