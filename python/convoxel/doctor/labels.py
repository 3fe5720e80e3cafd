"""Label maps: their values, where each lies, and how many pieces they fall into.

Everything is taken from the runs of a label map: stretches of one value along x. There are far fewer runs
than voxels, and two runs touch when they lie in neighbouring rows and overlap, corners included.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..volume import Volume
from .catalogue import Finding, finding
from .scans import Grid, grid_of, sample

_TINY, _MANY = 10, 200  # pieces of fewer voxels than that, that many of them
_MOST_VALUES = 1000
_MOST_RUNS = 30_000_000
_ROWS_AROUND = (
    (0, 1),
    (1, -1),
    (1, 0),
    (1, 1),
)  # (z, y): half of the eight; the other half are the same pairs


@dataclass(frozen=True)
class Runs:
    """Stretches of one value other than 0: value, z, y, first and last x; all int64 of one length."""

    value: NDArray[np.int64]
    z: NDArray[np.int64]
    y: NDArray[np.int64]
    first: NDArray[np.int64]
    last: NDArray[np.int64]

    @property
    def length(self) -> NDArray[np.int64]:
        return self.last - self.first + 1


@dataclass(frozen=True)
class LabelMap:
    """Facts of one label map. voxels and centres ((x, y, z) RAS+ mm) by value, background left out."""

    path: Path
    grid: Grid
    voxels: Mapping[int, int]
    centres: Mapping[int, NDArray[np.float64]]
    digest: bytes


def find_runs(labels: NDArray[Any]) -> Runs:
    """The runs of an integer label map (D, H, W), in the order of its voxels."""
    parts = []
    for z, plane in enumerate(labels):
        edges = plane[:, 1:] != plane[:, :-1]
        begins = plane != 0
        ends = begins.copy()
        begins[:, 1:] &= edges
        ends[:, :-1] &= edges
        y, first = np.nonzero(begins)
        last = np.nonzero(ends)[1]
        parts.append((plane[y, first].astype(np.int64), np.full(y.size, z), y, first, last))
    return Runs(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def pieces(runs: Runs, shape: tuple[int, int, int]) -> NDArray[np.int64]:
    """Voxels of every connected piece of one value (26 neighbours).

    >>> labels = np.array([[[1, 1, 0, 2], [0, 0, 1, 0]]])
    >>> pieces(find_runs(labels), labels.shape)
    array([3, 1])
    """
    parent = np.arange(runs.value.size)
    a, b = _touching(runs, shape)
    while True:
        left, right = parent[a], parent[b]
        differ = left != right
        if not differ.any():
            break
        a, b, left, right = a[differ], b[differ], left[differ], right[differ]
        np.minimum.at(parent, np.maximum(left, right), np.minimum(left, right))
        while (parent != (up := parent[parent])).any():
            parent = up
    sizes = np.bincount(parent, runs.length, runs.value.size).astype(np.int64)
    return sizes[sizes > 0]


def _touching(runs: Runs, shape: tuple[int, int, int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pairs of runs of one value in neighbouring rows whose stretches overlap or meet at a corner."""
    _, height, width = shape
    stride = width + 2  # room on both sides of a row, so that no stretch reaches into the next
    row = (runs.z * (height + 2) + runs.y + 1) * stride + 1
    begins, ends = row + runs.first, row + runs.last
    pairs = []
    for dz, dy in _ROWS_AROUND:
        shift = (dz * (height + 2) + dy) * stride
        low = np.searchsorted(ends, begins + shift - 1, "left")
        high = np.searchsorted(begins, ends + shift + 1, "right")
        count = np.maximum(high - low, 0)
        one = np.repeat(np.arange(count.size), count)
        other = np.arange(one.size) - np.repeat(np.cumsum(count) - count, count) + np.repeat(low, count)
        same = runs.value[one] == runs.value[other]
        pairs.append((one[same], other[same]))
    a, b = (np.concatenate(column) for column in zip(*pairs, strict=True))
    return a, b


def examine_labels(
    volume: Volume, path: Path, digest: bytes, known: Collection[int] | None
) -> tuple[LabelMap | None, list[Finding]]:
    """Facts of a label map (None where it is none), and what is wrong with it.

    known: the values that dataset.json names; None: any.
    """
    if volume.is_multichannel:
        return None, [finding("label-four-dimensional", path, f"its shape is {volume.shape} (C, D, H, W)")]
    labels, found = _whole_numbers(volume.array, path)
    if labels is None:
        return None, found
    if np.unique(sample(labels)).size > _MOST_VALUES:
        span = f"more than {_MOST_VALUES} different values from {labels.min()} to {labels.max()}"
        return None, [*found, finding("label-many-values", path, span)]
    runs = find_runs(labels)
    values, which = np.unique(runs.value, return_inverse=True)
    voxels = np.bincount(which, runs.length, values.size).astype(np.int64)
    middles = [np.bincount(which, runs.length * at, values.size) / voxels for at in
               ((runs.first + runs.last) / 2, runs.y, runs.z)]  # fmt: skip
    world = volume.affine @ np.vstack([*middles, np.ones(values.size)])
    facts = LabelMap(
        path,
        grid_of(volume),
        {int(v): int(n) for v, n in zip(values, voxels, strict=True)},
        {int(v): world[:3, i] for i, v in enumerate(values)},
        digest,
    )
    found += _values(facts, labels.size, known)
    found += _specks(runs, facts)
    return facts, found


def _specks(runs: Runs, facts: LabelMap) -> Iterator[Finding]:
    if runs.value.size > _MOST_RUNS:  # the pieces would take gigabytes to count
        yield finding(
            "label-specks", facts.path, f"{runs.value.size} stretches of equal voxels: the label is noise"
        )
        return
    sizes = pieces(runs, facts.grid.shape)
    tiny = int((sizes < _TINY).sum())
    if tiny >= _MANY:
        words = f"{tiny} of {sizes.size} connected pieces have fewer than {_TINY} voxels"
        yield finding("label-specks", facts.path, words)


def _whole_numbers(array: NDArray[Any], path: Path) -> tuple[NDArray[Any] | None, list[Finding]]:
    if array.dtype.kind in "iu":
        return array, []
    if not np.isfinite(array).all():
        return None, [
            finding(
                "label-not-finite", path, f"{int((~np.isfinite(array)).sum())} voxels are NaN or infinite"
            )
        ]
    if np.abs(array).max() > np.iinfo(np.int32).max:
        return None, [finding("label-many-values", path, f"values from {array.min():g} to {array.max():g}")]
    broken = array != np.rint(array)
    if broken.any():
        example = np.unique(array[broken])
        words = (
            f"{int(broken.sum())} voxels are not whole numbers, such as {example[0]:g} and {example[-1]:g}"
        )
        return None, [finding("label-not-integer", path, words)]
    return array.astype(np.int64), [finding("label-float", path, f"stored as {array.dtype}")]


def _values(facts: LabelMap, size: int, known: Collection[int] | None) -> Iterator[Finding]:
    if not facts.voxels:
        yield finding("label-empty", facts.path, "every voxel is background")
    elif sum(facts.voxels.values()) == size:
        yield finding("label-full", facts.path, "no voxel is background")
    for value, count in facts.voxels.items():
        if value < 0:
            yield finding("label-negative", facts.path, f"{count} voxels are {value}")
        elif known is not None and value not in known:
            words = f"{count} voxels are {value}, dataset.json names {', '.join(map(str, sorted(known)))}"
            yield finding("label-unknown-value", facts.path, words)


def on_nothing(image: NDArray[Any], labels: NDArray[Any], is_ct: bool) -> float:
    """The share of the labelled voxels where the image is empty: air in CT, else exactly 0."""
    marked = image[labels != 0]
    if not marked.size or (not is_ct and image.min() != 0):
        return 0.0
    return float((marked < -950).mean() if is_ct else (marked == 0).mean())
