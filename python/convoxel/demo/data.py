"""The one scan of the demonstration: the MNI152 template, its tissues, its two halves, and its disturbance.

nilearn's arrays are (x, y, z), x to the right, y to the front, z up (RAS+). They are turned once, here, to
(z, y, x) = (95, 117, 99) voxels of 2 mm; the axis called y is the second in both. The template is
mirror-symmetric, so left and right are never split: one half along y is for training, the other for testing,
and the eight planes between them are for neither.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..volume import Volume

TISSUES = ("CSF", "grey matter", "white matter")
CLASSES = ("background", *TISSUES)
TRAIN = slice(63, 117)  # y > 62 of 117: the frontal half
TEST = slice(0, 54)  # y < 54: the occipital half, with the cerebellum
BIAS = 0.4
NOISE = 0.1


@dataclass(frozen=True)
class Brain:
    """image: Volume (D, H, W) float32 in [0, 1]; labels: Volume (D, H, W) uint8, classes as in CLASSES."""

    image: Volume
    labels: Volume


def load_brain() -> Brain:
    """The MNI152 template at 2 mm with its most probable tissue in every voxel of the brain mask.

    The tissue maps are nilearn's probabilities of grey and white matter; what they leave is CSF. All four
    images are part of the nilearn package. Raises ImportError without nilearn.
    """
    try:
        from nilearn import datasets
    except ImportError as error:
        raise ImportError('the demo needs nilearn: pip install "convoxel[demo]"') from error
    template = datasets.load_mni152_template(resolution=2)
    grey = _zyx(datasets.load_mni152_gm_template(resolution=2))
    white = _zyx(datasets.load_mni152_wm_template(resolution=2))
    brain = _zyx(datasets.load_mni152_brain_mask(resolution=2)) > 0.5
    image = Volume(_zyx(template), spacing=None, affine=template.affine)
    return Brain(image, image.like(tissue_labels(grey, white, brain)))


def _zyx(scan: object) -> NDArray[np.float32]:
    array = scan.get_fdata(dtype=np.float32)  # type: ignore[attr-defined]
    return np.ascontiguousarray(array.transpose(2, 1, 0))


def tissue_labels(grey: NDArray, white: NDArray, brain: NDArray) -> NDArray[np.uint8]:
    """Probabilities of grey and white matter (D, H, W) and the brain mask -> class numbers (D, H, W).

    >>> tissue_labels(np.array([0.2, 0.9, 0.9]), np.array([0.1, 0.1, 0.1]), np.array([True, True, False]))
    array([1, 2, 0], dtype=uint8)
    """
    csf = 1 - grey - white
    return ((np.stack([csf, grey, white]).argmax(0) + 1) * brain).astype(np.uint8)


def smooth_field(shape: tuple[int, ...], generator: torch.Generator, waves: int = 3) -> Tensor:
    """A random smooth field, float32 in [-1, 1] with a largest magnitude of 1.

    A sum of cosines of up to `waves - 1` half periods along each axis (D, H, W), normal random amplitudes, no
    constant: what the coil of an MRI scanner does to the brightness of an image.
    """
    amplitude = torch.randn(waves, waves, waves, generator=generator)
    amplitude[0, 0, 0] = 0
    half_periods = torch.arange(waves)
    z, y, x = (torch.cos(math.pi * torch.outer(half_periods, (torch.arange(n) + 0.5) / n)) for n in shape)
    field = torch.einsum("abc,az,by,cx->zyx", amplitude, z, y, x)
    return field / field.abs().max()


def disturb(image: NDArray[np.float32], seed: int) -> NDArray[np.float32]:
    """The test image: (D, H, W) times a bias field of 1 +- BIAS, plus normal noise of deviation NOISE."""
    generator = torch.Generator().manual_seed(seed)
    clean = torch.from_numpy(image)
    field = smooth_field(image.shape, generator)
    noise = torch.randn(clean.shape, generator=generator)
    return (clean * (1 + BIAS * field) + NOISE * noise).numpy()
