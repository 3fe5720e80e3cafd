"""The grid that a network sees scans on, and their normalisation, from the fingerprint; each with its reasons.

Source of the rules: nnunetv2 2.8.1, experiment_planning/experiment_planners/default_experiment_planner.py. One is our
own: where scans are single slices, the axis across them comes first whatever its spacing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..importers.nnunet_recipe import Resampling
from .cases import Dataset
from .fingerprint import Fingerprint, Numbers
from .settings import Settings

IMAGE = Resampling("resample_data_or_seg_to_shape", 3, 0, None, "linear", 3.0)  # nnU-Net's, cubic
LOGITS = Resampling("resample_data_or_seg_to_shape", 1, 0, None, "linear", 3.0)

_ANISOTROPIC = 3.0  # spacing over the others', and voxels of the others' over it
_FINEST = 10  # percentile of the spacings that is taken on such an axis
_MASKED = 3 / 4  # of the scan, that the box which is not zero keeps
_LARGEST = 1 << 31  # voxels of a median image: a wrong spacing
_SCHEMES = {  # nnU-Net's, by the channel's name in lower case; others ZScoreNormalization
    "ct": "CTNormalization",
    "nonorm": "NoNormalization",
    "zscore": "ZScoreNormalization",
    "rescale_to_0_1": "RescaleTo01Normalization",
    "rgb_to_0_1": "RGBTo01Normalization",
}


@dataclass(frozen=True)
class Grid:
    """Axes are the network's: the scan's (z, y, x), ordered by `transpose`."""

    transpose: tuple[int, int, int]
    spacing: Numbers  # mm
    median: Numbers  # voxels of the median scan on this grid
    reasons: tuple[str, ...] = ()

    def turned(self, values: Sequence[int]) -> tuple[int, ...]:
        """Values for (z, y, x) of the scan, or (y, x) of the slices that the network sees, as the network's axes."""
        return tuple(values) if len(values) == 2 else tuple(values[axis] for axis in self.transpose)

    def back(self, values: Sequence[int]) -> tuple[int, ...]:
        """The reverse of `turned`."""
        if len(values) == 2:
            return tuple(values)
        return tuple(values[self.transpose.index(axis)] for axis in range(3))


def plan_grid(dataset: Dataset, found: Fingerprint, settings: Settings) -> Grid:
    """ValueError where nothing is left of the scans on the grid asked for, or single slices meet a 3-D network."""
    spacing, why = _spacing(found)
    transpose = _transpose(found, spacing)
    if settings.spacing is not None:
        given = settings.spacing
        spacing = (
            (given[0], given[1], given[2]) if settings.rank == 3 else _in_plane(spacing, transpose, given)
        )
        transpose = _transpose(found, spacing) if settings.rank == 3 else transpose
        why = "as the settings say"
    shapes = [
        IMAGE.grid(shape, old, spacing) for shape, old in zip(found.shapes, found.spacings, strict=True)
    ]
    median = np.median(shapes, axis=0).tolist()
    if settings.rank == 3 and 1 in np.median(found.shapes, axis=0):
        raise ValueError(
            f"{dataset.folder}: the scans are single slices ({by(np.median(found.shapes, axis=0).tolist())} voxels), "
            "and rank is 3; for a network of slices set rank: 2"
        )
    _check_spacing(found, transpose[3 - settings.rank :], spacing, median)
    first, second, third = transpose
    grid = Grid(
        transpose,
        (spacing[first], spacing[second], spacing[third]),
        (float(median[first]), float(median[second]), float(median[third])),
    )
    return replace(grid, reasons=_reasons(found, settings, grid, why))


def _spacing(found: Fingerprint) -> tuple[Numbers, str]:
    """(z, y, x) in mm, and why."""
    spacings, shapes = np.array(found.spacings), np.median(found.shapes, axis=0)
    target = np.median(spacings, axis=0)
    coarse = int(np.argmax(target))
    others = [axis for axis in range(3) if axis != coarse]
    why = f"the median of {_scans(found)}"
    widest = float(target[others].max())
    if target[coarse] > _ANISOTROPIC * widest and shapes[coarse] * _ANISOTROPIC < shapes[others].min():
        fine = float(np.percentile(spacings[:, coarse], _FINEST))
        why += (
            f"; along {'zyx'[coarse]}, where scans are coarse ({target[coarse]:.3g} mm) and few slices make them, that "
            "of the finest tenth, so that those lose nothing"
        )
        target[coarse] = fine if fine >= widest else widest + 1e-5
    z, y, x = target.tolist()
    return (z, y, x), why


def _transpose(found: Fingerprint, spacing: Sequence[float]) -> tuple[int, int, int]:
    """The coarsest axis first, the others in their order."""
    shapes = np.median(found.shapes, axis=0)
    single = [axis for axis in range(3) if shapes[axis] == 1]
    first = single[0] if single else int(np.argmax(spacing))
    second, third = (axis for axis in range(3) if axis != first)
    return first, second, third


def _in_plane(spacing: Numbers, transpose: Sequence[int], given: Sequence[float]) -> Numbers:
    changed = list(spacing)
    for axis, value in zip(transpose[1:], given, strict=True):
        changed[axis] = value
    z, y, x = changed
    return z, y, x


def _check_spacing(
    found: Fingerprint, used: Sequence[int], spacing: Sequence[float], median: Sequence[float]
) -> None:
    """Whether scans have voxels, and not too many, along the axes that the network sees."""
    for axis in used:
        if median[axis] < 2:
            extent = float(
                np.median([n[axis] * s[axis] for n, s in zip(found.shapes, found.spacings, strict=True)])
            )
            raise ValueError(
                f"spacing: {spacing[axis]:g} mm along {'zyx'[axis]} leaves {median[axis]:g} voxel of scans of "
                f"{extent:.0f} mm; choose a smaller one, or none: then it is planned from the scans"
            )
    if math.prod(median) > _LARGEST:
        raise ValueError(
            f"spacing: at {by(spacing)} mm the median scan would have {by(median)} voxels, beyond what can be "
            "trained on; choose a larger one, or look at the scans' own spacings (convoxel doctor)"
        )


def _reasons(found: Fingerprint, settings: Settings, grid: Grid, why: str) -> tuple[str, ...]:
    spacings = np.array(found.spacings)
    low, high = spacings.min(axis=0), spacings.max(axis=0)
    ranges = ", ".join(f"{a} {i:.3g} to {j:.3g}" for a, i, j in zip("zyx", low, high, strict=True))
    names = ["zyx"[axis] for axis in grid.transpose]
    lines = [
        f"Spacing {by(grid.spacing[3 - settings.rank :])} mm ({', '.join(names[3 - settings.rank :])}): {why}. "
        f"Scans have {ranges} mm. On this grid the median scan has {by(grid.median)} voxels."
    ]
    if grid.transpose != (0, 1, 2):
        lines.append(
            f"Axes in the order {', '.join(names)}: the network has the axis of the largest spacing first; sizes below "
            "are in that order."
        )
    return tuple(lines)


def plan_normalisation(
    dataset: Dataset, found: Fingerprint
) -> tuple[tuple[str, ...], tuple[bool, ...], tuple[str, ...]]:
    """Scheme, whether only what is not zero counts, and the reason, of each channel."""
    schemes = tuple(_SCHEMES.get(name.casefold(), "ZScoreNormalization") for name in dataset.channels)
    kept = float(np.median(found.kept))
    masked = tuple(scheme == "ZScoreNormalization" and kept < _MASKED for scheme in schemes)
    reasons = []
    for name, scheme, mask, numbers in zip(dataset.channels, schemes, masked, found.intensities, strict=True):
        if scheme == "CTNormalization":
            text = (
                f"clipped to {numbers.percentile_00_5:.4g} to {numbers.percentile_99_5:.4g} (0.5 and 99.5 percent of "
                f"the labelled voxels), minus their mean {numbers.mean:.4g}, by their deviation {numbers.std:.4g}"
            )
        elif scheme == "ZScoreNormalization":
            text = "minus the mean of each scan, by its deviation" + (
                f", within what is not zero: the box around that is {kept:.0%} of the median scan"
                if mask
                else ""
            )
        else:
            text = f"{scheme}, as its name in dataset.json asks for"
        reasons.append(f"Intensities of {name}: {text}.")
    return schemes, masked, tuple(reasons)


def _scans(found: Fingerprint) -> str:
    return f"{len(found.names)} scan{'s' * (len(found.names) > 1)}"


def by(values: Sequence[float]) -> str:
    """Sizes in words: 64 x 112 x 112."""
    return " x ".join(f"{value:.4g}" if value < 1000 else f"{value:.0f}" for value in values)
