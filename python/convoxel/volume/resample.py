"""Values between voxels: separable resizing of one field of view, and sampling along an affine.

Linear: y(u) = (1 - t) x[floor u] + t x[floor u + 1], t = u - floor u, per axis, u clamped to [0, n - 1].
Nearest: x[floor(u + 1/2)]. In `resize` u = (i + 1/2) n_old / n_new - 1/2. Positions are float64 whatever
the values are: in float32 a label map can come out one voxel off where two neighbours are equally near.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_SLAB = 1 << 20  # voxels sampled at a time: bounds the scratch of `sample` to about 100 MB


def resize(array: NDArray[Any], shape: tuple[int, ...], mode: str) -> NDArray[Any]:
    """(…, D, H, W) -> (…, *shape) over the same field of view; see Volume.resample."""
    _check_mode(mode)
    if mode == "nearest":
        for axis, n in enumerate(shape, start=array.ndim - 3):
            old = array.shape[axis]
            # floor((2 i + 1) old / (2 n)) in integers: exact for every size
            array = np.take(array, (2 * np.arange(n) + 1) * old // (2 * n), axis)
        return array
    result = array.astype(linear_dtype(array.dtype))
    for axis, n in enumerate(shape, start=array.ndim - 3):
        if n != array.shape[axis]:
            result = _resize_axis(result, axis, n)
    return result


def linear_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The floating type that holds every value of `dtype`: itself, float32 up to 16 bits, else float64."""
    return dtype if dtype.kind == "f" else np.dtype(np.float32 if dtype.itemsize <= 2 else np.float64)


def _resize_axis(x: NDArray[Any], axis: int, n: int) -> NDArray[Any]:
    old = x.shape[axis]
    low, t = _split((np.arange(n) + 0.5) * old / n - 0.5, old)
    t = t.reshape([-1 if a == axis else 1 for a in range(x.ndim)])
    return _mix(np.take(x, low, axis), np.take(x, np.minimum(low + 1, old - 1), axis), t)


def sample(
    array: NDArray[Any],
    shape: tuple[int, int, int],
    pull: NDArray[np.float64],
    mode: str,
    fill: float | None,
) -> NDArray[Any]:
    """Values of array (…, D, H, W) at pull @ (x, y, z, 1) for every voxel of a (D, H, W) = shape grid.

    Returns (…, *shape): the array's dtype for "nearest", floating for "linear".
    """
    _check_mode(mode)
    dtype = array.dtype if mode == "nearest" else linear_dtype(array.dtype)
    _check_fill(fill, dtype)
    out = np.empty(array.shape[:-3] + shape, dtype)
    sizes = array.shape[-3:]
    rows = max(1, _SLAB // (shape[1] * shape[2]))
    touched = False
    for start in range(0, shape[0], rows):
        z, y, x = np.ogrid[start : min(start + rows, shape[0]), 0 : shape[1], 0 : shape[2]]
        # positions in the source, (z, y, x), each broadcast over the slab
        at = [pull[i, 0] * x + pull[i, 1] * y + pull[i, 2] * z + pull[i, 3] for i in (2, 1, 0)]
        inside = np.logical_and.reduce([(u >= -0.5) & (u <= n - 0.5) for u, n in zip(at, sizes, strict=True)])
        touched |= bool(inside.any())
        values = _nearest(array, at) if mode == "nearest" else _linear(array, at)
        if fill is not None:
            values = np.where(inside, values, np.asarray(fill, dtype))
        out[..., start : start + rows, :, :] = values
    if not touched:
        raise ValueError(
            "resample_to: the two volumes do not overlap anywhere in space; check that both are of the same "
            "patient and examination and that their affines are right"
        )
    return out


def _nearest(array: NDArray[Any], at: list[NDArray[np.float64]]) -> NDArray[Any]:
    index = [
        np.clip(np.floor(u + 0.5), 0, n - 1).astype(np.intp)
        for u, n in zip(at, array.shape[-3:], strict=True)
    ]
    z, y, x = index
    return array[..., z, y, x]


def _linear(array: NDArray[Any], at: list[NDArray[np.float64]]) -> NDArray[Any]:
    dtype = linear_dtype(array.dtype)
    pairs = [_split(u, n) for u, n in zip(at, array.shape[-3:], strict=True)]
    (z, tz), (y, ty), (x, tx) = pairs
    z1, y1, x1 = (np.minimum(low + 1, n - 1) for (low, _), n in zip(pairs, array.shape[-3:], strict=True))

    def row(z: NDArray[np.intp], y: NDArray[np.intp]) -> NDArray[Any]:
        return _mix(array[..., z, y, x].astype(dtype), array[..., z, y, x1].astype(dtype), tx)

    def plane(z: NDArray[np.intp]) -> NDArray[Any]:
        return _mix(row(z, y), row(z, y1), ty)

    return _mix(plane(z), plane(z1), tz)


def _split(u: NDArray[np.float64], n: int) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    u = np.clip(u, 0, n - 1)
    low = np.floor(u).astype(np.intp)
    return low, u - low


def _mix(a: NDArray[Any], b: NDArray[Any], t: NDArray[np.float64]) -> NDArray[Any]:
    """(1 - t) a + t b, and a itself where t is 0, even beside a b that is not finite."""
    t = t.astype(a.dtype)
    with np.errstate(invalid="ignore"):
        return np.where(t == 0, a, a * (1 - t) + b * t)


def _check_mode(mode: str) -> None:
    if mode not in ("linear", "nearest"):
        raise ValueError(f'resample: mode must be "linear" or "nearest" (for labels), received {mode!r}')


def _check_fill(fill: float | None, dtype: np.dtype[Any]) -> None:
    if fill is None or dtype.kind == "f":
        return
    if not np.isfinite(fill) or int(fill) != fill or not _fits(int(fill), dtype):
        raise ValueError(f"resample_to: fill {fill} is not a value of the result's dtype {dtype}")


def _fits(value: int, dtype: np.dtype[Any]) -> bool:
    low, high = (0, 1) if dtype.kind == "b" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    return bool(low <= value <= high)
