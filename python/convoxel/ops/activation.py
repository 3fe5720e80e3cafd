"""relu and leaky relu, each with its gradient.

    relu        y = max(x, 0)               dx = dy where not y <= 0
    leaky_relu  y = x > 0 ? x : slope x     dx = x > 0 ? dy : slope dy

NaN comes out as NaN, and lets a gradient through where torch's does. relu keeps y, leaky_relu y too where the
slope is not negative (y > 0 exactly where x > 0): the next layer keeps that tensor anyway.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _C, runtime
from . import saved
from .library import SMALL, Operator, empty_like, register


def _check(op: str, x: Tensor, dy: Tensor | None = None) -> None:
    if x.dtype not in runtime.DTYPES:
        raise RuntimeError(f"{op}: kernels take {', '.join(map(str, runtime.DTYPES))}, received {x.dtype}")
    if dy is not None and (dy.shape != x.shape or dy.dtype != x.dtype):
        raise RuntimeError(
            f"{op}: expected dy like x, {tuple(x.shape)} and {x.dtype}, received {tuple(dy.shape)} and {dy.dtype}"
        )


def _like(x: Tensor, y: Tensor) -> Tensor:
    """x, its elements in y's order; y is empty_like of something, so it has no gaps."""
    return x if x.stride() == y.stride() else empty_like(y).copy_(x)


def _run(op: str, relu: bool, slope: float, x: Tensor, y: Tensor) -> None:
    threads = runtime.threads() if x.numel() > SMALL else 1
    with runtime.serve(op, "direct", lambda: f"{tuple(x.shape)} {x.dtype}"):
        _C.activation(runtime.DTYPES[x.dtype], x.numel(), relu, slope, x.data_ptr(), y.data_ptr(), threads)


def _run_backward(op: str, relu: bool, slope: float, dy: Tensor, x: Tensor) -> Tensor:
    _check(op, x, dy)
    dx = empty_like(x)
    dy, x = _like(dy, dx), _like(x, dx)
    threads = runtime.threads() if x.numel() > SMALL else 1
    with runtime.serve(op, "direct", lambda: f"{tuple(x.shape)} {x.dtype}"):
        _C.activation_backward(runtime.DTYPES[x.dtype], x.numel(), relu, slope,
                               dy.data_ptr(), x.data_ptr(), dx.data_ptr(), threads)  # fmt: skip
    return dx


# Behind a norm: its input is kept already, and says as much as y (saved.py) -------------------------


def _save_norm(ctx: Any, x: Tensor, y: Tensor, kind: str, slope: float) -> bool:
    """Saves what the norm saved that made x, and remembers how y is made of it; False where no norm did."""
    found, ctx.block = saved.pre_activation(x) if slope >= 0 else None, None
    if found is None:
        return False
    block, tensors = found
    ctx.block = block.activated(kind, slope, x.dtype)
    saved.save(ctx, y, ctx.block, tensors)
    return True


def _dz(ctx: Any, dy: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return ctx.block.dz(dy, ctx.saved_tensors)
    with torch.no_grad():  # a kinked function: no derivative of dz but that to dy
        y = ctx.block.make(ctx.saved_tensors)
    return relu_backward(dy, y) if ctx.block.kind == "relu" else leaky_relu_backward(dy, y, ctx.block.alpha)


# relu ---------------------------------------------------------------------------------------------


def _relu_fake(x: Tensor) -> Tensor:
    _check("relu", x)
    return empty_like(x)


def _relu_cpu(x: Tensor) -> Tensor:
    y = _relu_fake(x)
    _run("relu", True, 0.0, _like(x, y), y)
    return y


def _relu_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    if not _save_norm(ctx, inputs[0], output, "relu", 0.0):
        ctx.save_for_backward(output)


def _relu_backward(ctx: Any, dy: Tensor) -> Tensor:
    return _dz(ctx, dy) if ctx.block else relu_backward(dy, *ctx.saved_tensors)


def _relu_backward_fake(dy: Tensor, y: Tensor) -> Tensor:
    _check("relu_backward", y, dy)
    return empty_like(y)


def _relu_backward_cpu(dy: Tensor, y: Tensor) -> Tensor:
    return _run_backward("relu_backward", True, 0.0, dy, y)


def _relu_backward_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _relu_backward_backward(ctx: Any, ddx: Tensor) -> tuple[Tensor, None]:
    return relu_backward(ddx, *ctx.saved_tensors), None


# leaky relu ---------------------------------------------------------------------------------------


def _leaky_fake(x: Tensor, slope: float) -> Tensor:
    _check("leaky_relu", x)
    return empty_like(x)


def _leaky_cpu(x: Tensor, slope: float) -> Tensor:
    y = _leaky_fake(x, slope)
    _run("leaky_relu", False, slope, _like(x, y), y)
    return y


def _leaky_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.slope = inputs
    if not _save_norm(ctx, x, output, "leaky_relu", ctx.slope):
        ctx.save_for_backward(output if ctx.slope >= 0 else x)


def _leaky_backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
    return _dz(ctx, dy) if ctx.block else leaky_relu_backward(dy, *ctx.saved_tensors, ctx.slope), None


def _leaky_backward_fake(dy: Tensor, x: Tensor, slope: float) -> Tensor:
    _check("leaky_relu_backward", x, dy)
    return empty_like(x)


def _leaky_backward_cpu(dy: Tensor, x: Tensor, slope: float) -> Tensor:
    return _run_backward("leaky_relu_backward", False, slope, dy, x)


def _leaky_backward_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, x, ctx.slope = inputs
    ctx.save_for_backward(x)


def _leaky_backward_backward(ctx: Any, ddx: Tensor) -> tuple[Tensor, None, None]:
    return leaky_relu_backward(ddx, *ctx.saved_tensors, ctx.slope), None, None


# Operators: elementwise, so a vmap's axis is one axis more ------------------------------------------


def _vmap(op: Any, tensors: int) -> Any:
    def rule(info: Any, in_dims: Any, *arguments: Any) -> tuple[Tensor, int]:
        size = info.batch_size
        batched = [
            t.expand(size, *t.shape) if d is None else t.movedim(d, 0)
            for t, d in zip(arguments[:tensors], in_dims[:tensors], strict=True)
        ]
        return op()(*batched, *arguments[tensors:]), 0

    return rule


relu: Operator = register(
    "relu(Tensor x) -> Tensor", _relu_cpu, _relu_fake, _relu_backward, _relu_setup, _vmap(lambda: relu, 1)
)
relu_backward: Operator = register(
    "relu_backward(Tensor dy, Tensor y) -> Tensor",
    _relu_backward_cpu, _relu_backward_fake, _relu_backward_backward, _relu_backward_setup,
    _vmap(lambda: relu_backward, 2),
)  # fmt: skip
leaky_relu: Operator = register(
    "leaky_relu(Tensor x, float slope) -> Tensor",
    _leaky_cpu, _leaky_fake, _leaky_backward, _leaky_setup, _vmap(lambda: leaky_relu, 1),
)  # fmt: skip
leaky_relu_backward: Operator = register(
    "leaky_relu_backward(Tensor dy, Tensor x, float slope) -> Tensor",
    _leaky_backward_cpu, _leaky_backward_fake, _leaky_backward_backward, _leaky_backward_setup,
    _vmap(lambda: leaky_relu_backward, 2),
)  # fmt: skip


# In place -----------------------------------------------------------------------------------------


def _inplace_fake(x: Tensor, relu: bool, slope: float) -> None:
    _check("activation_", x)


def _inplace_cpu(x: Tensor, relu: bool, slope: float) -> None:
    _check("activation_", x)
    if x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("activation_ has no gradient of its own: call convoxel.functional.relu or leaky_relu with "
                           "inplace=True")  # fmt: skip
    y = empty_like(x)
    if x.stride() == y.stride():
        _run("relu" if relu else "leaky_relu", relu, slope, x, x)
    else:
        x.copy_(_relu_cpu(x) if relu else _leaky_cpu(x, slope))


activation_: Operator = register(
    "activation_(Tensor(a!) x, bool relu, float slope) -> ()", _inplace_cpu, _inplace_fake
)


class _InPlace(torch.autograd.Function):
    """x is overwritten and kept as the output, as torch's in-place activations do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: float | None) -> Tensor:
        ctx.slope = slope
        kind = "relu" if slope is None else "leaky_relu"
        kept = _save_norm(ctx, x, x, kind, slope or 0.0)
        activation_(x, slope is None, slope or 0.0)
        ctx.mark_dirty(x)
        if not kept:
            ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        if ctx.block:
            return _dz(ctx, dy), None
        (y,) = ctx.saved_tensors
        if ctx.slope is None:
            return relu_backward(dy, y), None
        if ctx.slope < 0:
            raise RuntimeError(
                f"leaky_relu: in-place backward with a negative slope, {ctx.slope}, is not supported: the sign of "
                "the input is lost; call it with inplace=False"
            )
        return leaky_relu_backward(dy, y, ctx.slope), None


def activation(x: Tensor, slope: float | None, inplace: bool) -> Tensor:
    """torch.nn.functional.leaky_relu, or relu where `slope` is None. x of any shape."""
    name = "relu" if slope is None else "leaky_relu"
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}(): argument 'input' must be Tensor, not {type(x).__name__}")
    if inplace and not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active():
        y = _InPlace.apply(x, slope)
        if made := getattr(y.grad_fn, "made", None):
            made.state = saved.State(y)  # as it is now
        return y
    y = relu(x) if slope is None else leaky_relu(x, slope)
    return x.copy_(y) if inplace else y
