"""Batch, instance, group and layer norm: one formula, y = h w + b with h = (x - mean) / sqrt(var + eps).

    norm           y, mean, var   over the channels of a group, the pixels and (over_batch) the images
    norm_fixed     y              mean and var are given
    norm_backward  dx, dw, db     of both

x is (N, C, *), w and b (C), mean and var (groups) or, unless over_batch, (N, groups), always in float64: the mean
of a scan in raw Hounsfield units needs more digits than a float has. Batch norm is groups = C over the batch,
instance norm groups = C, group norm any; layer norm is group norm of one group and one pixel, its elements being
channels. The variance is the biased one. With r = 1 / sqrt(var + eps), g = w dy and P the projection
P z = z - mean(z) - h mean(h z),

    dx = r P g,   dw = sum dy h,   db = sum dy,

and the gradient of these three, for incoming v, u, t, follows from P being symmetric:

    ddy = r w P v + u h + t,   ddw = sum dy r P v,   ddx = r P z - h r sum(g r P v) / count,
    z = u dy - r (g mean(h v) + v mean(h g)).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _C, runtime
from ..geometry import check_bool, check_float, is_channels_last, memory_format
from . import saved
from .library import SMALL, Operator, contiguous, empty_like, pointer, register, scratch

Ints = Sequence[int]

# Checks and the call ------------------------------------------------------------------------------


def check(op: str, x: Tensor, w: Tensor | None, b: Tensor | None, groups: int) -> None:
    """RuntimeError with what, expected, received, remedy."""
    if x.dtype not in runtime.DTYPES:
        raise RuntimeError(f"{op}: kernels take {', '.join(map(str, runtime.DTYPES))}, received {x.dtype}")
    if x.dim() < 2:
        raise RuntimeError(f"{op}: expected x with at least 2 axes (N, C, *), received {tuple(x.shape)}")
    channels = x.shape[1]
    if groups < 1 and channels > 0 or channels % max(groups, 1):
        raise RuntimeError(
            f"{op}: expected number of channels in input to be divisible by num_groups, but got input of shape "
            f"{tuple(x.shape)} and num_groups={groups}; choose a divisor of {channels}"
        )
    for name, t in (("weight", w), ("bias", b)):
        if t is not None and tuple(t.shape) != (channels,):
            raise RuntimeError(
                f"{op}: {name} should be a vector of {channels} elements, one for each channel of x {tuple(x.shape)}, "
                f"received {tuple(t.shape)}"
            )
    check_dtypes(op, x, weight=w, bias=b)


def check_dtypes(op: str, x: Tensor, **parameters: Tensor | None) -> None:
    """Parameters are of x's dtype, or all float32 where x is bfloat16: torch's rule."""
    given = {n: t.dtype for n, t in parameters.items() if t is not None}
    allowed = {x.dtype} | ({torch.float32} if x.dtype == torch.bfloat16 else set())
    if len(set(given.values())) > 1 or not set(given.values()) <= allowed:
        received = ", ".join(f"{n} {d}" for n, d in given.items())
        raise RuntimeError(
            f"{op}: mixed dtype: expected {' and '.join(given)} of dtype {' or '.join(sorted(map(str, allowed)))} "
            f"for input {x.dtype}, received {received}; convert them, or the input"
        )


def compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _layout(x: Tensor) -> torch.memory_format:
    return memory_format(is_channels_last(x), x.dim())


def _constant(x: Tensor, t: Tensor | None) -> Tensor | None:
    return None if t is None else t.to(compute_dtype(x)).contiguous()


def _run(
    op: str, x: Tensor, groups: int, over_batch: bool, fixed: bool, eps: float, *tensors: Tensor | None
) -> None:
    """One kernel over tensors that are dense in x's layout; one pixel is channels-last, whatever its strides."""
    pixels = math.prod(x.shape[2:])
    numbers = [x.shape[0], x.shape[1], pixels, groups, over_batch, fixed, is_channels_last(x) or pixels == 1]
    dtype, threads = runtime.DTYPES[x.dtype], runtime.threads() if x.numel() > SMALL else 1
    memory = scratch(_C.norm_scratch(dtype, numbers, threads))
    with runtime.serve(op, "direct", lambda: f"{tuple(x.shape)} groups {groups} {x.dtype}"):
        getattr(_C, op)(dtype, numbers, eps, *map(pointer, tensors), memory.data_ptr(), threads)


# y, mean, var -------------------------------------------------------------------------------------


def _norm_fake(
    x: Tensor, w: Tensor | None, b: Tensor | None, groups: int, over_batch: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    check("norm", x, w, b, groups)
    shape = (groups,) if over_batch else (x.shape[0], groups)
    mean, var = (x.new_empty(shape, dtype=torch.float64) for _ in range(2))
    return empty_like(x, memory_format=_layout(x)), mean, var


def _norm_cpu(
    x: Tensor, w: Tensor | None, b: Tensor | None, groups: int, over_batch: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    y, mean, var = _norm_fake(x, w, b, groups, over_batch, eps)
    if x.numel() == 0:
        return y, mean.zero_(), var.zero_()
    x = contiguous(x, _layout(x))
    _run("norm", x, groups, over_batch, False, eps, x, _constant(x, w), _constant(x, b), y, mean, var)
    return y, mean, var


def _norm_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, w, b, groups, over_batch, eps = inputs
    _, mean, var = output
    ctx.mark_non_differentiable(mean, var)
    ctx.set_materialize_grads(False)
    ctx.how = (groups, over_batch, False, eps)
    _save(ctx, output[0], x, w, b, mean, var)


def _save(
    ctx: Any, y: Tensor, x: Tensor, w: Tensor | None, b: Tensor | None, mean: Tensor, var: Tensor
) -> None:
    """What the gradient needs, and b where y may be made again; of rows it is not, which have a kernel of their own."""
    ctx.dtype_b = None if b is None else b.dtype
    again = saved.possible(y) and (ctx.how[1] or math.prod(x.shape[2:]) > 1)
    if again:
        saved.save(ctx, y, saved.Block(*ctx.how), (x, w, mean, var, b), _as_block)
    else:
        ctx.save_for_backward(x, w, mean, var, None)


def _as_block(kept: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    x, w, mean, var, b = kept
    return x, w, b, None, None, mean, var


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, w, mean, var, _ = ctx.saved_tensors
    need_x, need_w, need_b, *_ = ctx.needs_input_grad
    dx, dw, db = norm_backward(dy, x, w, mean, var, *ctx.how, need_x, need_w or need_b)
    return dx if need_x else None, dw.to(w.dtype) if need_w else None, db.to(ctx.dtype_b) if need_b else None


def _norm_backward(ctx: Any, dy: Tensor | None, dmean: None, dvar: None) -> tuple[Any, ...]:
    grads = (None,) * 3 if dy is None else _gradients(ctx, dy)
    return *grads, None, None, None


# y with given mean and var ------------------------------------------------------------------------


def _fixed_fake(
    x: Tensor, w: Tensor | None, b: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> Tensor:
    check("norm_fixed", x, w, b, max(x.shape[1], 1) if x.dim() > 1 else 1)
    _check_moments("norm_fixed", (x.shape[1],), mean, var)
    return empty_like(x, memory_format=_layout(x))


def _check_moments(op: str, shape: Ints, mean: Tensor, var: Tensor) -> None:
    for name, t in (("mean", mean), ("var", var)):
        if tuple(t.shape) != tuple(shape) or t.dtype != torch.float64:
            raise RuntimeError(f"{op}: expected {name} of shape {tuple(shape)} and dtype torch.float64, received "
                               f"{tuple(t.shape)} and {t.dtype}")  # fmt: skip


def _fixed_cpu(
    x: Tensor, w: Tensor | None, b: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> Tensor:
    y = _fixed_fake(x, w, b, mean, var, eps)
    if x.numel() == 0:
        return y
    x, mean, var = contiguous(x, _layout(x)), mean.contiguous(), var.contiguous()
    _run("norm", x, x.shape[1], True, True, eps, x, _constant(x, w), _constant(x, b), y, mean, var)
    return y


def _fixed_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, w, b, mean, var, eps = inputs
    ctx.how = (x.shape[1], True, True, eps)
    _save(ctx, output, x, w, b, mean, var)


def _fixed_backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    return *_gradients(ctx, dy), None, None, None


# dx, dw, db ---------------------------------------------------------------------------------------


def _backward_fake(
    dy: Tensor, x: Tensor, w: Tensor | None, mean: Tensor, var: Tensor, groups: int, over_batch: bool, fixed: bool,
    eps: float, need_dx: bool, need_dw: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    check("norm_backward", x, w, None, groups)
    _check_moments("norm_backward", (groups,) if over_batch else (x.shape[0], groups), mean, var)
    if fixed and not (over_batch and groups == x.shape[1]):
        raise RuntimeError("norm_backward: fixed mean and var belong to channels: expected over_batch and groups = "
                           f"{x.shape[1]}, received over_batch={over_batch}, groups={groups}")  # fmt: skip
    if dy.shape != x.shape or dy.dtype != x.dtype:
        raise RuntimeError(f"norm_backward: expected dy like x, {tuple(x.shape)} and {x.dtype}, received "
                           f"{tuple(dy.shape)} and {dy.dtype}")  # fmt: skip
    dw, db = (x.new_empty(x.shape[1] if need_dw else 0, dtype=compute_dtype(x)) for _ in range(2))
    dx = empty_like(x, memory_format=_layout(x)) if need_dx else x.new_empty(0)
    return dx, dw, db


def _backward_cpu(
    dy: Tensor, x: Tensor, w: Tensor | None, mean: Tensor, var: Tensor, groups: int, over_batch: bool, fixed: bool,
    eps: float, need_dx: bool, need_dw: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dx, dw, db = _backward_fake(dy, x, w, mean, var, groups, over_batch, fixed, eps, need_dx, need_dw)
    if x.numel() == 0:
        return dx, dw.zero_(), db.zero_()
    layout = _layout(x)
    x, dy = contiguous(x, layout), contiguous(dy, layout)
    wanted = (dx if need_dx else None, *((dw, db) if need_dw else (None, None)))
    moments = (mean.contiguous(), var.contiguous())
    _run("norm_backward", x, groups, over_batch, fixed, eps, dy, x, _constant(x, w), *moments, *wanted)
    return dx, dw, db


def _backward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    dy, x, w, mean, var, *ctx.how, ctx.need_dx, ctx.need_dw = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(dy, x, w, mean, var)


def _backward_backward(ctx: Any, v: Tensor | None, u: Tensor | None, t: Tensor | None) -> tuple[Any, ...]:
    """The formulas in the head of this file, in torch's arithmetic but for h and r P, which are operators: all
    of it can be differentiated again."""
    dy_, x_, w_, mean, var = ctx.saved_tensors
    groups, over_batch, fixed, eps = ctx.how
    accurate = compute_dtype(x_)
    channel = (1, -1, *(1,) * (x_.dim() - 2))
    dy, x = dy_.to(accurate), x_.to(accurate)
    w = 1 if w_ is None else w_.to(accurate).view(channel)
    v = None if v is None or not ctx.need_dx else v.to(accurate)
    u, t = (None if d is None or not ctx.need_dw else d.view(channel) for d in (u, t))

    def summed(z: Tensor) -> Tensor:  # over all that share a mean
        parts = z.reshape(z.shape[0], groups, z.shape[1] // max(groups, 1), -1)
        axes = [0, 2, 3] if over_batch else [2, 3]
        return parts.sum(axes, keepdim=True).expand_as(parts).reshape(z.shape)

    def project(z: Tensor) -> Tensor:  # r P z
        return norm_backward(z, x, None, mean, var, *ctx.how, True, False)[0]

    if fixed:
        h = norm_fixed(x, None, None, mean, var, eps)
    else:
        h = norm(x, None, None, groups, over_batch, eps)[0]
    ddy, dx, z, dw = torch.zeros_like(x), torch.zeros_like(x), torch.zeros_like(x), None
    if t is not None:
        ddy = ddy + t
    if u is not None:
        ddy, z = ddy + h * u, dy * u
    if v is not None:
        pv, g = project(v), dy * w
        ddy, dw = ddy + pv * w, (dy * pv).sum([0, *range(2, x.dim())])
        if not fixed:
            count = summed(torch.ones_like(x))
            deviation = x - summed(x) / count
            r = (summed(deviation * deviation) / count + eps).rsqrt()
            z = z - r * (g * summed(h * v) + v * summed(h * g)) / count
            dx = dx - h * r * summed(g * pv) / count
    dx = dx + project(z)
    dw = None if w_ is None or dw is None else dw.to(w_.dtype)
    return ddy.to(dy_.dtype), dx.to(x_.dtype), dw, *(None,) * 8


# vmap: the batch joins the channels ---------------------------------------------------------------


def _channels(t: Tensor | None, axis: int | None, size: int, at: int) -> Tensor | None:
    """A batch of tensors as one, its axis merged into the channels, axis `at`."""
    if t is None:
        return None
    batched = t.expand(size, *t.shape) if axis is None else t.movedim(axis, 0)
    return batched.movedim(0, at).flatten(at, at + 1)


def _split(t: Tensor, size: int, at: int) -> Tensor:
    return t.unflatten(at, (size, t.shape[at] // size)).movedim(at, 0)


def _norm_vmap(info: Any, in_dims: Any, x: Tensor, w: Tensor | None, b: Tensor | None, groups: int,
               over_batch: bool, eps: float) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:  # fmt: skip
    size = info.batch_size
    parts = [_channels(t, d, size, at) for t, d, at in zip((x, w, b), in_dims, (1, 0, 0), strict=False)]
    y, mean, var = norm(*parts, groups * size, over_batch, eps)
    at = 0 if over_batch else 1
    return (_split(y, size, 1), _split(mean, size, at), _split(var, size, at)), (0, 0, 0)


def _fixed_vmap(info: Any, in_dims: Any, x: Tensor, w: Tensor | None, b: Tensor | None, mean: Tensor, var: Tensor,
                eps: float) -> tuple[Tensor, int]:  # fmt: skip
    size = info.batch_size
    parts = [
        _channels(t, d, size, at)
        for t, d, at in zip((x, w, b, mean, var), in_dims, (1, 0, 0, 0, 0), strict=False)
    ]
    return _split(norm_fixed(*parts, eps), size, 1), 0


def _backward_vmap(info: Any, in_dims: Any, dy: Tensor, x: Tensor, w: Tensor | None, mean: Tensor, var: Tensor,
                   groups: int, over_batch: bool, fixed: bool, eps: float, need_dx: bool, need_dw: bool,
                   ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:  # fmt: skip
    size, at = info.batch_size, 0 if over_batch else 1
    axes = (1, 1, 0, at, at)
    parts = [_channels(t, d, size, a) for t, d, a in zip((dy, x, w, mean, var), in_dims, axes, strict=False)]
    dx, dw, db = norm_backward(*parts, groups * size, over_batch, fixed, eps, need_dx, need_dw)
    dx = _split(dx, size, 1) if need_dx else dx.expand(size, 0)
    dw, db = (_split(t, size, 0) for t in (dw, db))
    return (dx, dw, db), (0, 0, 0)


norm: Operator = register(
    "norm(Tensor x, Tensor? w, Tensor? b, SymInt groups, bool over_batch, float eps) -> (Tensor, Tensor, Tensor)",
    _norm_cpu, _norm_fake, _norm_backward, _norm_setup, _norm_vmap,
)  # fmt: skip
norm_fixed: Operator = register(
    "norm_fixed(Tensor x, Tensor? w, Tensor? b, Tensor mean, Tensor var, float eps) -> Tensor",
    _fixed_cpu, _fixed_fake, _fixed_backward, _fixed_setup, _fixed_vmap,
)  # fmt: skip
norm_backward: Operator = register(
    "norm_backward(Tensor dy, Tensor x, Tensor? w, Tensor mean, Tensor var, SymInt groups, bool over_batch, "
    "bool fixed, float eps, bool need_dx, bool need_dw) -> (Tensor, Tensor, Tensor)",
    _backward_cpu, _backward_fake, _backward_backward, _backward_setup, _backward_vmap,
)  # fmt: skip


# Public functions ---------------------------------------------------------------------------------


def _check_running(name: str, x: Tensor, needed: str, mean: Tensor | None, var: Tensor | None) -> None:
    """`needed`: when running statistics must be there, or nothing."""
    if needed and (mean is None or var is None):
        raise RuntimeError(
            f"{name}: running_mean and running_var must be defined {needed}; pass both, or let the input's own "
            "statistics be used"
        )
    if (mean is None) != (var is None):
        raise ValueError(f"{name}: running_mean and running_var must either both be None or neither be None")
    for what, t in (("running_mean", mean), ("running_var", var)):
        if t is None:
            continue
        if tuple(t.shape) != (x.shape[1],):
            raise RuntimeError(
                f"{name}: {what} should contain {x.shape[1]} elements, one for each channel of input "
                f"{tuple(x.shape)}, not {tuple(t.shape)}"
            )
        if t.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(f"{name}: not differentiable with respect to argument '{what}'; it must not require "
                               "grad: pass it detached")  # fmt: skip


def _vector(t: Tensor | None) -> Tensor | None:
    """torch takes weights of any shape with C elements."""
    return t if t is None or t.dim() == 1 else t.reshape(-1)


def _check_input(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}(): argument 'input' must be Tensor, not {type(x).__name__}")
    if x.dim() < 2:
        raise RuntimeError(
            f"{name}: expected at least 2 dimensions (N, C, *) for input tensor but received {x.dim()}: "
            f"{tuple(x.shape)}"
        )


def _update(running: Tensor, new: Tensor, momentum: float) -> None:
    """running = (1 - momentum) running + momentum new, rounded once to its own dtype."""
    running.copy_(running.double().lerp_(new, momentum))


def _track(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, count: int, momentum: float
) -> None:
    """Into the running statistics: the mean over images, and the unbiased variance of `count` elements."""
    with torch.no_grad():
        _update(running_mean, mean, momentum)
        _update(running_var, var * (count / (count - 1)), momentum)


def batch_norm(x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, w: Tensor | None,
               b: Tensor | None, training: bool, momentum: float, eps: float, norm: Operator = norm,
               norm_fixed: Operator = norm_fixed) -> Tensor:  # fmt: skip
    """torch.nn.functional.batch_norm. x (N, C, *); the others (C). norm, norm_fixed: what computes y."""
    name = "batch_norm"
    momentum, eps = check_float(name, "momentum", momentum), check_float(name, "eps", eps)
    count = x.numel() // max(x.shape[1], 1) if isinstance(x, Tensor) and x.dim() > 1 else 0
    if training and count == 1:
        raise ValueError(f"{name}: Expected more than 1 value per channel when training, got input size {x.shape}; "
                         "use a larger batch, or evaluate with running statistics")  # fmt: skip
    check_bool(name, "training", training)
    if eps < 0 or training and eps == 0:
        raise ValueError(f"{name} eps must be positive during training, and never negative, but got {eps}")
    _check_input(name, x)
    _check_running(name, x, "" if training else "in evaluation mode", running_mean, running_var)
    w, b = _vector(w), _vector(b)
    check_dtypes(name, x, weight=w, bias=b, running_mean=running_mean, running_var=running_var)
    if not training and running_mean is not None and running_var is not None:
        return norm_fixed(x, w, b, running_mean.double(), running_var.double(), eps)
    y, mean, var = norm(x, w, b, x.shape[1], True, eps)
    if running_mean is not None and running_var is not None and x.numel():
        _track(running_mean, running_var, mean, var, count, momentum)
    return y


def instance_norm(x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, w: Tensor | None,
                  b: Tensor | None, use_input_stats: bool, momentum: float, eps: float, norm: Operator = norm,
                  norm_fixed: Operator = norm_fixed) -> Tensor:  # fmt: skip
    """torch.nn.functional.instance_norm. x (N, C, *); the others (C). Running statistics take the mean over the
    images; those of an empty batch leave them alone. norm, norm_fixed: what computes y."""
    name = "instance_norm"
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}(): argument 'input' must be Tensor, not {type(x).__name__}")
    momentum, eps = check_float(name, "momentum", momentum), check_float(name, "eps", eps)
    count = math.prod(x.shape[2:])
    if use_input_stats and count == 1:
        raise ValueError(f"{name}: Expected more than 1 spatial element when training, got input size {x.shape}; "
                         "enlarge the input, or use running statistics")  # fmt: skip
    check_bool(name, "use_input_stats", use_input_stats)
    _check_input(name, x)
    _check_running(
        name, x, "" if use_input_stats else "when use_input_stats is false", running_mean, running_var
    )
    if not use_input_stats and running_mean is not None and running_var is not None:
        return norm_fixed(x, w, b, running_mean.double(), running_var.double(), eps)
    y, mean, var = norm(x, w, b, x.shape[1], False, eps)
    if running_mean is not None and running_var is not None and x.numel():
        _track(running_mean, running_var, mean.mean(0), var.mean(0), count, momentum)
    return y


def group_norm(x: Tensor, groups: int, w: Tensor | None, b: Tensor | None, eps: float,
               norm: Operator = norm) -> Tensor:  # fmt: skip
    """torch.nn.functional.group_norm. x (N, C, *), w and b (C); `groups` divides C. norm: what computes y."""
    name = "group_norm"
    _check_input(name, x)
    if not isinstance(groups, (int, torch.SymInt)):
        raise TypeError(f"{name}(): argument 'num_groups' must be int, not {type(groups).__name__}")
    eps = check_float(name, "eps", eps)
    if groups < 1:
        kind = ZeroDivisionError if groups == 0 else RuntimeError  # as torch does
        raise kind(f"{name}: expected num groups to be greater than 0, got {groups}")
    values = x.shape[0] * x.shape[1] // groups * math.prod(x.shape[2:])
    if values == 1:
        raise ValueError(f"{name}: Expected more than 1 value per channel when training, got input size {x.shape} in "
                         f"{groups} groups; take fewer groups")  # fmt: skip
    return norm(x, w, b, groups, False, eps)[0]


def layer_norm(x: Tensor, shape: Ints, w: Tensor | None, b: Tensor | None, eps: float) -> Tensor:
    """torch.nn.functional.layer_norm. x (*, *shape), w and b of that shape."""
    name = "layer_norm"
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}(): argument 'input' must be Tensor, not {type(x).__name__}")
    if not isinstance(shape, (tuple, list)) or not all(isinstance(v, (int, torch.SymInt)) for v in shape):
        raise TypeError(f"{name}(): argument 'normalized_shape' must be tuple of ints, not {shape!r}")
    shape, eps = tuple(shape), check_float(name, "eps", eps)
    if not shape:
        raise RuntimeError(f"{name}: expected normalized_shape to be at least 1-dimensional, but got {shape}")
    if tuple(x.shape[-len(shape) :]) != shape:
        wanted = ", ".join(["*", *map(str, shape)])
        raise RuntimeError(f"{name}: given normalized_shape={list(shape)}, expected input with shape [{wanted}], but "
                           f"got input of size {tuple(x.shape)}")  # fmt: skip
    for what, t in (("weight", w), ("bias", b)):
        if t is not None and tuple(t.shape) != shape:
            raise RuntimeError(f"{name}: expected {what} to be of same shape as normalized_shape, but got {what} of "
                               f"shape {tuple(t.shape)} and normalized_shape = {list(shape)}")  # fmt: skip
    rows = x.contiguous().view(math.prod(x.shape[: x.dim() - len(shape)]), math.prod(shape))
    return norm(rows, _vector(w), _vector(b), 1, False, eps)[0].view(x.shape)
