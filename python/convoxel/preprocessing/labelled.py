"""Label maps resized: every label's mask linearly, and each voxel to the label that has most of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .splines import matrix


def resize_labels(labels: NDArray[Any], shape: Sequence[int], separate: int | None = None) -> NDArray[Any]:
    """(D, H, W) integers -> `shape`, the same dtype and field of view; no value is there that was not before.

    Every label's mask is interpolated linearly (across the axis `separate` by nearest neighbour); the largest share
    wins, of equal ones the higher label. nnU-Net (resize_segmentation, order 1) is the same wherever one label has
    half of a voxel, and makes background of the others: specks where three structures meet.

    >>> resize_labels(np.array([[[0, 0, 5, 5, 2, 2]]]), (1, 1, 3))
    array([[[0, 5, 2]]])
    """
    target = tuple(int(n) for n in shape)
    if labels.shape == target:
        return labels
    axes = [
        matrix(n, m, 0 if axis == separate else 1).float()
        for axis, (n, m) in enumerate(zip(labels.shape, target, strict=True))
    ]
    values = [int(v) for v in np.unique(labels)]
    result = np.full(target, values[0], labels.dtype)
    most = torch.full(target, -1.0)
    for value in values:
        where, share = _share(labels == value, axes)
        best = most[where]
        wins = share >= best - 1e-6  # of equal ones the higher, whatever the rounding
        result[where][wins.numpy()] = value
        torch.where(wins, share, best, out=best)
    return result


def _share(mask: NDArray[np.bool_], axes: Sequence[Tensor]) -> tuple[tuple[slice, ...], Tensor]:
    """The box of the output that a mask reaches, and how much of each voxel there is the mask's."""
    inside, where, weights = [], [], []
    for axis, whole in enumerate(axes):
        hit = np.flatnonzero(mask.any(tuple(other for other in range(3) if other != axis)))
        source = slice(int(hit[0]), int(hit[-1]) + 1)
        rows = torch.nonzero(whole[:, source].any(1)).flatten()
        # a mask of one voxel may fall between the samples
        target = slice(int(rows[0]), int(rows[-1]) + 1) if len(rows) else slice(0, 0)
        inside.append(source)
        where.append(target)
        weights.append(whole[target, source])
    part = torch.from_numpy(np.ascontiguousarray(mask[tuple(inside)], np.float32))
    plane = weights[1] @ (part @ weights[2].T)
    return tuple(where), (weights[0] @ plane.flatten(1)).view(-1, *plane.shape[1:])
