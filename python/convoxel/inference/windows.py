"""Where windows stand on an image, and how much each of their voxels counts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_LEAST_WEIGHT = 1e-3  # of a Gaussian's rim: a voxel that only rims cover still divides by a normal number
_PADDING_MODES = ("constant", "reflect", "replicate", "circular")

Window = tuple[int, tuple[int, ...]]  # (index in the batch, first voxel on every axis)


def window_size(roi_size: Sequence[int | None] | int | None, inputs: Tensor) -> tuple[int, ...]:
    image = tuple(inputs.shape[2:])
    if not image or inputs.numel() == 0:
        raise ValueError(
            "sliding_window_inference: inputs must be (N, C, *spatial) with at least one voxel, received "
            f"{tuple(inputs.shape)}"
        )
    sizes = [roi_size] * len(image) if roi_size is None or isinstance(roi_size, int) else list(roi_size)
    if len(sizes) != len(image):
        raise ValueError(
            f"sliding_window_inference: roi_size {tuple(sizes)} has {len(sizes)} axes, inputs "
            f"{tuple(inputs.shape)} (N, C, *spatial) have {len(image)}; add a batch or channel axis, or "
            "give one size per spatial axis"
        )
    return tuple(int(r) if r is not None and r > 0 else n for r, n in zip(sizes, image, strict=True))


def per_axis(name: str, value: Sequence[float] | float, rank: int) -> tuple[float, ...]:
    values = tuple(value) if isinstance(value, Sequence) else (value,) * rank
    if len(values) != rank:
        raise ValueError(
            f"sliding_window_inference: {name} {values} should have {rank} numbers, one per axis"
        )
    low, high = (0.0, 1.0) if name == "overlap" else (math.ulp(0.0), math.inf)
    if not all(low <= v < high for v in values):
        allowed = "at least 0 and below 1" if name == "overlap" else "positive and finite"
        raise ValueError(f"sliding_window_inference: {name} must be {allowed}, received {value}")
    return values


def pad(inputs: Tensor, roi: tuple[int, ...], mode: str, cval: float) -> tuple[Tensor, tuple[int, ...]]:
    """The inputs, at least as large as a window, and how many voxels were put before each axis."""
    if mode not in _PADDING_MODES:
        raise ValueError(
            f"sliding_window_inference: padding_mode must be one of {_PADDING_MODES}, received {mode!r}"
        )
    missing = [max(0, r - n) for r, n in zip(roi, inputs.shape[2:], strict=True)]
    before = tuple(m // 2 for m in missing)
    if not any(missing):
        return inputs, before
    widths = [w for m in reversed(missing) for w in (m // 2, m - m // 2)]
    if mode == "constant":
        return F.pad(inputs, widths, value=cval), before
    most = {"reflect": -1, "circular": 0}.get(mode, math.inf)
    for n, m in zip(inputs.shape[2:], missing, strict=True):
        if m - m // 2 > n + most:
            raise ValueError(
                f"sliding_window_inference: {mode} padding cannot add {m} voxels to an axis of {n}; use "
                'padding_mode="replicate" or "constant", or a smaller roi_size'
            )
    return F.pad(inputs, widths, mode=mode), before


def starts(n: int, roi: int, overlap: float) -> list[int]:
    """First voxels of the windows on one axis: n=110, roi=64, overlap=0.5 -> 0, 32, 46."""
    step = max(1, int(roi * (1 - overlap)))
    return [*range(0, n - roi, step), n - roi]


def spread(n: int, roi: int, overlap: float) -> list[int]:
    """First voxels of windows that lie evenly apart, at most roi * (1 - overlap), as nnU-Net's do; each once.

    >>> spread(110, 64, 0.5)
    [0, 23, 46]
    """
    count = math.ceil((n - roi) / (roi * (1 - overlap))) + 1
    width = (n - roi) / (count - 1) if count > 1 else 0.0
    return sorted({round(width * i) for i in range(count)})


def weight_map(
    roi: tuple[int, ...], mode: str, sigma_scale: tuple[float, ...], given: Tensor | None
) -> Tensor:
    """(1, 1, *roi), float32 or the given map's dtype."""
    if mode not in ("constant", "gaussian"):
        raise ValueError(
            f'sliding_window_inference: mode must be "constant" or "gaussian", received {mode!r}'
        )
    if given is not None:
        return checked_weights(given, 1, roi)
    weights = torch.ones(roi, dtype=torch.float64)
    if mode == "gaussian":
        for axis, (n, scale) in enumerate(zip(roi, sigma_scale, strict=True)):
            x = torch.arange(n, dtype=torch.float64) - (n - 1) / 2
            profile = torch.exp(-((x / (scale * n)) ** 2) / 2)
            weights *= profile.reshape([-1 if a == axis else 1 for a in range(len(roi))])
        weights.clamp_(min=_LEAST_WEIGHT)
    return weights.float()[None, None]


def checked_weights(weights: Tensor, batch: int, roi: tuple[int, ...]) -> Tensor:
    shape = tuple(weights.shape)
    if shape == roi:
        weights = weights[None, None]
    elif shape not in ((1, 1, *roi), (batch, 1, *roi)):
        raise ValueError(
            f"sliding_window_inference: a weight map must have the window's shape {roi}, received {shape}"
        )
    if not bool((weights >= 0).all()):
        raise ValueError("sliding_window_inference: a weight map must not hold negative numbers or NaN")
    return weights


def buffer_axis(buffer_dim: int, rank: int) -> int:
    if not -rank <= buffer_dim < rank:
        raise ValueError(
            f"sliding_window_inference: buffer_dim must be from {-rank} to {rank - 1}, received {buffer_dim}"
        )
    return buffer_dim % rank


def bands(n: int, starts: list[list[int]], axis: int | None, steps: int | None) -> list[list[Window]]:
    """Every window, in the parts that share a buffer: one part, or one per image and `steps` positions."""
    if axis is None or steps is None:
        return [list(itertools.product(range(n), itertools.product(*starts)))]
    parts = []
    for image in range(n):
        for i in range(0, len(starts[axis]), steps):
            part = [s if a != axis else s[i : i + steps] for a, s in enumerate(starts)]
            parts.append([(image, start) for start in itertools.product(*part)])
    return parts


def coordinates(window: Window, roi: tuple[int, ...]) -> list[slice]:
    n, start = window
    return [slice(n, n + 1), slice(None), *(slice(s, s + r) for s, r in zip(start, roi, strict=True))]
