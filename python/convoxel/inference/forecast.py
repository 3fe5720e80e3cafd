"""What a prediction will take, worked out before it begins, from a few batches that are run to measure the network."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from .machine import peak_memory, restart_peak
from .network import Network
from .plan import Plan
from .rows import label_type, row_bytes, values_of

_PROBES = 3  # batches: the first ones find the allocator's heap tidier
_MARGIN = 32 << 20  # bytes, over what is measured: stacks, the interpreter, tables of a band


@dataclass(frozen=True)
class Forecast:
    """Bytes of memory at this process's peak, bytes on the disk meanwhile, seconds of the network.

    `rows` of the blend may be in memory at once; `classes` channels were counted.
    """

    memory: int
    scratch: int
    seconds: float
    windows: int
    classes: int
    rows: int

    def __str__(self) -> str:
        scratch = f", and {size(self.scratch)} in a scratch file" if self.scratch else ""
        return (f"{self.windows} windows, about {duration(self.seconds)} of network, "
                f"peak memory {size(self.memory)}{scratch}")  # fmt: skip


def forecast(network: Network, plan: Plan, regions: Sequence[int] | None, held: int, max_ram: int | None,
             scratch: bool) -> Forecast:  # fmt: skip
    """Runs the network on a few batches. `held`: bytes that are not there yet and will be, besides the blend and the
    labels.

    Raises ValueError if more than `max_ram` bytes are needed, with the least that would do.
    """
    before = restart_peak()
    batch = min(plan.batch, plan.windows)
    classes, seconds = _probe(network, batch)
    peak = peak_memory()
    held += plan.voxels * label_type(values_of(classes, regions)).itemsize
    row, most, least = row_bytes(plan, classes), plan.rows, plan.least_rows
    fixed = peak + held + max(_MARGIN, (peak - before) // 2)  # holes in the heap
    rows = most if max_ram is None else min(most, (max_ram - fixed) // row)
    if rows < (least if scratch else most):
        options = f"max_ram={fixed + most * row} would do"
        options += f", {fixed + least * row} with a scratch file" * (least < most)
        raise ValueError(
            f"predict_labels: max_ram is {max_ram} bytes, {fixed + (least if scratch else most) * row} are needed: "
            f"{peak} for the program, the scan and one batch, {held} for the result, {fixed - peak - held} to be safe, "
            f"the rest for blending {classes} channels; {options}, or a smaller batch_size or patch_size"
        )
    return Forecast(fixed + rows * row, max(0, most - rows) * row, seconds * math.ceil(plan.windows / batch),
                    plan.windows, classes, rows)  # fmt: skip


def _probe(network: Network, batch: int) -> tuple[int, float]:
    """(K, seconds of all passes over one batch)."""
    least, classes = math.inf, 0
    for _ in range(_PROBES):
        began = time.perf_counter()
        for y, _ in network([(0, 0, 0)] * batch):
            classes = y.shape[1]
            del y
        least = min(least, time.perf_counter() - began)
    return classes, least


def size(number: float) -> str:
    return f"{number / 2**30:.2f} GB" if number >= 2**30 else f"{number / 2**20:.0f} MB"


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
