"""DICOM series and enhanced files with known voxels at known places, for the tests of convoxel.volume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

LPS = np.diag([-1.0, -1, 1, 1])
CT, ENHANCED_CT = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.2.1"
ROOT = "1.2.826.0.1.3680043.10.99."


def values(depth: int = 4, rows: int = 5, columns: int = 6) -> np.ndarray:
    """(D, H, W) int16, every value another."""
    return np.arange(depth * rows * columns, dtype=np.int16).reshape(depth, rows, columns)


def oblique(shear: float = 0.0) -> np.ndarray:
    """(4, 4), LPS: a turned grid of 0.8 x 0.7 x 2.5 mm (x, y, z); sheared by `shear` mm a slice along y."""
    axes = np.linalg.qr(np.random.default_rng(5).normal(size=(3, 3)))[0]
    axes[:, 2] = np.cross(axes[:, 0], axes[:, 1])
    affine = np.eye(4)
    affine[:3] = np.c_[axes * (0.8, 0.7, 2.5), (-80.5, 33.25, 4)]
    affine[:3, 2] += shear * axes[:, 1]
    return affine


def dataset(uid: str = "1", number: int = 1) -> Any:
    """Patient and study of a CT image, without place or pixels."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian

    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = CT
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = f"{ROOT}{uid}.{number}"
    ds.StudyInstanceUID, ds.SeriesInstanceUID = ROOT + "9", ROOT + uid
    ds.FrameOfReferenceUID = ROOT + "8"
    ds.PatientName, ds.PatientID, ds.PatientBirthDate, ds.PatientSex = "Phantom", "0", "", "O"
    ds.StudyDate, ds.StudyTime, ds.StudyID, ds.AccessionNumber = "20240101", "120000", "1", ""
    ds.ReferringPhysicianName = ""
    ds.Modality, ds.SeriesDescription, ds.SeriesNumber, ds.InstanceNumber = "CT", "thorax", 1, number
    ds.Manufacturer = "convoxel"
    return ds


def put_pixels(ds: Any, array: np.ndarray) -> None:
    """(H, W) or (frames, H, W) int16 or uint16."""
    ds.Rows, ds.Columns = array.shape[-2:]
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 16, 15
    ds.PixelRepresentation = int(array.dtype.kind == "i")
    ds.add_new("PixelData", "OW", array.tobytes())


def write_series(
    folder: Path, array: np.ndarray, lps: np.ndarray, uid: str = "1", **changes: Any
) -> list[Path]:
    """One file a slice, (D, H, W); `changes` are DICOM keywords, a function of the slice or a value.

    Names and instance numbers run against the position.
    """
    folder.mkdir(exist_ok=True)
    paths = []
    for z, plane in enumerate(array):
        ds = dataset(uid, len(array) - z)
        sizes = np.linalg.norm(lps[:3, :2], axis=0)
        ds.ImageOrientationPatient = [f"{v:.12f}" for v in (lps[:3, :2] / sizes).T.ravel()]
        ds.ImagePositionPatient = [f"{v:.9f}" for v in lps[:3] @ (0, 0, z, 1)]
        ds.PixelSpacing = [f"{v:.9f}" for v in sizes[::-1]]
        ds.SliceThickness = "2.5"
        ds.RescaleSlope, ds.RescaleIntercept = "1", "-1024"
        put_pixels(ds, plane)
        for name, value in changes.items():
            value = value(z) if callable(value) else value
            if value is None:
                delattr(ds, name)
            else:
                setattr(ds, name, value)
        paths.append(folder / f"{uid}-{len(array) - z:03d}.dcm")
        save(ds, paths[-1])
    return paths


def write_enhanced(path: Path, array: np.ndarray, lps: np.ndarray) -> Path:
    """One file of all slices, its frames in another order than they lie."""
    from pydicom.dataset import Dataset

    ds = dataset()
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = ENHANCED_CT
    order = np.random.default_rng(0).permutation(len(array))
    put_pixels(ds, array[order])
    ds.NumberOfFrames = len(array)
    sizes = np.linalg.norm(lps[:3, :2], axis=0)
    shared, measures, orientation = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing = [f"{v:.9f}" for v in sizes[::-1]]
    measures.SliceThickness = "2.5"
    orientation.ImageOrientationPatient = [f"{v:.12f}" for v in (lps[:3, :2] / sizes).T.ravel()]
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [orientation]
    ds.SharedFunctionalGroupsSequence = [shared]
    groups = []
    for z in order:
        group, place, transform = Dataset(), Dataset(), Dataset()
        place.ImagePositionPatient = [f"{v:.9f}" for v in lps[:3] @ (0, 0, z, 1)]
        transform.RescaleSlope, transform.RescaleIntercept, transform.RescaleType = "1", "-1024", "HU"
        group.PlanePositionSequence, group.PixelValueTransformationSequence = [place], [transform]
        groups.append(group)
    ds.PerFrameFunctionalGroupsSequence = groups
    save(ds, path)
    return path


def save(ds: Any, path: Path) -> None:
    ds.save_as(path, enforce_file_format=True)
