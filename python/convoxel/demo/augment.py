"""Endless different patches out of one half of one brain.

Geometry first: axes flipped, rotated and scaled by one matrix, so that image and labels are read from the
original grid exactly once. Then intensity: contrast curve, brightness, bias field, noise.
"""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from .data import smooth_field

DEFORMED = 0.2  # share of the patches that are rotated and scaled; the others keep the sharpness of the scan
ROTATION = 20.0  # degrees about each axis, at most
SCALE = (0.85, 1.2)
GAMMA = 0.15  # exponent of the contrast curve: exp(-GAMMA) to exp(GAMMA)
BRIGHTNESS = (0.8, 1.2)
BIAS = (0.0, 0.5)
FIELD = (95, 117, 99)  # voxels over which the bias field varies: a whole scan, of which a patch sees a part
NOISE = (0.06, 0.12)


class Patches(Dataset):
    """Random patches (1, d, h, w) float32 with labels (d, h, w) int64; every reading draws anew.

    image (D, H, W) float32 in [0, 1], labels (D, H, W) uint8: what may be seen in training, and nothing
    else. A patch that reaches over the border sees the image mirrored there. The sequence of patches
    follows from the seed.
    """

    def __init__(self, image: NDArray, labels: NDArray, size: tuple[int, int, int], count: int, seed: int):
        self.image = torch.from_numpy(np.ascontiguousarray(image))[None, None]
        self.labels = torch.from_numpy(labels.astype(np.float32))[None, None]
        self.size, self.count = size, count
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not 0 <= index < self.count:
            raise IndexError(f"patch {index} of {self.count}")
        grid = self._grid()
        image = F.grid_sample(self.image, grid, "bilinear", "reflection", align_corners=False)[0]
        labels = F.grid_sample(self.labels, grid, "nearest", "reflection", align_corners=False)[0, 0]
        return self._intensity(image), labels.long()

    def _grid(self) -> Tensor:
        """(1, d, h, w, 3): where in the image each voxel of the patch comes from, in [-1, 1], (x, y, z)."""
        patch = torch.tensor(self.size[::-1], dtype=torch.float32)
        whole = torch.tensor(self.image.shape[:1:-1], dtype=torch.float32)
        turn = torch.eye(3)
        if torch.rand((), generator=self.generator) < DEFORMED:
            turn = self._rotation() * self._uniform(*SCALE)
        flips = torch.randint(0, 2, (3,), generator=self.generator) * 2.0 - 1
        room = (whole - patch).clamp(min=0)
        first = (torch.rand(3, generator=self.generator) * (room + 1)).floor()  # whole voxels: no blur
        voxels = torch.cat([turn * flips * patch / 2, (first - room / 2)[:, None]], dim=1)
        return F.affine_grid((voxels * 2 / whole[:, None])[None], [1, 1, *self.size], align_corners=False)

    def _rotation(self) -> Tensor:
        """(3, 3): the product of three rotations, one in the plane of each pair of axes."""
        product = torch.eye(3)
        for i, j in combinations(range(3), 2):
            angle = math.radians(self._uniform(-ROTATION, ROTATION))
            turn = torch.eye(3)
            turn[i, i] = turn[j, j] = math.cos(angle)
            turn[j, i] = math.sin(angle)
            turn[i, j] = -turn[j, i]
            product = product @ turn
        return product

    def _intensity(self, image: Tensor) -> Tensor:
        image = image.clamp(0, 1) ** math.exp(self._uniform(-GAMMA, GAMMA)) * self._uniform(*BRIGHTNESS)
        field = self._field()
        noise = torch.randn(image.shape, generator=self.generator)
        return image * (1 + self._uniform(*BIAS) * field) + self._uniform(*NOISE) * noise

    def _field(self) -> Tensor:
        """(d, h, w): a patch somewhere in a new bias field."""
        whole = [max(sizes) for sizes in zip(FIELD, self.size, strict=True)]
        field = smooth_field(tuple(whole), self.generator)
        for axis, (n, m) in enumerate(zip(whole, self.size, strict=True)):
            first = int(torch.randint(0, n - m + 1, (), generator=self.generator))
            field = field.narrow(axis, first, m)
        return field

    def _uniform(self, low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=self.generator).item()
