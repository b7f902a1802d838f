"""What becomes of freed memory: kept, so that a training step on the CPU takes a third less time on Linux, or returned.

glibc returns every large block to the system when it is freed, and a network's activations are large blocks:
each step then pays for fresh, zeroed pages again.
"""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> None:
    """Tell the C library to serve large blocks from its heap and not to shrink it. Does nothing elsewhere."""
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library: its own habits stand
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_M_TOP_PAD, 256 * 2**20)


def return_freed_memory() -> None:
    """Give what has been freed back to the system, after the rare work that took much of it. Does nothing elsewhere."""
    if sys.platform.startswith("linux"):
        with suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL("libc.so.6").malloc_trim(0)
