"""What a MONAI bundle does with a scan before its network and with its logits after, as plain data and arithmetic.

Transforms run in the bundle's order, on (C, x, y, z) arrays as MONAI has them; sizes and spacings are (x, y, z) here.
Spacing gives n_new = round((n - 1) s_old / s_new) + 1 voxels (`spaced`), read linearly, the edge continued; its inverse
reads them likewise, nearest neighbours rounding half to even as grid_sample does.

Sources: monai 1.6.1, transforms/spatial/array.py, transforms/intensity/array.py, transforms/post, inferers/inferer.py.
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
from ..inference.windows import per_axis, starts, weight_map
from ..preprocessing import interpolate, nonzero_box, padding
from ..volume import Volume
from .trained import Overlap, Prepared, Recipe, check_size, stack

_SAME = 1e-3  # of a spacing: MONAI's AFFINE_TOL, below which it does not resample

# name: arguments that are known, with MONAI's defaults
INTENSITY: dict[str, dict[str, Any]] = {
    "ScaleIntensityRange": {"a_min": None, "a_max": None, "b_min": None, "b_max": None, "clip": False},
    "ScaleIntensity": {"minv": 0.0, "maxv": 1.0, "factor": None, "channel_wise": False},
    "NormalizeIntensity": {"subtrahend": None, "divisor": None, "nonzero": False, "channel_wise": False},
}
SPATIAL: dict[str, dict[str, Any]] = {
    "Spacing": {"pixdim": None},
    "CropForeground": {"margin": 0, "k_divisible": 1},
}
Step = tuple[str, dict[str, Any]]


@dataclass(frozen=True)
class MonaiRecipe(Recipe):
    """Everything in a bundle's inference configuration that a prediction needs."""

    channels: tuple[str, ...]
    labels: Mapping[str, Any]
    orientation: str | None  # "RAS": axes are turned so before anything else
    steps: tuple[Step, ...]
    patch: tuple[int, ...]  # (x, y, z); 0: the whole axis
    overlap: Overlap
    mode: str  # of the blend: "constant" or "gaussian"
    sigma: float
    activation: str | None  # "softmax" or "sigmoid"
    activate_first: bool  # before the logits go back to the scan's grid, not after
    nearest: bool  # they go back by nearest neighbour
    threshold: float | None  # None: the largest channel
    heads: int  # channels that the network returns

    kind = "monai"
    mirror_axes = ()

    def __post_init__(self) -> None:
        if len(self.patch) != 3 or self.mode not in ("constant", "gaussian"):
            raise ValueError(
                f"expected a roi_size of 3 numbers and the mode constant or gaussian, received {self}"
            )
        if self.activation not in (None, "softmax", "sigmoid"):
            raise ValueError(f"expected softmax or sigmoid, received {self.activation!r}")
        if self.threshold is not None and self.activation == "softmax":
            raise ValueError("a threshold on softmax probabilities is not known; expected argmax, or sigmoid")
        if self.threshold is not None and self.activation and not 0 < self.threshold < 1:
            raise ValueError(f"expected a threshold between 0 and 1, received {self.threshold}")
        crops = any(name == "CropForeground" for name, _ in self.steps)
        if crops and self.threshold is not None and any(name == "Spacing" for name, _ in self.steps):
            raise ValueError("CropForeground together with Spacing and a threshold is not known")
        for name, options in self.steps:
            known = {**INTENSITY, **SPATIAL}.get(name)
            if known is None or options.keys() - known.keys():
                raise ValueError(f"the transform {name} with {sorted(options)} is not on convoxel's list")

    @property
    def regions(self) -> tuple[int, ...] | None:  # type: ignore[override]
        return None if self.threshold is None else tuple(range(1, self.heads + 1))

    @property
    def masks(self) -> bool:  # type: ignore[override]
        return self.threshold is not None and self.heads > 1

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> MonaiRecipe:
        fields = {field.name: found[field.name] for field in dataclasses.fields(cls)}
        fields = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
        fields["steps"] = tuple((str(name), dict(options)) for name, options in fields["steps"])
        return cls(**fields)

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, **dataclasses.asdict(self)}

    def prepare(self, scans: Sequence[Volume], overlap: Overlap) -> Prepared:
        turned = [scan.reorient(self.orientation or scan.orientation) for scan in scans]
        image = np.ascontiguousarray(stack(turned).transpose(0, 3, 2, 1))
        way = _Way(turned[0])
        for name, options in self.steps:
            if name == "Spacing":
                image = way.space(image, options["pixdim"])
            elif name == "CropForeground":
                image = way.crop(image)
            else:
                _scale(image, name, options)
        patch = [p if p > 0 else n for p, n in zip(self.patch, image.shape[1:], strict=True)]
        rim = padding(image.shape[1:], patch)
        if any(map(any, rim)):
            image = np.pad(image, [(0, 0), *rim])
        overlaps = per_axis("overlap", overlap, 3)
        place = tuple(starts(n, p, o) for n, p, o in zip(image.shape[1:], patch, overlaps, strict=True))
        weights = weight_map(tuple(patch), self.mode, (self.sigma,) * 3, None)[0, 0]
        axes, box = way.back(self.nearest, [low for low, _ in rim])

        def frame(array: NDArray[Any]) -> NDArray[Any]:
            view = scans[0].like(array).reorient(turned[0].orientation).array.swapaxes(-1, -3)
            return view[..., box[0], box[1], box[2]]

        return Prepared(
            torch.from_numpy(np.ascontiguousarray(image)),
            tuple(patch),
            place,
            weights,
            axes,
            frame,
            self._activate,
            self._probability,
        )

    def _activate(self, logits: Tensor) -> Tensor:
        """Finished logits (..., K) -> scores whose largest, or positive ones, are the labels."""
        if self.threshold is None:
            return torch.softmax(logits, -1) if self._softmax_first else logits
        if self.activation == "sigmoid" and self.activate_first:
            return torch.sigmoid(logits) - _below(self.threshold)
        return logits - _below(_logit(self.threshold) if self.activation else self.threshold)

    def _probability(self, scores: NDArray[np.float32]) -> NDArray[np.float32]:
        x = torch.from_numpy(np.ascontiguousarray(scores))
        if self.threshold is None:
            return (x if self._softmax_first else torch.softmax(x, -1)).numpy()
        if self.activation == "sigmoid" and self.activate_first:
            return (x + _below(self.threshold)).numpy()
        limit = _logit(self.threshold) if self.activation else self.threshold
        return torch.sigmoid(x + _below(limit)).numpy()

    @property
    def _softmax_first(self) -> bool:
        return self.activate_first and self.activation == "softmax"


class _Way:
    """The grid as the transforms change it, and the way back to the scan's (x, y, z)."""

    def __init__(self, scan: Volume) -> None:
        self.affine = np.array(scan.affine)
        self.shape = scan.grid_shape[::-1]  # of the scan
        self.grid = self.shape  # of the network, before it is cropped
        self.step, self.first = (
            np.ones(3),
            np.zeros(3),
        )  # the network's voxel i is the scan's first + i * step
        self.box: tuple[slice, slice, slice] | None = None

    def space(self, image: NDArray[np.float32], pixdim: Sequence[float]) -> NDArray[np.float32]:
        spacing = np.linalg.norm(self.affine[:3, :3], axis=0)
        wanted = np.array([p if p > 0 else s for p, s in zip(pixdim, spacing, strict=True)])
        pull, grid = spaced(self.affine, self.shape, wanted)
        if grid == self.shape and np.allclose(pull, np.eye(4), atol=_SAME):
            return image
        across = pull[:3, :3] - np.diag(np.diag(pull))[:3, :3]
        if (np.abs(across) * np.array(grid)).max() > _SAME:  # voxels, at the far end
            raise ValueError(
                "the scan's axes are not at right angles, which Spacing does not know; resample it first"
            )
        check_size(len(image), grid, f"resampled to {tuple(wanted)} mm (x y z), the scan")
        self.grid, self.step, self.first = grid, np.diag(pull)[:3], pull[:3, 3]
        return interpolate(
            image, [f + s * np.arange(n) for n, s, f in zip(grid, self.step, self.first, strict=True)]
        )

    def crop(self, image: NDArray[np.float32]) -> NDArray[np.float32]:
        self.box = nonzero_box(image > 0)
        return np.ascontiguousarray(image[:, self.box[0], self.box[1], self.box[2]])

    def back(self, nearest: bool, rim: Sequence[int]) -> tuple[list[Axis], tuple[slice, slice, slice]]:
        """How the labels' axes lie on the network's padded image, and the box of the scan that they fill."""
        axes, spans = [], []
        for a in range(3):
            u = np.clip((np.arange(self.shape[a]) - self.first[a]) / self.step[a], 0, self.grid[a] - 1)
            u = np.round(u) if nearest else u
            span = slice(0, self.grid[a]) if self.box is None else self.box[a]
            # Beyond the crop MONAI puts zeros: a voxel that reads a little of the inside has the inside's label.
            inside = np.flatnonzero((u > span.start - 1) & (u < span.stop))
            u = np.clip(u[inside], span.start, span.stop - 1) - span.start
            low = np.floor(u).astype(np.int64)
            t = np.minimum((u - low).astype(np.float32), np.nextafter(np.float32(1), np.float32(0)))
            axes.append(Axis(low, low + (t > 0), t).shifted(rim[a]))
            spans.append(slice(int(inside[0]), int(inside[-1]) + 1))
        return axes, (spans[0], spans[1], spans[2])


def spaced(
    affine: NDArray[np.float64], shape: Sequence[int], pixdim: NDArray[np.float64]
) -> tuple[NDArray[Any], tuple[int, int, int]]:
    """MONAI's grid of spacing `pixdim`: (4, 4) its voxels (x, y, z) to the scan's, and its shape.

    The first voxel stays where it is; but where the affine's columns are off the right angle by more than 1e-8 (any
    oblique scan whose header is float32) half the shapes come to one place instead.

    >>> spaced(np.eye(4), (10, 10, 10), np.array([2.0, 1.0, 1.0]))[1]
    (6, 10, 10)
    """
    columns = affine[:3, :3]
    upper = np.linalg.cholesky(columns.T @ columns).T
    new = np.eye(4)
    new[:3, :3] = columns @ np.linalg.inv(upper) @ np.diag(np.sign(np.diag(upper)) * pixdim)
    corners = np.asarray(np.meshgrid(*([0.0, n - 1.0] for n in shape), indexing="ij")).reshape(3, -1)
    homogeneous = np.concatenate([corners, np.ones((1, 8))])
    reached = (np.linalg.solve(new, affine) @ homogeneous)[:3]
    grid = np.round(np.ptp(reached, axis=1) + 1.0)
    smallest = [i for i in range(8) if np.allclose((reached - reached[:, i : i + 1]).min(1), 0)]
    if smallest:
        new[:3, 3] = (affine @ homogeneous)[:3, smallest[0]]
    else:
        new[:3, 3] = affine[:3, 3] + columns @ (np.array(shape) / 2) - new[:3, :3] @ (grid / 2)
    x, y, z = (int(n) for n in grid)
    return np.linalg.solve(affine, new), (x, y, z)


def _scale(image: NDArray[np.float32], name: str, options: Mapping[str, Any]) -> None:
    """One intensity transform, in place."""
    found = {**INTENSITY[name], **options}
    whole = [image] if not found.get("channel_wise", False) else list(image)
    for i, part in enumerate(whole):
        if name == "ScaleIntensityRange":
            _range(part, found)
        elif name == "ScaleIntensity":
            _rescale(part, found)
        else:
            _standardise(part, found, i)


def _range(x: NDArray[np.float32], found: Mapping[str, Any]) -> None:
    a_min, a_max, b_min, b_max = (found[key] for key in ("a_min", "a_max", "b_min", "b_max"))
    x -= np.float32(a_min)
    if a_max == a_min:
        x += np.float32(b_min or 0)
        return
    x /= np.float32(a_max - a_min)
    if b_min is not None and b_max is not None:
        x *= np.float32(b_max - b_min)
        x += np.float32(b_min)
    if found["clip"]:
        np.clip(x, b_min, b_max, out=x)


def _rescale(x: NDArray[np.float32], found: Mapping[str, Any]) -> None:
    minv, maxv, low, high = found["minv"], found["maxv"], x.min(), x.max()
    if minv is None and maxv is None:
        x *= np.float32(1 + (found["factor"] or 0))
    elif low == high:
        x *= np.float32(1 if minv is None else minv)
    else:
        x -= low
        x /= high - low
        if minv is not None and maxv is not None:
            x *= np.float32(maxv - minv)
            x += np.float32(minv)


def _standardise(x: NDArray[np.float32], found: Mapping[str, Any], channel: int) -> None:
    inside: Any = x != 0 if found["nonzero"] else ...
    values = x[inside]
    if not values.size:
        return

    def given(key: str) -> float | None:
        value = found[key]
        return value[channel] if isinstance(value, list | tuple) else value

    mean, deviation = given("subtrahend"), given("divisor")
    mean = values.mean(dtype=np.float64) if mean is None else mean
    deviation = values.std(dtype=np.float64) if deviation is None else deviation
    x[inside] = (values - np.float32(mean)) / np.float32(deviation or 1)


def _below(value: float) -> float:
    """The next smaller float32: x >= value is x - below(value) > 0."""
    return float(np.nextafter(np.float32(value), np.float32(-np.inf)))


def _logit(p: float) -> float:
    return math.log(p / (1 - p))
