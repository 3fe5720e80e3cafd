"""The intensity normalisations of nnU-Net, by its names; each works on one channel, in place.

    CTNormalization           (clip(x, percentile 0.5, percentile 99.5) - mean) / deviation, of the training set
    ZScoreNormalization       (x - mean) / deviation of this image, or of what lies inside its mask alone
    RescaleTo01Normalization  (x - min) / (max - min)
    RGBTo01Normalization      x / 255
    NoNormalization           x

Means and deviations are summed in float64 (nnU-Net: float32, which is off by 1e-4 on 10^8 raw Hounsfield units).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

SCHEMES = (
    "CTNormalization",
    "ZScoreNormalization",
    "RescaleTo01Normalization",
    "RGBTo01Normalization",
    "NoNormalization",
)
_LEAST = 1e-8  # deviation or range that is divided by


class Intensities(NamedTuple):
    """Of the foreground of the training set, in the image's units (CT: Hounsfield)."""

    mean: float
    std: float
    percentile_00_5: float
    percentile_99_5: float


def normalise(
    image: NDArray[np.float32],
    scheme: str,
    intensities: Intensities | None = None,
    mask: NDArray[np.bool_] | None = None,
) -> None:
    """Normalises one channel (D, H, W) in place.

    Args:
        image: float32, written to.
        scheme: one of SCHEMES.
        intensities: for CTNormalization.
        mask: (D, H, W), for ZScoreNormalization: only voxels inside count and change.

    Raises:
        ValueError: an unknown scheme, no intensities for CT, or values that are not RGB.

    Source: nnunetv2.preprocessing.normalization.default_normalization_schemes.

    >>> image = np.array([[[-2000, 0, 3000]]], np.float32)
    >>> normalise(image, "CTNormalization", Intensities(100, 50, -100, 400))
    >>> image
    array([[[-4., -2.,  6.]]], dtype=float32)
    """
    if scheme == "CTNormalization":
        if intensities is None:
            raise ValueError("CTNormalization: the model does not say the intensities of its training set")
        np.clip(image, intensities.percentile_00_5, intensities.percentile_99_5, out=image)
        image -= np.float32(intensities.mean)
        image /= np.float32(max(intensities.std, _LEAST))
    elif scheme == "ZScoreNormalization":
        _z_score(image, mask)
    elif scheme == "RescaleTo01Normalization":
        image -= image.min()
        image /= max(image.max(), np.float32(_LEAST))
    elif scheme == "RGBTo01Normalization":
        _check_rgb(image)
        image /= np.float32(255)
    elif scheme != "NoNormalization":
        raise ValueError(f"unknown normalisation {scheme!r}; expected one of {', '.join(SCHEMES)}")


def _z_score(image: NDArray[np.float32], mask: NDArray[np.bool_] | None) -> None:
    inside: Any = image if mask is None else image[mask]
    if not inside.size:
        return
    mean = inside.mean(dtype=np.float64)
    deviation = np.sqrt(_mean_square(inside, mean))
    inside -= np.float32(mean)
    inside /= np.float32(max(deviation, _LEAST))
    if mask is not None:
        image[mask] = inside


def _mean_square(values: NDArray[np.float32], mean: float) -> float:
    """mean((values - mean)^2) in float64, by planes: no copy of the whole."""
    planes = values if values.ndim > 1 else [values]
    return sum(float(np.square(plane - mean, dtype=np.float64).sum()) for plane in planes) / values.size


def _check_rgb(image: NDArray[np.float32]) -> None:
    low, high = float(image.min()), float(image.max())
    if low < 0 or high > 255:
        raise ValueError(
            f"RGBTo01Normalization: expected values from 0 to 255, received {low:g} to {high:g}; this model was "
            "trained on colour images"
        )
