"""Pooling: windows of a maximum or a mean, with a fixed stride or adaptive.

    max_pool             y[o] = max of x over o's window; code[o] = the tap that held it
    max_pool_input_grad  dx[i] = sum of the dy[o] whose maximum lay at i
    max_pool_pick        y[o] = x at the tap code[o]: the gradient of max_pool_input_grad, and it of this
    max_pool_indices     torch's indices from codes: int64, flat in (D, H, W) of the input
    avg_pool             y[o] = sum of x over o's window / its size
    avg_pool_input_grad  dx[i] = sum of dy[o] / size over the windows that hold i; its gradient is avg_pool

Codes number a window's taps, (kd * KH + kh) * KW + kw, in uint8 where that is enough and int32 elsewhere:
an eighth of what torch's indices take. Everything is 3-D here: x (N, C, D, H, W), y (N, C, OD, OH, OW); `how` are
the windows, as pool_windows.py has them.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from .. import _C, runtime
from ..geometry import Ints, check_bool, is_channels_last, memory_format
from .library import SMALL, Operator, contiguous, dense, from_3d, new, pointer, register, scratch
from .pool_windows import How, adaptive, check, code_dtype, extents, lifted, windows

# Checks and the call ------------------------------------------------------------------------------


def check_dtype(op: str, x: Tensor) -> None:
    if x.dtype not in runtime.DTYPES:
        raise RuntimeError(f"{op}: kernels take {', '.join(map(str, runtime.DTYPES))}, received {x.dtype}")


def check_codes(op: str, codes: Tensor, shape: Ints, dtype: torch.dtype) -> None:
    if tuple(codes.shape) != tuple(shape) or codes.dtype != dtype:
        raise RuntimeError(
            f"{op}: expected codes {tuple(shape)} of {dtype}, as max_pool gave them, received {tuple(codes.shape)} "
            f"of {codes.dtype}"
        )


def check_dy(op: str, dy: Tensor, size: Ints, how: How) -> tuple[int, ...]:
    """The shape of dx, for the gradient dy of a pooling of inputs of (D, H, W) `size`."""
    check_dtype(op, dy)
    shape = (*dy.shape[:2], *size)
    if tuple(dy.shape) != check(op, shape, how):
        raise RuntimeError(f"{op}: expected dy (N, C, {tuple(how[0])}), received {tuple(dy.shape)}")
    return shape


def run(op: str, size: Ints, how: How, last: bool, x: Tensor | None, y: Tensor, codes: Tensor | None,
        count_padding: bool = False, divisor: int = 0) -> None:  # fmt: skip
    """One kernel over tensors that are dense in one layout; `size` (D, H, W) is that of the input. The stride of
    a single window and the dilation of a single tap do nothing: without them no sum in csrc exceeds 64 bits."""
    out, kernel, *steps = how
    images = y.shape[:2]
    if not kernel and tuple(out) == (1, 1, 1) and not last:
        size = (1, 1, prod(size))  # the whole image as one row; its taps keep their numbers
    stride, padding, dilation = steps if kernel else ((1, 1, 1), (0, 0, 0), (1, 1, 1))
    numbers = [*images]
    for i, o, k, s, p, d in zip(size, out, extents(size, how), stride, padding, dilation, strict=True):
        numbers += [i, o, k, min(s, i + 2 * p + 1), p, d if k > 1 else 1]
    wide = codes is not None and codes.dtype == torch.int32
    numbers += [not kernel, last, wide, count_padding, divisor]
    dtype = runtime.DTYPES.get(y.dtype, 0)  # indices (int64) have no kernel of a dtype
    threads = runtime.threads() if prod(images) * max(prod(size), prod(out)) > SMALL else 1
    memory = scratch(_C.pool_scratch(numbers))
    with runtime.serve(op, "direct", lambda: f"{tuple(images)} {tuple(size)} -> {tuple(out)} {y.dtype}"):
        getattr(_C, op)(dtype, numbers, pointer(x), pointer(y), pointer(codes), memory.data_ptr(), threads)


# y, codes = max over windows ----------------------------------------------------------------------


def _max_fake(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    *how, want = args
    check_dtype("max_pool", x)
    shape, last = check("max_pool", x.shape, how), is_channels_last(x)
    dtype = code_dtype("max_pool", x.shape[2:], how)
    if not want:
        return new(x, shape, last), torch.empty(0, dtype=dtype, device=x.device)
    return new(x, shape, last), new(x, shape, last, dtype)


def _max_cpu(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    *how, want = args
    y, codes = _max_fake(x, *args)
    if y.numel():
        x, last = dense(x)
        run("max_pool", x.shape[2:], how, last, x, y, codes if want else None)
    return y, codes


def _max_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, *ctx.how, ctx.want = inputs
    ctx.size = x.shape[2:]
    ctx.save_for_backward(output[1] if ctx.want else x)


def _max_backward(ctx: Any, dy: Tensor, _: Any) -> tuple[Any, ...]:
    (saved,) = ctx.saved_tensors
    codes = saved if ctx.want else max_pool(saved.detach(), *ctx.how, True)[1]
    return (max_pool_input_grad(dy, codes, ctx.size, *ctx.how), *[None] * 6)


# dx = dy where the maximum lay --------------------------------------------------------------------


def _max_input_grad_fake(dy: Tensor, codes: Tensor, size: Ints, *how: Any) -> Tensor:
    op = "max_pool_input_grad"
    shape = check_dy(op, dy, size, how)
    check_codes(op, codes, dy.shape, code_dtype(op, size, how))
    return new(dy, shape, is_channels_last(codes))


def _max_input_grad_cpu(dy: Tensor, codes: Tensor, size: Ints, *how: Any) -> Tensor:
    dx = _max_input_grad_fake(dy, codes, size, *how)
    if dy.numel() == 0:
        return dx.zero_()
    if dy.dtype == torch.bfloat16 and not how[1] and any(i % o for i, o in zip(size, how[0], strict=True)):
        # Adaptive windows that overlap are added up in the storage type, so in float32.
        return _max_input_grad_cpu(dy.float(), codes, size, *how).bfloat16()
    codes, last = dense(codes)
    run("max_pool_input_grad", size, how, last, dx, contiguous(dy, memory_format(last)), codes)
    return dx


def _max_input_grad_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, codes, _, *ctx.how = inputs
    ctx.save_for_backward(codes)


def _max_input_grad_backward(ctx: Any, ddx: Tensor) -> tuple[Any, ...]:
    return (max_pool_pick(ddx, *ctx.saved_tensors, *ctx.how), *[None] * 7)


# y = x at the codes -------------------------------------------------------------------------------


def _pick_fake(x: Tensor, codes: Tensor, *how: Any) -> Tensor:
    op = "max_pool_pick"
    check_dtype(op, x)
    shape = check(op, x.shape, how)
    check_codes(op, codes, shape, code_dtype(op, x.shape[2:], how))
    return new(x, shape, is_channels_last(codes))


def _pick_cpu(x: Tensor, codes: Tensor, *how: Any) -> Tensor:
    y = _pick_fake(x, codes, *how)
    if y.numel():
        codes, last = dense(codes)
        run("max_pool_pick", x.shape[2:], how, last, contiguous(x, memory_format(last)), y, codes)
    return y


def _pick_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, codes, *ctx.how = inputs
    ctx.size = x.shape[2:]
    ctx.save_for_backward(codes)


def _pick_backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    return (max_pool_input_grad(g, *ctx.saved_tensors, ctx.size, *ctx.how), *[None] * 6)


# torch's indices ----------------------------------------------------------------------------------


def _indices_fake(codes: Tensor, size: Ints, *how: Any) -> Tensor:
    op = "max_pool_indices"
    shape = check(op, (*codes.shape[:2], *size), how)
    check_codes(op, codes, shape, code_dtype(op, size, how))
    return new(codes, shape, is_channels_last(codes), torch.int64)


def _indices_cpu(codes: Tensor, size: Ints, *how: Any) -> Tensor:
    indices = _indices_fake(codes, size, *how)
    if indices.numel():
        codes, last = dense(codes)
        run("max_pool_indices", size, how, last, None, indices, codes)
    return indices


# y = mean over windows ----------------------------------------------------------------------------


def check_divisor(op: str, divisor: int, how: How) -> None:
    if divisor and not how[1]:
        raise RuntimeError(f"{op}: adaptive windows take no divisor, received {divisor}")


def _avg_fake(x: Tensor, *args: Any) -> Tensor:
    *how, _, divisor = args
    check_dtype("avg_pool", x)
    check_divisor("avg_pool", divisor, how)
    return new(x, check("avg_pool", x.shape, how), is_channels_last(x))


def _avg_cpu(x: Tensor, *args: Any) -> Tensor:
    *how, count_padding, divisor = args
    y = _avg_fake(x, *args)
    if y.numel():
        x, last = dense(x)
        run("avg_pool", x.shape[2:], how, last, x, y, None, count_padding, divisor)
    return y


def _avg_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *ctx.how = inputs
    ctx.size, ctx.format = x.shape[2:], memory_format(is_channels_last(x))


def _avg_backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    dy = dy.contiguous(memory_format=ctx.format)  # dx in x's layout, whatever came
    return (avg_pool_input_grad(dy, ctx.size, *ctx.how), *[None] * 7)


def _avg_input_grad_fake(dy: Tensor, size: Ints, *args: Any) -> Tensor:
    *how, _, divisor = args
    check_divisor("avg_pool_input_grad", divisor, how)
    return new(dy, check_dy("avg_pool_input_grad", dy, size, how), is_channels_last(dy))


def _avg_input_grad_cpu(dy: Tensor, size: Ints, *args: Any) -> Tensor:
    *how, count_padding, divisor = args
    dx = _avg_input_grad_fake(dy, size, *args)
    if dy.numel() == 0:
        return dx.zero_()
    dy, last = dense(dy)
    run("avg_pool_input_grad", size, how, last, dx, dy, None, count_padding, divisor)
    return dx


def _avg_input_grad_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dy, _, *ctx.how = inputs
    ctx.format = memory_format(is_channels_last(dy))


def _avg_input_grad_backward(ctx: Any, ddx: Tensor) -> tuple[Any, ...]:
    ddx = ddx.contiguous(memory_format=ctx.format)
    return (avg_pool(ddx, *ctx.how), *[None] * 8)


# vmap: the batch joins N --------------------------------------------------------------------------


def _vmap(op: Any, tensors: int) -> Any:
    """Of an operator whose first `tensors` arguments are tensors (N, C, D, H, W)."""

    def join(t: Tensor, axis: int | None, size: int) -> Tensor:
        return (t.expand(size, *t.shape) if axis is None else t.movedim(axis, 0)).flatten(0, 1)

    def split(t: Tensor, size: int) -> Tensor:
        return t.unflatten(0, (size, t.shape[0] // size)) if t.dim() == 5 else t.expand(size, *t.shape)

    def rule(info: Any, in_dims: Any, *args: Any) -> Any:
        joined = [join(t, d, info.batch_size) for t, d in zip(args[:tensors], in_dims, strict=False)]
        result = op()(*joined, *args[tensors:])
        if isinstance(result, Tensor):
            return split(result, info.batch_size), 0
        return tuple(split(t, info.batch_size) for t in result), (0,) * len(result)

    return rule


_HOW = "SymInt[3] out, SymInt[] kernel, SymInt[] stride, SymInt[] padding, SymInt[] dilation"
_AVERAGE = f"{_HOW}, bool count_padding, SymInt divisor"

max_pool: Operator = register(
    f"max_pool(Tensor x, {_HOW}, bool codes) -> (Tensor, Tensor)",
    _max_cpu, _max_fake, _max_backward, _max_setup, _vmap(lambda: max_pool, 1),
)  # fmt: skip
max_pool_input_grad: Operator = register(
    f"max_pool_input_grad(Tensor dy, Tensor codes, SymInt[3] size, {_HOW}) -> Tensor",
    _max_input_grad_cpu, _max_input_grad_fake, _max_input_grad_backward, _max_input_grad_setup,
    _vmap(lambda: max_pool_input_grad, 2),
)  # fmt: skip
max_pool_pick: Operator = register(
    f"max_pool_pick(Tensor x, Tensor codes, {_HOW}) -> Tensor",
    _pick_cpu, _pick_fake, _pick_backward, _pick_setup, _vmap(lambda: max_pool_pick, 2),
)  # fmt: skip
max_pool_indices: Operator = register(
    f"max_pool_indices(Tensor codes, SymInt[3] size, {_HOW}) -> Tensor",
    _indices_cpu, _indices_fake, vmap=_vmap(lambda: max_pool_indices, 1),
)  # fmt: skip
avg_pool: Operator = register(
    f"avg_pool(Tensor x, {_AVERAGE}) -> Tensor",
    _avg_cpu, _avg_fake, _avg_backward, _avg_setup, _vmap(lambda: avg_pool, 1),
)  # fmt: skip
avg_pool_input_grad: Operator = register(
    f"avg_pool_input_grad(Tensor dy, SymInt[3] size, {_AVERAGE}) -> Tensor",
    _avg_input_grad_cpu, _avg_input_grad_fake, _avg_input_grad_backward, _avg_input_grad_setup,
    _vmap(lambda: avg_pool_input_grad, 1),
)  # fmt: skip


# Public functions: any rank lifted to 3-D ---------------------------------------------------------


def _maximum(rank: int, x: Tensor, batched: bool, how: How, return_indices: bool) -> Any:
    differentiated = torch.is_grad_enabled() and x.requires_grad
    y, codes = max_pool(x, *how, bool(return_indices or differentiated))
    if not return_indices:
        return from_3d(y, rank, batched)
    indices = max_pool_indices(codes, x.shape[2:], *how)
    return from_3d(y, rank, batched), from_3d(indices, rank, batched)


def maximum(rank: int, x: Tensor, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool,
            return_indices: bool) -> Any:  # fmt: skip
    """torch.nn.functional.max_pool{rank}d. x (N, C, *spatial) or (C, *spatial); returns y, or (y, indices) with
    int64 indices into the flat input plane.

    >>> maximum(1, torch.tensor([[1.0, 3.0, 3.0, 2.0]]), 2, None, 0, 1, False, True)
    (tensor([[3., 3.]]), tensor([[1, 2]]))
    """
    name = f"max_pool{rank}d"
    x, batched = lifted(name, rank, x, rank + 1)
    how = windows(name, rank, x.shape[2:], kernel, stride, padding, dilation, ceil_mode)
    return _maximum(rank, x, batched, how, return_indices)


def average(rank: int, x: Tensor, kernel: Any, stride: Any, padding: Any, ceil_mode: bool, count_include_pad: bool,
            divisor_override: int | None) -> Tensor:  # fmt: skip
    """torch.nn.functional.avg_pool{rank}d. x (N, C, *spatial) or (C, *spatial).

    >>> average(1, torch.tensor([[1.0, 3.0, 3.0, 2.0]]), 2, None, 0, False, True, None)
    tensor([[2.0000, 2.5000]])
    """
    name = f"avg_pool{rank}d"
    check_bool(name, "ceil_mode", ceil_mode)
    check_bool(name, "count_include_pad", count_include_pad)
    if isinstance(divisor_override, bool) or not isinstance(
        divisor_override, (int, torch.SymInt, type(None))
    ):
        raise TypeError(
            f"{name}(): argument 'divisor_override' must be int, not {type(divisor_override).__name__}"
        )
    if divisor_override == 0:
        raise RuntimeError(
            f"{name}: divisor must be not zero; leave divisor_override out for the window's size"
        )
    x, batched = lifted(name, rank, x, rank + 1)
    how = windows(name, rank, x.shape[2:], kernel, stride, padding, 1, ceil_mode)
    if rank == 3 and any(
        k > i for k, i in zip(how[1], x.shape[2:], strict=True)
    ):  # torch's rule in 3-D alone
        raise RuntimeError(
            f"{name}: input image {tuple(x.shape[2:])} smaller than kernel size {how[1]}; pad it first"
        )
    y = avg_pool(x, *how, count_include_pad, divisor_override or 0)
    return from_3d(y, rank, batched)


def adaptive_maximum(rank: int, x: Tensor, output_size: Any, return_indices: bool) -> Any:
    """torch.nn.functional.adaptive_max_pool{rank}d. x (N, C, *spatial) or (C, *spatial); None in output_size
    keeps that extent.

    >>> adaptive_maximum(1, torch.tensor([[1.0, 3.0, 3.0, 2.0, 5.0]]), 2, False)
    tensor([[3., 5.]])
    """
    name = f"adaptive_max_pool{rank}d"
    x, batched = lifted(name, rank, x, None)
    return _maximum(rank, x, batched, adaptive(name, rank, x.shape[2:], output_size), return_indices)


def adaptive_average(rank: int, x: Tensor, output_size: Any) -> Tensor:
    """torch.nn.functional.adaptive_avg_pool{rank}d. x (N, C, *spatial) or (C, *spatial); None in output_size
    keeps that extent.

    >>> adaptive_average(1, torch.tensor([[1.0, 3.0, 2.0, 2.0, 8.0]]), 2)
    tensor([[2., 4.]])
    """
    name = f"adaptive_avg_pool{rank}d"
    x, batched = lifted(name, rank, x, None if rank == 3 else rank)
    y = avg_pool(x, *adaptive(name, rank, x.shape[2:], output_size), False, 0)
    return from_3d(y, rank, batched)
