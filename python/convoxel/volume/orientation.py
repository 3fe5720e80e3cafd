"""Which way the axes of a grid run: nearest world axes, their letters, and the flips between two of them.

World axes are x (left to Right), y (posterior to Anterior), z (inferior to Superior); a grid's axes are
numbered (x, y, z) as the affine's columns, which is the array's axes from the last.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from numpy.typing import NDArray

LETTERS = ("LR", "PA", "IS")  # negative and positive end of the world axes x, y, z


def corners(grid_shape: tuple[int, ...]) -> NDArray[np.float64]:
    """(4, 8): homogeneous (x, y, z) indices of the eight corner voxels."""
    ends = [(0, n - 1) for n in grid_shape[::-1]]
    return np.array([(*corner, 1.0) for corner in itertools.product(*ends)], float).T


def nearest_axes(affine: NDArray[np.float64]) -> list[tuple[int, int]]:
    """For the x, y and z index: the world axis it runs along and its sign; the best assignment of six."""
    cosines = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    best = max(itertools.permutations(range(3)), key=lambda p: sum(abs(cosines[p[i], i]) for i in range(3)))
    return [(axis, 1 if cosines[axis, i] > 0 else -1) for i, axis in enumerate(best)]


def parse_orientation(orientation: str) -> list[tuple[int, int]]:
    axes = [
        (axis, 1 if letter == ends[1] else -1)
        for letter in orientation
        for axis, ends in enumerate(LETTERS)
        if letter in ends
    ]
    if len(orientation) != 3 or sorted(axis for axis, _ in axes) != [0, 1, 2]:
        raise ValueError(
            "Volume.reorient: orientation must be three letters with one of each of R/L, A/P, S/I, such as "
            f'"RAS" or "LPS"; received {orientation!r}'
        )
    return axes


def permute(array: NDArray[Any], source: list[int], flips: list[int]) -> NDArray[Any]:
    """Axes given as (x, y, z) numbers: new axis i is old axis source[i], reversed if i is in flips."""
    lead = array.ndim - 3
    order = [*range(lead), *(array.ndim - 1 - old for old in source[::-1])]
    moved = array.transpose(order)
    return np.flip(moved, tuple(array.ndim - 1 - new for new in flips))
