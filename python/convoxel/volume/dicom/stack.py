"""Slices to a grid: sorted by position along their normal, never by file name or instance number.

    place of voxel (x, y, z), LPS mm = first + x dx row + y dy column + z step

`step` is the way from one slice to the next. It is the normal's direction except with a tilted gantry,
where slices are shifted against each other and the affine is sheared.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..core import VolumeError
from ..files import warn
from ..layout import RAS_FROM_LPS
from .headers import Slice

_OFF = 0.1  # of a voxel: positions are decimal text, often of two digits


@dataclass(frozen=True)
class Stack:
    slices: list[Slice]  # from the first to the last z
    affine: NDArray[np.float64]  # (x, y, z) indices to RAS+ mm
    spacing: tuple[float, float, float]  # (z, y, x) mm

    @property
    def shape(self) -> tuple[int, int, int]:
        pixels = self.slices[0].pixels
        return len(self.slices), pixels.rows, pixels.columns


def stack(found: list[Slice], folder: Path) -> Stack:
    _check_alike(found, folder)
    first = found[0]
    normal = np.cross(first.along_row, first.along_column)
    heights = np.array([s.position @ normal for s in found])
    order = np.argsort(heights, kind="stable")
    found, heights = [found[i] for i in order], heights[order]
    first = found[0]
    if len(found) == 1:
        step = normal * first.thickness
    else:
        _check_gaps(found, heights, folder)
        step = _step(found, heights, normal, folder)
    dy, dx = first.spacing
    lps = np.eye(4)
    lps[:3] = np.stack([first.along_row * dx, first.along_column * dy, step, first.position], axis=1)
    return Stack(found, RAS_FROM_LPS @ lps + 0.0, (float(np.linalg.norm(step)), dy, dx))


def _check_alike(found: list[Slice], folder: Path) -> None:
    first = found[0]
    if len({s.pixels for s in found}) > 1:
        sizes = Counter((s.pixels.rows, s.pixels.columns) for s in found)
        words = (
            "bits" if len(sizes) == 1 else " and ".join(f"{n} of {r} x {c}" for (r, c), n in sizes.items())
        )
        raise _error(folder, f"its images differ ({words}); they are no one scan", _SPLIT)
    reach = max(first.pixels.rows, first.pixels.columns)
    ways: Counter[str] = Counter()
    for s in found:
        turned = max(
            np.abs(s.along_row - first.along_row).max(), np.abs(s.along_column - first.along_column).max()
        )
        ways[_way(s) if turned * reach > _OFF else _way(first)] += 1
        if not np.allclose(s.spacing, first.spacing, rtol=1e-3):
            raise _error(folder, f"pixel spacings {first.spacing} and {s.spacing} mm in one series", _SPLIT)
    if len(ways) > 1:
        words = ", ".join(f"{n} along {way}" for way, n in ways.most_common(4))
        raise _error(folder, f"its images are of different orientation ({words}): scouts among them?", _SPLIT)


_SPLIT = "put the images of one scan into a folder of their own"


def _way(s: Slice) -> str:
    return str(np.round(np.cross(s.along_row, s.along_column), 3).tolist())


def _check_gaps(found: list[Slice], heights: NDArray[np.float64], folder: Path) -> None:
    gaps = np.diff(heights)
    step = float(np.median(gaps))
    close = np.flatnonzero(gaps <= max(1e-4, _OFF * step))
    if close.size:
        raise _twice(found, close, folder)
    wide = np.flatnonzero(gaps > 1.5 * step)
    if wide.size:
        missing = sum(round(gaps[i] / step) - 1 for i in wide)
        at = [round(float(heights[i]), 2) for i in wide[:4]]
        whole = np.abs(gaps[wide] / step - np.round(gaps[wide] / step)).max() < _OFF
        what = f"missing slices ({missing})" if whole else "the distance between slices changes"
        raise _error(
            folder,
            f"{what}: steps of {step:.4g} mm, but after {at} mm {gaps[wide].max():.4g} mm",
            "copy the series again, whole",
        )
    z = np.arange(len(heights))
    if np.abs(heights - np.polyval(np.polyfit(z, heights, 1), z)).max() > _OFF * step:
        raise _error(
            folder,
            f"its slices are unevenly spaced, from {gaps.min():.4g} to {gaps.max():.4g} mm",
            "resample it where slices may lie anywhere (3D Slicer: Resample), or choose an even part",
        )


def _twice(found: list[Slice], close: NDArray[np.intp], folder: Path) -> VolumeError:
    a, b = found[close[0]], found[close[0] + 1]
    if a.apart["SOPInstanceUID"] == b.apart["SOPInstanceUID"]:
        return _error(folder, f"{a.path.name} and {b.path.name} are the same image", "remove one of them")
    differ = [
        f"{name} {a.apart.get(name)} and {b.apart.get(name)}"
        for name in {**a.apart, **b.apart}
        if name != "SOPInstanceUID" and a.apart.get(name) != b.apart.get(name)
    ]
    places = len(found) - len(close)
    return _error(
        folder,
        f"{len(found)} images at {places} places: several times, echoes or contrasts? {a.path.name} and "
        f"{b.path.name} differ in {', '.join(differ[:3]) or 'nothing that is known'}",
        _SPLIT,
    )


def _step(
    found: list[Slice], heights: NDArray[np.float64], normal: NDArray[np.float64], folder: Path
) -> NDArray[np.float64]:
    positions = np.array([s.position for s in found])
    step = (positions[-1] - positions[0]) / (len(found) - 1)
    pixel = min(found[0].spacing)
    straight = positions[0] + np.outer(
        (heights - heights[0]) / (heights[-1] - heights[0]), positions[-1] - positions[0]
    )
    if np.linalg.norm(positions - straight, axis=1).max() > _OFF * pixel:
        raise _error(
            folder, "its slices are shifted sideways against each other, each by another way", _SPLIT
        )
    upright = normal * (normal @ step)
    if np.linalg.norm(step - upright) * (len(found) - 1) <= _OFF * pixel:
        return upright
    angle = math.degrees(math.acos(min(1.0, float(normal @ step / np.linalg.norm(step)))))
    if angle > 60:
        raise _error(folder, f"its slices run {angle:.0f} degrees off their normal", _SPLIT)
    warn(
        f"{folder}: the gantry is tilted by {angle:.2f} degrees: slices are shifted against each other and the "
        "affine is sheared; for a network, resample_to a Volume with axes at right angles"
    )
    return step


def _error(folder: Path, reason: str, remedy: str) -> VolumeError:
    return VolumeError(f"{folder}: {reason}; {remedy}")
