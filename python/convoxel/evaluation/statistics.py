"""Numbers over cases: means with bootstrap intervals, and two models compared case by case.

The interval is the percentile bootstrap over cases: cases are drawn with replacement, 10,000 times, and the
mean of each draw taken; the interval is from its 2.5th to its 97.5th percentile. All structures share the
draws. Fewer than two cases have no interval. With few cases it is too narrow: of normal data it held the true
mean in 84 % (5 cases), 91 % (10), 94 % (30) and 94 % (100) of 2,000 trials.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
_LEVEL = 0.95
_AT_ONCE = 4_000_000  # weights of cases in draws

Interval = tuple[float, float]


@dataclass(frozen=True)
class Summary:
    """One metric of one structure over `n` scored cases; interval: 95 % of the mean. None: no such number."""

    n: int
    mean: float | None
    median: float | None
    interval: Interval | None


@dataclass(frozen=True)
class Comparison:
    """One metric of one structure, this model minus the other, over `n` cases.

    difference: mean, with its 95 % interval. p: Wilcoxon's signed-rank test, two-sided; not corrected for how many
    are looked at. wins: cases in which this model is better.
    """

    n: int
    difference: float | None
    interval: Interval | None
    p: float | None
    wins: int
    losses: int


def summarize(values: NDArray[np.float64], seed: int = 0) -> tuple[list[Summary], Summary]:
    """Of values (cases, structures), nan where there is none: each structure, and the mean over structures.

    The last is the mean of the structures' means, n the cases with any value, its median that of the cases' means.

    >>> each, overall = summarize(np.array([[0.5, 1.0], [0.7, np.nan]]))
    >>> each[0].n, round(each[0].mean, 3), round(overall.mean, 3)
    (2, 0.6, 0.8)
    """
    means, low, high = _bootstrap(values, seed)
    count = np.isfinite(values).sum(0)
    each = []
    for i, n in enumerate(count.tolist()):
        column = values[np.isfinite(values[:, i]), i]
        between = (float(low[i]), float(high[i])) if n > 1 else None
        each.append(
            Summary(n, float(means[i]) if n else None, float(np.median(column)) if n else None, between)
        )
    rows = values[np.isfinite(values).any(1)]
    n = len(rows)
    cases = [float(np.mean(row[np.isfinite(row)])) for row in rows]
    return each, Summary(
        n,
        float(means[-1]) if n else None,
        float(np.median(cases)) if n else None,
        (float(low[-1]), float(high[-1])) if n > 1 else None,
    )


def compare(differences: NDArray[np.float64], more_is_better: bool = True, seed: int = 0) -> list[Comparison]:
    """Of differences (cases, structures), this model minus the other, nan where not both have a score.

    >>> found = compare(np.array([[0.1], [0.2], [0.0], [-0.1]]))[0]
    >>> found.n, found.wins, found.losses
    (4, 2, 1)
    """
    from scipy import stats

    means, low, high = _bootstrap(differences, seed)
    found = []
    for i in range(differences.shape[1]):
        here = np.isfinite(differences[:, i])
        n, column = int(here.sum()), differences[here, i]
        apart = column[column != 0] * (1 if more_is_better else -1)
        p = float(stats.wilcoxon(apart).pvalue) if len(apart) else 1.0
        found.append(
            Comparison(
                n,
                float(means[i]) if n else None,
                (float(low[i]), float(high[i])) if n > 1 else None,
                p if n > 1 else None,
                int((apart > 0).sum()),
                int((apart < 0).sum()),
            )
        )
    return found


def _bootstrap(values: NDArray[np.float64], seed: int) -> tuple[NDArray[np.float64], ...]:
    """Means of the columns and, last, the mean of these; lower and upper ends of their intervals; nan: none."""
    n, columns = values.shape
    there = np.isfinite(values).astype(np.float64)
    filled = np.where(there > 0, values, 0.0)
    rng = np.random.default_rng(seed)
    draws = np.empty((RESAMPLES, columns + 1))
    step = max(1, _AT_ONCE // max(n, 1))
    for start in range(0, RESAMPLES, step):
        size = min(step, RESAMPLES - start)
        weights = rng.multinomial(n, np.full(n, 1 / n), size=size).astype(np.float64)
        draws[start : start + size] = _means(weights @ filled, weights @ there)
    mean = _means(filled.sum(0)[None], there.sum(0)[None])[0]
    low, high = (
        np.array([_quantile(draws[:, i], share) for i in range(columns + 1)])
        for share in ((1 - _LEVEL) / 2, (1 + _LEVEL) / 2)
    )
    return mean, low, high


def _means(total: NDArray[np.float64], count: NDArray[np.float64]) -> NDArray[np.float64]:
    """(draws, columns + 1): totals over counts, and the mean of those that there are."""
    means = np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
    there = np.isfinite(means)
    number = there.sum(1, keepdims=True)
    sums = np.where(there, means, 0.0).sum(1, keepdims=True)
    overall = np.divide(sums, number, out=np.full(sums.shape, np.nan), where=number > 0)
    return np.concatenate([means, overall], axis=1)


def _quantile(draws: NDArray[np.float64], share: float) -> float:
    finite = draws[np.isfinite(draws)]
    return float(np.quantile(finite, share)) if len(finite) else math.nan
