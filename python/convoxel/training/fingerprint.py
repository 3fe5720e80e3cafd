"""What a dataset is like: sizes, spacings, intensities and labels of its scans, for `plan`.

Source of what is looked at: nnunetv2 2.8.1, experiment_planning/dataset_fingerprint/fingerprint_extractor.py. Two
things are done otherwise: intensities are exact numbers of every case where nnU-Net draws voxels at random (cases
count alike in both), and voxels that nobody labelled (ignore) are no foreground.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..importers.nnunet_recipe import READERS
from ..preprocessing import Intensities, nonzero_box
from ..progress import bar
from .cache import at_a_time, read_case
from .cases import Case, Dataset

READER = "NibabelIOWithReorient"  # axes of all cases run alike: (z, y, x) upwards, forwards, rightwards
_RANKS = 10_000  # values of a case, evenly spaced in order of size, that percentiles are taken of

Numbers = tuple[float, float, float]


@dataclass(frozen=True)
class Fingerprint:
    """Facts of the training cases, in their order; axes (z, y, x) of scans turned to RAS."""

    names: tuple[str, ...]
    spacings: tuple[Numbers, ...]  # (z, y, x) in mm, per case
    shapes: tuple[tuple[int, int, int], ...]  # (d, h, w) of the box that is not zero, per case
    kept: tuple[float, ...]  # share of the scan's voxels within that box, per case
    intensities: tuple[Intensities, ...]  # per channel, of labelled voxels; cases count alike
    counts: Mapping[int, int]  # value: voxels in all cases; 0 where no case has it

    def to_json(self) -> dict[str, Any]:
        """Plain data from which `from_json` makes an equal one."""
        found = dataclasses.asdict(self)
        found["intensities"] = [each._asdict() for each in self.intensities]
        found["counts"] = {str(value): count for value, count in self.counts.items()}
        return found

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Fingerprint:
        """The reverse of `to_json`; KeyError, TypeError or ValueError for anything else."""

        def triples(name: str) -> Any:
            return tuple((z, y, x) for z, y, x in found[name])

        return cls(
            names=tuple(found["names"]),
            spacings=triples("spacings"),
            shapes=triples("shapes"),
            kept=tuple(found["kept"]),
            intensities=tuple(Intensities(**each) for each in found["intensities"]),
            counts={int(value): int(count) for value, count in found["counts"].items()},
        )


@dataclass(frozen=True)
class _Facts:
    """One case's."""

    spacing: Numbers
    shape: tuple[int, int, int]
    kept: float
    foreground: list[NDArray[np.float64]]  # per channel: mean, mean square, and _RANKS values; empty without
    counts: Mapping[int, int]


def fingerprint(dataset: Dataset, *, workers: int | None = None, progress: bool = False) -> Fingerprint:
    """Reads every training case once.

    Args:
        workers: cases at a time, each on its own thread; None: the cores at hand, fewer where memory is short. The
            result does not depend on it.
        progress: show a bar (needs tqdm).

    Raises:
        ValueError: no cases, a scan that cannot be read or does not fit its label, a label map with a value that
            dataset.json does not name, or none with a structure; with the case's name.

    >>> found = fingerprint(find_cases("Dataset001_Phantom"))
    >>> found.shapes[0], found.kept[0], found.intensities[0].mean
    ((58, 118, 118), 1.0, 115.6...)
    """
    cases = dataset.cases
    if not cases:
        raise ValueError(f"{dataset.folder}: there is no case with a label in it to learn from")
    with ThreadPoolExecutor(min(len(cases), workers or at_a_time(cases)), "convoxel-fingerprint") as pool:
        futures = [pool.submit(_look, case, dataset) for case in cases]
        try:
            done = as_completed(futures)
            for future in bar(done, "cases looked at", len(futures)) if progress else done:
                future.result()
        finally:
            for future in futures:
                future.cancel()
    facts = [future.result() for future in futures]
    return Fingerprint(
        names=tuple(case.name for case in cases),
        spacings=tuple(fact.spacing for fact in facts),
        shapes=tuple(fact.shape for fact in facts),
        kept=tuple(fact.kept for fact in facts),
        intensities=_intensities(facts, dataset),
        counts={value: sum(fact.counts.get(value, 0) for fact in facts) for value in dataset.values},
    )


def _look(case: Case, dataset: Dataset) -> _Facts:
    try:
        scans, labels = read_case(case, dataset, dataset.channels)
    except ValueError as error:
        raise ValueError(f"case {case.name}: {error}") from error
    orientation = READERS[READER] or scans[0].orientation
    turned = [scan.reorient(orientation) for scan in scans]
    box = nonzero_box([scan.array for scan in turned])
    values, counts = np.unique(labels, return_counts=True)
    inside = scans[0].like(labels).reorient(orientation).array[box]
    foreground = inside > 0
    if dataset.ignore is not None:
        foreground &= inside != dataset.ignore
    d, h, w = inside.shape
    return _Facts(
        spacing=turned[0].spacing,
        shape=(d, h, w),
        kept=inside.size / labels.size,
        foreground=[_summary(scan.array[box][foreground]) for scan in turned],
        counts={int(value): int(count) for value, count in zip(values, counts, strict=True)},
    )


def _summary(values: NDArray[Any]) -> NDArray[np.float64]:
    if not values.size:
        return np.empty(0)
    ordered = np.sort(values).astype(np.float64)
    ranks = ((np.arange(_RANKS) + 0.5) / _RANKS * len(ordered)).astype(np.int64)
    return np.concatenate([[ordered.mean(), np.square(ordered).mean()], ordered[ranks]])


def _intensities(facts: list[_Facts], dataset: Dataset) -> tuple[Intensities, ...]:
    found = []
    for channel in range(len(dataset.channels)):
        parts = [fact.foreground[channel] for fact in facts if fact.foreground[channel].size]
        if not parts:
            raise ValueError(
                f"{dataset.folder}: no label map has a structure within its scan, there is nothing to learn; "
                "check the label maps (convoxel doctor)"
            )
        rows = np.stack(parts)
        mean = float(rows[:, 0].mean())
        variance = float(rows[:, 1].mean()) - mean**2
        low, high = np.percentile(rows[:, 2:], (0.5, 99.5))
        found.append(Intensities(mean, math.sqrt(max(0.0, variance)), float(low), float(high)))
    return tuple(found)
