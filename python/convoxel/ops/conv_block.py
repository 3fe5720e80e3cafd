"""Convolution with the moments of its result, for the norm behind it.

    conv_moments   y, mean, var   y = F(x, w) + b, and y's moments as `norm` returns them: gathered part by part while
                                  the parts are at hand, so that y need not be read again

The moments are those of y as stored (bfloat16: rounded), in float64, the variance biased; they carry no gradient: the
gradient of a norm with respect to y already holds what goes through them (ops/norm.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .. import _C, runtime
from ..geometry import Ints, is_channels_last
from . import conv as conv_
from . import conv_vmap
from .library import SMALL, Operator, dense, pointer, register, scratch

# y, mean, var -------------------------------------------------------------------------------------


def _check_norm_groups(op: str, channels: int, norm_groups: int) -> None:
    if norm_groups < 1 or channels % norm_groups:
        raise RuntimeError(f"{op}: expected norm_groups to divide the {channels} output channels, received "
                           f"{norm_groups}; choose a divisor of {channels}")  # fmt: skip


def _moments_fake(
    x: Tensor, w: Tensor, b: Tensor | None, stride: Ints, padding: Ints, dilation: Ints, groups: int,
    norm_groups: int, over_batch: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    y = conv_._conv_fake(x, w, b, stride, padding, dilation, groups)
    _check_norm_groups("conv_moments", y.shape[1], norm_groups)
    shape = (norm_groups,) if over_batch else (y.shape[0], norm_groups)
    mean, var = (x.new_empty(shape, dtype=torch.float64) for _ in range(2))
    return y, mean, var


@lru_cache(maxsize=4096)
def _slots(geometry: tuple[int, ...], dtype: torch.dtype, isa: str) -> int:
    return _C.conv_forward_slots(runtime.DTYPES[dtype], geometry)


def _of(y: Tensor, norm_groups: int, over_batch: bool) -> list[int]:
    """Whose moments, as csrc/bind.cpp reads it."""
    pixels = math.prod(y.shape[2:])
    last = is_channels_last(y) or pixels == 1
    return [y.shape[0], y.shape[1], pixels, norm_groups, over_batch, last]


def _read_moments(y: Tensor, numbers: list[int], mean: Tensor, var: Tensor) -> None:
    """mean and var by a pass over y."""
    dtype, threads = runtime.DTYPES[y.dtype], runtime.threads() if y.numel() > SMALL else 1
    of_image = _C.moments_slots(dtype, numbers)
    slots = scratch(y.shape[0] * of_image * 3 * y.shape[1] * 8)
    memory = scratch(_C.moments_scratch(dtype, numbers, threads))
    with runtime.serve("moments", "direct", lambda: f"{tuple(y.shape)} {y.dtype}"):
        _C.gather_moments(dtype, numbers, pointer(y), slots.data_ptr(), memory.data_ptr(), threads)
        _C.combine_moments(dtype, numbers, slots.data_ptr(), of_image, pointer(mean), pointer(var), threads)


def _moments_cpu(
    x: Tensor, w: Tensor, b: Tensor | None, stride: Ints, padding: Ints, dilation: Ints, groups: int,
    norm_groups: int, over_batch: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    y, mean, var = _moments_fake(x, w, b, stride, padding, dilation, groups, norm_groups, over_batch)
    if y.numel() == 0:
        return y, mean.zero_(), var.zero_()
    numbers = _of(y, norm_groups, over_batch)
    if x.numel() == 0:
        y = conv_._conv_cpu(x, w, b, stride, padding, dilation, groups)
        _read_moments(y, numbers, mean, var)
        return y, mean, var
    (x, x_last), (w, w_last) = dense(x), dense(w)
    layouts = x_last, is_channels_last(y), (), w_last, conv_.mixed(x, w)
    geometry = conv_.numbers(x.shape, w.shape, y.shape, stride, padding, dilation, groups, *layouts)
    b = None if b is None else b.contiguous()
    run_with_moments("conv_moments", geometry, [x], w, b, y, numbers, mean, var)
    return y, mean, var


def run_with_moments(name: str, geometry: list[int], xs: Sequence[Tensor], w: Tensor, b: Tensor | None, y: Tensor,
                     numbers: list[int], mean: Tensor, var: Tensor) -> None:  # fmt: skip
    """The forward kernel, of x in its parts, and the moments of y: by a pass over y where the algorithm gathers none,
    and where they are not finite, since squares overflowed."""
    dtype, threads = runtime.DTYPES[y.dtype], runtime.threads()
    how = runtime.get_float32_conv_precision(), runtime.get_conv_algorithm(), runtime.isa()
    chosen, routed, size = conv_.planned("conv_forward", tuple(geometry), y.dtype, *how, threads)
    of_image = _slots(tuple(routed), y.dtype, runtime.isa())
    read = conv_.readable(w, y.dtype, chosen)
    memory, slots = scratch(size), scratch(y.shape[0] * of_image * 3 * y.shape[1] * 8)
    gathered = slots.data_ptr() if of_image else 0
    with runtime.serve(
        name, chosen.algorithm, lambda: conv_.problem(routed, y.dtype, b is not None), chosen.why
    ):
        _C.conv_forward_moments(dtype, routed, [*map(pointer, xs)], pointer(read), pointer(b), pointer(y), gathered,
                                memory.data_ptr(), threads)  # fmt: skip
        where = slots.data_ptr(), of_image, pointer(mean), pointer(var)
        found = of_image > 0 and _C.combine_moments(dtype, numbers, *where, threads)
    if not found:
        _read_moments(y, numbers, mean, var)


def _moments_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    y, mean, var = output
    ctx.mark_non_differentiable(mean, var)
    ctx.set_materialize_grads(False)
    conv_._conv_setup(ctx, inputs[:7], y)


def _moments_backward(ctx: Any, dy: Tensor | None, dmean: None, dvar: None) -> tuple[Any, ...]:
    return (None,) * 9 if dy is None else (*conv_._conv_backward(ctx, dy), None, None)


def _moments_vmap(info: Any, in_dims: Any, x: Tensor, w: Tensor, b: Tensor | None, stride: Ints, padding: Ints,
                  dilation: Ints, groups: int, norm_groups: int, over_batch: bool) -> tuple[Any, Any]:  # fmt: skip
    """The batch joins the groups of both kinds."""
    size = info.batch_size
    xb, wb = (conv_vmap.front(t, d, size) for t, d in zip((x, w), in_dims[:2], strict=True))
    bias = None if b is None else conv_vmap.front(b, in_dims[2], size).flatten(0, 1)
    how = (stride, padding, dilation, groups * size, norm_groups * size, over_batch)
    y, mean, var = conv_moments(conv_vmap.join(xb, 1), conv_vmap.join(wb, 0), bias, *how)
    at = 0 if over_batch else 1
    return (conv_vmap.split(y, 1, size), *(conv_vmap.split(t, at, size) for t in (mean, var))), (0, 0, 0)


conv_moments: Operator = register(
    f"conv_moments(Tensor x, Tensor w, Tensor? b, {conv_.HOW}, SymInt norm_groups, bool over_batch) "
    "-> (Tensor, Tensor, Tensor)",
    _moments_cpu, _moments_fake, _moments_backward, _moments_setup, _moments_vmap,
)  # fmt: skip
