"""Scans: an array together with its place in the patient, read from and written to files.

Arrays are (z, y, x), spacings (z, y, x) in mm, affines map (x, y, z) voxel indices to RAS+ mm; the
user page is docs/volume.md. NIfTI needs nibabel (`pip install "convoxel[io]"`),
DICOM pydicom and highdicom (`"convoxel[dicom]"`).
"""

from .core import Volume, VolumeError
from .dicom import write_dicom_seg
from .formats import read, write

__all__ = ["Volume", "VolumeError", "read", "write", "write_dicom_seg"]
