"""Two pictures: what the network sees, should find and finds, in three planes; and how it learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .data import BIAS, CLASSES, NOISE, TEST, TISSUES, TRAIN
from .report import Scores

COLOURS = ("#000000", "#3fa7ff", "#ff9d3c", "#fff6c8")  # background, CSF, grey, white matter
# Planes as (axis of (z, y, x), index); y = 38 lies in the test half, x = 43 beside the middle.
PLANES = {"axial": (0, 42), "coronal": (1, 38), "sagittal": (2, 43)}
ENDS = {"axial": "LRPA", "coronal": "LRIS", "sagittal": "PAIS"}  # left, right, bottom, top of the picture


def write(
    out: Path,
    image: NDArray,
    truth: NDArray,
    threshold: NDArray,
    prediction: NDArray,
    curve: dict[str, list[float]],
    scores: Scores,
) -> dict[str, str]:
    """Both pictures into the folder; returns what is in each, by file name."""
    overlay(out / "overlay.png", image, truth, threshold, prediction, scores)
    learning_curve(out / "learning_curve.png", curve, scores)
    return {
        "overlay.png": "image, truth, threshold and network in three planes",
        "learning_curve.png": "loss and Dice while it learned",
    }


def overlay(
    path: Path, image: NDArray, truth: NDArray, threshold: NDArray, prediction: NDArray, scores: Scores
) -> None:
    """Writes the picture: one row per plane; image, truth, threshold and network side by side.

    All arrays (D, H, W); image in the units of the template, the others class numbers.
    """
    figure_class = require_matplotlib()
    from matplotlib.colors import ListedColormap

    colours = ListedColormap(COLOURS)
    columns: list[tuple[str, NDArray, dict[str, Any]]] = [
        (
            f"What the network sees\nbias field ±{BIAS:.0%}, noise {NOISE}",
            image,
            {"cmap": "gray", "vmax": 1.2},
        ),
        ("Truth\nfrom the template's tissue maps", truth, {"cmap": colours, "vmax": 3}),
        (
            f"Intensity threshold\nmean Dice {np.mean(scores.threshold):.2f}",
            threshold,
            {"cmap": colours, "vmax": 3},
        ),
        (
            f"3D U-Net on convoxel\nmean Dice {np.mean(scores.network):.2f}",
            prediction,
            {"cmap": colours, "vmax": 3},
        ),
    ]
    heights = [np.take(image, i, axis).shape[0] for axis, i in PLANES.values()]
    figure = figure_class(figsize=(13, 11))
    axes = figure.subplots(3, 4, gridspec_kw={"height_ratios": heights})
    for row, (plane, (axis, index)) in enumerate(PLANES.items()):
        outline = np.take(truth, index, axis)
        for column, (title, array, style) in enumerate(columns):
            ax = axes[row, column]
            ax.imshow(np.take(array, index, axis), origin="lower", vmin=0, interpolation="nearest", **style)
            if column == 0:
                ax.contour(outline > 0, levels=[0.5], colors="#59e07d", linewidths=0.9)
                _letter(ax, plane)
            _mark_halves(ax, plane, named=column == 0)
            ax.set(xticks=[], yticks=[])
            if row == 0:
                ax.set_title(title, fontsize=12)
        axes[row, 0].set_ylabel(plane, fontsize=12)
    _legend(figure)
    figure.suptitle(
        "MNI152, one averaged brain: a demonstration, no clinical claim.  Dice: test half only.", fontsize=13
    )
    figure.subplots_adjust(left=0.03, right=0.99, top=0.89, bottom=0.06, wspace=0.03, hspace=0.03)
    figure.savefig(path, dpi=110)


def learning_curve(path: Path, curve: dict[str, list[float]], scores: Scores) -> None:
    """Writes the picture: loss per step, and Dice of the training patches per epoch beside the test's."""
    figure = require_matplotlib()(figsize=(12, 5))
    left, right = figure.subplots(1, 2)
    loss, dice = np.array(curve["loss"]), curve["dice"]
    per_epoch = len(loss) // len(dice)
    epochs = np.arange(1, len(dice) + 1)
    left.plot(np.arange(1, len(loss) + 1) / per_epoch, loss, color="#b9c7d8", lw=1, label="each step")
    left.plot(
        epochs, loss.reshape(len(dice), -1).mean(1), color="#1f4e8c", marker="o", label="mean of the epoch"
    )
    left.set(
        xlabel="epoch", ylabel="Dice + cross-entropy loss", title="Loss on training patches", ylim=(0, None)
    )
    right.plot(epochs, dice, color="#1f4e8c", marker="o", label="training patches, augmented")
    for value, colour, name in (
        (scores.network, "#c0392b", "test half: 3D U-Net, after training"),
        (scores.threshold, "#7f8c8d", "test half: intensity threshold"),
    ):
        mean = float(np.mean(value))
        right.axhline(mean, color=colour, ls="--", label=f"{name}, {mean:.2f}")
    right.set(xlabel="epoch", ylabel="mean Dice of the three tissues", title="Dice", ylim=(0, 1))
    for ax in (left, right):
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), frameon=False)
        ax.set_xlim(0, len(dice) * 1.03)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    figure.suptitle("Training a 3D U-Net on one half of MNI152 (one averaged brain, a demonstration)")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def require_matplotlib() -> Any:
    """matplotlib's Figure, which draws to files without a display; ImportError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('the demo needs matplotlib: pip install "convoxel[demo]"') from error
    return Figure


def _letter(ax: Any, plane: str) -> None:
    """Where the picture's sides lie: Left, Right, Posterior, Anterior, Inferior, Superior."""
    for letter, (x, y) in zip(ENDS[plane], ((0.03, 0.5), (0.97, 0.5), (0.5, 0.04), (0.5, 0.96)), strict=True):
        _text(ax, x, y, letter, transform=ax.transAxes, ha="center", va="center", fontsize=10)


def _mark_halves(ax: Any, plane: str, named: bool) -> None:
    """A line where the test half ends and one where training begins, in the planes that cross them."""
    if plane == "coronal":
        return
    axial = plane == "axial"
    for edge in (TEST.stop - 0.5, TRAIN.start - 0.5):
        (ax.axhline if axial else ax.axvline)(edge, color="white", lw=0.9, ls=(0, (4, 3)))
    if not named:
        return
    top = ax.get_ylim()[1] - 2
    for word, position, first in (("test", TEST.stop - 2, True), ("train", TRAIN.start + 1, False)):
        if axial:
            _text(ax, 1, position, word, va="top" if first else "bottom", fontsize=9)
        else:
            _text(ax, position, top, word, ha="right" if first else "left", va="top", fontsize=9)


def _text(ax: Any, x: float, y: float, words: str, **style: Any) -> None:
    """White with a black edge: legible on the brain and beside it."""
    from matplotlib.patheffects import withStroke

    ax.text(x, y, words, color="white", path_effects=[withStroke(linewidth=2, foreground="black")], **style)


def _legend(figure: Any) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [
        Patch(facecolor=COLOURS[CLASSES.index(tissue)], edgecolor="black", label=tissue) for tissue in TISSUES
    ]
    handles.append(Line2D([], [], color="#59e07d", label="true outline of the brain"))
    handles.append(
        Line2D([], [], color="0.4", ls=(0, (4, 3)), label="between the lines: neither trained on nor tested")
    )
    figure.legend(handles=handles, loc="lower center", ncol=5, frameon=False, fontsize=11)
