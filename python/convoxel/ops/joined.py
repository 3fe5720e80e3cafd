"""Convolution of a concatenation that is never made: the kernels read its parts where they are.

    conv_joined              y, mean, var    y = F(cat(xs), w) + b, and y's moments as `conv_moments` returns them
    conv_joined_input_grad   dxs             the parts of G(dy, w), each written in place
    conv_joined_weight_grad  dw              H(cat(xs), dy)

Of U-Nets' concatenations, up and skip, this saves the copy in forward, in backward where an input is made again, and
of the gradient. The parts have whole blocks of 16 channels but for the last; there are no groups. What differentiates
the gradients again lays the parts side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..geometry import Ints, is_channels_last, memory_format
from . import conv as conv_
from . import conv_vmap
from .cat import cat, cat_backward, cat_op, serves
from .conv_block import _check_norm_groups, _moments_cpu, _moments_vmap, _of, run_with_moments
from .conv_geometry import PARTS, check, check_dtypes, mixed, numbers
from .library import Operator, contiguous, dense, new, register
from .saved import Join, Kept

BLOCK = 16  # channels: vectors of no ISA lie across parts


class Parts(NamedTuple):
    """Tensors (N, C, *) that wait to be one, side by side along C."""

    tensors: tuple[Tensor, ...]

    def whole(self) -> Tensor:
        """The concatenation."""
        return cat(self.tensors, 1)


def parts_of(tensors: Any, dim: Any = 0, **other: Any) -> Parts | None:
    """The arguments of torch.cat as what a convolution can read; None: it cannot, or it gains nothing."""
    if other or not serves(tensors, dim) or int(dim) % tensors[0].dim() != 1:
        return None
    return Parts(tuple(tensors)) if _fits([t.shape[1] for t in tensors]) else None


def _fits(channels: Ints) -> bool:
    whole = all(c > 0 and c % BLOCK == 0 for c in channels[:-1])
    return 2 <= len(channels) <= PARTS and whole and channels[-1] > 0


def _shape(op: str, xs: Sequence[Tensor]) -> tuple[int, ...]:
    """Of cat(xs)."""
    shapes = [tuple(x.shape) for x in xs]
    same = all(len(s) == 5 and (s[0], *s[2:]) == (shapes[0][0], *shapes[0][2:]) for s in shapes)
    if not same or not _fits([s[1] for s in shapes]):
        raise RuntimeError(f"{op}: expected 2 to {PARTS} tensors (N, C, D, H, W) of which all but the last have "
                           f"a multiple of {BLOCK} channels, received {shapes}; concatenate them first")  # fmt: skip
    return (shapes[0][0], sum(s[1] for s in shapes), *shapes[0][2:])


def _dense(xs: Sequence[Tensor]) -> tuple[list[Tensor], bool]:
    last = all(map(is_channels_last, xs))
    return [contiguous(x, memory_format(last)) for x in xs], last


# y, mean, var -------------------------------------------------------------------------------------


def _fake(
    xs: Sequence[Tensor], w: Tensor, b: Tensor | None, stride: Ints, padding: Ints, dilation: Ints,
    norm_groups: int, over_batch: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    shape = _shape("conv_joined", xs)
    check_dtypes("conv_joined", *xs, b, w=w)
    y_shape = check("conv_joined", shape, w.shape, None, b, w.shape[0], stride, padding, dilation, 1)
    y = new(xs[0], y_shape, all(map(is_channels_last, xs)) or is_channels_last(w))
    if norm_groups:
        _check_norm_groups("conv_joined", y_shape[1], norm_groups)
    of = ((norm_groups,) if over_batch else (shape[0], norm_groups)) if norm_groups else (0,)
    mean, var = (y.new_empty(of, dtype=torch.float64) for _ in range(2))
    return y, mean, var


def _cpu(
    xs: Sequence[Tensor], w: Tensor, b: Tensor | None, stride: Ints, padding: Ints, dilation: Ints,
    norm_groups: int, over_batch: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    y, mean, var = _fake(xs, w, b, stride, padding, dilation, norm_groups, over_batch)
    how = (stride, padding, dilation, 1)
    if y.numel() == 0:
        return (
            _moments_cpu(cat_op(xs, 1), w, b, *how, norm_groups, over_batch)
            if norm_groups
            else (y, mean, var)
        )
    xs, last = _dense(xs)
    channels = [x.shape[1] for x in xs]
    shape = _shape("conv_joined", xs)
    (w, w_last), b = dense(w), None if b is None else b.contiguous()
    layouts = last, is_channels_last(y), channels, w_last, mixed(xs[0], w)
    geometry = numbers(shape, w.shape, y.shape, stride, padding, dilation, 1, *layouts)
    if norm_groups:
        of_y = _of(y, norm_groups, over_batch)
        run_with_moments("conv_joined", geometry, xs, w, b, y, of_y, mean, var)
    else:
        conv_.run("conv_forward", geometry, xs, w, b, y)
    return y, mean, var


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    xs, w, _, *ctx.how, _, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.size, ctx.channels = xs[0].shape[2:], [x.shape[1] for x in xs]
    ctx.join, kept = Join.of([Kept(x) for x in xs], 1)
    ctx.save_for_backward(w, *kept)


def _backward(ctx: Any, dy: Tensor | None, dmean: None, dvar: None) -> tuple[Any, ...]:
    need_x, need_w, need_b, *_ = ctx.needs_input_grad
    if dy is None:
        return [None] * len(need_x), *(None,) * 7
    w, *kept = ctx.saved_tensors
    again, dxs, dw = torch.is_grad_enabled(), None, None
    how = (*ctx.how, 1)
    if need_w and again:
        dw = conv_.conv_weight_grad(ctx.join.make(kept), dy, *how, w.shape[2:])
    elif need_w:
        dw = conv_joined_weight_grad(ctx.join.parts_of(kept), dy, *ctx.how, w.shape[2:])
    dw = None if dw is None else dw.to(w.dtype)
    if any(need_x) and again:
        dx = conv_.conv_input_grad(dy, w, None, *how, ctx.size)
        dxs = cat_backward(dx, ctx.channels, 1, [True] * len(need_x))
    elif any(need_x):
        dxs = conv_joined_input_grad(dy, w, *ctx.how, ctx.size, ctx.channels)
    if dxs is not None:
        dxs = [dx if need else None for dx, need in zip(dxs, need_x, strict=True)]
    db = conv_.channel_sum(dy) if need_b else None
    return dxs if dxs is not None else [None] * len(need_x), dw, db, *(None,) * 5


# dxs ----------------------------------------------------------------------------------------------


def _input_grad_fake(
    dy: Tensor, w: Tensor, stride: Ints, padding: Ints, dilation: Ints, size: Ints, channels: Ints
) -> list[Tensor]:
    name = "conv_joined_input_grad"
    check_dtypes(name, dy, w=w)
    last = is_channels_last(dy) or is_channels_last(w)
    dxs = [new(dy, (dy.shape[0], c, *size), last) for c in channels]
    check(name, _shape(name, dxs), w.shape, dy.shape, None, 0, stride, padding, dilation, 1)
    return dxs


def _input_grad_cpu(
    dy: Tensor, w: Tensor, stride: Ints, padding: Ints, dilation: Ints, size: Ints, channels: Ints
) -> list[Tensor]:
    dxs = _input_grad_fake(dy, w, stride, padding, dilation, size, channels)
    if dy.numel() == 0:
        return [dx.zero_() for dx in dxs]
    (dy,), y_last = _dense([dy])
    shape, (w, w_last) = _shape("conv_joined_input_grad", dxs), dense(w)
    layouts = is_channels_last(dxs[0]), y_last, channels, w_last, mixed(dy, w)
    geometry = numbers(shape, w.shape, dy.shape, stride, padding, dilation, 1, *layouts)
    conv_.run("conv_input_grad", geometry, dxs, w, None, dy)
    return dxs


# dw -----------------------------------------------------------------------------------------------


def _weight_grad_fake(
    xs: Sequence[Tensor], dy: Tensor, stride: Ints, padding: Ints, dilation: Ints, kernel: Ints
) -> Tensor:
    name = "conv_joined_weight_grad"
    shape = _shape(name, xs)
    check_dtypes(name, *xs, dy)
    w_shape = (dy.shape[1], shape[1], *kernel)
    check(name, shape, w_shape, dy.shape, None, 0, stride, padding, dilation, 1)
    return new(dy, w_shape, False)


def _weight_grad_cpu(
    xs: Sequence[Tensor], dy: Tensor, stride: Ints, padding: Ints, dilation: Ints, kernel: Ints
) -> Tensor:
    dw = _weight_grad_fake(xs, dy, stride, padding, dilation, kernel)
    if dy.numel() == 0:
        return dw.zero_()
    (xs, x_last), ((dy,), y_last) = _dense(xs), _dense([dy])
    shape, channels = _shape("conv_joined_weight_grad", xs), [x.shape[1] for x in xs]
    geometry = numbers(shape, dw.shape, dy.shape, stride, padding, dilation, 1, x_last, y_last, channels)
    conv_.run("conv_weight_grad", geometry, xs, dw, None, dy)
    return dw


# vmap: of the concatenation -----------------------------------------------------------------------


def _merged(info: Any, dims: Sequence[int | None], xs: Sequence[Tensor]) -> Tensor:
    """The concatenation, its batch in front."""
    return cat_op([conv_vmap.front(x, d, info.batch_size) for x, d in zip(xs, dims, strict=True)], 2)


def _vmap(
    info: Any, in_dims: Any, xs: Sequence[Tensor], w: Tensor, b: Tensor | None, stride: Ints, padding: Ints,
    dilation: Ints, norm_groups: int, over_batch: bool,
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:  # fmt: skip
    x, dims, how = _merged(info, in_dims[0], xs), (0, *in_dims[1:3]), (stride, padding, dilation, 1)
    if norm_groups:
        return _moments_vmap(info, dims, x, w, b, *how, norm_groups, over_batch)
    y, at = conv_vmap.linear(conv_.conv, info, dims, x, w, b, *how)
    none = (x.new_empty(0, dtype=torch.float64) for _ in range(2))
    return (y, *none), (at, None, None)


def _input_grad_vmap(
    info: Any, in_dims: Any, dy: Tensor, w: Tensor, stride: Ints, padding: Ints, dilation: Ints, size: Ints,
    channels: Ints,
) -> tuple[list[Tensor], list[int]]:  # fmt: skip
    how = (stride, padding, dilation, 1, size)
    dx, at = conv_vmap.linear(conv_.conv_input_grad, info, (*in_dims[:2], None), dy, w, None, *how)
    return cat_backward(dx, channels, at + 2, [True] * len(channels)), [at] * len(channels)


def _weight_grad_vmap(
    info: Any, in_dims: Any, xs: Sequence[Tensor], dy: Tensor, *how: Any
) -> tuple[Tensor, int]:
    stride, padding, dilation, kernel = how
    x, dims = _merged(info, in_dims[0], xs), (0, in_dims[1])
    return conv_vmap.weight_grad(
        conv_.conv_weight_grad, info, dims, x, dy, stride, padding, dilation, 1, kernel
    )


def _no_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Nothing is kept for a gradient that there is not."""


def _refuse_backward(ctx: Any, *grads: Any) -> None:
    raise RuntimeError("conv_joined's gradients have none of their own: differentiate conv_joined with "
                       "create_graph=True")  # fmt: skip


_HOW = "SymInt[3] stride, SymInt[3] padding, SymInt[3] dilation"

conv_joined: Operator = register(
    f"conv_joined(Tensor[] xs, Tensor w, Tensor? b, {_HOW}, SymInt norm_groups, bool over_batch) "
    "-> (Tensor, Tensor, Tensor)",
    _cpu, _fake, _backward, _setup, _vmap,
)  # fmt: skip
conv_joined_input_grad: Operator = register(
    f"conv_joined_input_grad(Tensor dy, Tensor w, {_HOW}, SymInt[3] size, SymInt[] channels) -> Tensor[]",
    _input_grad_cpu, _input_grad_fake, _refuse_backward, _no_setup, _input_grad_vmap,
)  # fmt: skip
conv_joined_weight_grad: Operator = register(
    f"conv_joined_weight_grad(Tensor[] xs, Tensor dy, {_HOW}, SymInt[3] kernel) -> Tensor",
    _weight_grad_cpu, _weight_grad_fake, _refuse_backward, _no_setup, _weight_grad_vmap,
)  # fmt: skip
