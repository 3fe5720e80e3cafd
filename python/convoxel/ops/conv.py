"""Convolution: three operators that are each other's gradients.

    conv             y  = F(x, w) + b      y[n,k,o] = b[k] + sum_{c,t} w[k,c,t] x[n,c,i],
                                           i = o * stride + t * dilation - padding
    conv_input_grad  dx = G(dy, w) + b     also the transposed convolution
    conv_weight_grad dw = H(x, dy)

F(x, w) is bilinear and <F(x, w), dy> = <x, G(dy, w)> = <w, H(x, dy)>, so the derivative of each is made of
the other two, to any order. Everything is 3-D here: x (N, C, D, H, W), w (K, C / groups, KD, KH, KW),
y (N, K, OD, OH, OW); the public functions lift 1-D and 2-D with unit extents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .. import _C, runtime
from ..geometry import (
    SPATIAL_NAMES,
    Problem,
    as_tuple,
    conv_out_size,
    conv_transpose_out_size,
    is_channels_last,
    lift,
)
from . import route
from .library import Operator, dense, from_3d, new, pointer, register, scratch, to_3d
from .saved import Kept, Upsampled, possible, remember

Ints = Sequence[int]

LARGEST = 2**40  # voxels of a padded axis: far beyond memory, and sums of several stay within 64 bits

# Checks and geometry ------------------------------------------------------------------------------


def check(op: str, x_shape: Ints, w_shape: Ints, y_shape: Ints | None, b: Tensor | None, b_size: int,
          stride: Ints, padding: Ints, dilation: Ints, groups: int) -> tuple[int, ...]:  # fmt: skip
    """The output's shape (N, K, OD, OH, OW); RuntimeError with what, expected, received, remedy."""
    shapes = (
        None if s is None else tuple(s) for s in (x_shape, w_shape, y_shape, None if b is None else b.shape)
    )
    words = (op, *shapes, b_size, tuple(stride), tuple(padding), tuple(dilation), groups)
    try:
        return _checked(*words)
    except TypeError:  # symbolic sizes have no hash
        return _checked.__wrapped__(*words)


@lru_cache(maxsize=4096)  # a network asks the same few hundred questions in every step
def _checked(op: str, x_shape: Ints, w_shape: Ints, y_shape: Ints | None, b_shape: Ints | None, b_size: int,
             stride: Ints, padding: Ints, dilation: Ints, groups: int) -> tuple[int, ...]:  # fmt: skip
    shapes = f"x {tuple(x_shape)}, weight {tuple(w_shape)}, groups {groups}"
    names = f"(N, C, {SPATIAL_NAMES[len(stride)]})"
    if {len(x_shape), len(w_shape)} != {len(stride) + 2}:
        raise RuntimeError(
            f"{op}: expected x and weight with {len(stride) + 2} axes {names}, received {shapes}"
        )
    if groups < 1:
        raise RuntimeError(f"{op}: groups must be positive, received {groups}")
    if min(stride) < 1 or min(dilation) < 1:
        raise RuntimeError(f"{op}: non-positive stride is not supported, nor dilation: "
                           f"received stride {tuple(stride)}, dilation {tuple(dilation)}")  # fmt: skip
    if min(padding) < 0:
        raise RuntimeError(
            f"{op}: negative padding is not supported, received {tuple(padding)}; crop x instead"
        )
    if w_shape[0] % groups or w_shape[0] < groups:
        raise RuntimeError(f"{op}: {w_shape[0]} output channels cannot be split into groups; {shapes}")
    if x_shape[1] != w_shape[1] * groups:
        raise RuntimeError(
            f"{op}: given groups={groups}, weight of size {tuple(w_shape)}, expected input to have "
            f"{w_shape[1] * groups} channels, but got {x_shape[1]} channels instead; {shapes}"
        )
    if b_shape is not None and b_shape != (b_size,):
        raise RuntimeError(f"{op}: expected bias of shape ({b_size},), received {b_shape}")
    if min(w_shape[2:]) < 1:
        raise RuntimeError(f"{op}: kernel extents must be positive, received weight {tuple(w_shape)}")
    padded = [n + 2 * p for n, p in zip(x_shape[2:], padding, strict=True)]
    if any(isinstance(n, int) and n >= LARGEST for n in padded):  # symbolic sizes: once they are known
        raise RuntimeError(f"{op}: expected padded extents below 2^40 voxels, received padding {tuple(padding)}; "
                           f"{shapes}; cut x into pieces")  # fmt: skip
    axes = zip(x_shape[2:], w_shape[2:], stride, padding, dilation, strict=True)
    out = tuple(conv_out_size(*a) for a in axes)
    if min(out) < 1:
        raise RuntimeError(
            f"{op}: kernel size can't be greater than the padded input: x {tuple(x_shape)} {names}, kernel "
            f"{tuple(w_shape[2:])}, padding {tuple(padding)}, dilation {tuple(dilation)} give an output of {out}; "
            "enlarge x or its padding"
        )
    expected = (x_shape[0], w_shape[0], *out)
    if y_shape is not None and tuple(y_shape) != expected:
        raise RuntimeError(f"{op}: expected dy of shape {expected}, received {tuple(y_shape)}; {shapes}")
    return expected


def check_dtypes(op: str, *tensors: Tensor | None) -> None:
    dtypes = [t.dtype for t in tensors if t is not None]
    if len(set(dtypes)) > 1:
        raise RuntimeError(
            f"{op}: input, weight and bias should have the same dtype, received {', '.join(map(str, dtypes))}; "
            "convert one of them, or use torch.autocast"
        )
    if dtypes[0] not in runtime.DTYPES:
        raise RuntimeError(f"{op}: kernels take {', '.join(map(str, runtime.DTYPES))}, received {dtypes[0]}")


def numbers(x_shape: Ints, w_shape: Ints, y_shape: Ints, stride: Ints, padding: Ints, dilation: Ints,
            groups: int, x_last: bool, y_last: bool) -> list[int]:  # fmt: skip
    """The geometry as csrc/bind.cpp reads it, direct. A stride beyond the padded extent makes one output like
    any other such stride, a dilation of one tap does nothing: without them no sum in csrc exceeds 64 bits."""
    flat = [x_shape[0], x_shape[1], w_shape[0], groups]
    for axes in zip(x_shape[2:], y_shape[2:], w_shape[2:], stride, padding, dilation, strict=True):
        n, out, k, s, p, d = axes
        flat += [n, out, k, min(s, n + 2 * p), p, d if k > 1 else 1]
    return [*flat, int(x_last), int(y_last), *route.DIRECT.numbers]


def problem(geometry: list[int], dtype: torch.dtype, bias: bool) -> str:
    """The call as a Problem string, for CONVOXEL_VERBOSE: of a gradient, the convolution that it belongs to."""
    axes = [geometry[4 + 6 * a : 10 + 6 * a] for a in range(3)]
    i, _, f, s, p, d = (tuple(a[j] for a in axes) for j in range(6))
    name = next(k for k, v in Problem.DTYPES.items() if v == dtype)
    return str(Problem("conv", geometry[0], geometry[1], geometry[2], i, f, s, p, d, g=geometry[3],
                       bias=bias, last=bool(geometry[22]), dtype=name))  # fmt: skip


@lru_cache(maxsize=4096)
def planned(op: str, geometry: tuple[int, ...], dtype: torch.dtype, precision: str, algorithm: str, isa: str,
            threads: int) -> tuple[route.Route, list[int], int]:  # fmt: skip
    """What every call with these words has in common: its route, the geometry with it, bytes of scratch."""
    chosen = route.choose(op, geometry, dtype, precision, algorithm, isa)
    routed = [*geometry[:-4], *chosen.numbers]
    return chosen, routed, getattr(_C, op + "_scratch")(runtime.DTYPES[dtype], routed, threads)


def run(op: str, geometry: list[int], x: Tensor, w: Tensor | None, b: Tensor | None, y: Tensor) -> None:
    """One kernel over tensors that are dense in the layouts that the geometry states."""
    dtype, threads = runtime.DTYPES[x.dtype], runtime.threads()
    how = runtime.get_float32_conv_precision(), runtime.get_conv_algorithm(), runtime.isa()
    chosen, geometry, size = planned(op, tuple(geometry), x.dtype, *how, threads)
    memory = scratch(size)
    with runtime.serve(
        op.removesuffix("_forward"),
        chosen.algorithm,
        lambda: problem(geometry, x.dtype, b is not None),
        chosen.why,
    ):
        getattr(_C, op)(
            dtype, geometry, pointer(x), pointer(w), pointer(b), pointer(y), memory.data_ptr(), threads
        )


# y = F(x, w) + b ----------------------------------------------------------------------------------


def _conv_fake(
    x: Tensor, w: Tensor, b: Tensor | None, stride: Ints, padding: Ints, dilation: Ints, groups: int
) -> Tensor:
    check_dtypes("conv", x, w, b)
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
    x, x_last = dense(x)
    geometry = numbers(
        x.shape, w.shape, y.shape, stride, padding, dilation, groups, x_last, is_channels_last(y)
    )
    run("conv_forward", geometry, x, w.contiguous(), None if b is None else b.contiguous(), y)
    return y


def _conv_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, w, _, *ctx.how = inputs
    ctx.size, ctx.x = x.shape[2:], Kept(x)
    ctx.save_for_backward(w, *ctx.x.take())


def _conv_backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    w, *kept = ctx.saved_tensors
    need_x, need_w, need_b, *_ = ctx.needs_input_grad
    # dw first: an x that is made again for it is gone before dx takes memory.
    dw = conv_weight_grad(ctx.x.give(kept), dy, *ctx.how, w.shape[2:]) if need_w else None
    dx = conv_input_grad(dy, w, None, *ctx.how, ctx.size) if need_x else None
    return dx, dw, channel_sum(dy) if need_b else None, None, None, None, None


# dx = G(dy, w) + b --------------------------------------------------------------------------------


def _input_grad_fake(dy: Tensor, w: Tensor, b: Tensor | None, stride: Ints, padding: Ints, dilation: Ints,
                     groups: int, size: Ints) -> Tensor:  # fmt: skip
    check_dtypes("conv_input_grad", dy, w, b)
    channels = w.shape[1] * groups if w.dim() == 5 else 0
    shape = (dy.shape[0], channels, *size)
    check("conv_input_grad", shape, w.shape, dy.shape, b, channels, stride, padding, dilation, groups)
    return new(dy, shape, is_channels_last(dy) or is_channels_last(w))


def _input_grad_cpu(dy: Tensor, w: Tensor, b: Tensor | None, stride: Ints, padding: Ints, dilation: Ints,
                    groups: int, size: Ints) -> Tensor:  # fmt: skip
    dx = _input_grad_fake(dy, w, b, stride, padding, dilation, groups, size)
    if dx.numel() == 0:
        return dx
    dy, y_last = dense(dy)
    geometry = numbers(
        dx.shape, w.shape, dy.shape, stride, padding, dilation, groups, is_channels_last(dx), y_last
    )
    run("conv_input_grad", geometry, dx, w.contiguous(), None if b is None else b.contiguous(), dy)
    return dx


def _input_grad_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dy, w, b, *ctx.how, size = inputs
    ctx.dy = Kept(dy)
    # With b, the output of a kernel as wide as its stride is quickly made again: one product a voxel and channel.
    again = possible(output) and tuple(w.shape[2:]) == tuple(ctx.how[0])
    ctx.save_for_backward(w, b if again else None, *ctx.dy.take())
    if again:
        remember(ctx, output, Upsampled(ctx.dy, (*ctx.how, size)))


def _input_grad_backward(ctx: Any, ddx: Tensor) -> tuple[Any, ...]:
    w, _, *kept = ctx.saved_tensors
    need_dy, need_w, need_b, *_ = ctx.needs_input_grad
    dw = conv_weight_grad(ddx, ctx.dy.give(kept), *ctx.how, w.shape[2:]) if need_w else None
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


# vmap: a batch of images joins N; a batch of weights joins the groups ------------------------------


def _front(t: Tensor, axis: int | None, size: int) -> Tensor:
    return t.expand(size, *t.shape) if axis is None else t.movedim(axis, 0)


def _join(t: Tensor, axis: int) -> Tensor:
    """(B, ...) with B put in front of `axis` and merged into it."""
    return t.movedim(0, axis).flatten(axis, axis + 1)


def _split(t: Tensor, axis: int, size: int) -> Tensor:
    return t.unflatten(axis, (size, t.shape[axis] // size)).movedim(axis, 0)


def _linear_vmap(op: Any) -> Any:
    """For conv and conv_input_grad alike: first argument images, second weights, third bias."""

    def rule(info: Any, in_dims: Any, x: Tensor, w: Tensor, b: Tensor | None, stride: Ints, padding: Ints,
             dilation: Ints, groups: int, *size: Any) -> tuple[Tensor, int]:  # fmt: skip
        size_b = info.batch_size
        if in_dims[1] is None and in_dims[2] is None:
            images = _join(x.movedim(in_dims[0], 0), 0)
            return _split(op()(images, w, b, stride, padding, dilation, groups, *size), 0, size_b), 0
        xb, wb = (_front(t, d, size_b) for t, d in zip((x, w), in_dims[:2], strict=True))
        bias = None if b is None else _front(b, in_dims[2], size_b).flatten(0, 1)
        how = (stride, padding, dilation, groups * size_b, *size)
        return _split(op()(_join(xb, 1), _join(wb, 0), bias, *how), 1, size_b), 0

    return rule


def _weight_grad_vmap(info: Any, in_dims: Any, x: Tensor, dy: Tensor, stride: Ints, padding: Ints, dilation: Ints,
                      groups: int, kernel: Ints) -> tuple[Tensor, int]:  # fmt: skip
    xb, dyb = (_front(t, d, info.batch_size) for t, d in zip((x, dy), in_dims[:2], strict=True))
    how = (stride, padding, dilation, groups * info.batch_size, kernel)
    return _split(conv_weight_grad(_join(xb, 1), _join(dyb, 1), *how), 0, info.batch_size), 0


def _channel_sum_vmap(info: Any, in_dims: Any, y: Tensor) -> tuple[Tensor, int]:
    return _split(channel_sum(_join(y.movedim(in_dims[0], 0), 1)), 0, info.batch_size), 0


_HOW = "SymInt[3] stride, SymInt[3] padding, SymInt[3] dilation, SymInt groups"

conv: Operator = register(
    f"conv(Tensor x, Tensor w, Tensor? b, {_HOW}) -> Tensor",
    _conv_cpu, _conv_fake, _conv_backward, _conv_setup, _linear_vmap(lambda: conv),
)  # fmt: skip
conv_input_grad: Operator = register(
    f"conv_input_grad(Tensor dy, Tensor w, Tensor? b, {_HOW}, SymInt[3] size) -> Tensor",
    _input_grad_cpu, _input_grad_fake, _input_grad_backward, _input_grad_setup, _linear_vmap(lambda: conv_input_grad),
)  # fmt: skip
conv_weight_grad: Operator = register(
    f"conv_weight_grad(Tensor x, Tensor dy, {_HOW}, SymInt[3] kernel) -> Tensor",
    _weight_grad_cpu, _weight_grad_fake, _weight_grad_backward, _weight_grad_setup, _weight_grad_vmap,
)  # fmt: skip
channel_sum: Operator = register(
    "channel_sum(Tensor y) -> Tensor",
    _channel_sum_cpu, _channel_sum_fake, _channel_sum_backward, _channel_sum_setup, _channel_sum_vmap,
)  # fmt: skip


# Public functions: any rank lifted to 3-D ---------------------------------------------------------


def _same_padding(
    name: str, x: Tensor, kernel: Ints, stride: Ints, dilation: Ints
) -> tuple[Tensor, tuple[int, ...]]:
    """torch's rule for padding="same": half of dilation * (kernel - 1) on each side, an odd rest on the right."""
    if any(s != 1 for s in stride):
        raise RuntimeError(
            f"{name}: padding='same' is not supported for strided convolutions, received stride {stride}"
        )
    total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if odd := [t % 2 for t in total]:
        if any(odd):
            x = torch.nn.functional.pad(x, [v for o in reversed(odd) for v in (0, o)])
    return x, tuple(t // 2 for t in total)


def _batched(name: str, rank: int, x: Tensor, w: Tensor) -> tuple[Tensor, bool]:
    for what, t in (("input", x), ("weight", w)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}(): argument '{what}' must be Tensor, not {type(t).__name__}")
    if w.dim() != rank + 2:
        raise RuntimeError(f"{name}: expected a weight with {rank + 2} axes, received {tuple(w.shape)}")
    if x.dim() not in (rank + 1, rank + 2):
        raise RuntimeError(
            f"{name}: expected {rank + 2}D (batched) or {rank + 1}D (unbatched) input, but got input of size "
            f"{tuple(x.shape)}; give it axes (N, C, {SPATIAL_NAMES[rank]})"
        )
    batched = x.dim() == rank + 2
    if 0 in x.shape[-rank:] and 0 not in x.shape[:-rank]:
        raise RuntimeError(
            f"{name}: only zero batch or zero channel inputs are supported, but got input shape {tuple(x.shape)}"
        )
    return (x, True) if batched else (x.unsqueeze(0), False)


def convolution(rank: int, x: Tensor, w: Tensor, b: Tensor | None, stride: Any, padding: Any, dilation: Any,
                groups: int, conv: Operator = conv) -> Tensor:  # fmt: skip
    """torch.nn.functional.conv{rank}d. x (N, C, *spatial) or (C, *spatial), w (K, C / groups, *kernel), b (K); conv:
    what computes y."""
    name = f"conv{rank}d"
    x, batched = _batched(name, rank, x, w)
    (groups,) = as_tuple((groups,), 1, name, "groups")
    stride, dilation = (as_tuple(v, rank, name, n) for v, n in ((stride, "stride"), (dilation, "dilation")))
    if isinstance(padding, str):
        if padding not in ("same", "valid"):
            raise RuntimeError(f"{name}: invalid padding string '{padding}', expected 'same' or 'valid'")
        padding_ = (0,) * rank
        if padding == "same":
            x, padding_ = _same_padding(name, x, w.shape[2:], stride, dilation)
    else:
        padding_ = as_tuple(padding, rank, name, "padding")
    try:
        y = conv(to_3d(x), to_3d(w), b, lift(stride, 1), lift(padding_, 0), lift(dilation, 1), groups)
    except RuntimeError as error:
        how = (b, w.shape[0], stride, padding_, dilation, groups)
        raise _in_its_rank(error, lambda: check(name, x.shape, w.shape, None, *how)) from None
    return from_3d(y, rank, batched)


def _in_its_rank(error: RuntimeError, again: Callable[[], Any]) -> RuntimeError:
    """What was wrong with a call, with the caller's axes where shapes were."""
    try:
        again()
    except RuntimeError as clearer:
        return clearer
    return error


def conv_transpose(rank: int, x: Tensor, w: Tensor, b: Tensor | None, stride: Any, padding: Any,
                   output_padding: Any, groups: int, dilation: Any) -> Tensor:  # fmt: skip
    """torch.nn.functional.conv_transpose{rank}d. x (N, K, *spatial), w (K, C / groups, *kernel), b (C): the
    input gradient of the convolution that has these weights."""
    name = f"conv_transpose{rank}d"
    x, batched = _batched(name, rank, x, w)
    (groups,) = as_tuple((groups,), 1, name, "groups")
    values = {"stride": stride, "padding": padding, "output_padding": output_padding, "dilation": dilation}
    s, p, o, d = (as_tuple(v, rank, name, n) for n, v in values.items())
    if min(s) < 1 or min(d) < 1:
        raise RuntimeError(f"{name}: non-positive stride is not supported, nor dilation: received stride {s}, "
                           f"dilation {d}")  # fmt: skip
    if any(a >= max(b, c) for a, b, c in zip(o, s, d, strict=True)) or min(o) < 0:
        raise RuntimeError(f"{name}: output padding must be smaller than either stride or dilation, and not "
                           f"negative: received output_padding {o}, stride {s}, dilation {d}")  # fmt: skip
    size = [conv_transpose_out_size(*a) for a in zip(x.shape[2:], w.shape[2:], s, p, o, d, strict=True)]
    if min(size) < 1:
        raise RuntimeError(f"{name}: input {tuple(x.shape)} gives an output of {tuple(size)}, too small; "
                           "enlarge it or lower the padding")  # fmt: skip
    # Output padding of a whole stride (dilation > stride) adds outputs that read beyond x: zeros there.
    extra = [a // b for a, b in zip(o, s, strict=True)]
    if any(extra):
        x = torch.nn.functional.pad(x, [v for e in reversed(extra) for v in (0, e)])
    how = (lift(s, 1), lift(p, 0), lift(d, 1), groups)
    try:
        return from_3d(conv_input_grad(to_3d(x), to_3d(w), b, *how, lift(size, 1)), rank, batched)
    except RuntimeError as error:
        raise _in_its_rank(error, lambda: _check_transposed(name, x, w, b, groups)) from None


def _check_transposed(name: str, x: Tensor, w: Tensor, b: Tensor | None, groups: int) -> None:
    shapes = f"x {tuple(x.shape)}, weight {tuple(w.shape)}, groups {groups}"
    if x.shape[1] != w.shape[0]:
        raise RuntimeError(f"{name}: given weight of size {tuple(w.shape)}, expected input to have {w.shape[0]} "
                           f"channels, but got {x.shape[1]} channels instead; {shapes}")  # fmt: skip
    if b is not None and tuple(b.shape) != (w.shape[1] * groups,):
        raise RuntimeError(f"{name}: expected bias of shape ({w.shape[1] * groups},), received {tuple(b.shape)}; "
                           f"{shapes}")  # fmt: skip


def linear(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """torch.nn.functional.linear as a 1x1x1 convolution. x (..., C), w (K, C), b (K); a row is a pixel."""
    for what, t in (("input", x), ("weight", w)):
        if not isinstance(t, Tensor):
            raise TypeError(f"linear(): argument '{what}' must be Tensor, not {type(t).__name__}")
    if w.dim() not in (1, 2) or x.dim() < 1 or x.shape[-1] != w.shape[-1]:
        raise RuntimeError(
            f"linear: mat1 and mat2 shapes cannot be multiplied: input {tuple(x.shape)} has features "
            f"{tuple(x.shape[-1:])}, weight {tuple(w.shape)} (K, C) expects {tuple(w.shape[-1:])}"
        )
    if w.dim() == 1 and b is not None:
        raise RuntimeError(
            f"linear: a bias needs a weight with 2 axes (K, C), received weight {tuple(w.shape)}"
        )
    k = w.shape[0] if w.dim() == 2 else 1
    shape = (*x.shape[:-1], k) if w.dim() == 2 else tuple(x.shape[:-1])
    if b is not None and tuple(b.shape) != (k,):  # torch adds whatever broadcasts to y
        if x.dim() == 1 and tuple(b.shape) == (1, k) != (1, 1):  # of one row
            return linear(x[None], w, b)[0]
        fits = all(m in (1, n) for m, n in zip(b.shape[::-1], shape[::-1], strict=False))
        if b.dim() > len(shape) or not fits:
            raise RuntimeError(f"linear: expected bias of shape ({k},), or that broadcasts to the output {shape}, "
                               f"received {tuple(b.shape)}")  # fmt: skip
        check_dtypes("linear", x, w, b)
        return linear(x, w, None) + b
    if k == 0:  # a convolution has outputs; this keeps the graph of a layer that has none
        return x[..., :0] + w.sum() if b is None else x[..., :0] + w.sum() + b
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    one, zero = (1, 1, 1), (0, 0, 0)
    # Rows are the pixels of one channels-last image (1, C, 1, 1, rows); no rows are no images.
    pixels = rows[None, None, None].permute(0, 4, 1, 2, 3) if len(rows) else rows[:, :, None, None, None]
    y = conv(pixels, w.reshape(k, x.shape[-1], 1, 1, 1), b, one, zero, one, 1)
    return y.permute(0, 2, 3, 4, 1).reshape(shape)
