"""Convolution: three operators that are each other's gradients.

    conv             y  = F(x, w) + b      y[n,k,o] = b[k] + sum_{c,t} w[k,c,t] x[n,c,i],
                                           i = o * stride + t * dilation - padding
    conv_input_grad  dx = G(dy, w) + b     also the transposed convolution
    conv_weight_grad dw = H(x, dy)

F(x, w) is bilinear and <F(x, w), dy> = <x, G(dy, w)> = <w, H(x, dy)>, so the derivative of each is made of
the other two, to any order. Everything is 3-D here: x (N, C, D, H, W), w (K, C / groups, KD, KH, KW),
y (N, K, OD, OH, OW); the public functions (ops/convolution.py) lift 1-D and 2-D with unit extents.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .. import _C, runtime
from ..geometry import Ints, is_channels_last
from . import conv_vmap, route
from .conv_geometry import check, check_dtypes, mixed, numbers, problem
from .library import Operator, dense, new, pointer, register, scratch
from .saved import Kept, Upsampled, possible, save


@lru_cache(maxsize=4096)
def planned(op: str, geometry: tuple[int, ...], dtype: torch.dtype, precision: str, algorithm: str, isa: str,
            threads: int) -> tuple[route.Route, list[int], int]:  # fmt: skip
    """What every call with these words has in common: its route, the geometry with it, bytes of scratch."""
    chosen = route.choose(op, geometry, dtype, precision, algorithm, isa)
    routed = [*geometry[:-4], *chosen.numbers]
    return chosen, routed, getattr(_C, op + "_scratch")(runtime.DTYPES[dtype], routed, threads)


def readable(w: Tensor | None, dtype: torch.dtype, chosen: route.Route) -> Tensor | None:
    """w as the kernels of the route read it: all but the depthwise ones round float32 to bfloat16 themselves."""
    return w.to(dtype) if w is not None and chosen.algorithm == "depthwise" else w


def run(op: str, geometry: list[int], x: Tensor | Sequence[Tensor], w: Tensor | None, b: Tensor | None,
        y: Tensor) -> None:  # fmt: skip
    """One kernel over tensors that are dense in the layouts that the geometry states; x: or its parts."""
    xs = [x] if isinstance(x, Tensor) else x
    x = xs[0]
    dtype, threads = runtime.DTYPES[x.dtype], runtime.threads()
    how = runtime.get_float32_conv_precision(), runtime.get_conv_algorithm(), runtime.isa()
    chosen, geometry, size = planned(op, tuple(geometry), x.dtype, *how, threads)
    memory, w = scratch(size), readable(w, x.dtype, chosen)
    with runtime.serve(
        op.removesuffix("_forward"),
        chosen.algorithm,
        lambda: problem(geometry, x.dtype, b is not None),
        chosen.why,
    ):
        getattr(_C, op)(
            dtype,
            geometry,
            [*map(pointer, xs)],
            pointer(w),
            pointer(b),
            pointer(y),
            memory.data_ptr(),
            threads,
        )


# y = F(x, w) + b ----------------------------------------------------------------------------------


def _conv_fake(
    x: Tensor, w: Tensor, b: Tensor | None, stride: Ints, padding: Ints, dilation: Ints, groups: int
) -> Tensor:
    check_dtypes("conv", x, b, w=w)
    shape = check("conv", x.shape, w.shape, None, b, w.shape[0], stride, padding, dilation, groups)
    return new(x, shape, is_channels_last(x) or is_channels_last(w))


def _conv_cpu(
    x: Tensor, w: Tensor, b: Tensor | None, stride: Ints, padding: Ints, dilation: Ints, groups: int
) -> Tensor:
    y = _conv_fake(x, w, b, stride, padding, dilation, groups)
    if y.numel() == 0:
        return y
    if x.numel() == 0:  # no channels: only the bias is left
        return y.zero_() if b is None else y.copy_(b.view(-1, 1, 1, 1).expand_as(y))
    (x, x_last), (w, w_last) = dense(x), dense(w)
    layouts = x_last, is_channels_last(y), (), w_last, mixed(x, w)
    geometry = numbers(x.shape, w.shape, y.shape, stride, padding, dilation, groups, *layouts)
    run("conv_forward", geometry, x, w, None if b is None else b.contiguous(), y)
    return y


def _conv_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, w, _, *ctx.how = inputs
    ctx.size, ctx.x = x.shape[2:], Kept(x)
    ctx.save_for_backward(w, *ctx.x.take())


def _conv_backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    w, *kept = ctx.saved_tensors
    need_x, need_w, need_b, *_ = ctx.needs_input_grad
    # dw first: an x that is made again for it is gone before dx takes memory.
    dw = conv_weight_grad(ctx.x.give(kept), dy, *ctx.how, w.shape[2:]).to(w.dtype) if need_w else None
    dx = conv_input_grad(dy, w, None, *ctx.how, ctx.size) if need_x else None
    return dx, dw, channel_sum(dy) if need_b else None, None, None, None, None


# dx = G(dy, w) + b --------------------------------------------------------------------------------


def _input_grad_fake(dy: Tensor, w: Tensor, b: Tensor | None, stride: Ints, padding: Ints, dilation: Ints,
                     groups: int, size: Ints) -> Tensor:  # fmt: skip
    check_dtypes("conv_input_grad", dy, b, w=w)
    channels = w.shape[1] * groups if w.dim() == 5 else 0
    shape = (dy.shape[0], channels, *size)
    check("conv_input_grad", shape, w.shape, dy.shape, b, channels, stride, padding, dilation, groups)
    return new(dy, shape, is_channels_last(dy) or is_channels_last(w))


def _input_grad_cpu(dy: Tensor, w: Tensor, b: Tensor | None, stride: Ints, padding: Ints, dilation: Ints,
                    groups: int, size: Ints) -> Tensor:  # fmt: skip
    dx = _input_grad_fake(dy, w, b, stride, padding, dilation, groups, size)
    if dx.numel() == 0:
        return dx
    (dy, y_last), (w, w_last) = dense(dy), dense(w)
    layouts = is_channels_last(dx), y_last, (), w_last, mixed(dy, w)
    geometry = numbers(dx.shape, w.shape, dy.shape, stride, padding, dilation, groups, *layouts)
    run("conv_input_grad", geometry, dx, w, None if b is None else b.contiguous(), dy)
    return dx


def _input_grad_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dy, w, b, *ctx.how, size = inputs
    ctx.dy = Kept(dy)
    # With b, the output of a kernel as wide as its stride is quickly made again: one product a voxel and channel.
    again = possible(output) and tuple(w.shape[2:]) == tuple(ctx.how[0])
    if again:
        save(ctx, output, Upsampled(ctx.dy, (*ctx.how, size)), (w, b, *ctx.dy.take()))
    else:
        ctx.save_for_backward(w, None, *ctx.dy.take())


def _input_grad_backward(ctx: Any, ddx: Tensor) -> tuple[Any, ...]:
    w, _, *kept = ctx.saved_tensors
    need_dy, need_w, need_b, *_ = ctx.needs_input_grad
    dw = conv_weight_grad(ddx, ctx.dy.give(kept), *ctx.how, w.shape[2:]).to(w.dtype) if need_w else None
    ddy = conv(ddx, w, None, *ctx.how) if need_dy else None
    return ddy, dw, channel_sum(ddx) if need_b else None, None, None, None, None, None


# dw = H(x, dy) ------------------------------------------------------------------------------------


def _weight_grad_fake(x: Tensor, dy: Tensor, stride: Ints, padding: Ints, dilation: Ints, groups: int,
                      kernel: Ints) -> Tensor:  # fmt: skip
    check_dtypes("conv_weight_grad", x, dy)
    if groups < 1 or x.dim() != 5 or dy.dim() != 5 or x.shape[1] % groups:
        raise RuntimeError(f"conv_weight_grad: expected x (N, C, D, H, W) with C a multiple of groups {groups}, "
                           f"received x {tuple(x.shape)}, dy {tuple(dy.shape)}")  # fmt: skip
    shape = (dy.shape[1], x.shape[1] // groups, *kernel)
    check("conv_weight_grad", x.shape, shape, dy.shape, None, 0, stride, padding, dilation, groups)
    return new(x, shape, False)


def _weight_grad_cpu(x: Tensor, dy: Tensor, stride: Ints, padding: Ints, dilation: Ints, groups: int,
                     kernel: Ints) -> Tensor:  # fmt: skip
    dw = _weight_grad_fake(x, dy, stride, padding, dilation, groups, kernel)
    if x.numel() == 0 or dy.numel() == 0:
        return dw.zero_()
    (x, x_last), (dy, y_last) = dense(x), dense(dy)
    geometry = numbers(x.shape, dw.shape, dy.shape, stride, padding, dilation, groups, x_last, y_last)
    run("conv_weight_grad", geometry, x, dw, None, dy)
    return dw


def _weight_grad_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, dy, *ctx.how, _ = inputs
    ctx.save_for_backward(x, dy)


def _weight_grad_backward(ctx: Any, ddw: Tensor) -> tuple[Any, ...]:
    x, dy = ctx.saved_tensors
    need_x, need_dy, *_ = ctx.needs_input_grad
    dx = conv_input_grad(dy, ddw, None, *ctx.how, x.shape[2:]) if need_x else None
    ddy = conv(x, ddw, None, *ctx.how) if need_dy else None
    return dx, ddy, None, None, None, None, None


# The sum over all but the channels: a bias's gradient ---------------------------------------------


def _channel_sum_fake(y: Tensor) -> Tensor:
    if y.dim() != 5:
        raise RuntimeError(f"channel_sum: expected y (N, K, D, H, W), received {tuple(y.shape)}")
    return torch.empty(y.shape[1], dtype=y.dtype, device=y.device)


def _channel_sum_cpu(y: Tensor) -> Tensor:
    check_dtypes("channel_sum", y)
    db = _channel_sum_fake(y)
    if y.numel() == 0:
        return db.zero_()
    y, last = dense(y)
    pixels = (*y.shape[:2], *y.shape[2:])
    one, zero = (1, 1, 1), (0, 0, 0)
    geometry = numbers(pixels, (y.shape[1], 1, *one), pixels, one, zero, one, 1, last, last)
    run("conv_bias_grad", geometry, y, None, db, y)
    return db


def _channel_sum_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.shape = inputs[0].shape


def _channel_sum_backward(ctx: Any, g: Tensor) -> Tensor:
    return g.view(-1, 1, 1, 1).expand(ctx.shape)


HOW = "SymInt[3] stride, SymInt[3] padding, SymInt[3] dilation, SymInt groups"

conv: Operator = register(
    f"conv(Tensor x, Tensor w, Tensor? b, {HOW}) -> Tensor",
    _conv_cpu, _conv_fake, _conv_backward, _conv_setup, lambda *a: conv_vmap.linear(conv, *a),
)  # fmt: skip
conv_input_grad: Operator = register(
    f"conv_input_grad(Tensor dy, Tensor w, Tensor? b, {HOW}, SymInt[3] size) -> Tensor",
    _input_grad_cpu, _input_grad_fake, _input_grad_backward, _input_grad_setup,
    lambda *a: conv_vmap.linear(conv_input_grad, *a),
)  # fmt: skip
conv_weight_grad: Operator = register(
    f"conv_weight_grad(Tensor x, Tensor dy, {HOW}, SymInt[3] kernel) -> Tensor",
    _weight_grad_cpu, _weight_grad_fake, _weight_grad_backward, _weight_grad_setup,
    lambda *a: conv_vmap.weight_grad(conv_weight_grad, *a),
)  # fmt: skip
channel_sum: Operator = register(
    "channel_sum(Tensor y) -> Tensor",
    _channel_sum_cpu, _channel_sum_fake, _channel_sum_backward, _channel_sum_setup,
    lambda *a: conv_vmap.channel_sum(channel_sum, *a),
)  # fmt: skip
