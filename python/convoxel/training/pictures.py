"""What the network makes of validation patches, as a picture to look at while it learns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .logs import new_figure, save_figure


class Preview(NamedTuple):
    """One patch of a validation case, what is true of it and what the network says."""

    name: str
    image: NDArray[np.float32]  # (D, H, W), the first channel
    truth: NDArray[np.bool_]  # (K, D, H, W), a mask per structure
    prediction: NDArray[np.bool_]  # (K, D, H, W)


def draw_previews(path: Path, previews: Sequence[Preview], names: Sequence[str], aspect: float) -> None:
    """Per patch the slice that has most structures: truth left, prediction right; aspect: spacing y / x."""
    figure = new_figure(figsize=(8.5, 4.2 * len(previews) + 0.6), layout="constrained")
    axes = figure.subplots(len(previews), 2, squeeze=False)
    colours = _colours(len(names))
    for (left, right), preview in zip(axes, previews, strict=True):
        covered = preview.truth.sum((2, 3), dtype=np.int64)
        z = int(np.argmax(covered.astype(bool).sum(0) + covered.sum(0) / (covered.sum() + 1)))
        for ax, masks, what in ((left, preview.truth, "truth"), (right, preview.prediction, "prediction")):
            _slice(ax, preview.image[z], masks[:, z], colours, aspect)
            ax.set_title(f"{preview.name}, {what}", fontsize=9)
    from matplotlib.patches import Patch

    handles = [Patch(color=colour, label=name) for colour, name in zip(colours, names, strict=True)]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(6, len(handles)), frameon=False, fontsize=8
    )
    save_figure(figure, path)


def _slice(
    ax: Any, image: NDArray[Any], masks: NDArray[np.bool_], colours: Sequence[Any], aspect: float
) -> None:
    low, high = np.percentile(image, (1, 99))
    shown = {"vmin": low, "vmax": max(high, low + 1e-6), "cmap": "gray"}
    ax.imshow(image, aspect=aspect, interpolation="nearest", **shown)
    overlay = np.zeros((*image.shape, 4))
    for mask, colour in zip(masks, colours, strict=True):
        overlay[mask] = (*colour[:3], 0.45)
    ax.imshow(overlay, aspect=aspect, interpolation="nearest")
    ax.invert_yaxis()  # arrays run to the right, the front and the head: front or head up, the patient's right left
    ax.invert_xaxis()
    ax.set_axis_off()


def _colours(count: int) -> list[Any]:
    from matplotlib import colormaps

    table = colormaps["tab10" if count <= 10 else "turbo"]
    return [table(i if count <= 10 else i / (count - 1)) for i in range(count)]
