"""What a scanner makes of tissues: contrast per modality, bias field, blurred noise, integers.

CT is in Hounsfield units. MR is in arbitrary units, another scale for every scan, with a receive field that
makes one side brighter, and Rician noise: |v + n1 + i n2|.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .shapes import Field, smooth_noise

Tissue = tuple[float, ...]  # one value per modality of the case

_TISSUES = ("air", "fat", "muscle", "bone", "marrow", "lung", "water", "bowel")
_ORGANS = ("liver", "spleen", "kidney", "medulla", "vessel", "cyst", "metastasis", "adenoma")
_CONTRAST: dict[str, tuple[float, ...]] = dict(
    #    air  fat  muscle bone marrow lung water bowel | liver spleen kidney medulla vessel cyst metast. adenoma
    CT=(-1000, -100, 55, 520, 210, -840, 15, 30, 108, 124, 185, 140, 178, 8, 62, 150),
    T1=(0.01, 0.95, 0.38, 0.10, 0.60, 0.04, 0.16, 0.25, 0.56, 0.46, 0.44, 0.34, 0.90, 0.15, 0.40, 0.60),
    T2=(0.01, 0.70, 0.22, 0.08, 0.42, 0.04, 1.00, 0.75, 0.30, 0.55, 0.62, 0.72, 0.10, 1.00, 0.52, 0.42),
)  # fmt: skip
MODALITIES = tuple(_CONTRAST)


def tissues(modalities: Sequence[str], rng: np.random.Generator) -> dict[str, Tissue]:
    """The values of every tissue of one patient: a little different in each, contrast medium most of all."""
    columns = []
    for modality in modalities:
        values = np.array(_CONTRAST[modality], float)
        spread = 5.0 if modality == "CT" else 0.02
        medium = rng.normal(0, 15.0) if modality == "CT" else 0.0
        values[1:] += rng.normal(0, spread, len(values) - 1)
        values[10:13] += medium
        columns.append(np.maximum(values, -1000 if modality == "CT" else 0.01))
    names = (*_TISSUES, *_ORGANS)
    return {name: tuple(float(column[i]) for column in columns) for i, name in enumerate(names)}


def between(a: Tissue, b: Tissue, share: float) -> Tissue:
    """From a (share 0) towards b (share 1)."""
    return tuple(p + share * (q - p) for p, q in zip(a, b, strict=True))


def acquire(
    image: Field, modality: str, spacing: Sequence[float], rng: np.random.Generator
) -> NDArray[np.int16]:
    """(D, H, W) tissue values -> what is stored: texture, bias field, noise; spacing (z, y, x) in mm."""
    extent = np.array(image.shape) * spacing
    texture = smooth_noise(rng, image.shape, np.minimum(extent / 9, np.array(image.shape) / 2))
    noise = _grain(rng, image.shape)
    if modality == "CT":
        beam = smooth_noise(rng, image.shape, extent / 150)  # hardening and scatter
        values = image + (image > -500) * (4 * texture + 4 * beam) + rng.uniform(10, 18) * noise
        return np.clip(np.rint(values), -1024, 3071).astype(np.int16)
    bias = np.exp(np.float32(0.22) * smooth_noise(rng, image.shape, extent / 180))
    signal = image * (1 + np.float32(0.04) * texture) * bias
    sigma = np.float32(rng.uniform(0.025, 0.05))
    values = np.hypot(signal + sigma * noise, sigma * _grain(rng, image.shape)) * rng.uniform(400, 1200)
    return np.clip(np.rint(values), 0, 32767).astype(np.int16)


def _grain(rng: np.random.Generator, shape: Sequence[int]) -> Field:
    """Normal noise of deviation 1, blurred in the plane as reconstruction does: neighbours resemble each other."""
    noise = rng.standard_normal(shape, np.float32)
    side, centre = np.float32(0.25), np.float32(0.5)
    for axis in (1, 2):
        rolled = np.roll(noise, 1, axis) + np.roll(noise, -1, axis)
        noise = centre * noise + side * rolled
    return noise / np.float32(0.375)  # (0.25^2 + 0.5^2 + 0.25^2) over both axes, square root
