"""A straight line through times over volumes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Line:
    """ms = fixed + slope * Mvoxel; deviation: the largest, relative."""

    fixed: float
    slope: float
    deviation: float


def fit(mvoxels: Sequence[float], ms: Sequence[float]) -> Line:
    """Least squares of the relative errors.

    >>> fit([1, 2, 4], [12, 22, 42])
    Line(fixed=2.0, slope=10.0, deviation=0.0)
    """
    x, y = torch.tensor(mvoxels, dtype=torch.float64), torch.tensor(ms, dtype=torch.float64)
    rows = torch.stack([1 / y, x / y], 1)
    fixed, slope = torch.linalg.lstsq(rows, torch.ones_like(y)[:, None]).solution.flatten().tolist()
    deviation = ((fixed + slope * x) / y - 1).abs().max().item()
    return Line(round(fixed, 9), round(slope, 9), round(deviation, 9))


def lines(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, int], Line]:
    """The line of each work and number of threads, of the rows of `convoxel bench scaling`."""
    found: dict[tuple[str, int], Line] = {}
    for key in dict.fromkeys((r["work"], r["threads"]) for r in rows):
        some = [r for r in rows if (r["work"], r["threads"]) == key]
        found[key] = fit([r["size"] ** 3 / 1e6 for r in some], [r["ms"] for r in some])
    return found
