"""One output of a predictor, as its windows add up to a whole image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .windows import Window


@dataclass
class Canvas:
    """One output of the predictor, being blended. `size` voxels of it stand for `roi` voxels of the image."""

    total: Tensor  # (N, K, *spatial), the weighted sum
    weight: Tensor  # (N or 1, 1, *spatial), the sum of the weights
    roi: tuple[int, ...]
    size: tuple[int, ...]
    dtype: torch.dtype
    sheet: Tensor  # what windows are added to: the total, or a buffer of which the first voxel is
    corner: tuple[int, ...]  # (n, *first) of the total

    @classmethod
    def blank(
        cls,
        y: Tensor,
        n: int,
        counted: int,
        roi: tuple[int, ...],
        image: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
    ) -> Canvas:
        if not dtype.is_floating_point:
            dtype = y.dtype if y.dtype.is_floating_point else torch.float32
        exact = torch.promote_types(dtype, torch.float32)
        size = tuple(y.shape[2:])
        whole = tuple(length * s // r for length, s, r in zip(image, size, roi, strict=True))
        total = torch.zeros((n, y.shape[1], *whole), dtype=exact, device=device)
        weight = torch.zeros((counted, 1, *whole), dtype=exact, device=device)
        return cls(total, weight, roi, size, dtype, total, (0,) * (1 + len(roi)))

    def begin(self, band: list[Window], axis: int, device: torch.device) -> None:
        """A buffer for the windows of one band: the whole image, but along `axis` no more than they span."""
        firsts = [self._first(start)[axis] for _, start in band]
        shape = list(self.total.shape[1:])
        shape[1 + axis] = max(firsts) + self.size[axis] - min(firsts)
        corner = [band[0][0], *[0] * len(self.size)]
        corner[1 + axis] = min(firsts)
        self.sheet = torch.zeros((1, *shape), dtype=self.total.dtype, device=device)
        self.corner = tuple(corner)

    def add(self, y: Tensor, batch: list[Window], weights: Tensor) -> None:
        """y: (B, K, *size); weights: (B or 1, 1, *roi)."""
        if tuple(y.shape[2:]) != self.size or y.shape[1] != self.total.shape[1]:
            shape = ", ".join(map(str, (self.total.shape[1], *self.size)))
            raise ValueError(f"predictor: outputs were (B, {shape}) at first, now they are {tuple(y.shape)}")
        if self.size != self.roi:
            weights = F.interpolate(weights, self.size, mode="nearest-exact")
        weights = weights.to(self.total.dtype)
        y = y.to(self.sheet.device, self.total.dtype)
        near = weights.to(self.sheet.device)
        for i, (n, start) in enumerate(batch):
            first, w = self._first(start), min(i, len(weights) - 1)
            shifted = tuple(f - c for f, c in zip(first, self.corner[1:], strict=True))
            self.sheet[n - self.corner[0]][self._region(shifted)].addcmul_(y[i], near[w])
            if n < len(self.weight):
                self.weight[n][self._region(first)].add_(weights[w])

    def end(self) -> None:
        n, *corner = self.corner
        extent = zip(corner, self.sheet.shape[2:], strict=True)
        region = (slice(None), *(slice(c, c + length) for c, length in extent))
        self.total[n][region].add_(self.sheet[0].to(self.total.device))

    def result(self, before: tuple[int, ...], image: tuple[int, ...], check: bool) -> Tensor:
        """The blend, cropped to the image that began `before` voxels into the padded one."""
        if check and not bool((self.weight > 0).all()):
            raise ValueError(
                "sliding_window_inference: the weights of some voxels sum to 0; make them positive"
            )
        crop = [slice(None), slice(None)]
        for b, n, s, r in zip(before, image, self.size, self.roi, strict=True):
            crop.append(slice(round(b * s / r), round((b + n) * s / r)))
        return self.total.div_(self.weight)[tuple(crop)].to(self.dtype)

    def _first(self, start: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(f * s // r for f, s, r in zip(start, self.size, self.roi, strict=True))

    def _region(self, first: tuple[int, ...]) -> tuple[slice, ...]:
        return (slice(None), *(slice(f, f + s) for f, s in zip(first, self.size, strict=True)))
