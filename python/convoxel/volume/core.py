"""Volume: voxels on a grid in patient space.

    world (x, y, z, 1) in RAS+ mm = affine @ (i_x, i_y, i_z, 1),    array[i_z, i_y, i_x]

The array axes run the other way round than the affine's columns: the last axis of the array is the
first column. Everything else in this package follows from that one line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import resample as _resample
from .orientation import LETTERS, corners, nearest_axes, parse_orientation, permute

_SPACING_TOLERANCE = 1e-3  # relative; NIfTI stores spacing and affine separately, each in float32


class VolumeError(ValueError):
    """A scan that cannot be read, trusted or written; the message says why and what to do."""


class Volume:
    """Voxels with their spacing and their place in the patient. Attributes cannot be rebound.

    Args:
        array: (D, H, W) or (C, D, H, W), that is (z, y, x); bool, integer or floating (at most 64 bits).
            It is not copied unless its byte order or memory layout has to change.
        spacing: (z, y, x) in mm; None takes it from the affine.
        affine: (4, 4), maps (x, y, z) voxel indices to RAS+ mm, as nibabel's. Without one the volume
            is taken as axis-aligned RAS+ with the centre of its first voxel at the origin:
            diag(spacing x, y, z, 1).

    Raises:
        TypeError: the array is not real numbers.
        ValueError: wrong rank, empty, spacing not positive and finite, affine singular, or spacing and
            affine that disagree by more than one part in a thousand.

    Example:
        >>> ct = Volume(np.zeros((40, 512, 512), np.int16), spacing=(3.0, 0.7, 0.7))
        >>> ct
        Volume(shape=(40, 512, 512), int16, spacing=(3, 0.7, 0.7) mm (z, y, x), RAS, origin=(0, 0, 0) mm)
    """

    __slots__ = ("_affine", "_array", "_file", "_grid", "_spacing", "_steps")

    _array: NDArray[Any]
    _affine: NDArray[np.float64]
    _spacing: tuple[float, float, float]
    # What `reorient` did to the grid this volume began with: affine = _grid @ _steps, _steps integer.
    # Turned back, _steps is the identity again and the affine is the first one to the last bit.
    _grid: NDArray[np.float64]
    _steps: NDArray[np.int64]
    _file: Mapping[str, Any] | None  # the file header's own words for _grid, so that `write` repeats them

    def __init__(
        self, array: ArrayLike, spacing: Sequence[float] | None, affine: ArrayLike | None = None
    ) -> None:
        voxels = _check_array(array)
        size, grid = _place(spacing, affine)
        self._set(voxels, size, grid, np.eye(4, dtype=np.int64), None)

    def _set(
        self,
        array: NDArray[Any],
        spacing: tuple[float, float, float],
        grid: NDArray[np.float64],
        steps: NDArray[np.int64],
        file: Mapping[str, Any] | None,
    ) -> Volume:
        affine = grid @ steps
        affine.flags.writeable = False
        values = (array, spacing, affine, grid, steps, file)
        for name, value in zip(("array", "spacing", "affine", "grid", "steps", "file"), values, strict=True):
            object.__setattr__(self, f"_{name}", value)
        return self

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(
            f"Volume: {name} cannot be set; make a new one with Volume(...) or volume.like(array)"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self._array, self._spacing, self._grid, self._steps, self._file)

    @property
    def array(self) -> NDArray[Any]:
        """(D, H, W) or (C, D, H, W); shared, not copied."""
        return self._array

    @property
    def spacing(self) -> tuple[float, float, float]:
        """(z, y, x) in mm."""
        return self._spacing

    @property
    def affine(self) -> NDArray[np.float64]:
        """(4, 4), (x, y, z) voxel indices to RAS+ mm; read-only."""
        return self._affine

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array, with the channels if there are any."""
        return self._array.shape

    @property
    def grid_shape(self) -> tuple[int, int, int]:
        """(D, H, W), without the channels."""
        d, h, w = self._array.shape[-3:]
        return d, h, w

    @property
    def dtype(self) -> np.dtype[Any]:
        return self._array.dtype

    @property
    def is_multichannel(self) -> bool:
        """Whether the array is (C, D, H, W)."""
        return self._array.ndim == 4

    @property
    def orientation(self) -> str:
        """Where the x, y and z index (in this order) grow to, nearest axes: "RAS", "LPS", "LIA" …"""
        axes = nearest_axes(self._affine)
        return "".join(LETTERS[axis][sign > 0] for axis, sign in axes)

    def same_grid(self, other: Volume, tolerance: float = 1e-3) -> bool:
        """Whether both have the same (D, H, W) and every voxel in the same place, to `tolerance` voxels."""
        if self.grid_shape != other.grid_shape:
            return False
        apart = (self._affine - other._affine) @ corners(self.grid_shape)
        distance = np.linalg.norm(apart, axis=0).max()
        return bool(distance <= tolerance * min(self._spacing))

    def like(self, array: ArrayLike) -> Volume:
        """`array`, (D, H, W) or (C, D, H, W), on this volume's grid: same spacing, affine, file geometry."""
        voxels = _check_array(array)
        if voxels.shape[-3:] != self.grid_shape:
            raise ValueError(
                f"Volume.like: array has (D, H, W) {voxels.shape[-3:]}, the volume {self.grid_shape}; "
                "resample or crop the array to the volume's grid first"
            )
        return self._with(voxels)

    def _with(self, array: NDArray[Any]) -> Volume:
        return _rebuild(array, self._spacing, self._grid, self._steps, self._file)

    def _from_file(self, placement: Mapping[str, Any]) -> Volume:
        return _rebuild(self._array, self._spacing, self._grid, self._steps, placement)

    def _file_placement(self) -> Mapping[str, Any] | None:
        """What the file said of this very grid; None for grids made here, and for reoriented ones."""
        return self._file if (self._steps == np.eye(4)).all() else None

    def reorient(self, orientation: str = "RAS") -> Volume:
        """The same voxels in the same places, with axes flipped and swapped so that they run as named.

        No value is interpolated, and `v.reorient("RAS").reorient(v.orientation)` is v to the last bit,
        array and affine. The array is a view where it can be.

        Args:
            orientation: three letters for the x, y and z index, one of each of R/L, A/P, S/I.
        """
        wanted = parse_orientation(orientation)
        have = nearest_axes(self._affine)
        steps = np.zeros((4, 4), np.int64)  # old index = steps @ new index
        steps[3, 3] = 1
        source: list[int] = []
        flips: list[int] = []
        for new, (axis, sign) in enumerate(wanted):
            old = next(i for i, (a, _) in enumerate(have) if a == axis)
            flip = sign != have[old][1]
            steps[old, new] = -1 if flip else 1
            if flip:
                steps[old, 3] = self._array.shape[-1 - old] - 1
                flips.append(new)
            source.append(old)
        array = permute(self._array, source, flips)
        spacing = tuple(self._spacing[2 - old] for old in source)[::-1]
        return _rebuild(
            array, (spacing[0], spacing[1], spacing[2]), self._grid, self._steps @ steps, self._file
        )

    def resample(
        self,
        spacing: Sequence[float] | None = None,
        *,
        shape: Sequence[int] | None = None,
        mode: str = "linear",
    ) -> Volume:
        """The same field of view cut into other voxels.

        The field of view (voxel borders) stays exactly where it is, as with torch's
        `align_corners=False`: output voxel i has its centre at input index (i + 0.5) * old / new - 0.5,
        and beyond the outermost centres the edge value holds. The result's spacing is therefore the
        field of view over a whole number of voxels: read it off the result.

        Args:
            spacing: (z, y, x) in mm; each axis gets round(extent / spacing) voxels, at least one.
            shape: (D, H, W) instead of a spacing.
            mode: "linear" (floating arrays keep their dtype; integers give float32 up to 16 bits, float64
                beyond) or "nearest" (dtype and values kept: for labels).

        Example:
            >>> Volume(np.zeros((10, 64, 64)), (5.0, 1.0, 1.0)).resample((1.0, 1.0, 1.0)).shape
            (50, 64, 64)
        """
        if spacing is not None and shape is None:
            d, h, w = (
                max(1, round(n * old / want))
                for n, old, want in zip(self.grid_shape, self._spacing, _check_spacing(spacing), strict=True)
            )
            new = d, h, w
        elif shape is not None and spacing is None:
            new = _check_shape(shape)
        else:
            raise ValueError("Volume.resample: give either spacing=(z, y, x) in mm or shape=(D, H, W)")
        if new == self.grid_shape:
            return self
        array = _resample.resize(self._array, new, mode)
        ratio = np.array(self.grid_shape, float) / new  # old voxels per new voxel, (z, y, x)
        step = np.diag([*ratio[::-1], 1.0])
        step[:3, 3] = (ratio[::-1] - 1) / 2
        size = np.array(self._spacing) * ratio
        affine = self._affine @ step
        return _rebuild(array, (size[0], size[1], size[2]), affine, np.eye(4, dtype=np.int64), None)

    def resample_to(self, other: Volume, *, mode: str = "linear", fill: float | None = None) -> Volume:
        """This volume's values at the voxel centres of `other`, whatever its orientation and spacing.

        Args:
            other: gives the grid; its values are not looked at.
            mode: "linear" or "nearest", as in `resample`.
            fill: value outside this volume's field of view; None continues the edge values.

        Raises:
            ValueError: the two fields of view do not touch.
        """
        if self.same_grid(other, tolerance=0.0):
            return other._with(self._array)
        pull = np.linalg.inv(self._affine) @ other._affine  # other's (x, y, z) index -> ours
        array = _resample.sample(self._array, other.grid_shape, pull, mode, fill)
        return other._with(array)

    def __repr__(self) -> str:
        spacing = ", ".join(f"{s:.4g}" for s in self._spacing)
        origin = ", ".join(f"{o:.4g}" for o in self._affine[:3, 3])
        return (
            f"Volume(shape={self.shape}, {self.dtype}, spacing=({spacing}) mm (z, y, x), "
            f"{self.orientation}, origin=({origin}) mm)"
        )


def _rebuild(
    array: NDArray[Any],
    spacing: tuple[float, float, float],
    grid: NDArray[np.float64],
    steps: NDArray[np.int64],
    file: Mapping[str, Any] | None,
) -> Volume:
    return Volume.__new__(Volume)._set(array, spacing, grid, steps, file)


def _check_array(array: ArrayLike) -> NDArray[Any]:
    voxels = np.asarray(array)
    if voxels.dtype.kind not in "biuf" or voxels.dtype.itemsize > 8:
        raise TypeError(
            f"Volume: array must be bool, integer or floating of at most 64 bits, received {voxels.dtype}"
        )
    if voxels.ndim not in (3, 4) or voxels.size == 0:
        raise ValueError(
            "Volume: array must be (D, H, W) or (C, D, H, W) with at least one voxel, received shape "
            f"{voxels.shape}; a 2D image is array[None]"
        )
    return voxels.astype(voxels.dtype.newbyteorder("="), copy=False)


def _check_spacing(spacing: Sequence[float]) -> tuple[float, float, float]:
    size = np.asarray(spacing, dtype=np.float64)
    if size.shape != (3,) or not np.isfinite(size).all() or (size <= 0).any():
        raise ValueError(
            f"Volume: spacing must be three positive finite numbers (z, y, x) in mm, received {spacing}"
        )
    z, y, x = (float(s) for s in size)
    return z, y, x


def _check_shape(shape: Sequence[int]) -> tuple[int, int, int]:
    if len(shape) != 3 or any(int(n) != n or n < 1 for n in shape):
        raise ValueError(f"Volume: shape must be three positive integers (D, H, W), received {tuple(shape)}")
    d, h, w = (int(n) for n in shape)
    return d, h, w


def _check_affine(affine: ArrayLike) -> NDArray[np.float64]:
    matrix = np.array(affine, dtype=np.float64)
    if matrix.shape != (4, 4) or not np.isfinite(matrix).all() or (matrix[3] != (0, 0, 0, 1)).any():
        raise ValueError(
            f"Volume: affine must be a finite (4, 4) matrix with last row 0 0 0 1, received {matrix.tolist()}"
        )
    lengths = np.linalg.norm(matrix[:3, :3], axis=0)
    if (lengths == 0).any() or abs(np.linalg.det(matrix[:3, :3] / lengths)) < 1e-3:
        raise ValueError(
            "Volume: affine is singular: its columns do not span space, so voxels have no place in the "
            f"patient; received {matrix[:3, :3].tolist()}"
        )
    return matrix


def _place(
    spacing: Sequence[float] | None, affine: ArrayLike | None
) -> tuple[tuple[float, float, float], NDArray[np.float64]]:
    """Spacing (z, y, x) and affine, each from the other where it is missing."""
    size = None if spacing is None else _check_spacing(spacing)
    if affine is not None:
        grid = _check_affine(affine)
        return _agreed_spacing(size, grid), grid
    if size is None:
        raise ValueError("Volume: there is neither a spacing nor an affine to take it from; give one of them")
    return size, np.diag([*size[::-1], 1.0])


def _agreed_spacing(
    spacing: tuple[float, float, float] | None, affine: NDArray[np.float64]
) -> tuple[float, float, float]:
    z, y, x = (float(n) for n in np.linalg.norm(affine[:3, :3], axis=0)[::-1])
    if spacing is None:
        return z, y, x
    if not np.allclose(spacing, (z, y, x), rtol=_SPACING_TOLERANCE, atol=0):
        raise ValueError(
            f"Volume: spacing {spacing} and affine disagree: the affine's columns have lengths "
            f"{(z, y, x)} mm (z, y, x); pass spacing=None to take the affine's"
        )
    return spacing
