"""Memory of the process. The pool for outputs and scratch comes with a later version."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # glibc's malloc.h


def keep_freed(keep: bool = True) -> bool:
    """Tells glibc's allocator to keep freed memory for the next tensor instead of giving it to the system.

    Fresh memory costs page faults: half of torch's time on 3-D networks. The price: the process never shrinks,
    and its peak is about 1.5 times as high. True if the allocator took the setting (glibc only); called by
    convoxel's own commands, never by import.

    >>> convoxel.memory.keep_freed(True)
    True
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # musl
        return False
    trim, maps = (2**31 - 1, 0) if keep else (128 * 1024, 65536)
    return bool(mallopt(_M_MMAP_MAX, maps)) and bool(mallopt(_M_TRIM_THRESHOLD, trim))
