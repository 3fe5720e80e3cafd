"""Images resized by splines, over the same field of view: output voxel i lies at u = (i + 1/2) n_old / n_new - 1/2.

Spline interpolation is linear and separable, so that resizing an axis is a product with a matrix (n_new, n_old):

    M = B P^-1 E        E continues the edges by 12 voxels, P^-1 finds the spline's coefficients, B evaluates it

which equals scipy.ndimage.zoom(mode="nearest", grid_mode=True), and with the clip to the input's range
skimage.transform.resize(mode="edge"), to rounding; that visits 64 neighbours a voxel on one thread, this is three
products. Rows of M fall off by 0.27 a voxel, so a slab of the output needs only the input around it: everything is
float64 and nothing but the result is as large as the image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ORDERS = (0, 1, 3)
_RIM = 12  # scipy's: the cubic spline's memory of the edge is 0.27^12 = 1e-7 there
_NOTHING = 1e-14  # entries of M below this do not change a float32 result; 25 voxels away
_SLAB = 64 << 20  # bytes of a slab's input in float64, if that is
_ROWS = 16  # rows of the output or more: each slab reads 50 rows of the input again


def resize(
    image: NDArray[Any],
    shape: Sequence[int],
    order: int = 3,
    separate: int | None = None,
    order_z: int = 0,
) -> NDArray[np.float32]:
    """(C, D, H, W) -> (C, *shape) float32, by splines of `order`, clipped to the range of the input.

    Args:
        shape: (D, H, W).
        order: 0 (nearest), 1 (linear) or 3 (cubic).
        separate: an axis (0, 1 or 2) to resample apart from the others, with order_z: every slice across it is
            resized (and clipped to its own range) as a plane first. nnU-Net's way where spacings are anisotropic.

    Returns the image itself (as float32) if it has that shape already. ValueError for another order.

    >>> resize(np.arange(3.0).reshape(1, 1, 1, 3), (1, 1, 6), order=1)
    array([[[[0.  , 0.25, 0.75, 1.25, 1.75, 2.  ]]]], dtype=float32)
    """
    for name, value in (("order", order), ("order_z", order_z)):
        if value not in ORDERS:
            raise ValueError(f"resize: {name} must be one of {ORDERS}, received {value!r}")
    depth, height, width = (int(n) for n in shape)
    if image.shape[1:] == (depth, height, width):
        return image.astype(np.float32, copy=False)
    out = np.empty((len(image), depth, height, width), np.float32)
    for channel, target in zip(image, out, strict=True):
        if separate is None:
            _whole(channel, target, order)
        else:
            _by_slices(np.moveaxis(channel, separate, 0), np.moveaxis(target, separate, 0), order, order_z)
    return out


def _whole(image: NDArray[Any], out: NDArray[np.float32], order: int) -> None:
    """The first axis by slabs, then the planes of each."""
    _multiply(image, out, [matrix(n, m, order) for n, m in zip(image.shape, out.shape, strict=True)])


def interpolate(image: NDArray[Any], positions: Sequence[Any]) -> NDArray[np.float32]:
    """(C, D, H, W) -> (C, D', H', W') float32: linear between voxels, at positions (D',), (H',), (W',) in voxels; the
    edge continues.

    >>> interpolate(np.arange(3.0).reshape(1, 1, 1, 3), ([0.0], [0.0], [-1.0, 0.5, 2.0]))
    array([[[[0. , 0.5, 2. ]]]], dtype=float32)
    """
    out = np.empty((len(image), *map(len, positions)), np.float32)
    matrices = [_linear(np.asarray(u), n) for u, n in zip(positions, image.shape[1:], strict=True)]
    for channel, target in zip(image, out, strict=True):
        _multiply(channel, target, matrices)
    return out


def _multiply(image: NDArray[Any], out: NDArray[np.float32], matrices: Sequence[Tensor]) -> None:
    down, rows, columns = matrices
    low, high = float(image.min()), float(image.max())
    for first, last, near, weights in _slabs(down, image[0].size * 8):
        part = _double(image[near])
        slab = (weights @ part.flatten(1)).view(-1, *part.shape[1:])
        out[first:last] = _plane(slab, rows, columns).clamp_(low, high).numpy()


def _by_slices(image: NDArray[Any], out: NDArray[np.float32], order: int, order_z: int) -> None:
    """Planes first, each clipped to its own range; then the first axis."""
    rows, columns = (matrix(n, m, order) for n, m in zip(image.shape[1:], out.shape[1:], strict=True))
    along = matrix(len(image), len(out), order_z)
    for first, last, near, weights in _slabs(along, out[0].size * 8):
        part = _double(image[near])
        limits = part.amin((1, 2), keepdim=True), part.amax((1, 2), keepdim=True)
        planes = torch.minimum(torch.maximum(_plane(part, rows, columns), limits[0]), limits[1])
        out[first:last] = (weights @ planes.flatten(1)).view(-1, *planes.shape[1:]).numpy()


def _plane(planes: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """(n, H, W) -> (n, H', W')."""
    return rows @ (planes @ columns.T)


def _double(image: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(image, np.float64))


def _slabs(matrix: Tensor, row_bytes: int) -> Iterator[tuple[int, int, slice, Tensor]]:
    """(first and last row of the output, the rows of the input that they need, their part of the matrix)."""
    used = matrix.abs() > _NOTHING
    begin = used.int().argmax(1)
    end = matrix.shape[1] - used.flip(1).int().argmax(1)
    first = 0
    while first < len(matrix):
        last = first + 1
        while last < len(matrix) and (
            last - first < _ROWS or int(end[last] - begin[first]) * row_bytes <= _SLAB
        ):
            last += 1
        near = slice(int(begin[first:last].min()), int(end[first:last].max()))
        yield first, last, near, matrix[first:last, near]
        first = last


def matrix(old: int, new: int, order: int) -> Tensor:
    """(new, old) float64: what every output voxel takes of every input voxel."""
    if old == new:
        return torch.eye(old, dtype=torch.float64)
    if order < 3:
        return _linear(nearest(old, new) if order == 0 else _positions(old, new), old)
    return torch.from_numpy(_cubic(old, new))


def _linear(u: NDArray[Any], old: int) -> Tensor:
    u = np.clip(u, 0, old - 1)
    low = np.floor(u).astype(int)
    matrix = np.zeros((len(u), old))
    np.add.at(matrix, (np.arange(len(u)), low), 1 - (u - low))
    np.add.at(matrix, (np.arange(len(u)), np.minimum(low + 1, old - 1)), u - low)
    return torch.from_numpy(matrix)


def _cubic(old: int, new: int) -> NDArray[np.float64]:
    n = old + 2 * _RIM
    continued = np.zeros((n, old))
    continued[np.arange(n), np.clip(np.arange(n) - _RIM, 0, old - 1)] = 1
    fit = (4 * np.eye(n) + np.eye(n, k=1) + np.eye(n, k=-1)) / 6
    fit[0, 0] = fit[-1, -1] = 5 / 6  # coefficients mirrored about the rim
    coefficients = np.linalg.solve(fit, continued)
    u = _positions(old, new) + _RIM
    low = np.floor(u).astype(int)
    t = u - low
    taps = ((1 - t) ** 3, 4 - 6 * t**2 + 3 * t**3, 1 + 3 * t + 3 * t**2 - 3 * t**3, t**3)
    matrix = np.zeros((new, old))
    for k, tap in enumerate(taps):
        matrix += tap[:, None] / 6 * coefficients[low + k - 1]
    return matrix


def nearest(old: int, new: int) -> NDArray[np.int64]:
    """(new,) the input voxel that each output voxel is: floor(u + 1/2).

    Where u lies in the middle between two, rounding decides, here as in scipy (other than in `Axis.nearest`, which
    is exact): of sizes up to 400, 2 in 100 pairs have such voxels.

    >>> nearest(2, 5).tolist()
    [0, 0, 1, 1, 1]
    """
    return np.clip(np.floor(_positions(old, new) + 0.5), 0, old - 1).astype(np.int64)


def _positions(old: int, new: int) -> NDArray[Any]:
    return (old / new) * (np.arange(new) + 0.5) - 0.5
