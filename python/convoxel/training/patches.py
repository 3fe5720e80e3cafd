"""Which patch comes next: a function of (seed, step, place in the batch) and of nothing else.

No generator is carried from patch to patch, so that any step can be asked for at any time, in any process: a run
that resumes at step 1000 sees what an uninterrupted one would have, to the last bit.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .cache import Stored

FOREGROUND = 1 / 3  # share of the patches that are centred on a structure (nnU-Net: 0.33)
_CASES, _PATCH = 0, 1  # streams of random numbers


@dataclass(frozen=True)
class Drawn:
    """One patch of one case."""

    case: int  # index into the cases
    start: tuple[int, int, int]  # its first voxel (z, y, x); negative where it begins before the scan
    label: int | None  # the value of the voxel that it was centred on; None: it lies anywhere
    seed: int  # of its augmentation


def draw(
    cases: Sequence[Stored],
    patch: Sequence[int],
    *,
    seed: int,
    step: int,
    index: int,
    batch: int,
    foreground: float = FOREGROUND,
    annotated: bool = False,
) -> Drawn:
    """Patch `index` of the batch of `step`.

    The cases come in turn, shuffled anew each time that all have been seen. A share `foreground` of the patches is
    centred on a random voxel of a random label that the case has, and moved inside where it would reach beyond the
    scan; the others lie anywhere inside. Where the scan is smaller than the patch it lies in the middle.

    Args:
        patch: (d, h, w); for 2-D networks d = 1.
        annotated: with an ignore label: patches that lie anywhere are centred on an annotated voxel as well, so
            that none is empty (nnU-Net: the same).

    >>> draw(cases, (64, 64, 64), seed=0, step=1000, index=1, batch=2)
    Drawn(case=3, start=(0, 21, 40), label=5, seed=7381...)
    """
    case = _case(len(cases), seed, step * batch + index)
    rng = np.random.default_rng((_PATCH, seed, step, index))
    stored = cases[case]
    label, centre = None, None
    present = [value for value, places in stored.places.items() if value and len(places)]
    if present and is_forced(step, index, batch, foreground):
        label = present[rng.integers(len(present))]
        centre = _pick(stored, label, rng)
    elif annotated and stored.places:
        values = list(stored.places)
        weights = np.array([stored.counts[value] for value in values], float)
        centre = _pick(stored, values[rng.choice(len(values), p=weights / weights.sum())], rng)
    z, y, x = (
        _start(n, p, None if centre is None else int(centre[axis]), rng)
        for axis, (n, p) in enumerate(zip(stored.shape, patch, strict=True))
    )
    return Drawn(case, (z, y, x), label, int(rng.integers(1 << 62)))


def is_forced(step: int, index: int, batch: int, share: float) -> bool:
    """Whether this patch is centred on a structure: the last ones of a batch, at least one (as in nnU-Net); in
    batches of one every third.

    >>> [is_forced(0, i, 6, 1 / 3) for i in range(6)], [is_forced(step, 0, 1, 1 / 3) for step in range(6)]
    ([False, False, False, False, True, True], [False, False, True, False, False, True])
    """
    if batch == 1:
        return math.floor((step + 1) * share + 1e-9) > math.floor(step * share + 1e-9)
    return share > 0 and index >= batch - max(1, round(batch * share))


def _case(count: int, seed: int, number: int) -> int:
    turn, place = divmod(number, count)
    return int(_order(count, seed, turn)[place])


@functools.lru_cache(64)
def _order(count: int, seed: int, turn: int) -> np.ndarray:
    return np.random.default_rng((_CASES, seed, turn)).permutation(count)


def _pick(stored: Stored, value: int, rng: np.random.Generator) -> np.ndarray:
    places = stored.places[value]
    return places[rng.integers(len(places))]


def _start(n: int, patch: int, centre: int | None, rng: np.random.Generator) -> int:
    if n <= patch:
        return -((patch - n) // 2)
    if centre is None:
        return int(rng.integers(n - patch + 1))
    return min(max(centre - patch // 2, 0), n - patch)
