"""What this machine can do at most, measured beside the calls that are compared with it, since clocks fall under
load: fused multiply-adds a second, and bytes copied a second."""

from __future__ import annotations

import time
from functools import lru_cache

import torch
from torch import Tensor

from .. import _C

COPY_BYTES = 256 * 2**20  # read and written by the copy whose rate is printed as the machine's


def fma_peak(seconds: float = 0.02) -> float:
    """GFLOP/s of independent float32 fused multiply-adds at the ISA in use on all threads, for about that long
    after a first estimate."""
    threads, rounds = torch.get_num_threads(), 100_000
    while True:
        start = time.perf_counter()
        flops = _C.fma_peak(rounds, threads)
        spent = time.perf_counter() - start
        if spent > seconds / 2:
            return flops / spent / 1e9
        rounds = round(rounds * min(10, seconds / spent))


@lru_cache(maxsize=1)  # the next row's buffers take this one's place
def buffers(moved: int) -> tuple[Tensor, Tensor]:
    """Two buffers in use (page faults paid) that a copy between reads and writes `moved` bytes of."""
    floats = max(1, moved // 8)
    return torch.ones(floats), torch.zeros(floats)


def copy_rate(moved: int = COPY_BYTES) -> float:
    """GB/s read and written by torch's copy of memory in use, `moved` bytes in all: a tensor that fits in a cache
    is measured there."""
    source, target = buffers(moved)
    target.copy_(source)
    calls = max(1, round(COPY_BYTES / 8 / moved))
    start = time.perf_counter()
    for _ in range(calls):
        target.copy_(source)
    return calls * 8 * source.numel() / (time.perf_counter() - start) / 1e9
