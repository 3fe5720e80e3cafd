"""What scanners do to intensities: noise, blur, brightness, contrast, resolution, gamma; in nnU-Net's order."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..preprocessing.splines import matrix

if TYPE_CHECKING:
    from .augment import Augmentation

_LEAST = 1e-7  # range or deviation that is divided by
_REACH = 4  # sigmas to which the Gaussian is followed


def change(x: Tensor, settings: Augmentation, rng: np.random.Generator) -> None:
    """Changes x (C, d, h, w) float32 in place; what is drawn follows from `rng` alone."""
    if rng.random() < settings.p_noise:
        generator = torch.Generator().manual_seed(int(rng.integers(1 << 62)))
        x.add_(torch.randn(x.shape, generator=generator), alpha=rng.uniform(*settings.noise))
    if rng.random() < settings.p_blur:
        for channel in _some(x, settings, rng):
            _separable(channel, [_gaussian(n, rng.uniform(*settings.blur)) for n in channel.shape])
    if rng.random() < settings.p_brightness:
        for channel in x:
            channel *= _about_one(settings.brightness, rng)
    if rng.random() < settings.p_contrast:
        for channel in x:
            _contrast(channel, _about_one(settings.contrast, rng))
    if rng.random() < settings.p_low_resolution:
        for channel in _some(x, settings, rng):
            share = rng.uniform(*settings.low_resolution)
            keep = [0] if settings.in_plane else []
            _separable(
                channel, [_coarse(n, 1.0 if axis in keep else share) for axis, n in enumerate(channel.shape)]
            )
    for inverted, probability in ((True, settings.p_gamma_inverted), (False, settings.p_gamma)):
        if rng.random() < probability:
            for channel in x:
                _gamma(channel, _about_one(settings.gamma, rng), inverted)


def _some(x: Tensor, settings: Augmentation, rng: np.random.Generator) -> list[Tensor]:
    return [channel for channel in x if rng.random() < settings.p_channel]


def _about_one(limits: tuple[float, float], rng: np.random.Generator) -> float:
    """Below 1 as often as above, if the range has both."""
    low, high = limits
    if low < 1 and (high <= 1 or rng.random() < 0.5):
        return rng.uniform(low, min(high, 1.0))
    return rng.uniform(max(low, 1.0), high)


def _contrast(x: Tensor, factor: float) -> None:
    """Away from the mean or towards it, within the range that was there."""
    low, high = x.aminmax()
    mean = x.mean()
    x.sub_(mean).mul_(factor).add_(mean).clamp_(low, high)


def _gamma(x: Tensor, exponent: float, inverted: bool) -> None:
    """((x - min) / range) ^ exponent, brought back to the mean and deviation that were there."""
    if inverted:
        x.neg_()
    deviation, mean = torch.std_mean(x, correction=0)
    low, high = x.aminmax()
    x.sub_(low).mul_(1 / (high - low).clamp(min=_LEAST)).clamp_(0, 1).pow_(exponent)
    new_deviation, new_mean = torch.std_mean(x, correction=0)
    x.sub_(new_mean).mul_(deviation / new_deviation.clamp(min=_LEAST)).add_(mean)
    if inverted:
        x.neg_()


def _separable(x: Tensor, axes: list[Tensor]) -> None:
    """x (d, h, w) becomes the product with a matrix on each axis, in place."""
    depth, rows, columns = axes
    planes = rows @ (x @ columns.T)
    torch.matmul(depth, planes.flatten(1), out=x.view(len(x), -1))


def _gaussian(n: int, sigma: float) -> Tensor:
    """(n, n) float32: a Gaussian of `sigma` voxels, the edge continued."""
    taps = np.arange(-int(np.ceil(_REACH * sigma)), int(np.ceil(_REACH * sigma)) + 1)
    weights = np.exp(-0.5 * (taps / sigma) ** 2)
    whole = np.zeros((n, n), np.float32)
    rows = np.repeat(np.arange(n), len(taps))
    columns = np.clip(np.add.outer(np.arange(n), taps).ravel(), 0, n - 1)
    np.add.at(whole, (rows, columns), np.tile(weights / weights.sum(), n))
    return torch.from_numpy(whole)


@functools.lru_cache(512)
def _low_and_back(n: int, few: int) -> Tensor:
    return (matrix(few, n, 1) @ matrix(n, few, 0)).float()


def _coarse(n: int, share: float) -> Tensor:
    """(n, n) float32: every so many voxels kept, and linearly interpolated."""
    return _low_and_back(n, max(1, round(n * share)))
