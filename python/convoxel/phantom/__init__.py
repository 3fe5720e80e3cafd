"""Scans that nobody had to lie down for: CT or MR of an upper abdomen whose truth is known to the voxel.

Liver, spleen, kidneys, vessels and lesions, of other sizes, places and contrasts in every patient, with partial
volume, bias field, noise, anisotropic voxels and changing fields of view. The same seed gives the same
patient, bit for bit on one machine. For tests, tutorials and load; no finding on a phantom says anything
about patients. User page: docs/phantom.md.
"""

from __future__ import annotations

from .anatomy import LABELS
from .dataset import Case, add_arguments, make_case, make_dataset, run_command
from .imaging import MODALITIES

__all__ = ["LABELS", "MODALITIES", "Case", "add_arguments", "make_case", "make_dataset", "run_command"]
