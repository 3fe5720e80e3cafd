"""The pool: blocks of memory that outputs and scratch live in, and that are used again.

Fresh memory costs a page fault every 4 KiB, and glibc gives every large block back to the system when its tensor
dies: torch spends half of its time on 3-D networks there. Tensors of 4 MiB and more that convoxel makes on the CPU
come from one pool instead (csrc/memory.cpp has its rule; docs/memory.md what it means for a program). They are
ordinary tensors, but for one thing: torch cannot grow their storage (`resize_`, `out=` of a larger result).
"""

from __future__ import annotations

import ctypes
import math
import os
import re
import sys
from collections.abc import Sequence

import torch  # before _C: both then share torch's OpenMP threads
from torch.utils.dlpack import from_dlpack

from . import _C

LEAST = 4 * 2**20  # bytes; below, torch.empty is as fast and the pool no gain

_DLPACK = {  # codes of dlpack.h, and bits
    torch.int8: (0, 8), torch.int16: (0, 16), torch.int32: (0, 32), torch.int64: (0, 64), torch.uint8: (1, 8),
    torch.float16: (2, 16), torch.float32: (2, 32), torch.float64: (2, 64), torch.bfloat16: (4, 16),
    torch.complex64: (5, 64), torch.complex128: (5, 128), torch.bool: (6, 8),
}  # fmt: skip
_UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
_NO_LIMIT = 2**63 - 1
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # glibc's malloc.h


class OutOfMemory(MemoryError, RuntimeError):
    """The system has no memory for a tensor, even after everything held was given back. A RuntimeError too,
    because that is what torch raises."""


def empty(
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> torch.Tensor:
    """`torch.empty(shape, dtype=dtype, memory_format=memory_format)` on the CPU, in a block of the pool.

    Args:
        shape: any number of axes; (N, C, H, W) for torch.channels_last, (N, C, D, H, W) for channels_last_3d.
        dtype: any; those below 8 bits or unknown to DLPack (float8, quantised) stay torch.empty's.
        memory_format: as torch.empty has it.

    Below 4 MiB it is torch.empty itself. Raises OutOfMemory, a MemoryError and a RuntimeError, when the system has
    no more; sizes that cannot be raise torch's errors.

    >>> x = convoxel.memory.empty((1, 32, 64, 64, 64), torch.float32, torch.channels_last_3d)
    >>> convoxel.memory.statistics()["in_use"]
    33554432
    """
    if math.prod(shape, start=dtype.itemsize) < LEAST or dtype not in _DLPACK:
        return torch.empty(shape, dtype=dtype, device="cpu", memory_format=memory_format)
    return like(torch.empty(shape, dtype=dtype, device="meta", memory_format=memory_format))


def like(meta: torch.Tensor) -> torch.Tensor:
    """A tensor of the pool with the shape, strides (dense) and dtype of `meta`, as torch worked them out."""
    code, bits = _DLPACK[meta.dtype]
    try:
        return from_dlpack(_C.new_tensor(code, bits, meta.shape, meta.stride()))
    except MemoryError as error:
        raise OutOfMemory(str(error)) from None


def set_limit(limit: int | str | None) -> None:
    """The most bytes that free blocks may hold: a number, or one with a unit, "2G"; 0 keeps nothing, None knows
    no limit but the pool's own rule (free and in use together at most 1.25 times the peak in use).

    Also CONVOXEL_MEMORY_LIMIT, read at import. The default is half of the machine's memory.

    >>> convoxel.memory.set_limit("2G")
    >>> convoxel.memory.limit()
    2147483648
    """
    _C.set_memory_limit(_NO_LIMIT if limit is None else as_bytes("limit", limit))


def limit() -> int | None:
    """The most bytes that free blocks may hold, or None."""
    value = _C.memory_statistics()["limit"]
    return None if value == _NO_LIMIT else value


def release() -> int:
    """Gives all free blocks back to the system and returns their bytes; the peak counts anew from what is in use.

    >>> convoxel.memory.release()
    33554432
    """
    return _C.release_memory()


def statistics() -> dict[str, int | None]:
    """Bytes `in_use` by the blocks of living tensors and `held` in free blocks; the `peak`, the most bytes that
    tensors asked for at once since the start or `release()`; the `limit` on `held`; how many `allocations` there
    were, and how many of them `reused` a block.

    >>> convoxel.memory.statistics()
    {'in_use': 0, 'held': 33554432, 'peak': 33554432, 'limit': 8589934592, 'allocations': 10, 'reused': 9}
    """
    return {**_C.memory_statistics(), "limit": limit()}


stats = statistics  # as `convoxel.stats`


def as_bytes(name: str, value: int | str) -> int:
    """2147483648 of "2G", "2GB", "2 GiB" or the number itself; ValueError, with `name`, for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d*)?) *([KMGT]?)i?B?", str(value).strip(), re.IGNORECASE)
    if isinstance(value, bool) or match is None:
        raise ValueError(f'{name}={value!r}: expected bytes, as 2147483648 or "2G"')
    return min(int(float(match[1]) * 2 ** _UNITS[match[2].upper()]), _NO_LIMIT)


if os.environ.get("CONVOXEL_MEMORY_LIMIT"):
    _C.set_memory_limit(as_bytes("CONVOXEL_MEMORY_LIMIT", os.environ["CONVOXEL_MEMORY_LIMIT"]))


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
