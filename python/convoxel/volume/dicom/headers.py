"""DICOM files to images: one record per slice, with every value that matters read and checked.

pydicom reads the files and turns values into Python's only when they are looked at, so that a damaged
file may raise anything anywhere: all of that happens here, inside `guarded`. What files say of lengths is
held against the file, and deflated files, which can grow without bound, are refused.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..core import VolumeError
from ..files import Source

_LONGEST = 256 << 20  # bytes of one header element; the frames of an enhanced file have some kilobytes each
NO_MARK = "no DICOM file: no mark DICM at byte 128"
_DEFLATED = "1.2.840.10008.1.2.1.99"
_NO_SCANS = {
    "1.2.840.10008.5.1.4.1.1.66.4": "a segmentation",
    "1.2.840.10008.5.1.4.1.1.66.7": "a segmentation",
    "1.2.840.10008.5.1.4.1.1.481.2": "a dose",
}
_TAGS = (
    *("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "SeriesDescription", "SeriesNumber", "Modality"),
    *("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated"),
    *("BitsStored", "HighBit", "PixelRepresentation", "PixelSpacing", "ImagePositionPatient"),
    *("ImageOrientationPatient", "SliceThickness", "SpacingBetweenSlices", "FrameOfReferenceUID"),
    *("RescaleSlope", "RescaleIntercept", "ModalityLUTSequence", "SharedFunctionalGroupsSequence"),
    *("PerFrameFunctionalGroupsSequence", "SpecificCharacterSet"),
)
APART = (  # what tells two images of one place apart
    *("AcquisitionNumber", "TemporalPositionIdentifier", "EchoNumbers", "EchoTime", "TriggerTime"),
    *("DiffusionBValue", "ImageType", "AcquisitionTime", "ContentTime"),
)


@dataclass(frozen=True)
class Pixels:
    """How the values of a slice are stored; the same for every slice of a scan."""

    rows: int
    columns: int
    allocated: int
    stored: int
    high: int
    signed: bool

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(f"{'i' if self.signed else 'u'}{self.allocated // 8}")


@dataclass(frozen=True)
class Slice:
    """One image of a file, and where it lies (LPS, mm)."""

    path: Path
    frame: int
    pixels: Pixels
    position: NDArray[np.float64]  # (3,) centre of the first voxel
    along_row: NDArray[np.float64]  # (3,) unit vector: the column index grows to there
    along_column: NDArray[np.float64]
    spacing: tuple[float, float]  # between rows, between columns
    thickness: float
    slope: float
    intercept: float
    apart: dict[str, str]


@dataclass
class File:
    """What a file says of itself; its slices are read when its series is chosen."""

    path: Path
    dataset: Any
    series: str
    title: str
    place: str  # frame of reference
    syntax: Any
    kind: str = field(default="an image")

    @property
    def is_scan(self) -> bool:
        return self.kind == "an image"


@contextmanager
def guarded(path: Path, what: str = "damaged DICOM") -> Iterator[None]:
    """Whatever pydicom or a decoder raises over a file is that file's fault."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of values that are read and checked here
            yield
    except (VolumeError, ImportError):
        raise
    except MemoryError as error:
        raise VolumeError(f"{path}: no memory to read it; use a larger machine") from error
    except Exception as error:
        kind = "" if isinstance(error, (ValueError, RuntimeError)) else f"{type(error).__name__}: "
        reason = " ".join(f"{kind}{error}".split())[:200]
        raise VolumeError(f"{path}: {what} ({reason}); copy or export it again") from error


def need_pydicom() -> Any:
    try:
        import pydicom
    except ImportError as error:
        raise ImportError('DICOM files need pydicom: pip install "convoxel[dicom]"') from error
    return pydicom


def has_mark(path: Path) -> bool:
    """Whether this is a DICOM file, by its mark at byte 128."""
    try:
        with path.open("rb") as stream:
            return stream.read(132)[128:] == b"DICM"
    except (OSError, ValueError):
        return False


class _Bounded:
    """A file for pydicom: lengths out of headers are no reason to take memory."""

    def __init__(self, source: Source, longest: int) -> None:
        self._stream, self._size, self._longest = source.raw, source.file_size, longest
        self.name = str(source.path)

    def read(self, count: int = -1) -> bytes:
        left = max(0, self._size - self._stream.tell())
        count = left if count < 0 else min(count, left)
        if count > self._longest:
            raise ValueError(f"an element of {count} bytes in the header")
        return self._stream.read(count)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        return self._stream.tell()

    def close(self) -> None:
        self._stream.close()


def read_dataset(source: Source, part: Literal["tags", "header", "all"]) -> Any:
    """The file's dataset: what `_TAGS` and `APART` name, everything before the pixels, or everything."""
    pydicom = need_pydicom()
    from pydicom.filereader import read_dataset as read_group
    from pydicom.filereader import read_preamble

    stream: Any = _Bounded(source, source.file_size if part == "all" else _LONGEST)
    read_preamble(stream, False)
    meta = read_group(stream, False, True, stop_when=lambda tag, vr, length: tag >> 16 != 2)
    if str(meta.get("TransferSyntaxUID", "")) == _DEFLATED:
        raise source.error("its transfer syntax is deflated", "save it uncompressed (dcmtk: dcmconv +te)")
    stream.seek(0)
    tags = [*_TAGS, *APART] if part == "tags" else None
    return pydicom.dcmread(stream, stop_before_pixels=part != "all", specific_tags=tags)


def read_header(path: Path) -> File:
    with Source(path) as source, guarded(path):
        if not has_mark(path):
            raise source.error(NO_MARK, "rewrite it (dcmtk: dcmconv)")
        dataset = read_dataset(source, "tags")
        sop_class, uid = dataset.get("SOPClassUID"), str(dataset.get("SeriesInstanceUID", "") or "")
        kind = _NO_SCANS.get(str(sop_class), "an image")
        if dataset.get("Rows") is None or dataset.get("Columns") is None:
            kind = "no image"
        whole = sop_class and (kind != "no image" or "Image" not in getattr(sop_class, "name", ""))
        if not whole or not uid:
            raise source.error(
                "its header is incomplete", "it is cut off or damaged: copy or export it again"
            )
        words = [str(dataset.get("Modality", "") or "?"), str(dataset.get("SeriesDescription", "") or "")]
        return File(
            path,
            dataset,
            uid,
            " ".join(filter(None, (" ".join(word.split())[:60] for word in words))),
            str(dataset.get("FrameOfReferenceUID", "") or ""),
            dataset.file_meta.get("TransferSyntaxUID"),
            kind,
        )


def slices(file: File) -> list[Slice]:
    """The slices of a file that is an image: one, or the frames of an enhanced one."""
    with guarded(file.path):
        dataset = file.dataset
        pixels = _pixels(dataset, file.path)
        if "ModalityLUTSequence" in dataset:
            raise _error(file.path, "its values go through a table", "convert it with a viewer")
        if "MOSAIC" in (dataset.get("ImageType") or ()):
            raise _error(file.path, "its slices are tiles of one picture (a mosaic)", "convert it (dcm2niix)")
        frames = _whole(dataset, "NumberOfFrames", file.path, 1, 1 << 20, default=1)
        groups = dataset.get("PerFrameFunctionalGroupsSequence")
        if groups is None:
            if frames != 1:
                raise _error(
                    file.path,
                    f"its {frames} frames have no place each (ultrasound, angiography?)",
                    "only enhanced CT, MR and PET files may hold several",
                )
            found = [_slice(file.path, 0, pixels, [dataset], dataset)]
        elif len(groups) != frames:
            raise _error(
                file.path, f"it has {frames} frames and {len(groups)} descriptions", "export it again"
            )
        else:
            shared = list(dataset.get("SharedFunctionalGroupsSequence") or [])
            found = [
                _slice(file.path, frame, pixels, [group, *shared, dataset], dataset)
                for frame, group in enumerate(groups)
            ]
        expected = frames * pixels.rows * pixels.columns * pixels.allocated // 8
        size = os.stat(file.path).st_size
        if not getattr(file.syntax, "is_compressed", False) and expected > size:
            raise _error(
                file.path,
                f"the header announces {expected} bytes, the file of {size} bytes cannot hold them",
                "it is cut off or its header damaged; copy or export it again",
            )
        return found


def _error(path: Path, reason: str, remedy: str) -> VolumeError:
    return VolumeError(f"{path}: {reason}; {remedy}")


def _pixels(dataset: Any, path: Path) -> Pixels:
    samples = _whole(dataset, "SamplesPerPixel", path, 1, 4, default=1)
    colour = str(dataset.get("PhotometricInterpretation", "MONOCHROME2"))
    if samples != 1 or colour not in ("MONOCHROME1", "MONOCHROME2"):
        raise _error(path, f"its pixels are {colour[:40]}, {samples} samples each", "expected grey values")
    allocated = _whole(dataset, "BitsAllocated", path, 1, 64)
    if allocated not in (8, 16, 32):
        raise _error(path, f"its pixels have {allocated} bits", "expected 8, 16 or 32; export it again")
    stored = _whole(dataset, "BitsStored", path, 1, allocated, default=allocated)
    high = _whole(dataset, "HighBit", path, stored - 1, allocated - 1, default=stored - 1)
    signed = _whole(dataset, "PixelRepresentation", path, 0, 1)
    rows, columns = (_whole(dataset, name, path, 1, 65535) for name in ("Rows", "Columns"))
    return Pixels(rows, columns, allocated, stored, high, bool(signed))


def _whole(dataset: Any, name: str, path: Path, low: int, high: int, default: int | None = None) -> int:
    value = dataset.get(name)
    value = default if value is None else value
    if not isinstance(value, (int, float)) or int(value) != value or not low <= value <= high:
        raise _error(
            path, f"{name} is {str(value)[:40]}, expected {low} to {high}", "it is damaged: export it again"
        )
    return int(value)


def _slice(path: Path, frame: int, pixels: Pixels, places: list[Any], dataset: Any) -> Slice:
    """`places`: where to look for a value, first the frame's own description."""
    row, column = _axes(_find(places, "PlaneOrientationSequence", "ImageOrientationPatient"), path)
    position = _floats(
        _find(places, "PlanePositionSequence", "ImagePositionPatient"), 3, "ImagePositionPatient", path
    )
    between = _floats(_find(places, "PixelMeasuresSequence", "PixelSpacing"), 2, "PixelSpacing", path)
    if min(between) < 1e-7 or max(between) > 1e6:
        raise _error(path, f"PixelSpacing is {between.tolist()} mm", "expected positive numbers")
    return Slice(
        path,
        frame,
        pixels,
        position,
        row,
        column,
        (float(between[0]), float(between[1])),
        _thickness(places),
        *_rescale(places, path),
        {name: str(dataset.get(name)) for name in APART if dataset.get(name) is not None}
        | {"SOPInstanceUID": f"{dataset.get('SOPInstanceUID')} frame {frame}"},
    )


def _find(places: list[Any], sequence: str, name: str) -> Any:
    for place in places:
        inner = place.get(sequence)
        for item in [*(inner or []), place]:
            if (value := item.get(name)) is not None:
                return value
    return None


def _floats(value: Any, count: int, name: str, path: Path) -> NDArray[np.float64]:
    if value is None:
        raise _error(
            path,
            f"it has no {name}, so its voxels have no place in the patient",
            "this is no slice of a scan, or it was anonymised too far: export it again",
        )
    found = np.array([float(v) for v in value] if hasattr(value, "__iter__") else [], float)
    if found.shape != (count,) or not np.isfinite(found).all() or np.abs(found).max() > 1e7:
        raise _error(path, f"{name} is {str(value)[:80]}, expected {count} finite numbers", "export it again")
    return found


def _axes(value: Any, path: Path) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    cosines = _floats(value, 6, "ImageOrientationPatient", path)
    row, column = cosines[:3], cosines[3:]
    lengths = np.linalg.norm(row), np.linalg.norm(column)
    # a few scanners write two or three digits
    if max(abs(n - 1) for n in lengths) > 0.01 or abs(row @ column) > 0.01:
        raise _error(
            path, f"ImageOrientationPatient {cosines.tolist()} is no right angle", "export the file again"
        )
    return row / lengths[0], column / lengths[1]


def _thickness(places: list[Any]) -> float:
    """For a scan of one slice; 1 mm where nothing is said, as for a plane of any format."""
    for name in ("SpacingBetweenSlices", "SliceThickness"):
        value = _find(places, "PixelMeasuresSequence", name)
        if isinstance(value, (int, float)) and 1e-7 < value < 1e6:
            return float(value)
    return 1.0


def _rescale(places: list[Any], path: Path) -> tuple[float, float]:
    values = []
    for name, default in (("RescaleSlope", 1.0), ("RescaleIntercept", 0.0)):
        value = _find(places, "PixelValueTransformationSequence", name)
        number = default if value is None else float(value)
        if not math.isfinite(number) or (name == "RescaleSlope" and number == 0):
            raise _error(path, f"{name} is {number}", "the values cannot be known: export it again")
        values.append(number)
    return values[0], values[1]
