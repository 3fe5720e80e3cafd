"""Where a NIfTI header puts its voxels, and how an affine is put into one.

A header has up to three answers: voxel sizes (pixdim), a rigid qform (a quaternion) and an affine sform.
The rule is nibabel's: the sform if its code is not 0, else the qform, else the sizes alone. Where two
answers disagree, a warning says so and by how much.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .core import Volume, VolumeError
from .files import Source
from .layout import SPACING_MM
from .orientation import corners

_UNIT_MM = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}  # xyzt_units & 7: unknown (taken as mm), m, mm, micron
_SAME_PLACE = 0.1  # voxels: qform and sform are float32 and come from different formulas
_ALIGNED = 2  # NIFTI_XFORM_ALIGNED_ANAT: what nibabel writes for an affine that a program made
_KEPT = (
    *("pixdim", "xyzt_units", "qform_code", "quatern_b", "quatern_c", "quatern_d"),
    *("qoffset_x", "qoffset_y", "qoffset_z", "sform_code", "srow_x", "srow_y", "srow_z"),
)


def read_placement(
    header: Any, grid_shape: tuple[int, ...], source: Source
) -> tuple[NDArray[np.float64], tuple[float, float, float], dict[str, Any]]:
    """Affine ((x, y, z) indices to RAS+ mm), spacing ((z, y, x) in mm) and the fields to write back."""
    sizes, unit = _voxel_sizes(header, source)
    affine = _choose_affine(header, grid_shape, source)
    affine[:3] *= unit
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    _check_sizes(lengths, "affine's voxel size", source)
    if abs(np.linalg.det(affine[:3, :3] / lengths)) < 1e-3:
        raise source.error(
            f"its affine is singular: {affine[:3, :3].tolist()}",
            "voxels have no place in the patient; set the right one and save it again",
        )
    if not np.allclose(lengths, sizes, rtol=1e-3, atol=0):
        source.warn(
            f"the header's voxel size {sizes.tolist()} and its affine's {lengths.tolist()} "
            "(x, y, z) mm differ; the affine's is taken"
        )
        sizes = lengths
    x, y, z = (float(s) for s in sizes)
    kept = {name: np.array(header[name], header[name].dtype.newbyteorder("=")) for name in _KEPT}
    return affine, (z, y, x), {"nifti": 1 if int(header["sizeof_hdr"]) == 348 else 2, **kept}


def _voxel_sizes(header: Any, source: Source) -> tuple[NDArray[np.float64], float]:
    """(x, y, z) in mm, and the header's unit in mm."""
    code = int(header["xyzt_units"]) & 7
    if code not in _UNIT_MM:
        raise source.error(f"unknown unit of length (code {code})", "export the file again, in mm")
    if int(header["dim"][0]) == 2 and header["pixdim"][3] == 0:
        header["pixdim"][3] = 1  # a plane needs no third size, but the formulas below do
    if header["pixdim"][0] == 0:
        header["pixdim"][0] = 1  # qfac: the standard says so
    sizes = header["pixdim"][1:4].astype(np.float64) * _UNIT_MM[code]
    _check_sizes(sizes, "header's voxel size", source)
    return sizes, _UNIT_MM[code]


def _check_sizes(sizes: NDArray[np.float64], what: str, source: Source) -> None:
    low, high = SPACING_MM
    if not ((sizes >= low) & (sizes <= high)).all():  # NaN compares false
        raise source.error(
            f"the {what} (x, y, z) is {sizes.tolist()} mm, expected positive, finite numbers",
            "set the right ones (with nibabel: header.set_zooms, set_sform) and save it again",
        )


def _choose_affine(header: Any, grid_shape: tuple[int, ...], source: Source) -> NDArray[np.float64]:
    """In the header's unit."""
    codes = {name: int(header[f"{name}_code"]) for name in ("sform", "qform")}
    for name, code in codes.items():
        if not 0 <= code <= 5:
            raise source.error(f"{name}_code is {code}, the standard knows 0 to 5", "export the file again")
    if not any(codes.values()):
        source.warn("the header does not say how the scan lies; x is taken to run to the left")
        return np.array(header.get_base_affine(), np.float64)
    found = {name: _form(header, name, source) for name, code in codes.items() if code}
    if len(found) == 2:
        apart = np.linalg.norm((found["sform"] - found["qform"]) @ corners(grid_shape), axis=0).max()
        if not apart <= _SAME_PLACE * header["pixdim"][1:4].min():
            source.warn(
                f"sform (code {codes['sform']}) and qform (code {codes['qform']}) place "
                f"voxels up to {apart:.3g} mm apart; the sform is taken"
            )
    return found["sform"] if "sform" in found else found["qform"]


def _form(header: Any, name: str, source: Source) -> NDArray[np.float64]:
    from nibabel.spatialimages import HeaderDataError  # only reached with a header of nibabel's

    try:
        affine = np.array(header.get_sform() if name == "sform" else header.get_qform(), np.float64)
    except (HeaderDataError, ValueError) as error:
        raise source.error(f"its {name} is invalid ({error})", "export the file again") from error
    if not np.isfinite(affine).all():
        raise source.error(f"its {name} is not finite: {affine.tolist()}", "export the file again")
    return affine


def write_placement(header: Any, volume: Volume, kept: Mapping[str, Any] | None) -> None:
    """Fills the header's pixdim, qform and sform: the fields as they were read, or the affine in float32."""
    if kept is not None and "nifti" in kept:
        for name in _KEPT:
            header[name] = kept[name]
        return
    header["pixdim"][1:4] = volume.spacing[::-1]
    header.set_xyzt_units("mm")
    header.set_sform(volume.affine, _ALIGNED)
    axes = volume.affine[:3, :3] / np.linalg.norm(volume.affine[:3, :3], axis=0)
    if np.abs(axes.T @ axes - np.eye(3)).max() < 1e-5:  # a qform cannot hold shear
        header.set_qform(volume.affine, _ALIGNED)
    if not all(math.isfinite(v) for name in ("srow_x", "srow_y", "srow_z") for v in header[name]):
        raise VolumeError(f"the affine does not fit float32, which NIfTI stores: {volume.affine.tolist()}")
