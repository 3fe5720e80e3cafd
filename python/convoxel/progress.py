"""How far and how long: progress bars, which need tqdm, and durations in words."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def bar(items: Iterable[Any] | None, what: str, total: int | None = None, **how: Any) -> Any:
    """tqdm's bar around `items`; of None, one that `update(n)` moves on to `total`. ImportError without tqdm.

    >>> list(bar([1, 2], "cases"))
    [1, 2]
    """
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError('a progress bar needs tqdm: pip install "convoxel[train]"') from error
    return tqdm(items, desc=what, total=total, **how)


def duration(seconds: float) -> str:
    """
    >>> duration(45), duration(600), duration(40_000)
    ('45 s', '10 min', '11.1 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
