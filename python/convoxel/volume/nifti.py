"""NIfTI files (.nii, .nii.gz; NIfTI-1 and -2): nibabel knows the header, nothing in it is believed.

The order of `read`: the header's fields are checked, the size that they announce is compared with the
file's and with a limit, and only then is memory taken. A file stores x fastest, then y, z and time or
channel: its bytes are our (C, D, H, W) array in C order, and nothing is transposed.
"""

from __future__ import annotations

import math
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .core import Volume, VolumeError
from .files import Source, machine_memory, write_atomically
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


def read(path: str | os.PathLike[str], *, max_bytes: int | None = None) -> Volume:
    """Reads a NIfTI scan.

    Two dimensions come as (1, H, W), three as (D, H, W), four (or five of which the fourth is 1) as
    (C, D, H, W). Values come in the file's dtype; where the file has a slope and an intercept they are
    applied, in float32 (float64 if more than 16 bits are stored or float32 cannot hold the range). The
    affine is the sform, else the qform, else the voxel sizes with x running to the left, as nibabel has
    it; metres and microns become mm.

    Args:
        path: a file that ends in .nii or .nii.gz.
        max_bytes: most memory to take for the voxels; None: half of the machine's.

    Raises:
        VolumeError: the file is missing, broken, inconsistent, too large or of a kind not supported.
        ImportError: nibabel is not installed.

    Warns:
        UserWarning: the file places its voxels twice and differently (the sform is taken), or not at all.

    Example:
        >>> volume = read("t1.nii.gz")
        >>> volume.shape, volume.spacing
        ((176, 256, 240), (1.0, 0.9375, 0.9375))
    """
    path = _checked_path(path)
    nibabel = _nibabel()
    with Source(path) as source:
        header = _read_header(source, nibabel)
        dtype, shape, scale = (
            _stored_dtype(header, source),
            _array_shape(header, source),
            _scaling(header, source),
        )
        result = _scaled_dtype(dtype, scale) if scale else dtype.newbyteorder("=")
        with np.errstate(all="ignore"):  # numbers of a damaged header: they are checked, not warned about
            affine, spacing, kept = read_placement(header, shape[-3:], source)
        count, offset = math.prod(shape), _data_offset(header, source)
        converted = 0 if result == dtype else result.itemsize
        limit = machine_memory() // 2 if max_bytes is None else max_bytes
        _check_size(source, offset + count * dtype.itemsize, count * (dtype.itemsize + converted), limit)
        source.read(offset - header.sizeof_hdr)
        stored = source.voxels(count, dtype).reshape(shape)
        array = _scaled(stored, scale, result, source) if scale else stored
    return Volume(array, spacing, affine)._from_file(kept)


def write(volume: Volume, path: str | os.PathLike[str]) -> None:
    """Writes a NIfTI file: aside, flushed to the disk, then renamed, so no half file ever has the name.

    A volume that was read, or made from one by `like`, gets that file's geometry fields back bit for
    bit; any other affine goes into sform and qform, in float32. bool is stored as uint8, float16 as
    float32, 64-bit integers in the smallest type that holds their values; a grid with an axis beyond
    32767 voxels as NIfTI-2.

    Args:
        volume: what to write.
        path: ends in .nii or .nii.gz; its folder must exist; a file of that name is replaced.

    Raises:
        VolumeError: wrong ending, folder missing, disk full, or values beyond 32-bit integers.
        ImportError: nibabel is not installed.

    Example:
        >>> scan = read("t1.nii.gz")
        >>> write(scan.like(labels.astype(np.uint8)), "t1_labels.nii.gz")
    """
    path = _checked_path(path)
    nibabel = _nibabel()
    array = _storable(volume.array, path)
    kept = volume._file_placement()
    large = max(array.shape) > np.iinfo(np.int16).max or (kept is not None and kept["nifti"] == 2)
    header = nibabel.Nifti2Header() if large else nibabel.Nifti1Header()
    header.set_data_dtype(array.dtype)
    header["dim"] = [array.ndim, *array.shape[::-1], *[1] * (7 - array.ndim)]
    header["scl_slope"], header["scl_inter"] = 1, 0
    header["vox_offset"] = header.sizeof_hdr + 4
    write_placement(header, volume, kept)
    write_atomically(path, header.binaryblock + bytes(4), array)


def check_target(path: str | os.PathLike[str]) -> None:
    """Raises now what `write` would raise later: before hours of work whose result it is to hold."""
    _nibabel()
    folder = _checked_path(path).resolve().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise VolumeError(f"{path}: its folder does not exist or is not writable; make it first")


def _nibabel() -> Any:
    try:
        import nibabel
    except ImportError as error:
        raise ImportError('NIfTI files need nibabel: pip install "convoxel[io]"') from error
    return nibabel


def _checked_path(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    name = path.name.lower()
    if name.endswith((".hdr", ".img", ".hdr.gz", ".img.gz")):
        raise VolumeError(f"{path}: .hdr/.img pairs are not supported; convert the pair to one .nii.gz")
    if not name.endswith((".nii", ".nii.gz")):
        raise VolumeError(
            f"{path}: expected a name that ends in .nii or .nii.gz; convert other formats first"
        )
    return path


def _storable(array: NDArray[Any], path: Path) -> NDArray[Any]:
    """The array in a type that NIfTI readers know."""
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
    raise VolumeError(
        f"{path}: values from {low} to {high} do not fit a 32-bit integer, and few programs read 64-bit "
        "NIfTI; renumber the labels, or write array.astype(float) if they are measurements"
    )


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


def _check_size(source: Source, end: int, needed: int, limit: int) -> None:
    """end: bytes up to the last voxel; needed: bytes of memory for the voxels."""
    if not source.could_hold(end):
        raise source.error(
            f"the header announces {end} bytes, the file of {source.file_size} bytes cannot hold them",
            "it is cut off or its header damaged; copy or export it again",
        )
    if needed > limit:
        raise source.error(
            f"its voxels need {needed} bytes of memory, the limit is {limit}",
            "raise it by read(path, max_bytes=...) if the machine has them",
        )


def _data_offset(header: Any, source: Source) -> int:
    offset = float(header["vox_offset"])
    least = int(header["sizeof_hdr"]) + 4
    if not (least <= offset <= least + _MAX_EXTENSIONS and offset == int(offset)):
        raise source.error(
            f"the header puts the voxels at byte {offset}",
            f"expected a whole number from {least} on; export the file again",
        )
    return int(offset)
