"""The box around what is not zero, and the rim that brings an image to a network's patch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Box = tuple[slice, slice, slice]


def nonzero_box(image: Sequence[NDArray[Any]] | NDArray[Any]) -> Box:
    """The smallest box outside of which every channel is 0; the whole image if it is 0 everywhere.

    image: (C, D, H, W), or C arrays (D, H, W). Holes inside do not matter to a box.

    >>> image = np.zeros((1, 4, 5, 6))
    >>> image[0, 1:3, 2, 5] = 7
    >>> nonzero_box(image)
    (slice(1, 3, None), slice(2, 3, None), slice(5, 6, None))
    """
    d, h, w = image[0].shape
    rows, depth = np.zeros((h, w), bool), np.zeros(d, bool)
    for z in range(d):  # by planes: no mask of the whole scan
        here = np.logical_or.reduce([channel[z] != 0 for channel in image])
        depth[z] = here.any()
        rows |= here
    if not depth.any():
        return slice(0, d), slice(0, h), slice(0, w)
    return _extent(depth), _extent(rows.any(1)), _extent(rows.any(0))


def _extent(hit: Any) -> slice:
    where = np.flatnonzero(hit)
    return slice(int(where[0]), int(where[-1]) + 1)


def filled(image: NDArray[Any]) -> NDArray[np.bool_]:
    """(C, D, H, W) -> (D, H, W): where any channel is not 0, and the holes inside (scipy.ndimage.binary_fill_holes).

    Raises ImportError without scipy.
    """
    try:
        from scipy.ndimage import binary_fill_holes
    except ImportError as error:
        raise ImportError('normalising within a mask needs scipy: pip install "convoxel[predict]"') from error
    return binary_fill_holes((image != 0).any(0))


def padding(shape: Sequence[int], least: Sequence[int]) -> list[tuple[int, int]]:
    """Voxels to put before and behind each axis so that it has at least `least`; the odd one goes behind.

    >>> padding((7, 20, 9), (10, 16, 16))
    [(1, 2), (0, 0), (3, 4)]
    """
    missing = [max(0, n - have) for have, n in zip(shape, least, strict=True)]
    return [(m // 2, m - m // 2) for m in missing]
