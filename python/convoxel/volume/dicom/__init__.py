"""DICOM series (a folder, or one file of it) to a Volume; segmentations back (`seg`)."""

from .read import read
from .seg import write_dicom_seg
from .series import is_dicom

__all__ = ["is_dicom", "read", "write_dicom_seg"]
