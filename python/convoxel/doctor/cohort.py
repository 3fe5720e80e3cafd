"""All cases together: what differs from the rest, what is there twice, what is hardly there at all."""

from __future__ import annotations

import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from ..volume.files import machine_memory
from .cases import CaseFacts
from .catalogue import Finding, finding
from .dataset import Dataset
from .labels import LabelMap
from .scans import Grid

_ENOUGH = 4  # cases, before one of them can be called unusual
_SPACING, _EXTENT, _INTENSITY = 3.0, 4.0, 20.0  # times the median
_WIDE = 4.0  # and that many times the median deviation: datasets of many scanners are wide
_RARE = 0.1  # of the training cases
_SIDES = (("left of", "right of"), ("behind", "in front of"), ("below", "above"))
_ABOUT = 0.6  # of the usual distance of two structures
_APART = 20.0  # mm between them, to tell one side from the other
_MOST_LABELS = 40  # whose pairs are looked at


def examine_cohort(dataset: Dataset, facts: Sequence[CaseFacts]) -> list[Finding]:
    """Findings that need all cases."""
    checks = (_orientations, _outliers, _copies, _label_use, _mirrored)
    return [f for check in checks for f in check(dataset, facts)] + list(_machine(dataset, facts))


def _orientations(dataset: Dataset, facts: Sequence[CaseFacts]) -> Iterator[Finding]:
    grids = [(fact, fact.grid) for fact in facts if fact.grid is not None]
    counts = Counter(grid.orientation for _, grid in grids)
    if len(counts) < 2:
        return
    usual, number = counts.most_common(1)[0]
    for fact, grid in grids:
        if grid.orientation != usual:
            words = f"its axes run to {grid.orientation}, those of {number} others to {usual}"
            yield finding("orientation-mixed", _first(fact), words)


def _first(fact: CaseFacts) -> str:
    return str(next(iter(fact.case.images.values())))


def _outliers(dataset: Dataset, facts: Sequence[CaseFacts]) -> Iterator[Finding]:
    known = [(fact, fact.grid) for fact in facts if fact.grid is not None]
    spacings = np.array([grid.spacing for _, grid in known])
    extents = np.array([np.multiply(grid.shape, grid.spacing) for _, grid in known])
    for name, values, times, unit in (("spacing-outlier", spacings, _SPACING, "mm"),
                                      ("extent-outlier", extents, _EXTENT, "mm wide")):  # fmt: skip
        for axis in range(3 if len(known) >= _ENOUGH else 0):
            for i, usual in _unusual(values[:, axis], times):
                words = f"{values[i, axis]:.4g} {unit} along {'zyx'[axis]}, typical is {usual:.4g}"
                yield finding(name, _first(known[i][0]), words)
    by_channel = defaultdict(list)
    for fact in facts:
        channels = [(path, channel) for path, several in fact.channels.items() for channel in several]
        for i, (path, channel) in enumerate(channels):
            if channel.last > channel.first:
                by_channel[i].append((path, channel.last - channel.first))
    for i, spreads in by_channel.items():
        for j, usual in _unusual(np.array([spread for _, spread in spreads]), _INTENSITY):
            path, spread = spreads[j]
            words = f"channel {i}: values spread over {spread:.4g}, typical is {usual:.4g}"
            yield finding("intensity-outlier", path, words)


def _unusual(values: NDArray[np.float64], times: float) -> Iterator[tuple[int, float]]:
    """(index, median) of what is more than `times` and _WIDE median deviations from the median, as ratios."""
    if values.size < _ENOUGH:
        return
    logs = np.log(values)
    middle = np.median(logs)
    limit = max(np.log(times), _WIDE * float(np.median(np.abs(logs - middle))))
    for i in np.flatnonzero(np.abs(logs - middle) > limit):
        yield int(i), float(np.exp(middle))


def _copies(dataset: Dataset, facts: Sequence[CaseFacts]) -> Iterator[Finding]:
    images: dict[bytes, CaseFacts] = {}
    labels: dict[bytes, LabelMap] = {}
    for fact in sorted(facts, key=lambda fact: not fact.case.training):
        for path, channels in fact.channels.items():
            for channel in channels:
                before = images.setdefault(channel.digest, fact)
                if before is fact or channel.low == channel.high:
                    continue
                both = before.case.training and fact.case.training
                either = before.case.training or fact.case.training
                name = "test-in-training" if either and not both else "duplicate-image"
                yield finding(name, path, f"the same voxels as in case {before.case.name}")
        if fact.label is not None and fact.label.voxels:
            first = labels.setdefault(fact.label.digest, fact.label)
            same_image = any(
                images.get(c.digest) is not fact for several in fact.channels.values() for c in several
            )
            if first is not fact.label and not same_image:
                yield finding("duplicate-label", fact.label.path, f"the same voxels as {first.path.name}")


def _label_use(dataset: Dataset, facts: Sequence[CaseFacts]) -> Iterator[Finding]:
    maps = [fact.label for fact in facts if fact.label is not None and fact.case.training]
    if not maps or dataset.labels is None:
        return
    for value, name in dataset.labels.items():
        count = sum(value in label.voxels for label in maps)
        if value == 0 or name == "ignore":
            continue
        if count == 0:
            yield finding(
                "label-unused", dataset.folder, f"{name} ({value}) is in none of {len(maps)} label maps"
            )
        elif len(maps) >= 5 and (count == 1 or count < _RARE * len(maps)):
            yield finding(
                "label-rare", dataset.folder, f"{name} ({value}) is in {count} of {len(maps)} label maps"
            )


def _mirrored(dataset: Dataset, facts: Sequence[CaseFacts]) -> Iterator[Finding]:
    """Cases whose structures lie the other way round than in the others.

    For two labels and an axis, "usual" is the median distance between their centres. A pair is steady if nine in ten
    cases have about that distance; a case is mirrored if at least half of its steady pairs have about minus that.
    """
    maps = [
        f.label
        for f in facts
        if f.label is not None and f.grid is not None and _together(f.label.grid, f.grid)
    ]
    values = sorted({value for label in maps for value in label.centres})[:_MOST_LABELS]
    steady = np.zeros((len(maps), 3), int)
    mirrored = np.zeros((len(maps), 3), int)
    words: dict[tuple[int, int], str] = {}
    for a, b in combinations(values, 2):
        both = [i for i, m in enumerate(maps) if a in m.centres and b in m.centres]
        if len(both) < 2 * _ENOUGH:
            continue
        offsets = np.array([maps[i].centres[a] - maps[i].centres[b] for i in both])
        usual = np.median(offsets, 0)
        near = np.abs(offsets - usual) < _ABOUT * np.abs(usual)
        use = (near.mean(0) >= 0.9) & (np.abs(usual) > _APART)
        turned = (np.abs(offsets + usual) < _ABOUT * np.abs(usual)) & use
        steady[both] += use
        mirrored[both] += turned
        for row, axis in np.argwhere(turned):
            here, there = _SIDES[axis] if usual[axis] > 0 else _SIDES[axis][::-1]
            names = [(dataset.labels or {}).get(value, str(value)) for value in (a, b)]
            words.setdefault(
                (both[row], int(axis)), f"{names[0]} is {here} {names[1]}, in other cases {there} it"
            )
    for (i, axis), text in sorted(words.items()):
        if 2 * mirrored[i, axis] >= steady[i, axis]:
            yield finding("label-mirrored", maps[i].path, text)


def _together(label: Grid, image: Grid) -> bool:
    """Whether a label lies on its image's grid: else that is said, and where it lies means nothing."""
    return label.shape == image.shape and label.apart(image) < min(image.spacing)


def _machine(dataset: Dataset, facts: Sequence[CaseFacts]) -> Iterator[Finding]:
    sizes = {_first(f): int(np.prod(f.grid.shape)) for f in facts if f.grid is not None and f.case.images}
    if not sizes:
        return
    channels, classes = len(dataset.channels or [1]), len(dataset.labels or [0, 1])
    needed, free = sum(sizes.values()) * (4 * channels + 2), shutil.disk_usage(dataset.folder).free
    if needed > free:
        words = f"preprocessed cases take about {needed / 1e9:.3g} GB, {free / 1e9:.3g} GB are free"
        yield finding("disk-space", dataset.folder, words)
    largest = max(sizes, key=sizes.__getitem__)
    scores, memory = sizes[largest] * classes * 4, machine_memory()
    if scores > memory / 2:
        words = (
            f"{classes} classes of float32 take {scores / 1e9:.3g} GB, the machine has {memory / 1e9:.3g} GB"
        )
        yield finding("large-scores", largest, words)
