"""Convolution together with what a block around it does to its tensors.

    conv_moments          y, mean, var   y = F(x, w) + b, and y's moments as `norm` returns them: gathered part by part
                                         while the parts are at hand, so that y need not be read again
    norm_act_conv         y, mean, var   the same of z = act(norm(x)), which is made of x where the convolution reads it
                                         and never written
    norm_act_conv_weight_grad   dw       H(z, dy)

The moments are those of y as stored (bfloat16: rounded), in float64, the variance biased; they carry no gradient: the
gradient of a norm with respect to y already holds what goes through them (ops/norm.py). z has the bits that `norm_act`
writes. Direct, Winograd's and AMX convolutions of more than one tap read x that way; the others, and what has no
elements, take z from `norm_act`.
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
from . import norm_act as norm_act_
from .library import SMALL, Operator, dense, pointer, register, scratch
from .norm import _channels, _constant, compute_dtype

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
    x, x_last = dense(x)
    geometry = conv_.numbers(
        x.shape, w.shape, y.shape, stride, padding, dilation, groups, x_last, is_channels_last(y)
    )
    w, b = w.contiguous(), None if b is None else b.contiguous()
    if not _run_with_moments(geometry, x, w, b, y, numbers, mean, var):
        _read_moments(y, numbers, mean, var)
    return y, mean, var


def _run_with_moments(geometry: list[int], x: Tensor, w: Tensor, b: Tensor | None, y: Tensor, numbers: list[int],
                      mean: Tensor, var: Tensor, load: Tensor | None = None, relu: bool = False) -> bool:  # fmt: skip
    """The forward kernel; whether it has left finite moments too. They are not where the algorithm gathers none, and
    where squares overflow, which the pass over y can help. load: what x goes through, of `_load`."""
    dtype, threads = runtime.DTYPES[x.dtype], runtime.threads()
    chosen, routed, size = _planned("conv_forward", geometry, x.dtype)
    of_image = _slots(tuple(routed), x.dtype, runtime.isa()) if mean.numel() else 0
    memory, slots = scratch(size), scratch(y.shape[0] * of_image * 3 * y.shape[1] * 8)
    gathered = slots.data_ptr() if of_image else 0
    name = "conv_moments" if load is None else "norm_act_conv"
    with runtime.serve(
        name, chosen.algorithm, lambda: conv_.problem(routed, x.dtype, b is not None), chosen.why
    ):
        _C.conv_forward_block(dtype, routed, pointer(x), pointer(w), pointer(b), pointer(y), pointer(load), relu,
                              gathered, memory.data_ptr(), threads)  # fmt: skip
        if not of_image:
            return False
        return _C.combine_moments(
            dtype, numbers, slots.data_ptr(), of_image, pointer(mean), pointer(var), threads
        )


def _planned(op: str, geometry: list[int], dtype: torch.dtype) -> tuple[Any, list[int], int]:
    how = runtime.get_float32_conv_precision(), runtime.get_conv_algorithm(), runtime.isa()
    return conv_.planned(op, tuple(geometry), dtype, *how, runtime.threads())


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


# The same of z = act(norm(x)) --------------------------------------------------------------------

LOADING = ("direct", "winograd", "amx")  # algorithms that can


def _norm_check(op: str, x: Tensor, mean: Tensor, var: Tensor, nw: Tensor | None, nb: Tensor | None,
                slopes: Tensor | None, norm_groups: int, over_batch: bool, fixed: bool, kind: str) -> None:  # fmt: skip
    norm_act_._check(op, x, nw, nb, slopes, None, mean, var, norm_groups, over_batch, fixed, kind)


def _block_fake(
    x: Tensor, mean: Tensor, var: Tensor, nw: Tensor | None, nb: Tensor | None, slopes: Tensor | None,
    norm_groups: int, over_batch: bool, fixed: bool, eps: float, kind: str, alpha: float,
    w: Tensor, b: Tensor | None, stride: Ints, padding: Ints, dilation: Ints, groups: int, out_groups: int,
    out_over_batch: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    _norm_check("norm_act_conv", x, mean, var, nw, nb, slopes, norm_groups, over_batch, fixed, kind)
    if out_groups:
        return _moments_fake(x, w, b, stride, padding, dilation, groups, out_groups, out_over_batch)
    y = conv_._conv_fake(x, w, b, stride, padding, dilation, groups)
    return y, x.new_empty(0, dtype=torch.float64), x.new_empty(0, dtype=torch.float64)


def _loads(op: str, geometry: list[int], dtype: torch.dtype, w: Tensor, kind: str) -> bool:
    """Whether the kernel of this call reads x through a norm and a kinked activation; a single tap reads x where it
    lies."""
    if kind not in norm_act_.KINKED:
        return False
    return math.prod(w.shape[2:]) > 1 and _planned(op, geometry, dtype)[0].algorithm in LOADING


def _load(x: Tensor, mean: Tensor, var: Tensor, nw: Tensor | None, nb: Tensor | None, slopes: Tensor | None,
          norm_groups: int, over_batch: bool, fixed: bool, eps: float, kind: str, alpha: float) -> Tensor:  # fmt: skip
    """(N, 4, C): the constants of z = (x - m) a + b and the slope, of the compute type."""
    constants = torch.empty((x.shape[0], 4, x.shape[1]), dtype=compute_dtype(x))
    numbers = [x.shape[0], x.shape[1], math.prod(x.shape[2:]), norm_groups, over_batch, fixed, True]
    tensors = (*(_constant(x, t) for t in (nw, nb, slopes)), mean.contiguous(), var.contiguous(), constants)
    _C.load_constants(
        runtime.DTYPES[x.dtype], numbers, eps, norm_act_._slope(kind, alpha), *map(pointer, tensors)
    )
    return constants


def _activated(x: Tensor, mean: Tensor, var: Tensor, nw: Tensor | None, nb: Tensor | None, slopes: Tensor | None,
               *how: Any) -> Tensor:  # fmt: skip
    """z; how: norm_groups, over_batch, fixed, eps, kind, alpha."""
    return norm_act_.norm_act_op(x, nw, nb, slopes, None, mean, var, *how)[0]


def _block_cpu(
    x: Tensor, mean: Tensor, var: Tensor, nw: Tensor | None, nb: Tensor | None, slopes: Tensor | None,
    norm_groups: int, over_batch: bool, fixed: bool, eps: float, kind: str, alpha: float,
    w: Tensor, b: Tensor | None, stride: Ints, padding: Ints, dilation: Ints, groups: int, out_groups: int,
    out_over_batch: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    norm = (mean, var, nw, nb, slopes, norm_groups, over_batch, fixed, eps, kind, alpha)
    how = (stride, padding, dilation, groups)
    y, out_mean, out_var = _block_fake(x, *norm, w, b, *how, out_groups, out_over_batch)
    x, x_last = dense(x)
    geometry = conv_.numbers(x.shape, w.shape, y.shape, *how, x_last, is_channels_last(y))
    if x.numel() == 0 or y.numel() == 0 or not _loads("conv_forward", geometry, x.dtype, w, kind):
        z = _activated(x, *norm)
        if not out_groups:
            return conv_._conv_cpu(z, w, b, *how), out_mean, out_var
        return _moments_cpu(z, w, b, *how, out_groups, out_over_batch)
    numbers = _of(y, max(out_groups, 1), out_over_batch)
    w, b = w.contiguous(), None if b is None else b.contiguous()
    load = _load(x, *norm)
    found = _run_with_moments(geometry, x, w, b, y, numbers, out_mean, out_var, load, kind == "relu")
    if out_groups and not found:
        _read_moments(y, numbers, out_mean, out_var)
    return y, out_mean, out_var


def _block_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *norm, ctx.kind, ctx.alpha, w, b, stride, padding, dilation, groups, _, _ = inputs
    x, mean, var, nw, nb, slopes, *ctx.norm = norm
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, mean, var, nw, nb, slopes, w)
    ctx.how, ctx.b = (stride, padding, dilation, groups), None if b is None else b.dtype


def _block_backward(ctx: Any, dy: Tensor | None, dmean: None, dvar: None) -> tuple[Any, ...]:
    if dy is None:
        return (None,) * 20
    x, mean, var, nw, nb, slopes, w = ctx.saved_tensors
    need_x, _, _, need_nw, need_nb, need_slopes = ctx.needs_input_grad[:6]
    need_w, need_b = ctx.needs_input_grad[12:14]
    norm, again = (*ctx.norm, ctx.kind, ctx.alpha), torch.is_grad_enabled()
    grads: tuple[Tensor | None, ...] = (None,) * 4
    if need_x or need_nw or need_nb or need_slopes:
        dz = conv_.conv_input_grad(dy, w, None, *ctx.how, x.shape[2:])
        need = (need_x, need_nw, need_nb, need_slopes)
        if again:
            grads = norm_act_._composed((*need, False), dz, x, nw, nb, slopes, None, mean, var, *norm)[:4]
        else:
            wanted = (need_x, need_nw or need_nb, need_slopes, False)
            found = norm_act_.norm_act_backward(dz, x, nw, nb, slopes, None, mean, var, *norm, *wanted)
            grads = tuple(
                g.to(t.dtype) if n and t is not None else None
                for g, t, n in zip(found, (x, nw, nb, slopes), need, strict=False)
            )
    dw = None
    if need_w and again:
        z = _activated(x, mean, var, nw, nb, slopes, *norm)
        dw = conv_.conv_weight_grad(z, dy, *ctx.how, w.shape[2:])
    elif need_w:
        dw = norm_act_conv_weight_grad(x, mean, var, nw, nb, slopes, *norm, dy, *ctx.how, w.shape[2:])
    db = conv_.channel_sum(dy) if need_b else None
    return grads[0], None, None, *grads[1:], *(None,) * 6, dw, db, *(None,) * 6


def _block_vmap(
    info: Any, in_dims: Any, *arguments: Any
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    """The batch joins the channels, and so the groups of all kinds."""
    norm_groups, over_batch, fixed, eps, kind, alpha, w, b, *how, groups, out_groups, out_over = arguments[6:]
    size, at = info.batch_size, 0 if over_batch else 1
    parts = _merge(arguments[:6], in_dims[:6], (1, at, at, 0, 0, 0), size)
    weights = _merge((w, b), in_dims[12:14], (0, 0), size)
    norm = (norm_groups * size, over_batch, fixed, eps, kind, alpha)
    y, *moments = norm_act_conv(*parts, *norm, *weights, *how, groups * size, out_groups * size, out_over)
    if not out_groups:
        return (conv_vmap.split(y, 1, size), *moments), (0, None, None)
    at = 0 if out_over else 1
    return (conv_vmap.split(y, 1, size), *(conv_vmap.split(m, at, size) for m in moments)), (0, 0, 0)


def _merge(tensors: Sequence[Any], dims: Sequence[Any], axes: Ints, size: int) -> list[Tensor | None]:
    return [_channels(t, d, size, at) for t, d, at in zip(tensors, dims, axes, strict=True)]


# dw = H(z, dy) ------------------------------------------------------------------------------------


def _block_weight_grad_fake(
    x: Tensor, mean: Tensor, var: Tensor, nw: Tensor | None, nb: Tensor | None, slopes: Tensor | None,
    norm_groups: int, over_batch: bool, fixed: bool, eps: float, kind: str, alpha: float,
    dy: Tensor, stride: Ints, padding: Ints, dilation: Ints, groups: int, kernel: Ints,
) -> Tensor:  # fmt: skip
    name = "norm_act_conv_weight_grad"
    _norm_check(name, x, mean, var, nw, nb, slopes, norm_groups, over_batch, fixed, kind)
    return conv_._weight_grad_fake(x, dy, stride, padding, dilation, groups, kernel)


def _block_weight_grad_cpu(
    x: Tensor, mean: Tensor, var: Tensor, nw: Tensor | None, nb: Tensor | None, slopes: Tensor | None,
    norm_groups: int, over_batch: bool, fixed: bool, eps: float, kind: str, alpha: float,
    dy: Tensor, stride: Ints, padding: Ints, dilation: Ints, groups: int, kernel: Ints,
) -> Tensor:  # fmt: skip
    norm = (mean, var, nw, nb, slopes, norm_groups, over_batch, fixed, eps, kind, alpha)
    how = (stride, padding, dilation, groups)
    dw = _block_weight_grad_fake(x, *norm, dy, *how, kernel)
    if x.numel() == 0 or dy.numel() == 0:
        return dw.zero_()
    (x, x_last), (dy, y_last) = dense(x), dense(dy)
    geometry = conv_.numbers(x.shape, dw.shape, dy.shape, *how, x_last, y_last)
    if not _loads("conv_weight_grad", geometry, x.dtype, dw, kind):
        return conv_._weight_grad_cpu(_activated(x, *norm), dy, *how, kernel)
    chosen, routed, size = _planned("conv_weight_grad", geometry, x.dtype)
    memory, load = scratch(size), _load(x, *norm)
    with runtime.serve(
        "norm_act_conv_weight_grad",
        chosen.algorithm,
        lambda: conv_.problem(routed, x.dtype, False),
        chosen.why,
    ):
        _C.conv_weight_grad_block(
            runtime.DTYPES[x.dtype], routed, pointer(x), pointer(dw), pointer(dy), pointer(load), kind == "relu",
            memory.data_ptr(), runtime.threads(),
        )  # fmt: skip
    return dw


def _no_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Nothing is kept for a gradient that there is not."""


def _refuse_backward(ctx: Any, ddw: Tensor) -> None:
    raise RuntimeError("norm_act_conv_weight_grad has no gradient of its own: differentiate norm_act_conv with "
                       "create_graph=True")  # fmt: skip


def _block_weight_grad_vmap(info: Any, in_dims: Any, *arguments: Any) -> tuple[Tensor, int]:
    norm_groups, over_batch, fixed, eps, kind, alpha, dy, *how, groups, kernel = arguments[6:]
    size, at = info.batch_size, 0 if over_batch else 1
    parts = _merge(arguments[:6], in_dims[:6], (1, at, at, 0, 0, 0), size)
    (dy,) = _merge((dy,), in_dims[12:13], (1,), size)
    norm = (norm_groups * size, over_batch, fixed, eps, kind, alpha)
    dw = norm_act_conv_weight_grad(*parts, *norm, dy, *how, groups * size, kernel)
    return conv_vmap.split(dw, 0, size), 0


_NORM = (
    "Tensor x, Tensor mean, Tensor var, Tensor? nw, Tensor? nb, Tensor? slopes, SymInt norm_groups, bool over_batch, "
    "bool fixed, float eps, str kind, float alpha"
)

norm_act_conv: Operator = register(
    f"norm_act_conv({_NORM}, Tensor w, Tensor? b, {conv_.HOW}, SymInt out_groups, bool out_over_batch) "
    "-> (Tensor, Tensor, Tensor)",
    _block_cpu, _block_fake, _block_backward, _block_setup, _block_vmap,
)  # fmt: skip
norm_act_conv_weight_grad: Operator = register(
    f"norm_act_conv_weight_grad({_NORM}, Tensor dy, {conv_.HOW}, SymInt[3] kernel) -> Tensor",
    _block_weight_grad_cpu, _block_weight_grad_fake, _refuse_backward, _no_setup, _block_weight_grad_vmap,
)  # fmt: skip
