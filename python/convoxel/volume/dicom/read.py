"""The values of a scan: decoded slice by slice, rescaled to what they measure (Hounsfield units for CT)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core import Volume, VolumeError
from ..files import Source, machine_memory
from ..resample import linear_dtype
from .codestream import check_frames
from .headers import File, Pixels, Slice, guarded, read_dataset, slices
from .series import files_of
from .stack import Stack, stack

# Not GDCM: of 6,000 damaged frames (JPEG lossless, JPEG-LS, JPEG 2000) 11 ended the process, November 2026.
# These came through 3,000 each.
_DECODERS = ("pydicom", "pyjpegls", "pylibjpeg", "pillow")  # pyjpegls refuses more than pylibjpeg


def read(path: Path, max_bytes: int | None, series: str | None) -> Volume:
    files = files_of(path, series)
    found = stack_of(files, path)
    largest = max(file.path.stat().st_size for file in files)  # one file at a time is in memory
    room = _Room(path, found.shape, largest, machine_memory() // 2 if max_bytes is None else max_bytes)
    array = _fill(room, found, {file.path: file for file in files})
    return Volume(array, found.spacing, found.affine)


@dataclass(frozen=True)
class _Room:
    """Memory for the voxels, held against the limit before it is taken."""

    path: Path
    shape: tuple[int, int, int]
    besides: int
    limit: int

    def empty(self, dtype: np.dtype[Any], besides: int = 0) -> NDArray[Any]:
        needed = math.prod(self.shape) * dtype.itemsize + self.besides + besides
        if needed > self.limit:
            raise VolumeError(
                f"{self.path}: its voxels need {needed} bytes of memory, the limit is {self.limit}; raise it "
                "by read(path, max_bytes=...) if the machine has them"
            )
        try:
            return np.empty(self.shape, dtype)
        except (MemoryError, ValueError) as error:
            raise VolumeError(f"{self.path}: no memory for {needed} bytes; use a larger machine") from error


def stack_of(files: list[File], path: Path) -> Stack:
    return stack([s for file in files for s in slices(file)], path)


def _fill(room: _Room, found: Stack, files: dict[Path, File]) -> NDArray[Any]:
    """Whole numbers are int16 until a slice needs int32."""
    array = room.empty(_result(found.slices))
    written: list[int] = []
    at = sorted(enumerate(found.slices), key=lambda item: (str(item[1].path), item[1].frame))
    for path, group in groupby(at, key=lambda item: item[1].path):
        with Source(path) as source, guarded(path):
            frames = _frames(source, found.slices[0].pixels, files[path])
            for (z, s), stored in zip(group, frames, strict=True):
                values = _rescaled(stored, s)
                if array.dtype.kind == "i" and not _fits(values, array.dtype):
                    narrow, array = array, room.empty(np.dtype(np.int32), array.nbytes)
                    array[written] = narrow[written]
                    del narrow
                array[z] = values
                written.append(z)
    return array


def _fits(values: NDArray[Any], dtype: np.dtype[Any]) -> bool:
    return dtype.itemsize > 2 or bool(-(2**15) <= values.min() and values.max() < 2**15)


def _frames(source: Source, pixels: Pixels, file: File) -> Any:
    """The stored values of each frame, (rows, columns)."""
    from pydicom.pixels import pixel_array

    dataset = read_dataset(source, "all")
    if "PixelData" not in dataset:
        raise source.error("it has no PixelData", "it is cut off, or no image: copy or export it again")
    plugin = ""
    if getattr(file.syntax, "is_compressed", False):
        plugin = _decoder(file.syntax, source)
        check_frames(dataset, pixels, source)
    for index in range(int(dataset.get("NumberOfFrames") or 1)):
        frame = pixel_array(dataset, index=index, raw=True, decoding_plugin=plugin)
        if frame.shape != (pixels.rows, pixels.columns) or frame.dtype.itemsize * 8 != pixels.allocated:
            raise source.error(
                f"a frame is {frame.shape} {frame.dtype}, not as its header says", "export it again"
            )
        yield _significant(frame, pixels)


def _decoder(syntax: Any, source: Source) -> str:
    """The name of a decoder of this transfer syntax that holds against damaged data."""
    from pydicom.pixels import get_decoder

    try:
        available = get_decoder(syntax).available_plugins
    except NotImplementedError:
        available = ()
    for name in _DECODERS:
        if name in available:
            return name
    raise source.error(
        f"there is no decoder for its {syntax.name}",
        "pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg, or save it uncompressed (dcmtk: dcmdjpeg)",
    )


def _significant(frame: NDArray[Any], pixels: Pixels) -> NDArray[Any]:
    """Only the stored bits, sign extended: old files keep overlays in the others."""
    frame = frame.view(pixels.dtype.newbyteorder(frame.dtype.byteorder)).astype(pixels.dtype, copy=False)
    if pixels.stored == pixels.allocated:
        return frame
    shifted = np.left_shift(frame, pixels.allocated - 1 - pixels.high)
    return np.right_shift(shifted, pixels.allocated - pixels.stored)


def _result(found: list[Slice]) -> np.dtype[Any]:
    """Unscaled values keep their type. Whole slopes and intercepts leave whole numbers: int16, or int32
    where that does not hold the values. Others give floats, as in every format."""
    pixels = found[0].pixels
    scales = {(s.slope, s.intercept) for s in found}
    if scales == {(1.0, 0.0)}:
        return pixels.dtype
    reach = max(2.0**pixels.stored * abs(slope) + abs(offset) for slope, offset in scales)
    whole = all(slope == int(slope) and offset == int(offset) for slope, offset in scales)
    if whole and reach < 2**31:
        return np.dtype(np.int16)
    wide = linear_dtype(pixels.dtype)
    return wide if reach < float(np.finfo(wide).max) else np.dtype(np.float64)


def _rescaled(stored: NDArray[Any], s: Slice) -> NDArray[Any]:
    if (s.slope, s.intercept) == (1.0, 0.0):
        return stored
    with np.errstate(over="raise", invalid="raise"):
        return stored.astype(np.float64) * s.slope + s.intercept
