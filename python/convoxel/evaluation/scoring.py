"""Scores of one structure in one case, with a rule for what is missed or empty.

    missed (in the truth, nothing predicted), false (predicted, not in the truth):
        Dice, IoU, surface Dice, precision and recall 0; HD95 the diagonal of the scan's field of view
    in neither: no score (None), which summaries count and show
    volume error: always predicted - true in ml; in % of the truth, so None where there is no truth

So every failure has a finite score, the worst there is, and nothing gets better by being missed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..volume import Volume, VolumeError
from .surfaces import Surface, surface, surface_scores

Scores = dict[str, float | None]
# What each is where a structure is in neither and the other model predicted some: nothing was wrong.
PERFECT = {
    "dice": 1.0,
    "iou": 1.0,
    "hd95_mm": 0.0,
    "surface_dice": 1.0,
    "precision": 1.0,
    "recall": 1.0,
    "volume_error_ml": 0.0,
    "volume_error_percent": 0.0,
}
METRICS = (*PERFECT, "truth_ml", "predicted_ml")
LESIONS = ("lesions_found", "lesions_missed", "lesions_false")
_LARGEST = 100_000  # label value
_SAME_PLACE = 0.02  # voxels

Box = tuple[slice, ...]


class LabelMap:
    """Labels, integers (D, H, W), and the box around each value. `unknown`: where they have no say, (D, H, W)."""

    def __init__(
        self, labels: NDArray[Any], spacing: Sequence[float], unknown: NDArray[np.bool_] | None = None
    ) -> None:
        from scipy import ndimage

        if unknown is not None:
            labels = np.where(unknown, 0, labels)
        self.labels, self.spacing, self.shape = labels, tuple(spacing), labels.shape
        self.boxes: list[Box | None] = ndimage.find_objects(labels)
        self.values = tuple(i + 1 for i, box in enumerate(self.boxes) if box is not None)

    def cut(self, values: Iterable[int]) -> tuple[NDArray[np.bool_], tuple[int, ...]]:
        """The mask of some values in the box around them, and where the box starts."""
        values = [v for v in values if v in self.values]
        boxes = [box for v in values if (box := self.boxes[v - 1]) is not None]
        if not boxes:
            return np.zeros((0, 0, 0), bool), (0, 0, 0)
        low = [min(b[axis].start for b in boxes) for axis in range(3)]
        high = [max(b[axis].stop for b in boxes) for axis in range(3)]
        part = self.labels[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]
        mask = part == values[0] if len(values) == 1 else np.isin(part, values)
        return mask, tuple(low)


def whole_numbers(volume: Volume) -> NDArray[Any]:
    """The labels (D, H, W) as integers; VolumeError where they are something else."""
    array = volume.array
    if volume.is_multichannel:
        raise VolumeError(f"expected a label map (D, H, W), received shape {volume.shape}")
    if array.dtype == bool:
        return array.astype(np.uint8)
    if array.dtype.kind == "f" and not (np.isfinite(array) & (array == np.rint(array))).all():
        raise VolumeError("its values are not whole numbers; is it an image, or was it interpolated?")
    low, high = float(array.min()), float(array.max())
    if low < 0 or high > _LARGEST:
        raise VolumeError(f"labels must be from 0 to {_LARGEST}, received {low:g} to {high:g}")
    return array if array.dtype.kind in "iu" else array.astype(np.int32)


def scores(
    prediction: Volume,
    truth: Volume,
    label: int | Sequence[int],
    tolerance: float = 1.0,
    *,
    ignore: int | None = None,
    lesions: bool = False,
) -> Scores:
    """Scores of one structure, None where there is none (the head of this file has the rule).

    Args:
        prediction, truth: label maps (D, H, W) on one grid.
        label: its value, or the values that together make a region.
        tolerance: in mm, of surface_dice.
        ignore: value of the truth where nothing counts, neither voxels nor surfaces.
        lesions: also count connected pieces (26 neighbours): lesions_found are pieces of the truth that
            the prediction touches, lesions_missed those it does not; lesions_false are predicted pieces
            that touch no truth.

    Returns:
        A number or None for dice, iou, hd95_mm (mm), surface_dice, precision, recall, volume_error_ml
        and volume_error_percent (predicted - true), truth_ml, predicted_ml.

    Raises:
        VolumeError: not label maps, or not on one grid. ValueError: a tolerance below 0.
        ImportError: scipy is missing: pip install "convoxel[evaluate]".

    Example:
        >>> truth = Volume(np.pad(np.ones((8, 8, 8), np.uint8), 4), spacing=(2.0, 1.0, 1.0))
        >>> found = scores(truth.like(np.roll(truth.array, 1, axis=0)), truth, label=1)
        >>> found["dice"], found["hd95_mm"], found["volume_error_ml"]
        (0.875, 2.0, 0.0)
    """
    need_scipy()
    if not truth.same_grid(prediction, _SAME_PLACE):
        raise VolumeError(f"prediction and truth lie on different grids: {prediction}, {truth}")
    values = (label,) if isinstance(label, int) else tuple(label)
    labels = whole_numbers(truth)
    unknown = ignored(labels, ignore)
    ours = LabelMap(whole_numbers(prediction), truth.spacing, unknown)
    return score(ours, LabelMap(labels, truth.spacing, unknown), values, tolerance, unknown, lesions)


def empty(truth: Volume) -> Volume:
    """A prediction of nothing."""
    return truth.like(np.zeros(truth.grid_shape, np.uint8))


def ignored(truth: NDArray[Any], ignore: int | None) -> NDArray[np.bool_] | None:
    """Where nothing counts, (D, H, W); None: nowhere."""
    unknown = None if ignore is None else truth == ignore
    return unknown if unknown is not None and unknown.any() else None


def score(
    prediction: LabelMap,
    truth: LabelMap,
    values: Sequence[int],
    tolerance: float,
    unknown: NDArray[np.bool_] | None = None,
    lesions: bool = False,
) -> Scores:
    """As `scores`, of label maps that are known to lie on one grid."""
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"tolerance must be 0 mm or more, received {tolerance}")
    mine, true = prediction.cut(values), truth.cut(values)
    p, t = int(np.count_nonzero(mine[0])), int(np.count_nonzero(true[0]))
    if not p and not t:
        return absent(lesions)
    a, b = _shared(mine, true)
    both = int(np.count_nonzero(a & b))
    ml = math.prod(truth.spacing) / 1000
    found: Scores = {
        "dice": 2 * both / (p + t),
        "iou": both / (p + t - both),
        "hd95_mm": math.hypot(*(n * s for n, s in zip(truth.shape, truth.spacing, strict=True))),
        "surface_dice": 0.0,
        "precision": both / p if p else 0.0,
        "recall": both / t if t else 0.0,
        "volume_error_ml": (p - t) * ml,
        "volume_error_percent": 100 * (p - t) / t if t else None,
        "truth_ml": t * ml,
        "predicted_ml": p * ml,
    }
    if p and t:
        surfaces = [
            surface(mask, truth.spacing, start=start, grid=truth.shape) for mask, start in (mine, true)
        ]
        counted = None if unknown is None else (_known(surfaces[0], unknown), _known(surfaces[1], unknown))
        pair = surface_scores(surfaces[0], surfaces[1], tolerance, counted)
        found["hd95_mm"], found["surface_dice"] = pair or (None, None)
    return found | (_lesions(mine, true) if lesions else {})


def absent(lesions: bool = False) -> Scores:
    """What a structure has that is in neither: volumes of 0, no score."""
    none: Scores = dict.fromkeys(METRICS + (LESIONS if lesions else ()))
    return none | {"truth_ml": 0.0, "predicted_ml": 0.0}


def status(found: Scores) -> str:
    """ "scored", "missed", "false" or "absent"."""
    there = bool(found["truth_ml"]), bool(found["predicted_ml"])
    return {(1, 1): "scored", (1, 0): "missed", (0, 1): "false", (0, 0): "absent"}[there]


def need_scipy() -> None:
    """ImportError with the remedy where scipy is missing."""
    try:
        import scipy.ndimage  # noqa: F401
    except ImportError as error:
        raise ImportError('evaluation needs scipy: pip install "convoxel[evaluate]"') from error


Cut = tuple[NDArray[np.bool_], tuple[int, ...]]


def _shared(a: Cut, b: Cut) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Both masks in the box that they share; of size 0 where there is none."""
    low = [max(i, j) for i, j in zip(a[1], b[1], strict=True)]
    high = [min(i + n, j + m) for i, n, j, m in zip(a[1], a[0].shape, b[1], b[0].shape, strict=True)]
    if any(i >= j for i, j in zip(low, high, strict=True)):
        return np.zeros(0, bool), np.zeros(0, bool)
    first, second = (
        mask[tuple(slice(i - s, j - s) for i, j, s in zip(low, high, start, strict=True))]
        for mask, start in (a, b)
    )
    return first, second


def _known(of: Surface, unknown: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which elements have no ignored voxel among their eight."""
    known = np.ones(len(of.number), bool)
    last = np.array(unknown.shape) - 1
    for shift in np.ndindex(2, 2, 2):
        z, y, x = np.clip(of.corners - np.array(shift), 0, last).T
        known &= ~unknown[z, y, x]
    return known


def _lesions(mine: Cut, true: Cut) -> Scores:
    from scipy import ndimage

    predicted, p = ndimage.label(mine[0], np.ones((3, 3, 3)))
    pieces, t = ndimage.label(true[0], np.ones((3, 3, 3)))
    a, b = _shared((predicted, mine[1]), (pieces, true[1]))
    touching = (a > 0) & (b > 0)
    found, good = len(np.unique(b[touching])), len(np.unique(a[touching]))
    return {"lesions_found": found, "lesions_missed": t - found, "lesions_false": p - good}
