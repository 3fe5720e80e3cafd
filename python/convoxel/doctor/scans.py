"""One file: what the reader refuses or warns about, its grid, and the values of an image."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..volume import Volume, VolumeError, read
from ..volume.orientation import corners
from .catalogue import Finding, finding

# What the reader says, and the fault's name here; the first that fits.
_REFUSALS = (
    ("the file is empty", "empty-file"),
    ("goes on after the voxels", "trailing-data"),
    ("damaged data|damaged or cut off at its end|damaged DICOM|no field of a header|has no end", "damaged"),
    ("cut off|cannot hold them|overlap the header|has no PixelData|does not come to", "truncated"),
    ("named .nii but gzip", "hidden-gzip"),
    ("named .gz but not", "not-gzip"),
    (r"\.hdr/\.img", "header-pair"),
    ("not a NIfTI|NIfTI mark|not a NRRD|not a MetaImage|no DICOM file", "wrong-content"),
    ("a name that ends in", "unsupported-format"),
    ("voxels' type|ElementType is|its type is|samples each|a segmentation|no DICOM scan", "unsupported-type"),
    ("time and channels together|four dimensions and channels|axes in space and", "five-dimensional"),
    ("voxel size|PixelSpacing|ElementSpacing", "bad-voxel-size"),
    ("singular|not finite|[qs]form is invalid|directions of length 1", "bad-affine"),
    ("bytes of memory", "too-large"),
    ("missing slices|distance between slices changes", "slices-missing"),
    ("unevenly spaced|shifted sideways", "slices-uneven"),
    (r"are the same image|images at \d+ places", "slices-doubled"),
    (r"it has \d+ series", "several-series"),
    (
        "its images differ|images are of different orientation|pixel spacings|several frames of ref",
        "slices-mixed",
    ),
    ("among the files of the series", "slice-damaged"),
)
_WARNINGS = (
    ("place voxels up to", "qform-sform-conflict"),
    ("header's voxel size", "voxel-size-conflict"),
    ("how the scan lies|which way its space|no TransformMatrix|its space is", "no-orientation"),
    ("no space origin", "no-origin"),
    ("gantry is tilted", "gantry-tilt"),
)
_SPACING_MM = (0.05, 20.0)  # clinical scans lie between, microscopes below, localizers above
_SHEAR = (1e-4, 1e-2)  # cosine between two axes: beyond float32's rounding, beyond half a degree
_ANISOTROPIC = 8.0
_THIN = 8  # voxels
_SAMPLE = 200_000  # voxels that percentiles are taken from
_FEW = 16  # distinct values
_CT_BRIGHTEST = 31743  # of the extended scale, ten times that of 12 bits


@dataclass(frozen=True)
class Grid:
    """Where voxels lie: (D, H, W), spacing (z, y, x) in mm, affine and orientation as Volume has them."""

    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    affine: NDArray[np.float64]
    orientation: str

    def apart(self, other: Grid) -> float:
        """The largest distance in mm between voxels of the same index; the shapes are equal."""
        return float(np.linalg.norm((self.affine - other.affine) @ corners(self.shape), axis=0).max())


@dataclass(frozen=True)
class Channel:
    """Values of one channel: range, first and 99th percentile, and a digest of every voxel."""

    low: float
    high: float
    first: float
    last: float
    digest: bytes


def load(path: Path, max_bytes: int | None = None) -> tuple[Volume | None, list[Finding]]:
    """The volume, or None where the reader refuses it, and what the reader and the header say."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            volume = read(path, max_bytes=max_bytes)
        except VolumeError as error:
            reason, _, remedy = _without(path, str(error)).rpartition("; ")
            name = _name(reason or remedy, _REFUSALS, "") or _name(str(error), _REFUSALS, "unreadable")
            return None, [finding(name, path, reason or remedy, remedy)]
    found = [
        finding(_name(str(w.message), _WARNINGS, "reader-warning"), path, _without(path, str(w.message)))
        for w in caught
    ]
    tilted = any(f.name == "gantry-tilt" for f in found)
    return volume, found + [
        f for f in _placement(volume, path) if not (tilted and f.name.startswith("axes-"))
    ]


def _name(message: str, names: tuple[tuple[str, str], ...], otherwise: str) -> str:
    return next((name for pattern, name in names if re.search(pattern, message)), otherwise)


def _without(path: Path, message: str) -> str:
    return message.removeprefix(f"{path}: ")


def grid_of(volume: Volume) -> Grid:
    return Grid(volume.grid_shape, volume.spacing, volume.affine, volume.orientation)


def _placement(volume: Volume, path: Path) -> Iterator[Finding]:
    spacing = "{:.4g} x {:.4g} x {:.4g} mm (z, y, x)".format(*volume.spacing)
    if min(volume.spacing) < _SPACING_MM[0]:
        yield finding("tiny-spacing", path, f"voxels of {spacing}")
    if max(volume.spacing) > _SPACING_MM[1]:
        yield finding("huge-spacing", path, f"voxels of {spacing}")
    elif max(volume.spacing) > _ANISOTROPIC * min(volume.spacing):
        yield finding("anisotropic", path, f"voxels of {spacing}")
    if min(volume.grid_shape) < _THIN:
        yield finding("thin", path, "{} x {} x {} voxels (z, y, x)".format(*volume.grid_shape))
    axes = volume.affine[:3, :3] / np.linalg.norm(volume.affine[:3, :3], axis=0)
    cosine = float(np.abs(axes.T @ axes - np.eye(3)).max())
    if cosine > _SHEAR[0]:
        off = float(np.degrees(np.arcsin(min(cosine, 1.0))))
        name = "axes-not-orthogonal" if cosine > _SHEAR[1] else "axes-nearly-orthogonal"
        yield finding(name, path, f"two axes are {off:.2g} degrees off a right angle")
    header = volume._file_placement() or {}
    if "nifti" in header:
        if not header["sform_code"] and not header["qform_code"] and volume.spacing == (1.0, 1.0, 1.0):
            yield finding("no-spacing", path, "voxel sizes of 1, and no transform")
        if int(header["xyzt_units"]) & 7 == 0:
            yield finding("unit-unknown", path, "xyzt_units is 0")


def examine_image(volume: Volume, path: Path, names: list[str] | None) -> tuple[list[Channel], list[Finding]]:
    """Facts of every channel, and what is doubtful about the values.

    names: of the channels in this file, as dataset.json has them; None: a scan on its own.
    """
    array = volume.array if volume.is_multichannel else volume.array[None]
    channels, found = [], []
    for i, values in enumerate(array):
        name = names[i] if names is not None and i < len(names) else None
        where = f"channel {i}: " if len(array) > 1 else ""
        some = sample(values)
        channel = channel_of(values)
        channels.append(channel)
        faults = list(_values(values, some, channel, in_dataset=names is not None))
        if not faults and name is not None and name.strip().upper() == "CT":
            faults = list(_hounsfield(channel))
        found += [finding(fault, path, where + words) for fault, words in faults]
    return channels, found


def sample(values: NDArray[Any]) -> NDArray[Any]:
    """Some hundred thousand voxels, evenly spread."""
    flat = values.reshape(-1)
    return flat[:: max(1, flat.size // _SAMPLE) | 1]  # odd: does not fall into step with even rows


def channel_of(values: NDArray[Any]) -> Channel:
    """Facts of the voxels of one channel."""
    some = sample(values)
    finite = some[np.isfinite(some)] if some.dtype.kind == "f" else some
    first, last = np.percentile(finite, (1, 99)) if finite.size else (0.0, 0.0)
    digest = hashlib.blake2b(repr((values.shape, values.dtype.str)).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(values).data)
    return Channel(float(values.min()), float(values.max()), float(first), float(last), digest.digest())


def _values(
    values: NDArray[Any], some: NDArray[Any], channel: Channel, in_dataset: bool
) -> Iterator[tuple[str, str]]:
    if np.isnan(channel.low):
        yield "nan", f"{int(np.isnan(values).sum())} of {values.size} voxels are not a number"
    if np.isinf(channel.low) or np.isinf(channel.high) or (np.isnan(channel.low) and np.isinf(values).any()):
        yield "infinite", f"{int(np.isinf(values).sum())} of {values.size} voxels are infinite"
    if not np.isfinite(channel.low + channel.high):
        return
    if channel.low == channel.high:
        yield "constant", f"every voxel is {channel.low:g}"
        return
    distinct, counts = np.unique(some, return_counts=True)
    if not in_dataset and values.dtype.kind in "iu" and distinct.size <= 4 * _FEW:
        return  # a label map on its own
    share = counts.max() / some.size
    if share > 0.995:
        yield "nearly-constant", f"{share:.2%} of the voxels are {distinct[counts.argmax()]:g}"
    elif in_dataset and distinct.size <= _FEW:
        yield "few-values", f"{distinct.size} different values from {channel.low:g} to {channel.high:g}"
    elif in_dataset and (
        values.dtype.itemsize == 1 or distinct.size <= 256 and _whole_byte(channel, distinct)
    ):
        yield "eight-bit", f"values from {channel.low:g} to {channel.high:g}, stored as {values.dtype}"
    elif (some == channel.high).mean() > 0.02:
        yield (
            "clipped",
            f"{(some == channel.high).mean():.1%} of the voxels are {channel.high:g}, the highest",
        )


def _whole_byte(channel: Channel, distinct: NDArray[Any]) -> bool:
    return channel.low >= 0 and channel.high == 255 and bool((distinct == np.rint(distinct)).all())


def _hounsfield(channel: Channel) -> Iterator[tuple[str, str]]:
    low, high = channel.low, channel.high
    span = f"values from {low:g} to {high:g}"
    if low >= -1.5 and high <= 255:
        yield "ct-rescaled", span
    elif low >= 0 and high > 1200:
        yield "ct-raw-offset", span
    elif low > -200:
        yield "ct-no-air", span
    elif low < -1100:
        yield "ct-padding", span
    if high > _CT_BRIGHTEST:
        yield "ct-too-bright", span
