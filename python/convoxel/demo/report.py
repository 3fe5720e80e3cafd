"""What the demonstration leaves behind: a table in words and numbers, and label maps on the template's grid."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from ..volume import Volume, write
from .data import BIAS, NOISE, TEST, TISSUES, TRAIN, Brain

TARGET = 0.80  # mean Dice over the three tissues
MARGIN = 0.08  # above the threshold baseline on the same image

ABOUT = (
    "A 3D U-Net learns to find CSF, grey and white matter in MNI152, an average of many brains (2 mm voxels).\n"
    "This is a demonstration on one averaged brain. It says nothing about patients: no clinical claim is made."
)

SPEEDS = (
    "Training: one step (forward, loss, backward, optimizer) on a patch of {} x {} x {}; inference: one pass of "
    "the whole scan.\nThe same network and weights, taking turns, medians; both with freed memory kept "
    "(convoxel.memory.keep_freed)."
)


@dataclass(frozen=True)
class Scores:
    """Dice per tissue (CSF, grey, white) on the test half."""

    threshold_clean: list[float]  # of the undisturbed image
    threshold: list[float]  # of the disturbed image, as the network's
    network: list[float]

    def missed(self) -> str | None:
        """Why the target is missed, in one sentence; None if it is reached."""
        mean, baseline = np.mean(self.network), np.mean(self.threshold)
        if not mean >= TARGET:  # nan too
            return f"the mean Dice is {mean:.3f}, the target is {TARGET:.2f}"
        if not mean >= baseline + MARGIN:
            return f"the mean Dice {mean:.3f} is less than {MARGIN:.2f} above the threshold's {baseline:.3f}"
        return None


def dice_table(scores: Scores) -> str:
    """Rows: the threshold on the clean image, the threshold, the network; columns: tissues and their mean."""
    rows = {
        "threshold, clean image": scores.threshold_clean,
        "threshold, disturbed image": scores.threshold,
        "3D U-Net, disturbed image": scores.network,
    }
    lines = ["".join([f"{'Dice on the test half':<28}", *(f"{t:>14}" for t in (*TISSUES, "mean"))])]
    for name, values in rows.items():
        lines.append("".join([f"{name:<28}", *(f"{v:>14.3f}" for v in (*values, np.mean(values)))]))
    return "\n".join(lines)


def speed_table(speeds: dict[str, float]) -> str:
    """Rows: training, inference; columns: convoxel, torch and their ratio; millions of voxels per second.

    >>> print(speed_table({"training, convoxel": 6e5, "training, torch": 4e5,
    ...                    "inference, convoxel": 3e6, "inference, torch": 2e6}).splitlines()[1])
    training                              0.60          0.40         1.50x
    """
    title = "million voxels per second"
    lines = [f"{title:<28}{'convoxel':>14}{'torch ' + torch.__version__.split('+')[0]:>14}{'ratio':>14}"]
    for work in ("training", "inference"):
        ours, theirs = speeds[f"{work}, convoxel"], speeds[f"{work}, torch"]
        lines.append(f"{work:<28}{ours / 1e6:>14.3g}{theirs / 1e6:>14.3g}{ours / theirs:>13.2f}x")
    return "\n".join(lines)


def halves(brain: Brain) -> Volume:
    """1 where the network was trained, 2 where it is tested, 0 between; on the template's grid."""
    marks = np.zeros(brain.labels.shape, np.uint8)
    marks[:, TRAIN] = 1
    marks[:, TEST] = 2
    return brain.labels.like(marks)


def write_volumes(out: Path, brain: Brain, disturbed: Volume, prediction: Volume) -> dict[str, str]:
    """NIfTI files on the template's grid; returns what is in each, by file name."""
    files = {
        "prediction.nii.gz": (prediction, "predicted labels: 0 background, 1 CSF, 2 grey, 3 white matter"),
        "truth.nii.gz": (brain.labels, "the template's own labels, same numbers"),
        "image.nii.gz": (disturbed, f"the disturbed image: bias field +-{BIAS:.0%}, noise {NOISE}"),
        "halves.nii.gz": (halves(brain), "1 the half that was trained on, 2 the half that is tested"),
    }
    for name, (volume, _) in files.items():
        write(volume, out / name)
    return {name: what for name, (_, what) in files.items()}


def write_numbers(
    path: Path, scores: Scores, speeds: dict[str, float], curve: dict[str, list[float]]
) -> None:
    """Everything that was measured, as JSON."""
    numbers = {"dice": asdict(scores), "voxels_per_second": speeds, "curve": curve}
    path.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
