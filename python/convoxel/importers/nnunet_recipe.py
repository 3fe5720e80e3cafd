"""What nnU-Net v2 does with a scan before its networks and with their logits after, as plain data and arithmetic.

    axes transposed, cropped to what is not zero, channels normalised, resampled (cubic; slices apart where spacings
    are anisotropic), padded to the patch | windows, Gaussian | logits resampled back (linear; nearest across the
    slices), argmax or regions, crop and transposition undone

Sources: nnunetv2 2.8.1, preprocessing/preprocessors/default_preprocessor.py, inference/sliding_window_prediction.py
and export_prediction.py. One thing is done better: windows are blended in float32, where nnU-Net sums in float16.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..inference import Axis
from ..inference.windows import per_axis, spread
from ..preprocessing import (
    SCHEMES,
    Intensities,
    filled,
    nearest,
    nonzero_box,
    normalise,
    padding,
    resize,
    resize_labels,
)
from ..preprocessing.splines import ORDERS
from ..volume import Volume
from .trained import Frame, Overlap, Prepared, Recipe, check_size

READERS = {  # nnU-Net's reader: the orientation that it turns scans to
    "SimpleITKIO": None,
    "NibabelIO": None,
    "SimpleITKIOWithReorient": "RAS",
    "NibabelIOWithReorient": "RAS",
}
_SPLINES, _TORCH, _NOT = "resample_data_or_seg_to_shape", "resample_torch_fornnunet", "no_resampling_hack"
_CENTRE = 10.0  # nnU-Net's Gaussian peaks at 10, so that its float16 reaches further down


@dataclass(frozen=True)
class Resampling:
    """One of nnU-Net's three resampling functions and its options."""

    function: str
    order: int
    order_z: int
    separate_z: bool | None  # None: where spacings are anisotropic
    mode: str
    threshold: float

    def __post_init__(self) -> None:
        if self.function not in (_SPLINES, _TORCH, _NOT):
            raise ValueError(
                f"the resampling {self.function!r} is not nnU-Net's; expected {_SPLINES}, {_TORCH} or {_NOT}"
            )
        if self.function == _TORCH and self.mode != "linear":
            raise ValueError(f"{_TORCH}: expected the mode linear, received {self.mode!r}")
        if self.order not in ORDERS or self.order_z not in ORDERS:
            raise ValueError(
                f"resampling: expected orders of {ORDERS}, received {self.order} and {self.order_z}"
            )

    @property
    def orders(self) -> tuple[int, int]:
        """Within the slices, and across them where they are resampled apart."""
        return (1, 0) if self.function == _TORCH else (self.order, self.order_z)

    def separate(self, old: Sequence[float], new: Sequence[float]) -> int | None:
        """The axis to resample apart, or None; old and new are spacings in mm."""
        if self.separate_z is False:
            return None
        rough = [s for s in (old, new) if max(s) / min(s) > self.threshold]
        if self.separate_z is None and not rough:
            return None
        spacing = old if self.separate_z else rough[0]
        lowest = [axis for axis, s in enumerate(spacing) if s == max(spacing)]
        return lowest[0] if len(lowest) == 1 else None

    def grid(self, shape: Sequence[int], old: Sequence[float], new: Sequence[float]) -> tuple[int, ...]:
        if self.function == _NOT:
            return tuple(shape)
        return tuple(max(1, round(i / j * k)) for i, j, k in zip(old, new, shape, strict=True))


@dataclass(frozen=True)
class OnGrid:
    """A scan on its network's grid, in nnU-Net's transposed axes, before windows are laid over it."""

    image: NDArray[np.float32]  # (C, d, h, w), cropped, normalised, resampled
    cropped: tuple[int, ...]  # (d, h, w) of the box that is not zero, on the scan's own grid
    spacing: list[float]  # mm, of that box
    target: list[float]  # mm, of the network's grid as the plans have it
    frame: Frame  # (..., D, H, W) of the scan -> that box, a view


@dataclass(frozen=True)
class NnunetRecipe(Recipe):
    """Everything in plans.json and dataset.json that inference needs; sizes are in nnU-Net's transposed axes."""

    channels: tuple[str, ...]
    labels: Mapping[str, Any]  # name: value, or the values of a region
    region_order: tuple[int, ...]
    reader: str
    transpose: tuple[int, ...]
    spacing: tuple[float, ...]  # mm, of the network's grid: 3, or 2 within slices
    patch_size: tuple[int, ...]  # 3, or 2
    schemes: tuple[str, ...]
    masked: tuple[bool, ...]  # per channel: normalise within what is not zero
    intensities: tuple[tuple[float, ...] | None, ...]
    data: Resampling
    logits: Resampling
    mirror: tuple[int, ...]

    kind = "nnunet"
    overlap = 0.5

    def __post_init__(self) -> None:
        rank, count = len(self.patch_size), len(self.channels)
        if rank not in (2, 3) or len(self.spacing) != rank:
            raise ValueError(
                f"patch {self.patch_size} and spacing {self.spacing} should both have 2 or 3 numbers"
            )
        if sorted(self.transpose) != [0, 1, 2]:
            raise ValueError(f"transpose_forward should order the axes 0, 1, 2, received {self.transpose}")
        if not all(isinstance(n, int) and 0 < n < 1 << 16 for n in self.patch_size):
            raise ValueError(f"patch sizes should be positive whole numbers, received {self.patch_size}")
        if not all(math.isfinite(s) and s > 0 for s in self.spacing):
            raise ValueError(f"spacings should be positive numbers of mm, received {self.spacing}")
        if not len(self.schemes) == len(self.masked) == len(self.intensities) == count:
            raise ValueError(f"there are {count} channels, but {len(self.schemes)} normalisations")
        if foreign := [scheme for scheme in self.schemes if scheme not in SCHEMES]:
            raise ValueError(f"the normalisation {foreign[0]!r} is not one of {', '.join(SCHEMES)}")
        if self.reader not in READERS:
            raise ValueError(f"its scans are read by {self.reader}; convoxel has {', '.join(READERS)}")
        if max(self.logits.orders) > 1 and self.logits.function != _NOT:
            raise ValueError(
                f"logits are resampled linearly or by nearest neighbour, not by order {max(self.logits.orders)}"
            )
        if any(axis not in range(rank) for axis in self.mirror):
            raise ValueError(f"mirroring axes should be within 0..{rank - 1}, received {self.mirror}")
        if self._has_regions and len(self.region_order) != self.heads:
            raise ValueError(
                f"{self.heads} regions need as many regions_class_order, received {self.region_order}"
            )

    @property
    def _has_regions(self) -> bool:
        return any(isinstance(value, list | tuple) and len(value) > 1 for value in self.labels.values())

    @property
    def regions(self) -> tuple[int, ...] | None:  # type: ignore[override]
        return tuple(int(value) for value in self.region_order) if self._has_regions else None

    @property
    def mirror_axes(self) -> tuple[int, ...]:  # type: ignore[override]
        return tuple(axis + 3 - len(self.patch_size) for axis in self.mirror)

    @property
    def heads(self) -> int:
        """Channels that the network returns: one per label or region; the ignore label has none."""
        kept = [value for name, value in self.labels.items() if name != "ignore"]
        if self._has_regions:
            return sum(set(np.atleast_1d(value).tolist()) != {0} for value in kept)
        return len({int(v) for value in kept for v in np.atleast_1d(value)})

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> NnunetRecipe:
        """The reverse of `to_json`; ValueError, TypeError or KeyError for anything else."""
        fields = {field.name: found[field.name] for field in dataclasses.fields(cls)}
        fields = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
        for name in ("data", "logits"):
            fields[name] = Resampling(**fields[name])
        fields["intensities"] = tuple(None if i is None else tuple(i) for i in fields["intensities"])
        return cls(**fields)

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, **dataclasses.asdict(self)}

    @property
    def preprocessing(self) -> dict[str, Any]:
        """What decides the numbers that `on_grid` gives: recipes that agree in it can share a cache."""
        names = ("reader", "transpose", "spacing", "schemes", "masked", "intensities", "data")
        found = {name: getattr(self, name) for name in names}
        return {**found, "data": dataclasses.asdict(self.data)}

    def on_grid(self, scans: Sequence[Volume]) -> OnGrid:
        """The channels of one scan, all on one grid, brought to the network's: the same for training and prediction."""
        turned = [scan.reorient(READERS[self.reader] or scan.orientation) for scan in scans]
        arrays = [scan.array.transpose(self.transpose) for scan in turned]
        box = nonzero_box(arrays)
        cropped = arrays[0][box].shape
        image = np.empty((len(arrays), *cropped), np.float32)  # only what is left becomes float
        for channel, array in zip(image, arrays, strict=True):
            channel[:] = array[box]
        self._normalise(image)
        spacing = [turned[0].spacing[axis] for axis in self.transpose]
        target = [*spacing[: 3 - len(self.spacing)], *self.spacing]
        grid = self.data.grid(cropped, spacing, target)
        check_size(len(image), grid, f"resampled to {tuple(self.spacing)} mm, the scan")
        order, order_z = self.data.orders
        image = resize(image, grid, order, self.data.separate(spacing, target), order_z)

        def frame(array: NDArray[Any]) -> NDArray[Any]:
            view = scans[0].like(array).reorient(turned[0].orientation).array
            lead = array.ndim - 3
            view = view.transpose(*range(lead), *(lead + axis for axis in self.transpose))
            return view[..., box[0], box[1], box[2]]

        return OnGrid(image, cropped, spacing, target, frame)

    def labels_on_grid(self, labels: NDArray[Any], placed: OnGrid) -> NDArray[Any]:
        """(D, H, W) labels of a scan -> (d, h, w) on the grid of its image, see `resize_labels`; for training."""
        separate = self.data.separate(placed.spacing, placed.target)
        return resize_labels(placed.frame(labels), placed.image.shape[1:], separate)

    def prepare(self, scans: Sequence[Volume], overlap: Overlap) -> Prepared:
        placed = self.on_grid(scans)
        image, grid = placed.image, placed.image.shape[1:]
        patch = (1,) * (3 - len(self.patch_size)) + self.patch_size
        rim = padding(grid, patch)
        padded = np.pad(image, [(0, 0), *rim]) if any(map(any, rim)) else image
        overlaps = per_axis("overlap", overlap, 3)
        starts = tuple(spread(n, p, o) for n, p, o in zip(padded.shape[1:], patch, overlaps, strict=True))
        axes = self._axes(grid, placed.cropped, placed.target, placed.spacing, rim)
        return Prepared(
            torch.from_numpy(padded), self.patch_size, starts, gaussian(patch), axes, placed.frame
        )

    def _normalise(self, image: NDArray[np.float32]) -> None:
        mask = filled(image) if any(self.masked) and "ZScoreNormalization" in self.schemes else None
        for channel, scheme, masked, found in zip(
            image, self.schemes, self.masked, self.intensities, strict=True
        ):
            normalise(
                channel, scheme, None if found is None else Intensities(*found), mask if masked else None
            )

    def _axes(
        self,
        grid: Sequence[int],
        cropped: Sequence[int],
        target: Sequence[float],
        spacing: Sequence[float],
        rim: Sequence[tuple[int, int]],
    ) -> list[Axis] | None:
        """Where the voxels of the cropped scan lie on the network's padded grid."""
        if tuple(grid) == tuple(cropped) and not any(map(any, rim)):
            return None
        order, order_z = self.logits.orders
        apart = self.logits.separate(target, spacing)
        found_axes = []
        for axis, (n, m, (first, _)) in enumerate(zip(grid, cropped, rim, strict=True)):
            near = (order_z if axis == apart else order) == 0
            found_axes.append((_nearest(n, m) if near else Axis.linear(n, m)).shifted(first))
        return found_axes


def _nearest(n: int, m: int) -> Axis:
    low = nearest(n, m)
    return Axis(low, low, np.zeros(m, np.float32))


def gaussian(patch: Sequence[int]) -> Tensor:
    """(patch) float32: exp(-((i - n // 2) / (n / 8))^2 / 2) per axis, with nnU-Net's rounding to float16, and its
    smallest number in place of zeros.

    >>> gaussian((1, 4, 4))[0, 2].tolist()
    [0.00335693359375, 1.353515625, 10.0, 1.353515625]
    """
    weights = np.ones((), np.float64)
    for n in patch:
        profile = np.exp(-0.5 * ((np.arange(n) - n // 2) / (n / 8)) ** 2)
        weights = weights[..., None] * profile
    half = torch.from_numpy(weights * _CENTRE).half()
    half[half == 0] = half[half > 0].min()
    return half.float()
