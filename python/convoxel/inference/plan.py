"""In which order windows are visited, so that as little as possible of their blend is alive at once.

Windows stand on a product grid. They are visited axis by axis in an order of our choice, the last axis fastest; all
windows that differ along the last axis only are a band; bands of less than a batch go in groups. When a band is done,
every row of voxels (a line along the last axis) that no later window touches is finished: it is divided by its
weights, read by the output voxels between it and its finished neighbours, and given up once no later output voxel
reads it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from .axis import Axis

Span = tuple[int, int]  # from, up to


@dataclass(frozen=True)
class Steps:
    """One axis, window by window: how many of its voxels are finished, how many of the output's can be made, and from
    which on they are still needed."""

    done: list[int]
    made: list[int]
    keep: list[int]

    @classmethod
    def of(cls, starts: Sequence[int], size: int, axis: Axis) -> Steps:
        done = [*starts[1:], size]
        made = [int(np.searchsorted(axis.high, d)) for d in done]
        keep = [min(d, int(axis.low[m])) if m < len(axis) else d for d, m in zip(done, made, strict=True)]
        return cls(done, made, keep)


@dataclass(frozen=True)
class Band:
    """The windows (first, second, every third), and what is settled once they are added; two axes each."""

    starts: tuple[int, int]
    touched: tuple[Span, Span]  # rows that its windows are added to
    finished: tuple[Span, Span]  # rows that are to be divided now
    output: tuple[Span, Span]  # output rows that can be made now
    needed: tuple[Span, Span]  # rows that those read
    dropped: tuple[Span, Span]  # rows that nothing needs any more


@dataclass(frozen=True)
class Plan:
    """Everything is in the order in which the axes are visited: axis `order[0]` of the image first."""

    order: tuple[int, int, int]
    size: tuple[int, int, int]
    patch: tuple[int, int, int]
    starts: tuple[list[int], list[int], list[int]]
    axes: tuple[Axis, Axis, Axis]
    batch: int  # windows

    @classmethod
    def of(cls, order: Sequence[int], size: Sequence[int], patch: Sequence[int], starts: Sequence[Sequence[int]],
           axes: Sequence[Axis], batch: int = 1) -> Plan:  # fmt: skip
        """In the order given; the arguments are in the image's."""
        a, b, c = order
        return cls((a, b, c), (size[a], size[b], size[c]), (patch[a], patch[b], patch[c]),
                   (list(starts[a]), list(starts[b]), list(starts[c])), (axes[a], axes[b], axes[c]), batch)  # fmt: skip

    @classmethod
    def smallest(cls, size: Sequence[int], patch: Sequence[int], starts: Sequence[Sequence[int]],
                 axes: Sequence[Axis], batch: int = 1) -> Plan:  # fmt: skip
        """In the order that keeps the fewest voxels at once. One that ends with the image's last axis may keep a third
        more: in it windows are added 10 % faster, and lines that go to a file go there whole."""
        plans = [
            cls.of(order, size, patch, starts, axes, batch) for order in itertools.permutations(range(3))
        ]
        return min(plans, key=lambda plan: plan.rows * plan.size[2] * (1 if plan.order[2] == 2 else 4 / 3))

    @property
    def voxels(self) -> int:
        """Of the output."""
        return math.prod(map(len, self.axes))

    @property
    def windows(self) -> int:
        return len(self.starts[0]) * len(self.starts[1]) * len(self.starts[2])

    def groups(self) -> Iterator[list[Band]]:
        """Bands, as many as make a batch at most."""
        bands, n = self.bands(), max(1, self.batch // len(self.starts[2]))
        while group := list(itertools.islice(bands, n)):
            yield group

    def bands(self) -> Iterator[Band]:
        steps = [Steps.of(self.starts[a], self.size[a], self.axes[a]) for a in (0, 1)]
        for at in itertools.product(*(range(len(self.starts[a])) for a in (0, 1))):
            z, y = (self._settled(a, k, steps[a]) for a, k in enumerate(at))
            yield Band(*zip(z, y, strict=True))  # type: ignore[arg-type]

    def _settled(self, a: int, k: int, steps: Steps) -> tuple[int, Span, Span, Span, Span, Span]:
        """A band's fields along axis a, at its window k."""
        start, output = self.starts[a][k], _span(steps.made, k)
        touched = start, start + self.patch[a]
        return start, touched, _span(steps.done, k), output, self._read(a, output), _span(steps.keep, k)

    def _read(self, a: int, output: Span) -> Span:
        axis, (begin, end) = self.axes[a], output
        return (int(axis.low[begin]), int(axis.high[end - 1]) + 1) if begin < end else (0, 0)

    @cached_property
    def rows(self) -> int:
        """The most rows that are alive at once."""
        alive: NDArray[np.bool_] = np.zeros(self.size[:2], bool)
        now = most = 0
        for group in self.groups():
            for band in group:
                touched = box(band.touched)
                now += alive[touched].size - int(alive[touched].sum())
                alive[touched] = True
            most = max(most, now)
            for band in group:
                gone = box(band.dropped)
                now -= int(alive[gone].sum())
                alive[gone] = False
        return most

    @cached_property
    def least_rows(self) -> int:
        """The most rows that a group touches and reads: fewer cannot be in memory."""
        return max((z.stop - z.start) * (y.stop - y.start) for z, y in map(here, self.groups()))


def here(group: Sequence[Band]) -> tuple[slice, slice]:
    """The box around all rows that a group touches or needs."""
    boxes = [spans for band in group for spans in (band.touched, band.needed) if all(a < b for a, b in spans)]
    z, y = ((min(s[a][0] for s in boxes), max(s[a][1] for s in boxes)) for a in (0, 1))
    return slice(*z), slice(*y)


def _span(ends: Sequence[int], k: int) -> Span:
    return (ends[k - 1] if k else 0), ends[k]


def box(spans: tuple[Span, Span]) -> tuple[slice, slice]:
    return slice(*spans[0]), slice(*spans[1])
