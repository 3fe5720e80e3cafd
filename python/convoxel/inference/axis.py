"""One axis of a scan as it lies between the voxels of the grid that a network saw."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Axis:
    """n voxels of an output between those of an input: y[i] = (1 - t[i]) x[low[i]] + t[i] x[high[i]].

    Attributes:
        low, high: (n,) int64 indices into the input; neither may fall from one voxel to the next.
        t: (n,) float32 in [0, 1).

    Example:
        >>> Axis.linear(2, 4)  # voxel centres at -0.25, 0.25, 0.75, 1.25, the edges clamped
        Axis(low=array([0, 0, 0, 1]), high=array([0, 1, 1, 1]), t=array([0.  , 0.25, 0.75, 0.  ], dtype=float32))
    """

    low: NDArray[np.int64]
    high: NDArray[np.int64]
    t: NDArray[np.float32]

    @classmethod
    def linear(cls, old: int, new: int) -> Axis:
        """`new` voxels over the field of view of `old`: torch's interpolate with align_corners=False."""
        u = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
        low = np.floor(u).astype(np.int64)
        t = (u - low).astype(np.float32)
        t[t == 1] = np.nextafter(np.float32(1), np.float32(0))  # rounded up from float64
        return cls(low, np.where(t > 0, low + 1, low), t)

    @classmethod
    def nearest(cls, old: int, new: int) -> Axis:
        """`new` voxels over the field of view of `old`, each the one that it lies in (torch's nearest-exact)."""
        low = (2 * np.arange(new, dtype=np.int64) + 1) * old // (2 * new)
        return cls(low, low, np.zeros(new, np.float32))

    def shifted(self, voxels: int) -> Axis:
        """The same over an input that has `voxels` more in front (padding; negative: cropped)."""
        return Axis(self.low + voxels, self.high + voxels, self.t)

    def __len__(self) -> int:
        return len(self.low)

    def check(self, name: str, size: int) -> Axis:
        """The same in the dtypes above; ValueError unless it reads rising voxels of an input of `size`."""
        low, high = (np.ascontiguousarray(v, np.int64) for v in (self.low, self.high))
        t = np.ascontiguousarray(self.t, np.float32)
        fits = low.ndim == 1 and low.shape == high.shape == t.shape and len(low) > 0
        if not fits or low.min() < 0 or high.max() >= size or (high < low).any():
            raise ValueError(f"{name}: expected low <= high, both (n,) indices into {size} voxels, and as many t; "
                             f"received {self}")  # fmt: skip
        if (np.diff(low) < 0).any() or (np.diff(high) < 0).any() or not ((t >= 0) & (t < 1)).all():
            raise ValueError(
                f"{name}: expected rising indices and t in [0, 1), received {self}; flip the image"
            )
        return Axis(low, np.where(t > 0, high, low), t)
