"""Norm, addition and activation as one operator: one pass over memory each way, and nothing of y's size is kept.

    norm_act            y, mean, var     z = h w + b (+ residual), y = act(z), h = (x - mean) / sqrt(var + eps)
    norm_act_backward   dx, dw, db, dslopes, dresidual

With dz = dy act'(z): dresidual = dz, dslopes = sum dy min(z, 0), and dx, dw, db are those of the norm (ops/norm.py)
for dz. z is computed again from x in both passes of the gradient. Shapes as in ops/norm.py; residual is like x.
Derivatives of these gradients are those of the operators that the block consists of: with `create_graph=True` the
backward pass is composed of them.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _C, runtime
from ..geometry import is_channels_last
from . import saved
from .library import SMALL, Operator, contiguous, empty_like, pointer, register, scratch
from .norm import (
    _channels,
    _check_moments,
    _constant,
    _layout,
    _split,
    check,
    check_dtypes,
    compute_dtype,
    norm,
    norm_backward,
    norm_fixed,
)

# As csrc/cpu/norm_act_tile.h numbers them.
KINDS = {
    "identity": 0,
    "leaky_relu": 0,
    "prelu": 0,
    "relu": 1,
    "elu": 2,
    "silu": 3,
    "gelu": 4,
    "gelu_tanh": 5,
}


class Act(NamedTuple):
    """An activation of `norm_act`: kind is a key of KINDS; alpha is leaky_relu's slope and elu's alpha; slopes are
    prelu's, 1 or C."""

    kind: str
    alpha: float = 0.0
    slopes: Tensor | None = None


# Checks and the call ------------------------------------------------------------------------------


def _check(op: str, x: Tensor, w: Tensor | None, b: Tensor | None, slopes: Tensor | None, residual: Tensor | None,
           mean: Tensor | None, var: Tensor | None, groups: int, over_batch: bool, fixed: bool, kind: str,
           ) -> None:  # fmt: skip
    check(op, x, w, b, groups)
    if kind not in KINDS:
        raise RuntimeError(f"{op}: expected an activation of {', '.join(KINDS)}, received {kind!r}")
    if (slopes is None) != (kind != "prelu"):
        raise RuntimeError(f"{op}: slopes belong to prelu, and to nothing else: received activation {kind!r} "
                           f"{'without' if slopes is None else 'with'} slopes")  # fmt: skip
    if slopes is not None:
        check_dtypes(op, x, slopes=slopes)
        if tuple(slopes.shape) != (x.shape[1],):
            raise RuntimeError(f"{op}: expected slopes of shape ({x.shape[1]},), one for each channel of x "
                               f"{tuple(x.shape)}, received {tuple(slopes.shape)}")  # fmt: skip
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise RuntimeError(f"{op}: expected residual like x, {tuple(x.shape)} and {x.dtype}, received "
                           f"{tuple(residual.shape)} and {residual.dtype}")  # fmt: skip
    if (mean is None) != (var is None) or fixed and mean is None:
        raise RuntimeError(f"{op}: expected mean and var, both or neither, and both where they are fixed; received "
                           f"mean={mean is not None}, var={var is not None}, fixed={fixed}")  # fmt: skip
    if mean is not None and var is not None:
        _check_moments(op, (groups,) if over_batch else (x.shape[0], groups), mean, var)
    if fixed and not (over_batch and groups == x.shape[1]):
        raise RuntimeError(f"{op}: fixed mean and var belong to channels: expected over_batch and groups = "
                           f"{x.shape[1]}, received over_batch={over_batch}, groups={groups}")  # fmt: skip


def _slope(kind: str, alpha: float) -> float:
    return 1.0 if kind == "identity" else alpha


def _run(op: str, x: Tensor, groups: int, over_batch: bool, fixed: bool, eps: float, kind: str, alpha: float,
         *tensors: Tensor | None) -> None:  # fmt: skip
    """One kernel over tensors that are dense in x's layout; one pixel is channels-last, whatever its strides."""
    pixels = math.prod(x.shape[2:])
    numbers = [x.shape[0], x.shape[1], pixels, groups, over_batch, fixed, is_channels_last(x) or pixels == 1]
    dtype, threads = runtime.DTYPES[x.dtype], runtime.threads() if x.numel() > SMALL else 1
    memory = scratch(_C.norm_act_scratch(dtype, numbers, threads))
    with runtime.serve(op, "direct", lambda: f"{tuple(x.shape)} groups {groups} {kind} {x.dtype}"):
        getattr(_C, op)(dtype, numbers, eps, KINDS[kind], _slope(kind, alpha), *map(pointer, tensors),
                        memory.data_ptr(), threads)  # fmt: skip


# y, mean, var -------------------------------------------------------------------------------------


def _fake(
    x: Tensor, w: Tensor | None, b: Tensor | None, slopes: Tensor | None, residual: Tensor | None,
    mean: Tensor | None, var: Tensor | None, groups: int, over_batch: bool, fixed: bool, eps: float, kind: str,
    alpha: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    _check("norm_act", x, w, b, slopes, residual, mean, var, groups, over_batch, fixed, kind)
    shape = ((groups,) if over_batch else (x.shape[0], groups)) if mean is None else (0,)
    moments = (x.new_empty(shape, dtype=torch.float64) for _ in range(2))
    return empty_like(x, memory_format=_layout(x)), *moments  # type: ignore[return-value]


def _cpu(
    x: Tensor, w: Tensor | None, b: Tensor | None, slopes: Tensor | None, residual: Tensor | None,
    mean: Tensor | None, var: Tensor | None, groups: int, over_batch: bool, fixed: bool, eps: float, kind: str,
    alpha: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    y, *new = _fake(x, w, b, slopes, residual, mean, var, groups, over_batch, fixed, eps, kind, alpha)
    if x.numel() == 0:
        return y, new[0].zero_(), new[1].zero_()
    layout = _layout(x)
    x = contiguous(x, layout)
    residual = None if residual is None else contiguous(residual, layout)
    given = mean is not None and var is not None
    moments = (mean.contiguous(), var.contiguous()) if given else new  # type: ignore[union-attr]
    parameters = (_constant(x, t) for t in (w, b, slopes))
    _run("norm_act", x, groups, over_batch, given, eps, kind, alpha, x, *parameters, residual, y, *moments)
    return y, new[0], new[1]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, w, b, slopes, residual, mean, var, *ctx.how = inputs
    y, *new = output
    ctx.mark_non_differentiable(*new)
    ctx.set_materialize_grads(False)
    saves = (x, w, b, slopes, residual, *(new if mean is None else (mean, var)))
    saved.save(ctx, y, saved.Block(*ctx.how), saves)


def _backward(ctx: Any, dy: Tensor | None, dmean: None, dvar: None) -> tuple[Any, ...]:
    if dy is None:
        return (None,) * 13
    tensors, need = ctx.saved_tensors, ctx.needs_input_grad[:5]
    if torch.is_grad_enabled():
        return *_composed(need, dy, *tensors, *ctx.how), *(None,) * 8
    need_x, need_w, need_b, need_slopes, need_residual = need
    same = ctx.how[4] == "identity"  # then dz is dy
    dx, dw, db, dslopes, dz = norm_act_backward(
        dy, *tensors, *ctx.how, need_x, need_w or need_b, need_slopes, need_residual and not same
    )
    _, w, b, slopes, *_ = tensors
    return (
        dx if need_x else None,
        dw.to(w.dtype) if need_w else None,
        db.to(b.dtype) if need_b else None,
        dslopes.to(slopes.dtype) if need_slopes else None,
        (dy if same else dz) if need_residual else None,
        *(None,) * 8,
    )


def _derivative(kind: str, z: Tensor, slope: float | Tensor) -> Tensor:
    """act'(z), in torch's arithmetic; at a kink torch's own."""
    if kind == "silu":
        p = z.sigmoid()
        return p * (1 + z * (1 - p))
    if kind == "gelu":
        return (1 + (z * 0.5**0.5).erf()) / 2 + z * (z * z / -2).exp() / (2 * math.pi) ** 0.5
    if kind == "gelu_tanh":
        k = (2 / math.pi) ** 0.5
        t = (k * (z + 0.044715 * z**3)).tanh()
        return (1 + t) / 2 + z * (1 - t * t) / 2 * k * (1 + 3 * 0.044715 * z * z)
    one, below = torch.ones_like(z), torch.zeros_like(z) + slope
    if kind == "relu":
        return torch.where(z <= 0, 0, one)
    return torch.where(z > 0, one, below * z.clamp(max=0).exp() if kind == "elu" else below)


def _composed(
    need: tuple[bool, ...], dy: Tensor, x: Tensor, w: Tensor | None, b: Tensor | None, slopes: Tensor | None,
    residual: Tensor | None, mean: Tensor, var: Tensor, groups: int, over_batch: bool, fixed: bool, eps: float,
    kind: str, alpha: float,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The five gradients, of operators that can be differentiated again."""
    wide = compute_dtype(x)
    dy_, x_ = dy.to(wide), x.to(wide)
    w_, b_, slopes_, residual_ = (None if t is None else t.to(wide) for t in (w, b, slopes, residual))
    if fixed:
        z = norm_fixed(x_, w_, b_, mean, var, eps)
    else:
        z = norm(x_, w_, b_, groups, over_batch, eps)[0]
    z = z if residual_ is None else z + residual_
    pixels = (1,) * (x.dim() - 2)
    slope = _slope(kind, alpha) if slopes_ is None else slopes_.view(-1, *pixels)
    dz = dy_ * _derivative(kind, z, slope)
    dx, dw, db = norm_backward(
        dz, x_, w_, mean, var, groups, over_batch, fixed, eps, need[0], need[1] or need[2]
    )
    dslopes = torch.where(z > 0, 0, z * dy_).sum([0, *range(2, x.dim())]) if need[3] else None
    grads = zip((dx, dw, db, dslopes, dz), (x, w, b, slopes, residual), need, strict=True)
    return tuple(
        g.to(t.dtype) if t is not None and g is not None and wanted else None for g, t, wanted in grads
    )


# dx, dw, db, dslopes, dresidual -------------------------------------------------------------------


def _backward_fake(
    dy: Tensor, x: Tensor, w: Tensor | None, b: Tensor | None, slopes: Tensor | None, residual: Tensor | None,
    mean: Tensor, var: Tensor, groups: int, over_batch: bool, fixed: bool, eps: float, kind: str, alpha: float,
    need_dx: bool, need_dw: bool, need_dslopes: bool, need_dresidual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    _check("norm_act_backward", x, w, b, slopes, residual, mean, var, groups, over_batch, fixed, kind)
    if dy.shape != x.shape or dy.dtype != x.dtype:
        raise RuntimeError(f"norm_act_backward: expected dy like x, {tuple(x.shape)} and {x.dtype}, received "
                           f"{tuple(dy.shape)} and {dy.dtype}")  # fmt: skip
    dx, dresidual = (
        empty_like(x, memory_format=_layout(x)) if need else x.new_empty(0)
        for need in (need_dx, need_dresidual)
    )
    dw, db, dslopes = (
        x.new_empty(x.shape[1] if need else 0, dtype=compute_dtype(x))
        for need in (need_dw, need_dw, need_dslopes)
    )
    return dx, dw, db, dslopes, dresidual


def _backward_cpu(
    dy: Tensor, x: Tensor, w: Tensor | None, b: Tensor | None, slopes: Tensor | None, residual: Tensor | None,
    mean: Tensor, var: Tensor, groups: int, over_batch: bool, fixed: bool, eps: float, kind: str, alpha: float,
    need_dx: bool, need_dw: bool, need_dslopes: bool, need_dresidual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    how = (groups, over_batch, fixed, eps, kind, alpha)
    needs = (need_dx, need_dw, need_dw, need_dslopes, need_dresidual)
    grads = _backward_fake(dy, x, w, b, slopes, residual, mean, var, *how, need_dx, *needs[2:])
    if x.numel() == 0:
        for g in grads:
            g.zero_()
        return grads
    layout = _layout(x)
    x, dy = contiguous(x, layout), contiguous(dy, layout)
    residual = None if residual is None else contiguous(residual, layout)
    parameters = (_constant(x, t) for t in (w, b, slopes))
    moments = (mean.contiguous(), var.contiguous())
    wanted = (g if need else None for g, need in zip(grads, needs, strict=True))
    _run("norm_act_backward", x, *how, dy, x, *parameters, residual, *moments, *wanted)
    return grads


def _no_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)


def _refuse_backward(ctx: Any, *grads: Tensor | None) -> tuple[None, ...]:
    raise RuntimeError(
        "norm_act_backward has no gradient of its own: differentiate norm_act with create_graph=True"
    )


# vmap: the batch joins the channels ---------------------------------------------------------------


def _merged(
    info: Any, in_dims: Any, arguments: tuple[Any, ...], axes: tuple[int, ...]
) -> list[Tensor | None]:
    size = info.batch_size
    return [_channels(t, d, size, at) for t, d, at in zip(arguments, in_dims, axes, strict=False)]


def _vmap(info: Any, in_dims: Any, *arguments: Any) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    *_, mean, _, groups, over_batch, fixed, eps, kind, alpha = arguments
    size, at = info.batch_size, 0 if over_batch else 1
    parts = _merged(info, in_dims, arguments, (1, 0, 0, 0, 1, at, at))
    y, *moments = norm_act_op(*parts, groups * size, over_batch, fixed, eps, kind, alpha)
    if mean is not None:
        return (_split(y, size, 1), *moments), (0, None, None)
    return (_split(y, size, 1), *(_split(m, size, at) for m in moments)), (0, 0, 0)


def _backward_vmap(info: Any, in_dims: Any, *arguments: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    groups, over_batch, *how = arguments[8:]
    size, at = info.batch_size, 0 if over_batch else 1
    parts = _merged(info, in_dims, arguments, (1, 1, 0, 0, 0, 1, at, at))
    grads = norm_act_backward(*parts, groups * size, over_batch, *how)
    empty = [not need for need in (how[-4], how[-3], how[-3], how[-2], how[-1])]
    split = (
        g.expand(size, 0) if none else _split(g, size, axis)
        for g, none, axis in zip(grads, empty, (1, 0, 0, 0, 1), strict=True)
    )
    return tuple(split), (0,) * 5


_TENSORS = "Tensor x, Tensor? w, Tensor? b, Tensor? slopes, Tensor? residual"
_HOW = "SymInt groups, bool over_batch, bool fixed, float eps, str kind, float alpha"

norm_act_op: Operator = register(
    f"norm_act({_TENSORS}, Tensor? mean, Tensor? var, {_HOW}) -> (Tensor, Tensor, Tensor)",
    _cpu, _fake, _backward, _setup, _vmap,
)  # fmt: skip
norm_act_backward: Operator = register(
    f"norm_act_backward(Tensor dy, {_TENSORS}, Tensor mean, Tensor var, {_HOW}, bool need_dx, bool need_dw, "
    "bool need_dslopes, bool need_dresidual) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_cpu, _backward_fake, _refuse_backward, _no_setup, _backward_vmap,
)  # fmt: skip


# Public function ----------------------------------------------------------------------------------


def norm_act(
    x: Tensor, w: Tensor | None, b: Tensor | None, groups: int, over_batch: bool, eps: float, act: Act,
    residual: Tensor | None = None, moments: tuple[Tensor, Tensor] | None = None, fixed: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """act(norm(x) * w + b + residual), and the mean and variance that it used, in float64.

    Args:
        x: (N, C, *), float32, bfloat16 or float64.
        w, b: (C), of x's dtype, or float32 where x is bfloat16; None: 1 and 0.
        groups: C / groups channels share a mean: C for batch and instance norm.
        over_batch: all images share it, as in batch norm.
        eps: added to the variance.
        act: the activation.
        residual: like x; None: 0.
        moments: mean and (biased) variance, (groups) or, unless over_batch, (N, groups), from elsewhere: gathered while
            x was written, or running statistics.
        fixed: the moments do not depend on x, and belong to channels: no gradient flows through them.

    Gradients flow to x, w, b, act.slopes and residual. RuntimeError for shapes and dtypes that do not fit.

    >>> x = torch.tensor([[[1.0, 3.0]]])
    >>> norm_act(x, None, None, 1, False, 0.0, Act("relu"))[0]
    tensor([[[0., 1.]]])
    """
    slopes, (mean, var) = act.slopes, moments or (None, None)
    if slopes is not None and slopes.dim() == 1 and slopes.shape[0] == 1:
        slopes = slopes.expand(x.shape[1])
    if mean is not None and var is not None:
        mean, var = mean.double(), var.double()
    y, *new = norm_act_op(
        x, w, b, slopes, residual, mean, var, groups, over_batch, fixed, eps, act.kind, act.alpha
    )
    if mean is not None and var is not None:
        return y, mean, var
    return y, new[0], new[1]
