"""torch.vmap of convolutions: a batch of images joins N; a batch of weights joins the groups.

`op` is the operator itself: each rule calls it once, with more images or groups."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..geometry import Ints
from .library import Operator


def front(t: Tensor, axis: int | None, size: int) -> Tensor:
    return t.expand(size, *t.shape) if axis is None else t.movedim(axis, 0)


def join(t: Tensor, axis: int) -> Tensor:
    """(B, ...) with B put in front of `axis` and merged into it."""
    return t.movedim(0, axis).flatten(axis, axis + 1)


def split(t: Tensor, axis: int, size: int) -> Tensor:
    return t.unflatten(axis, (size, t.shape[axis] // size)).movedim(axis, 0)


def linear(op: Operator, info: Any, in_dims: Any, x: Tensor, w: Tensor, b: Tensor | None, stride: Ints, padding: Ints,
           dilation: Ints, groups: int, *size: Any) -> tuple[Tensor, int]:  # fmt: skip
    """Of conv and conv_input_grad alike: first argument images, second weights, third bias."""
    batch = info.batch_size
    if in_dims[1] is None and in_dims[2] is None:
        images = join(x.movedim(in_dims[0], 0), 0)
        return split(op(images, w, b, stride, padding, dilation, groups, *size), 0, batch), 0
    xb, wb = (front(t, d, batch) for t, d in zip((x, w), in_dims[:2], strict=True))
    bias = None if b is None else front(b, in_dims[2], batch).flatten(0, 1)
    how = (stride, padding, dilation, groups * batch, *size)
    return split(op(join(xb, 1), join(wb, 0), bias, *how), 1, batch), 0


def weight_grad(op: Operator, info: Any, in_dims: Any, x: Tensor, dy: Tensor, stride: Ints, padding: Ints,
                dilation: Ints, groups: int, kernel: Ints) -> tuple[Tensor, int]:  # fmt: skip
    xb, dyb = (front(t, d, info.batch_size) for t, d in zip((x, dy), in_dims[:2], strict=True))
    how = (stride, padding, dilation, groups * info.batch_size, kernel)
    return split(op(join(xb, 1), join(dyb, 1), *how), 0, info.batch_size), 0


def channel_sum(op: Operator, info: Any, in_dims: Any, y: Tensor) -> tuple[Tensor, int]:
    return split(op(join(y.movedim(in_dims[0], 0), 1)), 0, info.batch_size), 0
