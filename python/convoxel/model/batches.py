"""What `fit`, `evaluate` and `predict` read: arrays, datasets and loaders, all as batches of (x, y).

Arrays are numpy arrays or torch tensors (N, C, ...) with N samples; they are cut into batches without
a copy of the whole, so that a memory-mapped array stays on the disk. The last batch may be smaller.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

DEFAULT_BATCH_SIZE = 32
Array = np.ndarray | Tensor
Data = Array | Dataset | Iterable


def as_tensor(a: Any) -> Tensor:
    """A tensor with the values of an array; memory is shared where torch can (native, writable, C order).

    >>> as_tensor(np.arange(3, dtype=">i2"))
    tensor([0, 1, 2], dtype=torch.int16)
    """
    if isinstance(a, Tensor):
        return a
    if not isinstance(a, np.ndarray):
        raise TypeError(
            f"expected a torch tensor or a numpy array, received {type(a).__name__}; for other samples "
            "(dictionaries, lists of different sizes) give the DataLoader a collate_fn that returns (x, y)"
        )
    if a.dtype.kind not in "biufc":
        raise TypeError(f"expected an array of numbers, received dtype {a.dtype} (are the samples ragged?)")
    native = a.astype(a.dtype.newbyteorder("="), copy=False)
    return torch.from_numpy(np.require(native, requirements=["C", "W"]))


class ArrayBatches:
    """Batches (x, y) of two arrays, or (x, None); shuffled anew by torch's generator at each iteration.

    >>> [x.tolist() for x, _ in ArrayBatches(np.arange(5), None, batch_size=2)]
    [[0, 1], [2, 3], [4]]
    """

    def __init__(self, x: Array, y: Array | None, batch_size: int, shuffle: bool = False):
        self.x, self.y, self.batch_size, self.shuffle = x, y, batch_size, shuffle

    def __len__(self) -> int:
        return -(-len(self.x) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        n, order = len(self.x), None
        if self.shuffle:
            order = torch.randperm(n)
        for start in range(0, n, self.batch_size):
            part = slice(start, start + self.batch_size)
            chosen = part if order is None else order[part]
            yield _take(self.x, chosen), None if self.y is None else _take(self.y, chosen)


def _take(a: Array, chosen: slice | Tensor) -> Tensor:
    if isinstance(a, np.ndarray):
        return as_tensor(a[chosen.numpy() if isinstance(chosen, Tensor) else chosen])
    return a[chosen.to(a.device) if isinstance(chosen, Tensor) else chosen]


def batches(
    x: Data,
    y: Array | None = None,
    batch_size: int | None = None,
    shuffle: bool = False,
    labelled: bool = True,
) -> Iterable:
    """An iterable of batches from arrays x (N, C, ...) and y (N, ...), a Dataset, or a loader.

    batch_size (default 32) and shuffle are for arrays and datasets; a loader has its own. labelled: whether
    y is needed. Raises TypeError and ValueError for data of another kind and lengths that differ.

    >>> len(batches(torch.zeros(10, 1, 4), torch.zeros(10), batch_size=4))
    3
    """
    if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
        raise ValueError(f"batch_size must be a whole number of at least 1, received {batch_size!r}")
    if isinstance(x, (np.ndarray, Tensor)):
        _check_arrays(x, y, labelled)
        return ArrayBatches(x, y, batch_size or DEFAULT_BATCH_SIZE, shuffle)
    if not isinstance(x, (Dataset, Iterable)) or isinstance(x, (str, Mapping)):
        raise TypeError(
            "expected arrays (numpy or torch), a torch Dataset, or a loader that yields (x, y), "
            f"received {type(x).__name__}"
        )
    if y is not None:
        raise ValueError(
            f"y goes with an array x; a {type(x).__name__} must yield (x, y) itself: if it holds the samples, "
            "make it an array with numpy.asarray(x)"
        )
    if isinstance(x, Dataset):
        shuffle = shuffle and not isinstance(x, IterableDataset)
        # A loader draws a seed from torch's generator even when it has nothing to shuffle: with a generator
        # of its own a validation set does not change the training.
        generator = None if shuffle else torch.Generator()
        return DataLoader(
            x, batch_size or DEFAULT_BATCH_SIZE, shuffle=shuffle, collate_fn=collate, generator=generator
        )
    if batch_size is not None:
        raise ValueError(
            f"batch_size is for arrays and datasets; this {type(x).__name__} makes its own batches"
        )
    return x


def collate(samples: list) -> Any:
    """torch's default_collate, with a reason where samples of one batch differ in shape."""
    for values in zip(*(s if isinstance(s, (tuple, list)) else (s,) for s in samples), strict=True):
        shapes = {tuple(np.shape(v)) for v in values if isinstance(v, (np.ndarray, Tensor))}
        if len(shapes) > 1:
            raise ValueError(
                f"the samples of one batch must have one shape, received {sorted(shapes)}; "
                "crop or pad them, or use batch_size=1"
            )
    return default_collate(samples)


def pair(batch: Any) -> tuple[Tensor, Tensor]:
    """The (x, y) of a batch; anything else is refused."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2 or batch[1] is None:
        what = (
            f"{type(batch).__name__} of {len(batch)}"
            if isinstance(batch, (tuple, list))
            else type(batch).__name__
        )
        raise TypeError(
            f"a batch must be a pair (x, y), received a {what}; give the DataLoader a collate_fn "
            "that returns (x, y)"
        )
    x, y = as_tensor(batch[0]), as_tensor(batch[1])
    if not x.ndim or not y.ndim or len(x) != len(y):
        raise ValueError(f"x and y of a batch differ in length: shapes {tuple(x.shape)} and {tuple(y.shape)}")
    return x, y


def inputs_only(batch: Any) -> Tensor:
    """The x of a batch that may carry labels too."""
    return as_tensor(batch[0] if isinstance(batch, (tuple, list)) and len(batch) else batch)


def _check_arrays(x: Array, y: Array | None, labelled: bool) -> None:
    if x.ndim < 2:
        raise ValueError(f"x must be (N, C, ...), received shape {tuple(x.shape)}")
    if not len(x):
        raise ValueError(f"x holds no samples: shape {tuple(x.shape)}")
    if y is None and labelled:
        raise ValueError("x is an array but y is missing; pass the labels as y, or a dataset of (x, y)")
    if y is not None and not isinstance(y, (np.ndarray, Tensor)):
        raise TypeError(f"y must be a numpy array or a torch tensor, received {type(y).__name__}")
    if y is not None and (not y.ndim or len(x) != len(y)):
        raise ValueError(
            f"x and y differ in length: x {tuple(x.shape)} and y {tuple(y.shape)}; "
            "both need one entry per sample along axis 0"
        )
