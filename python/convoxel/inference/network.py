"""The network's side of a prediction: every checkpoint, every mirror image, over windows of one scan."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from ..conversion.layout import to_last
from ..modes import in_mode

Flips = tuple[bool, ...]  # of the axes D, H, W
Model = Callable[[Tensor], Tensor]


class Network:
    """Models over windows of an image (C, D, H, W), float32.

    Args:
        models: each (B, C, d, h, w) float32 -> (B, K, d, h, w) logits; a patch of depth 1 and `flat`: without d.
        patch: (d, h, w) voxels.
        mirror_axes: of 0, 1, 2: windows are also seen mirrored along these, in every combination.
    """

    def __init__(self, models: Sequence[Model], image: Tensor, patch: Sequence[int], mirror_axes: Sequence[int],
                 flat: bool) -> None:  # fmt: skip
        self.models, self.image, self.patch, self.flat = models, image, tuple(patch), flat
        self.flips: list[Flips] = [
            tuple(a in some for a in range(3))
            for n in range(len(mirror_axes) + 1)
            for some in itertools.combinations(mirror_axes, n)
        ]
        self.devices = [device_of(model) for model in models]

    @property
    def passes(self) -> int:
        """Logits that each window gets."""
        return len(self.models) * len(self.flips)

    def __call__(self, starts: Sequence[Sequence[int]]) -> Iterator[tuple[Tensor, Flips]]:
        """For each pass: logits (B, K, *patch) of the windows that begin there, float32, channels adjacent in memory,
        and the axes along which they run backwards."""
        for flips in self.flips:
            axes = [2 + a for a, flipped in enumerate(flips) if flipped]
            for model, device in zip(self.models, self.devices, strict=True):
                # A batch of its own for each model: they may work in place.
                x = torch.stack([self.window(start) for start in starts])
                x = torch.flip(x, axes) if axes else x
                x = to_last(x[:, :, 0] if self.flat else x).to(device)
                y = checked(model(x), x)
                y = y[:, :, None] if self.flat else y
                y = y.to("cpu", torch.float32).contiguous(memory_format=torch.channels_last_3d)
                yield y, flips
                del x, y  # or they would lie beside the next pass

    def window(self, start: Sequence[int]) -> Tensor:
        index = [slice(None), *(slice(s, s + p) for s, p in zip(start, self.patch, strict=True))]
        return self.image[tuple(index)]


def device_of(model: object) -> torch.device:
    parameter = next(model.parameters(), None) if isinstance(model, torch.nn.Module) else None
    return torch.device("cpu") if parameter is None else parameter.device


def checked(y: Any, x: Tensor) -> Tensor:
    if not isinstance(y, Tensor):
        raise TypeError(
            f"predict_labels: the model returned {type(y).__name__}, expected one tensor of logits; with "
            "deep supervision wrap it: lambda x: model(x)[0]"
        )
    if y.ndim != x.ndim or y.shape[0] != x.shape[0] or y.shape[2:] != x.shape[2:]:
        axes = "h, w" if x.ndim == 4 else "d, h, w"
        raise ValueError(
            f"predict_labels: for patches (B, C, {axes}) = {tuple(x.shape)} the model returned "
            f"{tuple(y.shape)}, expected (B, K, {axes}) of the same B, {axes}"
        )
    if y.is_complex():
        raise TypeError(f"predict_labels: the model returned {y.dtype}, expected real logits")
    return y


@contextmanager
def evaluating(models: Sequence[object]) -> Iterator[None]:
    """Eval mode for every module inside, without gradients, and afterwards the mode that each had."""
    with ExitStack() as stack:
        for model in models:
            if isinstance(model, torch.nn.Module):
                stack.enter_context(in_mode(model, training=False))
        stack.enter_context(torch.no_grad())
        yield
