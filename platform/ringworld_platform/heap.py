"""Memory that this process has freed and still holds.

The C library keeps what was freed for the thread that used it: the lists of runs that a controller
has made in its many threads would take more memory than all that it knows.
"""

from __future__ import annotations

import ctypes

_LIBRARY = ctypes.CDLL(None)


def give_back() -> None:
    """Hand freed memory back to the system, where the C library can (glibc): milliseconds."""
    trim = getattr(_LIBRARY, "malloc_trim", None)
    if trim is not None:
        trim(0)
