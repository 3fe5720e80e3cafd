"""`read` and `write`: which file is which, by its name; the formats do the rest."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from . import dicom, metaimage, nifti, nrrd
from .core import Volume, VolumeError
from .files import Source, write_atomically
from .layout import Find, check_written, load

_FIND: dict[str, Find] = {
    **{".nrrd": nrrd.layout, ".nhdr": nrrd.layout, ".mha": metaimage.layout, ".mhd": metaimage.layout}
}
_SAVE: dict[str, Callable[[Volume, IO[bytes], bool], None]] = {".nrrd": nrrd.save, ".mha": metaimage.save}
_NIFTI = (".nii", ".nii.gz")
_PAIRS = (".hdr", ".img", ".hdr.gz", ".img.gz")


def read(path: str | os.PathLike[str], *, max_bytes: int | None = None, series: str | None = None) -> Volume:
    """Reads a scan: NIfTI (.nii, .nii.gz), NRRD (.nrrd, .nhdr), MetaImage (.mha, .mhd) or DICOM.

    Two dimensions come as (1, H, W), three as (D, H, W), four as (C, D, H, W). Values come in the file's
    dtype; where a file has a slope and an intercept they are applied, in float32 (float64 if more than 16
    bits are stored or float32 cannot hold the range; DICOM's whole slopes and intercepts: int16 or int32).
    Affines come in RAS+ mm, whatever the file counts in.

    DICOM is a folder or one file of it; its slices are sorted by where they lie. They have to be of one
    size, orientation and distance; with a tilted gantry the affine is sheared, and a warning says so.

    Args:
        path: a folder is DICOM; of a file, what its name ends in says what it is.
        max_bytes: most memory to take for the voxels; None: half of the machine's.
        series: SeriesInstanceUID, where a folder has several DICOM series; the error lists them.

    Raises:
        VolumeError: the file is missing, broken, inconsistent, too large or of a kind not supported; slices
            are missing, doubled or unevenly spaced.
        ImportError: nibabel (NIfTI) or pydicom (DICOM) is not installed; the message names the extra.

    Warns:
        UserWarning: the file places its voxels twice and differently, not at all, or sheared; the message
            says what was taken.

    Example:
        >>> volume = read("t1.nii.gz")
        >>> volume.shape, volume.spacing
        ((176, 256, 240), (1.0, 0.9375, 0.9375))
    """
    path = Path(path)
    known = path.name.lower().endswith((*_NIFTI, *_FIND)) and not path.is_dir()
    if not known and dicom.is_dicom(path):
        return dicom.read(path, max_bytes, series)
    if series is not None:
        raise ValueError(f"read: {path} is no DICOM folder or file, so it has no series to choose")
    if known and path.name.lower().endswith(_NIFTI):
        return nifti.read(path, max_bytes)
    if known:
        return load(path, _FIND[path.suffix.lower()], max_bytes)
    Source(path).close()  # says so if there is no such file
    raise _unknown(path, (*_NIFTI, *_FIND), "a DICOM folder or ")


def write(volume: Volume, path: str | os.PathLike[str], *, compress: bool | None = None) -> None:
    """Writes NIfTI, NRRD or MetaImage: aside, flushed to the disk, its geometry read back, then renamed.

    No half file ever has the name, and none whose header gives another grid than the volume's. A volume
    that was read, or made from one by `like`, gets that file's geometry back bit for bit; NRRD and
    MetaImage hold any affine in float64, NIfTI-1 in float32. bool is stored as uint8, float16 as float32,
    64-bit integers in the smallest type that holds their values.

    Args:
        volume: what to write.
        path: ends in .nii, .nii.gz, .nrrd or .mha; its folder must exist; a file of that name is replaced.
        compress: for .nrrd and .mha, which are compressed unless it is False; NIfTI's name says it.

    Raises:
        VolumeError: wrong ending, folder missing, disk full, an affine that the format cannot hold, or
            (NIfTI) values beyond 32-bit integers.
        ImportError: nibabel is not installed and the file is to be NIfTI.

    Example:
        >>> scan = read("t1.nii.gz")
        >>> write(scan.like(labels.astype(np.uint8)), "t1_labels.nii.gz")
    """
    path = _writable(path)
    zipped = path.name.lower().endswith(".gz")
    if path.suffix.lower() in _SAVE:
        find, save = _FIND[path.suffix.lower()], _SAVE[path.suffix.lower()]
        write_atomically(
            path,
            lambda stream: save(volume, stream, compress is not False),
            lambda aside: check_written(volume, find, aside, path),
        )
    elif compress not in (None, zipped):
        raise ValueError(f"write: {path.name} says by its name whether it is compressed; rename it")
    else:
        write_planes(volume, volume.array, path)


def write_planes(volume: Volume, array: Any, path: str | os.PathLike[str]) -> None:
    """`write` of another array, (D, H, W) or (C, D, H, W), on the volume's grid, as NIfTI: all that is asked
    of it are shape, ndim, dtype and planes, array[z] or array[c, z], so that it need not fit into memory."""
    path = _nifti(path)
    write_atomically(
        path,
        lambda stream: nifti.save(volume, array, stream, path.name.lower().endswith(".gz"), path),
        lambda aside: check_written(volume, nifti.find, aside, path, array.shape),
    )


def check_target(path: str | os.PathLike[str]) -> None:
    """Raises now what `write` would raise later: before hours of work whose result it is to hold."""
    path = _writable(path)
    if path.name.lower().endswith(_NIFTI):
        nifti.need_nibabel()
    folder = path.resolve().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise VolumeError(f"{path}: its folder does not exist or is not writable; make it first")


def check_planes_target(path: str | os.PathLike[str]) -> None:
    """`check_target` for `write_planes`."""
    check_target(_nifti(path))


def _nifti(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    if not path.name.lower().endswith(_NIFTI):
        raise VolumeError(f"{path}: expected a name that ends in {' or '.join(_NIFTI)}")
    return path


def _writable(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    if not path.name.lower().endswith((*_NIFTI, *_SAVE)):
        raise _unknown(path, (*_NIFTI, *_SAVE))
    return path


def _unknown(path: Path, known: tuple[str, ...], other: str = "") -> VolumeError:
    if path.name.lower().endswith(_PAIRS):
        return VolumeError(f"{path}: .hdr/.img pairs are not supported; convert the pair to one .nii.gz")
    return VolumeError(
        f"{path}: expected {other}a name that ends in {', '.join(known)}; convert other formats first"
    )
