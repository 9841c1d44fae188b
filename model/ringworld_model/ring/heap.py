"""Heap: whether the C library keeps what a process frees, for it to be cheap to take again."""

from __future__ import annotations

import ctypes
from functools import cache

# From the C library's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 1 << 30
# The most that the C library takes for a threshold.
_LARGEST_BYTES = 32 << 20


@cache
def keep_freed_memory() -> None:
    """Let this process keep up to 1 GiB that it has freed, for its next call or training step.

    Memory that goes back to the system costs a page fault every 4 KiB when it is next taken. Left
    to itself the C library gives back what is free at the heap's end once that is more than twice
    the largest block that it has seen freed: up to 8,000 faults a call at 8Ki tokens and 10,000 at
    16Ki, more or less by chance (measured, two ranks, 8 heads of 64). Holds for the whole process;
    what it uses at once is not more, but it stays. Does nothing where the C library is not glibc.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "gnu_get_libc_version"):
        library.mallopt(_MMAP_THRESHOLD, _LARGEST_BYTES)
        library.mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)
