"""Concatenation, and its gradient: large tensors laid side by side in memory of the pool, past the caches.

    cat            y = the tensors, one after the other along an axis
    cat_backward   the pieces of dy, each without gaps

torch's gradient is a view of dy; the layers in front of a concatenation then copy it, each for itself, and the sum of
two gradients needs memory of its own where it could be added to a piece.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _C, memory, runtime
from ..geometry import is_channels_last, is_integer, memory_format
from . import saved
from .library import Operator, contiguous, new, register, why_not

Ints = Sequence[int]


def _check(op: str, tensors: Sequence[Tensor], dim: int) -> None:
    if not tensors:
        raise RuntimeError(f"{op}: expected a non-empty list of Tensors")
    shapes = ", ".join(str(tuple(t.shape)) for t in tensors)
    if not 0 <= dim < tensors[0].dim():
        raise RuntimeError(f"{op}: expected 0 <= dim < {tensors[0].dim()}, received {dim}; tensors {shapes}")
    for t in tensors[1:]:
        first = tensors[0]
        if t.dtype != first.dtype:
            raise RuntimeError(f"{op}: expected tensors of one dtype, received {first.dtype} and {t.dtype}")
        if t.dim() != first.dim() or _without(t.shape, dim) != _without(first.shape, dim):
            raise RuntimeError(
                f"{op}: Sizes of tensors must match except in dimension {dim}, received {shapes}"
            )


def _without(shape: Ints, dim: int) -> tuple[int, ...]:
    return (*shape[:dim], *shape[dim + 1 :])


def _run(op: str, parts: Sequence[Tensor | None], sizes: Ints, whole: Tensor, dim: int, last: bool) -> None:
    """One kernel: tensors without gaps in one layout are rows of bytes from axis `dim` on."""
    order = (0, *range(2, whole.dim()), 1) if last else tuple(range(whole.dim()))
    at = order.index(dim)
    rows = math.prod(whole.shape[a] for a in order[:at])
    inner = math.prod(whole.shape[a] for a in order[at + 1 :]) * whole.element_size()
    pointers = [0 if t is None else t.data_ptr() for t in parts]
    with runtime.serve(op, "direct", lambda: f"{tuple(whole.shape)} of {list(sizes)} {whole.dtype}"):
        _C.cat(pointers, [n * inner for n in sizes], rows, whole.data_ptr(), op != "cat", runtime.threads())


# y ------------------------------------------------------------------------------------------------


def _last(tensors: Sequence[Tensor]) -> bool:
    return all(map(is_channels_last, tensors))


def _fake(tensors: Sequence[Tensor], dim: int) -> Tensor:
    _check("cat", tensors, dim)
    first = tensors[0].shape
    shape = (*first[:dim], sum(t.shape[dim] for t in tensors), *first[dim + 1 :])
    return new(tensors[0], shape, _last(tensors))


def _cpu(tensors: Sequence[Tensor], dim: int) -> Tensor:
    y, last = _fake(tensors, dim), _last(tensors)
    if y.numel():
        parts = [contiguous(t, memory_format(last, t.dim())) for t in tensors]
        _run("cat", parts, [t.shape[dim] for t in tensors], y, dim, last)
    return y


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tensors, ctx.dim = inputs
    ctx.sizes = [t.shape[ctx.dim] for t in tensors]


def _backward(ctx: Any, dy: Tensor) -> tuple[list[Tensor | None], None]:
    need = list(ctx.needs_input_grad[0])
    pieces = cat_backward(dy, ctx.sizes, ctx.dim, need)
    return [p if wanted else None for p, wanted in zip(pieces, need, strict=True)], None


# The pieces of dy ---------------------------------------------------------------------------------


def _backward_fake(dy: Tensor, sizes: Ints, dim: int, need: Sequence[bool]) -> list[Tensor]:
    if not 0 <= dim < dy.dim() or dy.shape[dim] != sum(sizes) or len(sizes) != len(need):
        raise RuntimeError(f"cat_backward: expected sizes that add up along dim {dim}, and as many bools as sizes, "
                           f"received dy {tuple(dy.shape)}, sizes {list(sizes)}, need {list(need)}")  # fmt: skip
    last = is_channels_last(dy)
    return [
        new(dy, (*dy.shape[:dim], n, *dy.shape[dim + 1 :]), last) if wanted else dy.new_empty(0)
        for n, wanted in zip(sizes, need, strict=True)
    ]


def _backward_cpu(dy: Tensor, sizes: Ints, dim: int, need: Sequence[bool]) -> list[Tensor]:
    pieces = _backward_fake(dy, sizes, dim, need)
    if dy.numel():
        last = is_channels_last(dy)
        parts = [p if wanted else None for p, wanted in zip(pieces, need, strict=True)]
        _run("cat_backward", parts, sizes, contiguous(dy, memory_format(last, dy.dim())), dim, last)
    return pieces


def _backward_setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    dy, ctx.sizes, ctx.dim, ctx.need = inputs
    ctx.shape = dy.shape


def _backward_backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Tensor, None, None, None]:
    some = next(g for g, wanted in zip(grads, ctx.need, strict=True) if wanted and g is not None)
    pieces = [
        g
        if wanted and g is not None
        else some.new_zeros((*ctx.shape[: ctx.dim], n, *ctx.shape[ctx.dim + 1 :]))
        for n, g, wanted in zip(ctx.sizes, grads, ctx.need, strict=True)
    ]
    return cat_op(pieces, ctx.dim), None, None, None


# vmap: an axis in front -----------------------------------------------------------------------------


def _vmap(info: Any, in_dims: Any, tensors: Sequence[Tensor], dim: int) -> tuple[Tensor, int]:
    size = info.batch_size
    parts = [
        t.expand(size, *t.shape) if d is None else t.movedim(d, 0)
        for t, d in zip(tensors, in_dims[0], strict=True)
    ]
    return cat_op(parts, dim + 1), 0


def _backward_vmap(
    info: Any, in_dims: Any, dy: Tensor, sizes: Ints, dim: int, need: Sequence[bool]
) -> tuple[list[Tensor], list[int]]:
    pieces = cat_backward(dy.movedim(in_dims[0], 0), sizes, dim + 1, need)
    return [p if wanted else p.expand(info.batch_size, 0) for p, wanted in zip(pieces, need, strict=True)], [
        0
    ] * len(pieces)


cat_op: Operator = register("cat(Tensor[] tensors, int dim) -> Tensor", _cpu, _fake, _backward, _setup, _vmap)
cat_backward: Operator = register(
    "cat_backward(Tensor dy, SymInt[] sizes, int dim, bool[] need) -> Tensor[]",
    _backward_cpu, _backward_fake, _backward_backward, _backward_setup, _backward_vmap,
)  # fmt: skip


# Public function ----------------------------------------------------------------------------------


def serves(tensors: Any, dim: Any) -> bool:
    """Large dense tensors of one layout and dtype; all else, mistakes too, is torch's."""
    if not isinstance(tensors, (tuple, list)) or not is_integer(dim) or torch.compiler.is_compiling():
        return False
    if not tensors or any(type(t) not in (Tensor, torch.nn.Parameter) for t in tensors):
        return False
    first = tensors[0]
    if sum(t.nbytes for t in tensors) < memory.LEAST or not -first.dim() <= dim < first.dim():
        return False
    if torch._C._are_functorch_transforms_active() or why_not(*tensors) or not first.is_cpu:
        return False
    dim, layout = dim % first.dim(), memory_format(_last(tensors), first.dim())
    return all(
        t.dtype == first.dtype
        and t.dim() == first.dim()
        and _without(t.shape, dim) == _without(first.shape, dim)
        and t.is_contiguous(memory_format=layout)
        for t in tensors
    )


def cat(tensors: tuple[Tensor, ...] | list[Tensor], dim: int = 0) -> Tensor:
    """torch.cat. Large dense tensors of one layout are laid out by convoxel; anything else is torch's, which strict
    mode does not mind: a concatenation computes nothing."""
    if not serves(tensors, dim):
        return torch.cat(tensors, dim)
    dim = int(dim) % tensors[0].dim()
    y = cat_op(list(tensors), dim)
    saved.remember_parts(y, tensors, dim)
    return y
