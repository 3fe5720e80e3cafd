"""The blend of a scan's windows, as rows that live no longer than they are needed (csrc/cpu/scores.cpp).

A row is a line of W voxels along the axis that is visited fastest: [W][K] sums of weight * logit, then [W] sums of
weights, all float32. Rows are given out of one arena; where that is smaller than what is alive, rows that the present
band does not need wait in a scratch file.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import _C, runtime
from .plan import Band, Plan, box, here

LARGEST, LAST_POSITIVE, SCORES = 0, 1, 2  # kernels.h numbers them
_NOWHERE = -1
_SOME = 8 << 20  # bytes of rows that are changed at a time


def row_bytes(plan: Plan, classes: int) -> int:
    return 4 * plan.size[2] * (classes + 1)


def values_of(classes: int, regions: Sequence[int] | None) -> NDArray[np.int32]:
    """The labels that there can be: each channel's index, or 0 and each region's."""
    return np.array(range(classes) if regions is None else [0, *regions], np.int32)


def label_type(values: NDArray[np.int32]) -> np.dtype[Any]:
    return np.dtype(np.uint8 if values.max() < 256 else np.uint16)


class Rows:
    """Rows (z, y) of a plan, of `classes` channels; at most `capacity` of them in memory."""

    def __init__(self, plan: Plan, classes: int, capacity: int, folder: Path | None = None) -> None:
        self.plan, self.classes = plan, classes
        self._bytes = row_bytes(plan, classes)
        self._arena = mmap.mmap(-1, capacity * self._bytes)  # fresh memory is only taken once it is touched
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._arena.madvise(mmap.MADV_HUGEPAGE)
        memory = np.frombuffer(self._arena, np.float32).reshape(capacity, -1)
        self._memory = torch.from_numpy(memory)
        self._slots = np.full(plan.size[:2], _NOWHERE, np.int64)
        self._free = np.arange(capacity)[::-1].copy()
        self._left = capacity
        self._file = ScratchFile(self._bytes, plan.size[:2], folder) if folder else None

    def begin(self, group: Sequence[Band]) -> None:
        """Room for every row that the bands touch; the new ones are zero."""
        if self._file:
            self._bring(here(group), self._file)
        for band in group:
            touched = box(band.touched)
            new = np.argwhere(self._slots[touched] == _NOWHERE) + [s.start for s in touched]
            slots = self._take(len(new))
            self._memory.index_fill_(0, torch.from_numpy(slots), 0)
            self._slots[new[:, 0], new[:, 1]] = slots

    def _bring(self, place: tuple[slice, slice], file: ScratchFile) -> None:
        """All rows of the box that wait in the file, and room for those that are to come."""
        self._make_room(place, file)
        waiting = np.argwhere(file.holds(place)) + [s.start for s in place]
        for (z, y), slot in zip(waiting, self._take(len(waiting)), strict=True):
            file.read(z, y, self._memory[slot].numpy())
            self._slots[z, y] = slot

    def _take(self, count: int) -> NDArray[np.int64]:
        if count > self._left:
            raise AssertionError(f"{count} rows wanted, {self._left} left: the plan counted wrong")
        self._left -= count
        return self._free[self._left : self._left + count].copy()

    def _give(self, slots: NDArray[np.int64]) -> None:
        self._free[self._left : self._left + len(slots)] = slots
        self._left += len(slots)

    def _make_room(self, place: tuple[slice, slice], file: ScratchFile) -> None:
        """Puts as many rows aside as the box needs slots."""
        wanted = int((self._slots[place] == _NOWHERE).sum()) - self._left
        if wanted <= 0:
            return
        there = self._slots != _NOWHERE
        there[place] = False
        z, y = np.nonzero(there)
        # Needed last: those that the second axis has passed; they wait for the first axis' next step.
        last = np.lexsort((-z, -y, y >= place[1].start))[:wanted]
        for at in zip(z[last], y[last], strict=True):
            file.write(*at, self._memory[self._slots[at]].numpy())
        self._give(self._slots[z[last], y[last]])
        self._slots[z[last], y[last]] = _NOWHERE

    def add(self, y: Tensor, weights: Tensor, start: Sequence[int], flipped: Sequence[bool]) -> None:
        """y (K, *patch) float32 with adjacent channels, its axes in the plan's order; weights (*patch), contiguous.
        A flipped axis of y runs backwards."""
        pointer, strides = y.data_ptr(), list(y.stride()[1:])
        for a, (n, back) in enumerate(zip(y.shape[1:], flipped, strict=True)):
            if back:
                pointer, strides[a] = pointer + 4 * (n - 1) * strides[a], -strides[a]
        (z, d), (u, h) = ((s, s + n) for s, n in zip(start[:2], y.shape[1:3], strict=True))
        rows = self._addresses(self._slots[z:d, u:h])
        _C.score_add(self.plan.size[2], self.classes, y.shape[1:], strides, start[2], pointer, weights.data_ptr(),
                     rows.ctypes.data, runtime.threads())  # fmt: skip

    def divide(self, band: Band) -> bool:
        """Divides finished rows by their weights; whether no logit is NaN."""
        rows = self._addresses(self._slots[box(band.finished)])
        return _C.score_divide(
            self.plan.size[2], self.classes, rows.size, rows.ctypes.data, runtime.threads()
        )

    def apply(self, band: Band, change: Callable[[Tensor], Tensor]) -> None:
        """Finished rows become change(rows), (n, W, K) -> (n, W, K), some at a time."""
        w, k = self.plan.size[2], self.classes
        slots = torch.from_numpy(self._slots[box(band.finished)].ravel())
        for some in slots.split(max(1, _SOME // self._bytes)):
            logits = self._memory[some, : w * k].view(-1, w, k)
            self._memory[some, : w * k] = change(logits).reshape(len(some), -1)

    def output(self, z: range, y: range, kind: int, values: NDArray[np.int32],
               dtype: np.dtype[np.generic]) -> NDArray[np.generic]:  # fmt: skip
        """(z, y, width) labels, or (z, y, width, K) scores: those voxels of the output, divided rows read."""
        first, second, third = self.plan.axes
        low, high = ([axis.low[span], axis.high[span]] for axis, span in ((first, z), (second, y)))
        corners = [[self._slots[np.ix_(a, b)] for b in high] for a in low]  # [first][second], (z, y) each
        rows = self._addresses(np.stack([c for pair in corners for c in pair], axis=-1))
        between = np.empty((len(z), len(y), 2), np.float32)
        between[..., 0], between[..., 1] = first.t[z, None], second.t[None, y]
        shape = (len(z), len(y), len(third)) + ((self.classes,) if kind == SCORES else ())
        result = np.empty(shape, dtype)
        threads = runtime.threads()
        scratch = torch.empty(
            _C.score_output_scratch(self.plan.size[2], self.classes, threads), dtype=torch.uint8
        )
        _C.score_output(self.plan.size[2], self.classes, len(z) * len(y), len(third), rows.ctypes.data,
                        between.ctypes.data, third.low.ctypes.data, third.high.ctypes.data, third.t.ctypes.data,
                        values.ctypes.data, kind, dtype == np.uint16, result.ctypes.data, scratch.data_ptr(),
                        threads)  # fmt: skip
        return result

    def drop(self, band: Band) -> None:
        """Gives up the rows that nothing needs any more."""
        gone = box(band.dropped)
        slots = self._slots[gone]
        self._give(slots[slots != _NOWHERE])
        slots[...] = _NOWHERE
        if self._file:
            self._file.forget(gone)

    def close(self) -> None:
        if self._file:
            self._file.close()

    def _addresses(self, slots: NDArray[np.int64]) -> NDArray[np.uint64]:
        if (slots == _NOWHERE).any():
            raise AssertionError("a row is read that is not there")
        return (self._memory.data_ptr() + slots * self._bytes).astype(np.uint64)


class ScratchFile:
    """Rows that wait on the disk; a file without a name, so nothing is left behind."""

    def __init__(self, size: int, rows: Sequence[int], folder: Path) -> None:
        self._size, self._end, self._free = size, 0, list[int]()
        self._place = np.full(tuple(rows), _NOWHERE, np.int64)
        self._stream = tempfile.TemporaryFile(dir=folder, buffering=0)

    def close(self) -> None:
        self._stream.close()

    def holds(self, here: tuple[slice, slice]) -> NDArray[np.bool_]:
        return self._place[here] != _NOWHERE

    def write(self, z: int, y: int, row: NDArray[np.float32]) -> None:
        if not self._free:
            self._free.append(self._end)
            self._end += 1
        place = self._place[z, y] = self._free.pop()
        rest, at = memoryview(row.data).cast("B"), place * self._size
        while rest:
            done = os.pwrite(self._stream.fileno(), rest, at)
            rest, at = rest[done:], at + done

    def read(self, z: int, y: int, row: NDArray[np.float32]) -> None:
        """The row, which the file then forgets."""
        place = int(self._place[z, y])
        rest, at = memoryview(row.data).cast("B"), place * self._size
        while rest:
            done = os.preadv(self._stream.fileno(), [rest], at)
            if not done:
                raise OSError(f"the scratch file ends at {at}: the disk lost a row")
            rest, at = rest[done:], at + done
        self.forget((slice(z, z + 1), slice(y, y + 1)))

    def forget(self, here: tuple[slice, slice]) -> None:
        places = self._place[here]
        self._free += places[places != _NOWHERE].tolist()
        places[...] = _NOWHERE
