"""NIfTI files (.nii, .nii.gz; NIfTI-1 and -2): nibabel knows the header, nothing in it is believed.

The order of `read`: the header's fields are checked, the size that they announce is compared with the
file's and with a limit, and only then is memory taken. A file stores x fastest, then y, z and time or
channel: its bytes are our (C, D, H, W) array in C order, and nothing is transposed.
"""

from __future__ import annotations

import math
import struct
from contextlib import nullcontext
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from .core import Volume, VolumeError
from .files import Source, gzipped, write_array
from .layout import Layout, shrunk
from .placement import read_placement, write_placement
from .resample import linear_dtype

_DTYPES = {
    **{2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8"},
    **{256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"},
}
_REFUSED = {
    **{1: "one bit", 32: "complex64", 128: "RGB"},
    **{1536: "float128", 1792: "complex128", 2048: "complex256", 2304: "RGBA"},
}
_MAX_EXTENSIONS = 64 << 20  # bytes between header and voxels; real files have kilobytes


def read(path: Path, max_bytes: int | None) -> Volume:
    """The affine is the sform, else the qform, else the voxel sizes with x running to the left."""
    nibabel = need_nibabel()
    with Source(path) as source:
        _check_gzip(source, path)
        header = _read_header(source, nibabel)
        found, offset = _layout(header, source)
        scale = _scaling(header, source)
        result = _scaled_dtype(found.dtype, scale) if scale else found.dtype.newbyteorder("=")
        count = math.prod(found.shape)
        converted = 0 if result == found.dtype else result.itemsize
        source.afford(offset + found.bytes, count * (found.dtype.itemsize + converted), max_bytes)
        source.skip(offset - header.sizeof_hdr)
        volume = found.load(source)
        return volume._with(_scaled(volume.array, scale, result, source)) if scale else volume


def find(source: Source) -> tuple[Layout, Source]:
    if source.is_gzip():
        source.inflate()
    return _layout(_read_header(source, need_nibabel()), source)[0], source


def _layout(header: Any, source: Source) -> tuple[Layout, int]:
    """Also the byte at which the voxels begin."""
    dtype, shape = _stored_dtype(header, source), _array_shape(header, source)
    with np.errstate(all="ignore"):  # numbers of a damaged header: they are checked, not warned about
        affine, spacing, kept = read_placement(header, shape[-3:], source)
    return Layout(shape, dtype, affine, spacing, kept=kept), _data_offset(header, source)


def save(volume: Volume, array: Any, stream: IO[bytes], compress: bool, path: Path) -> None:
    """`array` on the grid of `volume`; all that is asked of it are shape, ndim, dtype and planes. A volume that was
    read, or made from one by `like`, gets that file's geometry fields bit for bit; any other affine goes into sform
    and qform, in float32. Axes beyond 32767 voxels make it NIfTI-2."""
    nibabel = need_nibabel()
    array = _storable(array, path)
    kept = volume._file_placement()
    large = max(array.shape) > np.iinfo(np.int16).max or (kept is not None and kept.get("nifti") == 2)
    header = nibabel.Nifti2Header() if large else nibabel.Nifti1Header()
    header.set_data_dtype(array.dtype)
    header["dim"] = [array.ndim, *array.shape[::-1], *[1] * (7 - array.ndim)]
    header["scl_slope"], header["scl_inter"] = 1, 0
    header["vox_offset"] = header.sizeof_hdr + 4
    write_placement(header, volume, kept)
    with gzipped(stream) if compress else nullcontext(stream) as target:
        target.write(header.binaryblock + bytes(4))
        write_array(target, array)


def need_nibabel() -> Any:
    try:
        import nibabel
    except ImportError as error:
        raise ImportError('NIfTI files need nibabel: pip install "convoxel[io]"') from error
    return nibabel


def _check_gzip(source: Source, path: Path) -> None:
    named = path.name.lower().endswith(".gz")
    if source.is_gzip():
        source.inflate()
    if source.compressed and not named:
        raise source.error("named .nii but gzip-compressed", "rename it to .nii.gz")
    if named and not source.compressed:
        raise source.error("named .gz but not gzip-compressed", "rename it to .nii if it is NIfTI")


def _storable(array: NDArray[Any], path: Path) -> NDArray[Any]:
    """The array in a type that NIfTI readers know."""
    array = shrunk(array)
    if array.dtype.kind in "iu" and array.dtype.itemsize == 8:
        raise VolumeError(
            f"{path}: values from {array.min()} to {array.max()} do not fit a 32-bit integer, and few "
            "programs read 64-bit NIfTI; renumber the labels, or write array.astype(float) if they are "
            "measurements"
        )
    return array


def _read_header(source: Source, nibabel: Any) -> Any:
    """nibabel's header object of a single-file NIfTI-1 or -2: fields by name, nothing checked."""
    start = source.read(4)
    kinds = {348: (nibabel.Nifti1Header, b"n+1\0"), 540: (nibabel.Nifti2Header, b"n+2\0\r\n\032\n")}
    size, endian = next(((n, e) for e in "<>" for n in struct.unpack(e + "i", start) if n in kinds), (0, ""))
    if not size:
        raise source.error(
            f"not a NIfTI file: it should begin with a header size of 348 or 540, it begins with {start!r}",
            "check that this is the right file",
        )
    block = start + source.read(size - 4)
    kind, magic = kinds[size]
    found = block[344:348] if size == 348 else block[4:12]
    if found[:3] in (b"ni1", b"ni2"):
        raise source.error("this is the header of a .hdr/.img pair", "convert the pair to one .nii.gz")
    if found != magic:
        raise source.error(
            f"the NIfTI mark should be {magic!r}, it is {found!r}",
            "the header is damaged, or this is Analyze 7.5: convert it to NIfTI",
        )
    return kind(block, endianness=endian, check=False)


def _stored_dtype(header: Any, source: Source) -> np.dtype[Any]:
    code, bits = int(header["datatype"]), int(header["bitpix"])
    if code not in _DTYPES:
        kind = _REFUSED.get(code, f"unknown (code {code})")
        raise source.error(
            f"the voxels' type is {kind}", "expected integers or floats of up to 64 bits; convert the file"
        )
    dtype = np.dtype(_DTYPES[code]).newbyteorder(header.endianness)
    if bits != 8 * dtype.itemsize:
        raise source.error(
            f"the header contradicts itself: type {dtype.name}, but bitpix {bits}",
            "export the file again",
        )
    return dtype


def _array_shape(header: Any, source: Source) -> tuple[int, ...]:
    """(D, H, W) or (C, D, H, W)."""
    rank = int(header["dim"][0])
    sizes = [int(n) for n in header["dim"][1:]]
    if not 2 <= rank <= 7:
        raise source.error(f"the header gives {rank} dimensions", "expected 2, 3 or 4; export the file again")
    sizes = sizes[:rank]
    if min(sizes) < 1:
        raise source.error(
            f"the header gives sizes {sizes}", "every size must be at least 1; export it again"
        )
    if rank == 2:
        sizes.append(1)
    while len(sizes) > 4 and sizes[-1] == 1:
        sizes.pop()
    if len(sizes) == 5 and sizes[3] == 1:  # NIfTI's place for vectors, and ITK's for channels
        del sizes[3]
    if len(sizes) > 4:
        raise source.error(
            f"the header gives sizes {sizes}", "time and channels together are not supported; split the file"
        )
    return tuple(sizes[::-1])


def _scaling(header: Any, source: Source) -> tuple[float, float] | None:
    """(slope, intercept), or None where the stored values are the values."""
    slope, offset = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or not math.isfinite(slope):  # the standard's "not scaled", and nibabel's (NaN)
        return None
    if not math.isfinite(offset):
        raise source.error(f"scl_slope is {slope} but scl_inter {offset}", "export the file again")
    return None if (slope, offset) == (1, 0) else (slope, offset)


def _scaled_dtype(dtype: np.dtype[Any], scale: tuple[float, float]) -> np.dtype[Any]:
    wide = linear_dtype(dtype.newbyteorder("="))
    if wide == np.float32 and dtype.kind != "f":
        reach = 2 ** (8 * dtype.itemsize) * abs(scale[0]) + abs(scale[1])
        return wide if reach < float(np.finfo(np.float32).max) else np.dtype(np.float64)
    return wide


def _scaled(
    stored: NDArray[Any], scale: tuple[float, float], dtype: np.dtype[Any], source: Source
) -> NDArray[Any]:
    slope, offset = scale
    array = np.empty(stored.shape, dtype)
    try:
        with np.errstate(over="raise", invalid="ignore"):
            for index in np.ndindex(stored.shape[:-2]):  # by planes: the float64 in between stays small
                array[index] = stored[index].astype(np.float64) * slope + offset
    except FloatingPointError as error:
        raise source.error(
            f"scaled by {slope} and {offset}, values exceed {dtype}", "the header is damaged; export it again"
        ) from error
    return array


def _data_offset(header: Any, source: Source) -> int:
    offset = float(header["vox_offset"])
    least = int(header["sizeof_hdr"]) + 4
    if not (least <= offset <= least + _MAX_EXTENSIONS and offset == int(offset)):
        raise source.error(
            f"the header puts the voxels at byte {offset}",
            f"expected a whole number from {least} on; export the file again",
        )
    return int(offset)
