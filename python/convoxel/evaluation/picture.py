"""The worst cases as one picture: where prediction and truth differ most, drawn over the image."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..doctor.dataset import ENDINGS
from ..volume import Volume, read
from .cases import Case
from .result import Result

TRUTH, PREDICTION, IGNORED = "#00c8ff", "#ff8c1a", "#808080"
AnyPath = str | os.PathLike[str]
_COLUMNS = 3
_MARGIN = 25.0  # mm around the structure
_SMALLEST = 60.0  # mm shown


def worst_cases(result: Result, path: AnyPath, number: int = 6, images: AnyPath | None = None) -> int:
    """Writes the picture, and returns how many cases are in it.

    Of each the slice with most wrong voxels, across the axis of the longest voxels: contours of truth and prediction
    over the image (CASE.nii.gz or channel 0, CASE_0000.nii.gz, in the folder `images`), else over the masks.

    Raises:
        ImportError: matplotlib is missing. FileNotFoundError, VolumeError: an image is, or is no such image.
    """
    chosen = result.worst(number)
    if not chosen:
        return 0
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('the picture needs matplotlib: pip install "convoxel[evaluate]"') from error
    rows = -(-len(chosen) // _COLUMNS)
    columns = min(len(chosen), _COLUMNS)
    figure = Figure(figsize=(4.4 * columns, 4.9 * rows + 0.8), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax in axes:
        ax.set_axis_off()
    for ax, (case, name) in zip(axes, chosen, strict=False):
        _draw(ax, result, case, name, None if images is None else Path(images))
    _legend(figure, result.ignore is not None)
    figure.savefig(path, dpi=100)
    return len(chosen)


def _draw(ax: Any, result: Result, case: Case, name: str, images: Path | None) -> None:
    truth = read(case.truth)
    values = result.values[name]
    true = np.isin(truth.array, values)
    unknown = truth.array == result.ignore if result.ignore is not None else np.zeros(true.shape, bool)
    predicted = np.zeros_like(true)
    if case.prediction is not None:
        predicted = np.isin(read(case.prediction).array, values) & ~unknown
    axis = int(np.argmax(truth.spacing))
    others = tuple(a for a in range(3) if a != axis)
    index = int(np.argmax((true ^ predicted).sum(others)))
    t, p, u = (np.take(mask, index, axis) for mask in (true, predicted, unknown))
    height, width = (truth.spacing[a] for a in others)
    window = _window(t | p, (height, width))
    image = None if images is None else np.take(_image(images, case, truth).array, index, axis)[window]
    _background(ax, image, t[window], p[window], height / width)
    for mask, colour, style in ((t, TRUTH, "solid"), (p, PREDICTION, "dashed"), (u, IGNORED, "dotted")):
        if mask[window].any():
            padded = np.pad(mask[window], 1).astype(float)  # contours close at the picture's edge
            y, x = (np.arange(-1, n + 1) for n in mask[window].shape)
            ax.contour(x, y, padded, levels=[0.5], colors=colour, linewidths=1.6, linestyles=style)
    ax.set_title(_title(result, case, name, "zyx"[axis], index), fontsize=10)
    rows, columns = (truth.orientation[2 - a] for a in others)
    if rows in "AS":  # head and front up
        ax.invert_yaxis()
    if columns in "RA":  # the patient's right and front on the left
        ax.invert_xaxis()


def _background(
    ax: Any, image: NDArray[Any] | None, t: NDArray[np.bool_], p: NDArray[np.bool_], aspect: float
) -> None:
    if image is None:
        shades = 0.25 * t + 0.25 * p
        ax.imshow(shades, cmap="gray", vmin=0, vmax=1, aspect=aspect, interpolation="nearest")
        return
    low, high = np.percentile(image, (1, 99))
    ax.imshow(
        image, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), aspect=aspect, interpolation="nearest"
    )


def _window(mask: NDArray[np.bool_], spacing: tuple[float, float]) -> tuple[slice, slice]:
    """Around the mask, with a margin; at least 60 mm, where the slice has as much."""
    cut = []
    for axis in (0, 1):
        there = np.flatnonzero(mask.any(1 - axis))
        margin = max(_MARGIN, (_SMALLEST - (there[-1] - there[0]) * spacing[axis]) / 2) / spacing[axis]
        cut.append(slice(max(0, int(there[0] - margin)), int(there[-1] + margin) + 2))
    return cut[0], cut[1]


def _title(result: Result, case: Case, name: str, axis: str, index: int) -> str:
    found = result.scores[case.name][name]
    missing = " (no prediction's file)" if case.prediction is None else ""
    numbers = f"Dice {found['dice']:.3f}"
    if found["hd95_mm"] is not None:
        numbers += f", HD95 {found['hd95_mm']:.1f} mm"
    return f"{case.name}{missing}\n{name}: {numbers}, {axis} = {index}"


def _image(images: Path, case: Case, truth: Volume) -> Volume:
    names = [f"{case.name}{suffix}{ending}" for suffix in ("_0000", "") for ending in ENDINGS]
    path = next((images / name for name in names if (images / name).is_file()), None)
    if path is None:
        raise FileNotFoundError(
            2, f"no image of {case.name} ({names[0]} or {case.name}{ENDINGS[0]})", str(images)
        )
    image = read(path)
    if image.grid_shape != truth.grid_shape:
        raise ValueError(f"{path}: {image.grid_shape} voxels (z, y, x), its truth has {truth.grid_shape}")
    return image.like(image.array[0]) if image.is_multichannel else image


def _legend(figure: Any, ignored: bool) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=TRUTH, linewidth=2, label="truth"),
        Line2D([], [], color=PREDICTION, linewidth=2, linestyle="dashed", label="prediction"),
        Line2D([], [], color=IGNORED, linewidth=2, linestyle="dotted", label="ignored"),
    ][: 3 if ignored else 2]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
