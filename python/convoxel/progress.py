"""Progress bars, which need tqdm."""

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
