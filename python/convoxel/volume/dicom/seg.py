"""A label map as a DICOM segmentation of the series that it was made from (highdicom).

Labels may come in any orientation, as long as their voxels are the series' voxels: they are flipped and
swapped back, never resampled. What was written is decoded and compared before the file gets its name.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from ..core import Volume, VolumeError
from ..files import Source, write_atomically
from .headers import guarded, read_dataset
from .read import stack_of
from .series import files_of
from .stack import Stack

_SAME_PLACE = 0.01  # voxels; labels have often been NIfTI in between, in float32


def write_dicom_seg(
    labels: Volume,
    path: str | os.PathLike[str],
    scan: str | os.PathLike[str],
    *,
    names: Mapping[int, str] | None = None,
    series: str | None = None,
    description: str = "Segmentation",
) -> None:
    """Writes labels as a DICOM segmentation object (SEG), which viewers and archives show over the scan.

    One binary segment for each label, numbered from 1 in the order of the labels. Patient, study and frame
    of reference are the scan's; segments have the general codes "Tissue" and an automatic algorithm.

    Args:
        labels: (D, H, W) whole numbers, 0 is background, on the voxels of the scan in any orientation.
        path: ends in .dcm; its folder must exist; a file of that name is replaced.
        scan: the folder of the DICOM series that was labelled, or one file of it.
        names: what the labels are called, {1: "liver"}; "label 1" where nothing is said. A named label that
            has no voxel is left out, and so is not said to have been looked for.
        series: SeriesInstanceUID, where the folder has several.
        description: the new series' description, at most 64 characters.

    Raises:
        VolumeError: the labels lie on another grid than the scan, are empty, or what was written differs
            from them; the scan cannot be read.
        ValueError: the labels are no whole numbers from 0 to 65535, or a name is given to no label.
        ImportError: highdicom is not installed: pip install "convoxel[dicom]".

    Example:
        >>> ct = read("ct/")
        >>> write_dicom_seg(ct.like(labels), "liver.dcm", "ct/", names={1: "liver", 2: "tumour"})
    """
    path, folder = Path(path), Path(scan)
    if path.suffix.lower() != ".dcm":
        raise VolumeError(f"{path}: expected a name that ends in .dcm; give the segmentation one")
    highdicom = _need_highdicom()
    values = _label_values(labels, names or {})
    files = files_of(folder, series)
    found = stack_of(files, folder)
    planes = _on(found, labels, folder)
    sources = []
    for file in dict.fromkeys(s.path for s in found.slices):
        with Source(file) as source, guarded(file):
            dataset = read_dataset(source, "header")
            if not dataset.get("SliceThickness"):  # highdicom wants one; it may be empty
                dataset.SliceThickness = f"{found.spacing[0]:.6g}"
            sources.append(dataset)
    if len(sources) == 1:  # the frames of an enhanced file, in its own order
        planes = planes[np.argsort([s.frame for s in found.slices])]
    segment = np.zeros(values[-1] + 1, np.uint8 if len(values) < 256 else np.uint16)
    segment[values] = np.arange(1, len(values) + 1)
    numbers = segment[planes.astype(np.uint8) if planes.dtype.kind == "b" else planes]
    titles = [(names or {}).get(value, f"label {value}") for value in values]
    with guarded(folder, "highdicom cannot make a segmentation of it"):
        made = _segmentation(highdicom, sources, numbers, titles, description)

    def save(stream: IO[bytes]) -> None:
        made.save_as(stream, enforce_file_format=True)

    write_atomically(path, save, lambda aside: _check(aside, path, found, numbers, sources))


def _need_highdicom() -> Any:
    try:
        import highdicom
    except ImportError as error:
        raise ImportError('DICOM segmentations need highdicom: pip install "convoxel[dicom]"') from error
    return highdicom


def _label_values(labels: Volume, names: Mapping[int, str]) -> NDArray[Any]:
    if labels.is_multichannel or labels.dtype.kind not in "bui":
        raise ValueError(
            f"write_dicom_seg: labels must be whole numbers, (D, H, W), received {labels.dtype} "
            f"{labels.shape}; labels.like(labels.array.astype(np.uint8)) if they are whole"
        )
    low, high = int(labels.array.min()), int(labels.array.max())
    if low < 0 or high > 65535:
        raise ValueError(f"write_dicom_seg: labels run from {low} to {high}, expected 0 to 65535")
    wrong = [f"{key!r}: {name!r}" for key, name in names.items() if not _is_name(key, name)]
    if wrong:
        raise ValueError(
            f'write_dicom_seg: names must be {{label: name}} such as {{1: "liver"}}, labels from 1 on, names of '
            f"at most 64 characters; received {', '.join(wrong[:3])}"
        )
    if high == 0:
        raise VolumeError("write_dicom_seg: every label is 0; there is no segment to write")
    seen = np.zeros(high + 1, bool)
    for plane in labels.array:  # np.unique would sort a copy of the scan
        seen[plane.astype(np.uint16, copy=False)] = True
    seen[0] = False
    return np.flatnonzero(seen)


def _is_name(key: Any, name: Any) -> bool:
    return isinstance(key, int) and 0 < key <= 65535 and isinstance(name, str) and 0 < len(name.strip()) <= 64


def _on(found: Stack, labels: Volume, folder: Path) -> NDArray[Any]:
    """The labels on the scan's planes, (D, H, W)."""
    grid = Volume(np.broadcast_to(np.uint8(0), found.shape), found.spacing, found.affine)
    turned = labels.reorient(grid.orientation)
    if not turned.same_grid(grid, _SAME_PLACE):
        raise VolumeError(
            f"{folder}: the labels, {labels}, do not lie on the voxels of the scan, {grid}; bring them there by "
            'labels.resample_to(read(scan), mode="nearest")'
        )
    return turned.array


def _segmentation(
    highdicom: Any, sources: list[Any], numbers: NDArray[Any], titles: list[str], description: str
) -> Any:
    from pydicom.sr.codedict import codes

    from ... import __version__

    algorithm = highdicom.AlgorithmIdentificationSequence(
        name="convoxel", family=codes.DCM.ArtificialIntelligence, version=__version__
    )
    segments = [
        highdicom.seg.SegmentDescription(
            segment_number=number,
            segment_label=title,
            segmented_property_category=codes.SCT.Tissue,
            segmented_property_type=codes.SCT.Tissue,
            algorithm_type="AUTOMATIC",
            algorithm_identification=algorithm,
        )
        for number, title in enumerate(titles, start=1)
    ]
    return highdicom.seg.Segmentation(
        source_images=sources,
        pixel_array=numbers,
        segmentation_type="BINARY",
        segment_descriptions=segments,
        series_instance_uid=highdicom.UID(),
        series_number=1000,
        sop_instance_uid=highdicom.UID(),
        instance_number=1,
        manufacturer="convoxel",
        manufacturer_model_name="convoxel",
        software_versions=__version__,
        device_serial_number="0",
        series_description=description,
    )


def _check(aside: Path, path: Path, found: Stack, numbers: NDArray[Any], sources: list[Any]) -> None:
    """Every frame where its plane lies, every voxel as it was."""
    order = found.slices if len(sources) > 1 else sorted(found.slices, key=lambda s: s.frame)
    places = np.array([s.position for s in order])
    near = 0.1 * min(found.spacing)
    with Source(aside) as source, guarded(aside):
        written = read_dataset(source, "all")
        size = numbers[0].size
        back = np.zeros_like(numbers)
        shared = written.SharedFunctionalGroupsSequence[0]
        for index, group in enumerate(written.PerFrameFunctionalGroupsSequence):
            at = np.array([float(v) for v in group.PlanePositionSequence[0].ImagePositionPatient])
            apart = np.linalg.norm(places - at, axis=1)
            first, last = index * size, (index + 1) * size  # frames begin anywhere in a byte
            packed = np.frombuffer(written.PixelData, np.uint8)[first // 8 : -(-last // 8)]
            bits = np.unpackbits(packed, bitorder="little")[first % 8 :][:size]
            named = group if "SegmentIdentificationSequence" in group else shared
            number = named.SegmentIdentificationSequence[0].ReferencedSegmentNumber
            if apart.min() <= near:
                back[apart.argmin()].reshape(-1)[bits == 1] = number
        cosines = np.array([float(v) for v in shared.PlaneOrientationSequence[0].ImageOrientationPatient])
        between = np.array([float(v) for v in shared.PixelMeasuresSequence[0].PixelSpacing])
    wanted = np.concatenate([order[0].along_row, order[0].along_column])
    turned = np.abs(cosines - wanted).max() * max(numbers.shape[1:]) > 0.1
    if turned or not np.allclose(between, order[0].spacing, rtol=1e-3) or not np.array_equal(back, numbers):
        raise VolumeError(
            f"{path}: not written: read back, the segmentation differs from the labels; report it"
        )
