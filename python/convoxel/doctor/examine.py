"""A path, looked over: a dataset's folder, a folder of scans, or one scan."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path

from ..progress import bar
from ..volume.dicom import is_dicom
from .cases import examine_case
from .catalogue import Finding, finding, in_order
from .cohort import examine_cohort
from .dataset import ENDINGS, is_dataset, open_dataset
from .scans import examine_image, load

_LOOKED_AT = 20  # files of a folder, to see whether it holds DICOM


@dataclass(frozen=True)
class Examination:
    """What was looked at, in words; how many files of scans were read; what was found, errors first."""

    subject: str
    files: int
    findings: list[Finding]


def examine(
    path: str | os.PathLike[str], *, progress: bool = False, max_bytes: int | None = None
) -> list[Finding]:
    """What is wrong or doubtful with a scan, a folder of scans, or a dataset; nothing is changed.

    Files and formats are those of `convoxel.volume.read`; a folder of DICOM slices is one scan. A folder with a
    dataset.json or an imagesTr is taken as a dataset of nnU-Net (version 2) or, where
    dataset.json lists its training files, of the Medical Segmentation Decathlon. Every file is read once, one
    at a time (an image beside its label).

    Args:
        path: a file or folder.
        progress: show a bar (needs tqdm).
        max_bytes: most memory for the voxels of one file; None: half of the machine's.

    Returns:
        Findings, errors first; an empty list where all is well. docs/doctor.md explains every name.

    Raises:
        FileNotFoundError: there is no such path.
        ImportError: nibabel (or for the bar tqdm) is missing: pip install "convoxel[io]".

    Example:
        >>> for f in examine("Dataset001_Phantom"):
        ...     print(f)
        error: label-place: .../labelsTr/phantom_003.nii.gz: up to 4.2 mm (1.6 voxels) from ...
    """
    return look_over(path, progress=progress, max_bytes=max_bytes).findings


def look_over(
    path: str | os.PathLike[str], *, progress: bool = False, max_bytes: int | None = None
) -> Examination:
    """`examine`, with what was looked at and how many files."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    if path.is_dir() and is_dataset(path):
        return _dataset(path, progress, max_bytes)
    files = _scans(path) if path.is_dir() else [path]
    if not files:
        words = f"no dataset.json, no imagesTr, no DICOM, and no file that ends in {', '.join(ENDINGS)}"
        return Examination(f"{path}: a folder", 0, [finding("no-cases", path, words)])
    found: list[Finding] = []
    for file in bar(files, "doctor", leave=False) if progress else files:
        found += _scan(file, max_bytes)
    subject = f"{path}: {len(files)} scans" if path.is_dir() else f"{path}: one scan"
    return Examination(subject, len(files), in_order(found))


def _scans(folder: Path) -> list[Path]:
    """Files by their names, and the folders that hold DICOM, in a folder and all below it."""
    found: list[Path] = []
    for place, _, names in os.walk(folder):
        paths = [Path(place, name) for name in sorted(names)]
        found += [path for path in paths if path.name.endswith(ENDINGS)]
        others = [path for path in paths if not path.name.endswith(ENDINGS) and path.name != "DICOMDIR"]
        if any(is_dicom(path) for path in others[:_LOOKED_AT]):
            found.append(Path(place))
    return sorted(found)


def _scan(path: Path, max_bytes: int | None) -> list[Finding]:
    volume, found = load(path, max_bytes)
    if volume is None:
        return found
    if volume.is_multichannel:
        found.append(finding("several-volumes", path, f"its shape is {volume.shape} (C, D, H, W)"))
    return found + examine_image(volume, path, None)[1]


def _dataset(folder: Path, progress: bool, max_bytes: int | None) -> Examination:
    dataset, found = open_dataset(folder)
    facts = []
    for case in bar(dataset.cases, "doctor", leave=False) if progress else dataset.cases:
        fact, more = examine_case(case, dataset, max_bytes)
        facts.append(fact)
        found += more
    found += examine_cohort(dataset, facts)
    return Examination(str(dataset), sum(fact.files for fact in facts), in_order(found))
