"""How far a network pools, and the patch that it sees, from spacing and size; sizes in voxels, spacings in mm.

Source of the rules: nnunetv2 2.8.1, experiment_planning/experiment_planners/network_topology.py and
default_experiment_planner.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

BOTTOM = 4  # voxels that pooling leaves on an axis, at least
SMALLEST = 16  # voxels of a patch on an axis, where the images have them
_CLOSE = 2.0  # spacings within this factor of the smallest are pooled, and convolved, together
_START = {2: 2048, 3: 256}  # edge of the square or cube whose volume the first patch has


@dataclass(frozen=True)
class Topology:
    """Strides and kernels of every stage, full resolution first, and a patch that the strides divide."""

    patch: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    kernels: tuple[tuple[int, ...], ...]

    @property
    def divisor(self) -> tuple[int, ...]:
        """What the patch has to be a multiple of, per axis."""
        return tuple(math.prod(axis) for axis in zip(*self.strides, strict=True))


def topology(spacing: Sequence[float], patch: Sequence[int]) -> Topology:
    """The network for a patch; where its strides do not divide the patch, that is rounded up.

    An axis is halved as long as BOTTOM voxels are left and its spacing, which doubles each time, is less than twice
    the smallest; one axis alone only with 3 * BOTTOM voxels left. Kernels are 1 on an axis until its spacing is less
    than twice the smallest, then 3 for good.

    >>> found = topology((5.0, 1.0, 1.0), (20, 100, 96))
    >>> found.patch, found.strides[2:], found.kernels[:3]
    ((20, 112, 96), ((1, 2, 2), (2, 2, 2), (2, 2, 2)), ((1, 3, 3), (1, 3, 3), (3, 3, 3)))
    """
    axes = range(len(spacing))
    now, size = list(spacing), list(patch)
    strides, kernels, kernel = [(1,) * len(axes)], [], [1] * len(axes)
    while True:
        large = [axis for axis in axes if size[axis] >= 2 * BOTTOM]
        finest = min((now[axis] for axis in large), default=0.0)
        pooled = [axis for axis in large if now[axis] < _CLOSE * finest]
        if not pooled or (len(pooled) == 1 and size[pooled[0]] < 3 * BOTTOM):
            break
        kernel = [3 if now[axis] < _CLOSE * min(now) else kernel[axis] for axis in axes]
        kernels.append(tuple(kernel))
        strides.append(tuple(2 if axis in pooled else 1 for axis in axes))
        for axis in pooled:
            now[axis] *= 2
            size[axis] = -(-size[axis] // 2)
    kernels.append((3,) * len(axes))
    divisor = [math.prod(axis) for axis in zip(*strides, strict=True)]
    whole = tuple(-(-n // d) * d for n, d in zip(patch, divisor, strict=True))
    return Topology(whole, tuple(strides), tuple(kernels))


def first_patch(spacing: Sequence[float], median: Sequence[float]) -> tuple[int, ...]:
    """Larger than needed: as many mm on every axis, of 256^3 or 2048^2 voxels, but no more than the median image.

    >>> first_patch((2.0, 1.0, 1.0), (400, 512, 300))
    (161, 323, 300)
    """
    rank = len(spacing)
    edge = _START[rank] * math.prod(spacing) ** (1 / rank)  # mm
    return tuple(max(1, int(min(round(edge / s), n))) for s, n in zip(spacing, median, strict=True))


def shrink(
    spacing: Sequence[float], median: Sequence[float], fits: Callable[[Topology], bool]
) -> tuple[Topology, Topology | None]:
    """The largest patch on the way from `first_patch` down to SMALLEST that fits, and the one before, which did not.

    Each step takes the axis whose patch is largest in proportion to the median image. If nothing fits the last and
    smallest is returned: the caller asks `fits` again.
    """
    found, larger = topology(spacing, first_patch(spacing, median)), None
    while not fits(found) and (smaller := _smaller(spacing, median, found)):
        found, larger = smaller, found
    return found, larger


def _smaller(spacing: Sequence[float], median: Sequence[float], found: Topology) -> Topology | None:
    """The next smaller patch on one axis, or None where every axis is as small as it may be."""
    for axis in sorted(range(len(spacing)), key=lambda axis: (found.patch[axis] / median[axis], axis))[::-1]:
        least = min(SMALLEST, max(1, math.floor(median[axis])))
        for n in range(found.patch[axis] - 1, least - 1, -1):
            trial = topology(spacing, (*found.patch[:axis], n, *found.patch[axis + 1 :]))
            # With fewer voxels the network may pool less, on other axes more: only less on the whole leads to an end.
            if trial.patch[axis] < found.patch[axis] and math.prod(trial.patch) < math.prod(found.patch):
                return trial
    return None


def nearest_patch(spacing: Sequence[float], patch: Sequence[int]) -> tuple[int, ...]:
    """The patch nearest to this one that its own network's strides divide; itself if they do.

    >>> nearest_patch((1.0, 1.0, 1.0), (130, 100, 64))
    (128, 96, 64)
    """
    divisor = topology(spacing, patch).divisor
    choices = product(*({n // d * d, -(-n // d) * d} for n, d in zip(patch, divisor, strict=True)))
    usable = [c for c in choices if min(c) > 0 and topology(spacing, c).patch == c]
    return min(usable, key=lambda c: (sum(abs(a - b) for a, b in zip(c, patch, strict=True)), c))
