"""What a header says, once it is checked; and whether what was written says the same as the volume."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .core import Volume, VolumeError
from .files import Source
from .orientation import corners

RAS_FROM_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])  # ITK, MetaImage and DICOM count x and y the other way
MM = {"": 1.0, "?": 1.0, "mm": 1.0, "millimeter": 1.0, "millimeters": 1.0, "m": 1000.0, "cm": 10.0}
MM |= {"um": 0.001, "µm": 0.001, "micron": 0.001, "microns": 0.001}
SPACING_MM = (1e-7, 1e6)  # from electron microscopy to nonsense
_SAME_PLACE = 1e-3  # voxels
_WHOLE = re.compile(r"[+-]?[0-9]{1,18}")


@dataclass(frozen=True)
class Layout:
    """Voxels as they are stored, and where they lie."""

    shape: tuple[int, ...]  # of the stored bytes in C order: (z, y, x), and perhaps a channel axis
    dtype: np.dtype[Any]
    affine: NDArray[np.float64]  # (x, y, z) indices to RAS+ mm
    spacing: tuple[float, float, float]  # (z, y, x) in mm
    channels: int | None = None  # which axis of `shape` counts channels
    kept: Mapping[str, Any] | None = None  # the header's own words for the place, for `write` to repeat

    @property
    def array_shape(self) -> tuple[int, ...]:
        """(D, H, W) or (C, D, H, W)."""
        if self.channels is None:
            return self.shape
        rest = [n for axis, n in enumerate(self.shape) if axis != self.channels]
        return self.shape[self.channels], *rest

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def load(self, source: Source) -> Volume:
        array = source.voxels(self.shape, self.dtype)
        if self.channels is not None:
            array = np.moveaxis(array, self.channels, 0)
        volume = Volume(array, self.spacing, self.affine)
        return volume if self.kept is None else volume._from_file(self.kept)


Find = Callable[[Source], tuple[Layout, Source]]  # header -> layout, and the source that is at the voxels


def load(path: Path, find: Find, max_bytes: int | None) -> Volume:
    with Source(path) as source:
        found, data = find(source)
        with data:
            data.afford(0, found.bytes, max_bytes)
            return found.load(data)


def check_written(
    volume: Volume, find: Find, aside: Path, path: Path, shape: tuple[int, ...] | None = None
) -> None:
    """Before a file gets its name: the grid that its header gives has to be the volume's.

    `shape`: with the channels, where these are others than the volume's."""
    shape = volume.shape if shape is None else shape
    try:
        with Source(aside, quiet=True) as source:
            found, _ = find(source)
    except VolumeError as error:
        raise VolumeError(str(error).replace(str(aside), f"{path}: not written", 1)) from error
    apart = np.linalg.norm((found.affine - volume.affine) @ corners(volume.grid_shape), axis=0).max()
    channels = found.array_shape[:-3] or (1,)  # one channel may be written as none
    same = found.array_shape[-3:] == volume.grid_shape and channels == (shape[:-3] or (1,))
    if not same or not apart <= _SAME_PLACE * min(volume.spacing):
        raise VolumeError(
            f"{path}: not written: read back, it holds {found.array_shape} voxels up to {apart:.3g} mm from "
            f"where they lie, the volume is {shape}; the format cannot hold this affine: write .nrrd"
        )


def shrunk(array: NDArray[Any]) -> NDArray[Any]:
    """In a type that every reader knows: bool as uint8, float16 as float32, 64-bit integers in the
    smallest type that holds their values, if 32 bits do."""
    if array.dtype.kind == "b":
        return array.view(np.uint8)
    if array.dtype == np.float16:
        return array.astype(np.float32)
    if array.dtype.kind == "f" or array.dtype.itemsize < 8:
        return array
    low, high = int(array.min()), int(array.max())
    for name in ("u1", "u2", "i2", "u4", "i4"):
        if np.iinfo(name).min <= low and high <= np.iinfo(name).max:
            return array.astype(name)
    return array


def wholes(text: str, what: str, source: Source) -> list[int]:
    words = text.split()
    if not words or not all(_WHOLE.fullmatch(word) for word in words):
        raise source.error(f"{what} should be whole numbers, it is {text[:80]!r}", "export the file again")
    return [int(word) for word in words]


def numbers(text: str, count: int, what: str, source: Source) -> list[float]:
    """`count` finite numbers."""
    try:
        values = [float(word) for word in text.replace(",", " ").split()]
    except ValueError:
        values = []
    if len(values) != count or not all(map(math.isfinite, values)):
        raise source.error(
            f"{what} should be {count} finite numbers, it is {text[:80]!r}", "export the file again"
        )
    return values


def sizes_of(text: str, axes: int, what: str, source: Source) -> list[int]:
    sizes = wholes(text, what, source)
    if len(sizes) != axes or min(sizes) < 1:
        raise source.error(
            f"{what} should be {axes} numbers of at least 1, it is {text[:80]!r}", "export the file again"
        )
    return sizes


def placed(affine: NDArray[np.float64], source: Source) -> tuple[float, float, float]:
    """Spacing (z, y, x) in mm of an affine that can be believed."""
    with np.errstate(all="ignore"):  # numbers of a damaged header: they are checked, not warned about
        lengths = np.linalg.norm(affine[:3, :3], axis=0)
        det = abs(np.linalg.det(affine[:3, :3] / lengths)) if lengths.all() else 0.0
    low, high = SPACING_MM
    if not ((lengths >= low) & (lengths <= high)).all():
        raise source.error(
            f"the voxel size (x, y, z) is {lengths.tolist()} mm, expected positive, finite numbers",
            "set the right ones and save it again",
        )
    if not det >= 1e-3 or not np.isfinite(affine).all():
        raise source.error(
            f"its axes are singular or not finite: {affine.tolist()}",
            "voxels have no place in the patient; set the right ones and save it again",
        )
    x, y, z = (float(length) for length in lengths)
    return z, y, x


def voxels(
    source: Source, name: str | None, found: Layout, skip: int, unpack: Callable[[Source], None] | None
) -> Source:
    """Where a layout's voxels begin: in the header's own file or in that of this `name` beside it, unpacked, after
    `skip` bytes; of -1, so that they end with the file."""
    data = source if name is None else Source(_data_file(source, name), quiet=source.quiet)
    try:
        if unpack is not None:
            unpack(data)
        if not data.could_hold(skip + found.bytes):
            data.afford(skip + found.bytes, 0, None)
        data.skip(skip) if skip >= 0 else data.skip_to_last(found.bytes)
    except BaseException:
        data.close()
        raise
    return data


def _data_file(source: Source, name: str) -> Path:
    """The file beside a header that holds its voxels; a header cannot point anywhere else."""
    folder = source.path.parent
    path = Path(name)
    inside = not path.is_absolute() and ".." not in path.parts and "\0" not in name and name.isprintable()
    try:
        inside = inside and (folder / path).resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError):
        inside = False
    if not inside or not path.name:
        raise source.error(
            f"its header says that the voxels are in {name[:120]!r}",
            "only a file in the header's own folder is opened: put both into one folder",
        )
    return folder / path
