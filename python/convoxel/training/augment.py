"""One patch made into endless ones: moved first, image and labels by the same map, then its intensities.

A voxel o of the patch, counted from its middle, is read from the scan at

    middle + s S^-1 R S F o + e(o)        F flips, R rotates and S is the spacing (rotation is in mm), s scales,
                                          e is a smooth random displacement (elastic)

once: linearly for the image, by nearest neighbour for the labels, from the scan itself, so that what is turned in
comes from there and not from a rim of zeros. Beyond the scan the image is 0 and the label background, as in
prediction. Flips alone read every voxel as it is.

Strengths, probabilities and order are those of nnU-Net 2.6 (nnUNetTrainer.get_training_transforms, with
batchgeneratorsv2), which leaves elastic deformation out: `p_elastic` is 0 unless it is set.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .cache import Stored
from .intensities import change
from .patches import Drawn

_ANISOTROPIC = (
    3  # largest side of the patch over its depth, beyond which slices stay in their planes (nnU-Net)
)
_KNOTS = 5  # of the elastic displacement, on every axis of the patch


@dataclass(frozen=True)
class Augmentation:
    """How likely (p_..., per patch) and how strong each change is. Ranges are drawn from uniformly.

    >>> Augmentation.for_patch((16, 160, 160)).in_plane
    True
    """

    flip_axes: tuple[int, ...] = (0, 1, 2)  # of (z, y, x), each flipped in half of the patches
    in_plane: bool = False  # slices stay slices: for anisotropic data and for 2-D patches
    p_rotation: float = 0.2
    rotation: float = 30.0  # degrees about each axis, at most; in plane about z alone
    p_scale: float = 0.2
    scale: tuple[float, float] = (0.7, 1.4)  # field of view of the patch: above 1 things look smaller
    p_elastic: float = 0.0
    elastic: tuple[float, float] = (0.0, 0.03)  # deviation of the displacement, in sides of the patch
    p_noise: float = 0.1
    noise: tuple[float, float] = (0.0, 0.1)  # deviation; images have about 1
    p_blur: float = 0.2
    blur: tuple[float, float] = (0.5, 1.0)  # sigma in voxels, another one for each axis
    p_brightness: float = 0.15
    brightness: tuple[float, float] = (
        0.75,
        1.25,
    )  # factor; below and above 1 equally often, as the next ones
    p_contrast: float = 0.15
    contrast: tuple[float, float] = (0.75, 1.25)  # factor about the mean, within the old range
    p_low_resolution: float = 0.25
    low_resolution: tuple[float, float] = (0.5, 1.0)  # share of the voxels that is kept on each axis
    p_gamma_inverted: float = 0.1  # gamma of the negative image
    p_gamma: float = 0.3
    gamma: tuple[float, float] = (0.7, 1.5)  # exponent; mean and deviation stay
    p_channel: float = 0.5  # for blur and low resolution: share of the channels

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name.startswith("p_") and not 0 <= value <= 1:
                raise ValueError(f"Augmentation: {name} is a probability, received {value}")
            if (
                isinstance(value, tuple)
                and name != "flip_axes"
                and not (len(value) == 2 and value[0] <= value[1])
            ):
                raise ValueError(f"Augmentation: {name} is a range (low, high), received {value}")
        if any(axis not in (0, 1, 2) for axis in self.flip_axes):
            raise ValueError(f"Augmentation: flip_axes are of 0, 1, 2 (z, y, x), received {self.flip_axes}")

    @classmethod
    def for_patch(
        cls, patch_size: Sequence[int], flip_axes: Sequence[int] | None = None, elastic: bool = False
    ) -> Augmentation:
        """nnU-Net's choice: slices that are much larger than the patch is deep turn within their plane, all the way;
        oblong 2-D patches by 15 degrees, other volumes by 30 about each axis."""
        slices = len(patch_size) == 2 or max(patch_size) > _ANISOTROPIC * patch_size[0]
        oblong = len(patch_size) == 2 and max(patch_size) > 1.5 * min(patch_size)
        axes = flip_axes if flip_axes is not None else range(3 - len(patch_size), 3)
        return cls(
            flip_axes=tuple(axes),
            in_plane=slices,
            rotation=15.0 if oblong else 180.0 if slices else 30.0,
            p_elastic=0.2 if elastic else 0.0,
        )


def augment(case: Stored, drawn: Drawn, settings: Augmentation | None, x: Tensor, y: Tensor) -> None:
    """Fills x (C, d, h, w) float32 and y (d, h, w) int64 with the patch; without settings as it is."""
    if settings is None:
        _copy(case, drawn.start, (), x, y)
        return
    rng = np.random.default_rng(drawn.seed)
    flips = [axis for axis in settings.flip_axes if rng.random() < 0.5]
    turn = _turn(settings, case.spacing, rng)
    bend = rng.uniform(*settings.elastic) if rng.random() < settings.p_elastic else 0.0
    if turn is None and not bend:
        _copy(case, drawn.start, flips, x, y)
    else:
        whole = np.eye(3) if turn is None else turn
        whole[:, flips] *= -1
        (_read_planes if settings.in_plane else _read)(case, drawn.start, whole, bend, rng, x, y)
    change(x, settings, rng)


def _turn(settings: Augmentation, spacing: Sequence[float], rng: np.random.Generator) -> np.ndarray | None:
    """(3, 3): from the patch's (z, y, x) voxels to the scan's, or None where they are the same."""
    rotated, scaled = rng.random() < settings.p_rotation, rng.random() < settings.p_scale
    turn = np.eye(3)
    if rotated:
        planes = [(1, 2)] if settings.in_plane else [(1, 2), (0, 2), (0, 1)]
        for i, j in planes:
            angle = math.radians(rng.uniform(-settings.rotation, settings.rotation))
            part = np.eye(3)
            part[[i, j], [i, j]] = math.cos(angle)
            part[i, j], part[j, i] = -math.sin(angle), math.sin(angle)
            turn = turn @ part
        turn = turn * np.asarray(spacing) / np.asarray(spacing)[:, None]
    if scaled:
        turn[1 if settings.in_plane else 0 :] *= rng.uniform(*settings.scale)
    return turn if rotated or scaled else None


def _copy(case: Stored, start: Sequence[int], flips: Sequence[int], x: Tensor, y: Tensor) -> None:
    shape = case.shape
    source, target = [], []
    for first, n, p in zip(start, shape, y.shape, strict=True):
        low, high = max(first, 0), min(first + p, n)
        source.append(slice(low, high))
        target.append(slice(low - first, high - first))
    if any(t.stop - t.start < p for t, p in zip(target, y.shape, strict=True)):
        x.zero_()
        y.zero_()
    turned = tuple(slice(None, None, -1) if axis in flips else slice(None) for axis in range(3))
    x.numpy()[_all(turned)][_all(target)] = case.image[_all(source)]
    y.numpy()[turned][tuple(target)] = case.labels[tuple(source)]


def _all(box: Sequence[slice]) -> tuple[slice, ...]:
    """The box in every channel."""
    return (slice(None), *box)


def _read(
    case: Stored,
    start: Sequence[int],
    turn: np.ndarray,
    bend: float,
    rng: np.random.Generator,
    x: Tensor,
    y: Tensor,
) -> None:
    grid, box = _grid(y.shape, start, turn, case.shape, bend, rng)
    image = torch.from_numpy(np.array(case.image[_all(box)]))
    labels = torch.from_numpy(case.labels[box].astype(np.float32))
    x.copy_(F.grid_sample(image[None], grid, "bilinear", "zeros", align_corners=False)[0])
    y.copy_(F.grid_sample(labels[None, None], grid, "nearest", "zeros", align_corners=False)[0, 0])


def _read_planes(
    case: Stored,
    start: Sequence[int],
    turn: np.ndarray,
    bend: float,
    rng: np.random.Generator,
    x: Tensor,
    y: Tensor,
) -> None:
    """Every slice by the same map of its plane: one grid for all, and four neighbours instead of eight."""
    grid, box = _grid(y.shape[1:], start[1:], turn[1:, 1:], case.shape[1:], bend, rng)
    low, high = max(start[0], 0), min(start[0] + len(y), case.shape[0])
    thick = (slice(low, high), *box)
    image = torch.from_numpy(np.array(case.image[_all(thick)]))
    labels = torch.from_numpy(case.labels[thick].astype(np.float32))
    moved = F.grid_sample(image.flatten(0, 1)[None], grid, "bilinear", "zeros", align_corners=False)[0]
    moved = moved.view(len(x), high - low, *y.shape[1:])
    truth = F.grid_sample(labels[None], grid, "nearest", "zeros", align_corners=False)[0]
    first = low - start[0]
    if turn[0, 0] < 0:  # flipped across the slices
        moved, truth, first = moved.flip(1), truth.flip(0), len(y) - first - (high - low)
    x.zero_()
    y.zero_()
    x[:, first : first + high - low] = moved
    y[first : first + high - low] = truth.long()


def _grid(
    patch: Sequence[int],
    start: Sequence[int],
    turn: np.ndarray,
    shape: Sequence[int],
    bend: float,
    rng: np.random.Generator,
) -> tuple[Tensor, tuple[slice, ...]]:
    """For F.grid_sample, (1, *patch, rank): where each voxel is read, in a box of the scan; and that box."""
    side = np.array(patch)
    shift = _displacement(patch, bend, rng) if bend else None
    middle = np.array(start) + (side - 1) / 2
    reach = np.abs(turn) @ ((side - 1) / 2) + (0 if shift is None else float(shift.abs().max()))
    low = np.clip(np.floor(middle - reach), 0, np.array(shape) - 1).astype(int)
    high = np.clip(np.ceil(middle + reach) + 1, low + 1, shape).astype(int)
    size = high - low
    # F.affine_grid counts from -1 to 1, x first, over the patch and over the box.
    theta = np.concatenate([turn * side / size[:, None], (2 * (middle - low + 0.5) / size - 1)[:, None]], 1)
    theta[:, :-1] = theta[:, -2::-1]
    of_x_first = torch.from_numpy(theta[::-1].astype(np.float32))[None]
    grid = F.affine_grid(of_x_first, [1, 1, *patch], align_corners=False)
    if shift is not None:
        grid += shift.flip(0).movedim(0, -1) * torch.tensor(2 / size[::-1], dtype=torch.float32)
    return grid, tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))


def _displacement(patch: Sequence[int], bend: float, rng: np.random.Generator) -> Tensor:
    """(rank, *patch) voxels: cubic B-splines of normal numbers, of deviation `bend` times the side of the patch."""
    field = torch.from_numpy(rng.standard_normal((len(patch), *[_KNOTS + 3] * len(patch)), np.float32))
    for axis, n in enumerate(patch):
        field = torch.tensordot(field, _spline(n), dims=([1], [1]))  # the axis goes last: in turn
        field[axis] *= bend * n
    return field


@functools.lru_cache(64)
def _spline(n: int) -> Tensor:
    """(n, knots) float32: uniform cubic B-splines over n voxels, scaled to keep a deviation of about 1."""
    u = (np.arange(n) + 0.5) / n * _KNOTS
    low = np.floor(u).astype(int)
    t = u - low
    taps = ((1 - t) ** 3 / 6, (4 - 6 * t**2 + 3 * t**3) / 6, (1 + 3 * t + 3 * t**2 - 3 * t**3) / 6, t**3 / 6)
    weights = np.zeros((n, _KNOTS + 3))
    for k, tap in enumerate(taps):
        weights[np.arange(n), low + k] = tap
    return torch.from_numpy((weights / np.sqrt((weights**2).sum(1).mean())).astype(np.float32))
