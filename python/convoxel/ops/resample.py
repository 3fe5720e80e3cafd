"""Interpolation: two operators that are each other's gradients.

    interpolate       y  = R(x)        y[n,c,o] = sum_i r[o,i] x[n,c,i]
    interpolate_grad  dx = R^T(dy)     dx[n,c,i] = sum_o r[o,i] dy[n,c,o]

r is the product of one sparse matrix for each axis. With scale = in / out (or 1 / scale_factor), row o has

    nearest        1 at floor(o * scale)
    nearest-exact  1 at floor((o + 1/2) * scale)
    linear         1 - t at i and t at i + 1, where i + t = max((o + 1/2) * scale - 1/2, 0),
                   or o * (in - 1) / (out - 1) with align_corners

and both neighbours end at the last voxel. The positions are rounded as torch rounds them, so nearest picks
torch's voxels. R is linear: its derivative is R^T, that of R^T is R. Everything is 3-D here, (N, C, D, H, W);
the public function lifts 1-D and 2-D, and axes of one voxel on both sides are copied.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _C, runtime
from ..geometry import check_bool, is_channels_last, is_integer, lift
from .library import SMALL, dense, from_3d, new, register, scratch, to_3d

Ints = Sequence[int]
Floats = Sequence[float]

NEAREST, NEAREST_EXACT, LINEAR, NEAREST_VECTORIZED, NEAREST_EXACT_VECTORIZED = range(5)  # csrc/kernels.h
NAMES = ("nearest", "nearest-exact", "linear", "nearest", "nearest-exact")
RANKS = {"linear": 1, "bilinear": 2, "trilinear": 3}
LARGEST = 2.0**40  # factor: an extent that is too large then still fits an int64, and is refused as one

# The operators -----------------------------------------------------------------------------------


def check(op: str, x: Tensor, size: Ints, mode: int, scales: Floats) -> None:
    """RuntimeError with what, expected, received, remedy."""
    if x.dtype not in runtime.DTYPES:
        raise RuntimeError(f"{op}: kernels take {', '.join(map(str, runtime.DTYPES))}, received {x.dtype}")
    if x.dim() != 5 or len(size) != 3 or len(scales) != 3:
        raise RuntimeError(
            f"{op}: expected a tensor with 5 axes (N, C, D, H, W), 3 sizes and 3 scales, received "
            f"{tuple(x.shape)}, size {tuple(size)}, scales {tuple(scales)}"
        )
    if x.shape[1] < 1:
        raise RuntimeError(f"{op}: non-empty 5D data tensor expected but got a tensor with sizes "
                           f"{list(x.shape)}; only the batch may be empty")  # fmt: skip
    if min(x.shape[2:]) < 1 or min(size) < 1:
        raise RuntimeError(
            f"{op}: input and output sizes should be greater than 0, but got {tuple(x.shape[2:])} and "
            f"{tuple(size)} (D, H, W)"
        )
    if not 0 <= mode < len(NAMES):
        raise RuntimeError(f"{op}: mode must be from 0 to {len(NAMES) - 1}, received {mode}")


def _fake(op: str, x: Tensor, size: Ints, mode: int, scales: Floats) -> Tensor:
    check(op, x, size, mode, scales)
    return new(x, (*x.shape[:2], *size), is_channels_last(x))


def _run(
    op: str, adjoint: bool, x: Tensor, size: Ints, mode: int, align_corners: bool, scales: Floats
) -> Tensor:
    y = _fake(op, x, size, mode, scales)
    if y.numel() == 0:
        return y
    x, last = dense(x)
    images, inner = (x.shape[0], x.shape[1]) if last else (x.shape[0] * x.shape[1], 1)
    small, large = (y, x) if adjoint else (x, y)
    geometry = _C.ResampleGeometry(
        images, inner, mode, align_corners, list(small.shape[2:]), list(large.shape[2:]), list(scales)
    )
    dtype = runtime.DTYPES[x.dtype]
    threads = runtime.threads() if max(x.numel(), y.numel()) > SMALL else 1
    memory = scratch(_C.resample_scratch(dtype, geometry, adjoint, threads))
    with runtime.serve(op, "direct", lambda: f"{NAMES[mode]} {tuple(x.shape)} -> {tuple(size)}"):
        _C.resample(dtype, geometry, adjoint, x.data_ptr(), y.data_ptr(), memory.data_ptr(), threads)
    return y


def _interpolate_cpu(x: Tensor, size: Ints, mode: int, align_corners: bool, scales: Floats) -> Tensor:
    return _run("interpolate", False, x, size, mode, align_corners, scales)


def _interpolate_fake(x: Tensor, size: Ints, mode: int, align_corners: bool, scales: Floats) -> Tensor:
    return _fake("interpolate", x, size, mode, scales)


def _grad_cpu(dy: Tensor, size: Ints, mode: int, align_corners: bool, scales: Floats) -> Tensor:
    return _run("interpolate_grad", True, dy, size, mode, align_corners, scales)


def _grad_fake(dy: Tensor, size: Ints, mode: int, align_corners: bool, scales: Floats) -> Tensor:
    return _fake("interpolate_grad", dy, size, mode, scales)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _, *ctx.how = inputs
    ctx.size = x.shape[2:]


def _interpolate_backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    return interpolate_grad(dy, ctx.size, *ctx.how), None, None, None, None


def _grad_backward(ctx: Any, ddx: Tensor) -> tuple[Any, ...]:
    return interpolate(ddx, ctx.size, *ctx.how), None, None, None, None


def _vmap(op: Any) -> Any:
    """A batch of images joins N."""

    def rule(info: Any, in_dims: Any, x: Tensor, *how: Any) -> tuple[Tensor, int]:
        images = x.movedim(in_dims[0], 0)
        y = op()(images.flatten(0, 1), *how)
        return y.unflatten(0, images.shape[:2]), 0

    return rule


_HOW = "SymInt[3] size, int mode, bool align_corners, float[] scales"

interpolate: Any = register(
    f"interpolate(Tensor x, {_HOW}) -> Tensor",
    _interpolate_cpu, _interpolate_fake, _interpolate_backward, _setup, _vmap(lambda: interpolate),
)  # fmt: skip
interpolate_grad: Any = register(
    f"interpolate_grad(Tensor dy, {_HOW}) -> Tensor",
    _grad_cpu, _grad_fake, _grad_backward, _setup, _vmap(lambda: interpolate_grad),
)  # fmt: skip


# The public function ------------------------------------------------------------------------------


def _per_axis(value: Any, rank: int, name: str, x: Tensor) -> list[Any]:
    values = list(value) if isinstance(value, (list, tuple)) else [value] * rank
    if len(values) != rank:
        raise ValueError(
            f"interpolate: input and {name} must have the same number of spatial dimensions, but got input with "
            f"spatial dimensions of {list(x.shape[2:])} and {name} {value}; give one entry for each axis, or one number"
        )
    return values


def _sizes(value: Any, rank: int, x: Tensor) -> list[Any]:
    values = _per_axis(value, rank, "size", x)
    for v in values:
        if not is_integer(v) or (not isinstance(v, torch.SymInt) and abs(int(v)) >= 2**63):
            raise TypeError(
                f"interpolate: expected size to be an int of 64 bits or {rank} of them, but got {value!r}, where "
                f"{v!r} is a {type(v).__name__}; use scale_factor for a factor"
            )
    return [v if isinstance(v, torch.SymInt) else int(v) for v in values]


def _scaled(value: Any, rank: int, x: Tensor) -> tuple[list[float], list[int]]:
    """The factors, and the extents that they give: floor(5 * 1.5) = 7."""
    factors = _per_axis(value, rank, "scale_factor", x)
    if wrong := [f for f in factors if not isinstance(f, (int, float, torch.SymInt, torch.SymFloat))]:
        raise TypeError(
            f"interpolate: expected scale_factor to be a float or {rank} floats, but got {value!r}, where "
            f"{wrong[0]!r} is a {type(wrong[0]).__name__}"
        )
    if not all(math.isfinite(f) and abs(f) < LARGEST for f in factors if isinstance(f, (int, float))):
        raise RuntimeError(f"interpolate: scale_factor must be finite and below 2^40, received {value!r}")
    return [float(f) for f in factors], [
        torch.sym_int(s * f) for s, f in zip(x.shape[2:], factors, strict=True)
    ]


def _vectorized(x: Tensor, size: Ints) -> bool:
    """Whether torch's CPU kernels for nearest take their vectorized path, whose roundings differ: the same
    voxels except when a scale_factor other than 1 or 2 gives the same or the doubled extent, and in rare
    ties."""
    if x.dim() == 3:
        return False
    last = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    if x.shape[1] > 3 and x.is_contiguous(memory_format=last):
        return True
    return x.dim() == 4 and sum(size) <= 128


def resize(x: Tensor, size: Any, scale_factor: Any, mode: str, align_corners: bool | None,
           recompute_scale_factor: bool | None) -> Tensor:  # fmt: skip
    """torch.nn.functional.interpolate without bicubic, lanczos, area and antialias. x (N, C, *spatial) with 1 to
    3 spatial axes; size in voxels for each of them, or scale_factor.

    >>> resize(torch.tensor([[[1.0, 3.0]]]), None, 2, "linear", None, None)
    tensor([[[1.0000, 1.5000, 2.5000, 3.0000]]])
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"interpolate(): argument 'input' must be Tensor, not {type(x).__name__}")
    rank = x.dim() - 2
    if mode in ("nearest", "nearest-exact") and align_corners is not None:
        raise ValueError(
            "align_corners option can only be set with the interpolating modes: linear | bilinear | bicubic | "
            f"trilinear; received mode {mode!r}: leave align_corners out"
        )
    if (size is None) == (scale_factor is None):
        which = "either" if size is None else "only one of"
        raise ValueError(
            f"{which} size or scale_factor should be defined; received size {size}, scale_factor {scale_factor}"
        )
    if recompute_scale_factor and size is not None:
        raise ValueError(
            "recompute_scale_factor is not meaningful with an explicit size; leave one of them out"
        )
    which, value = ("size", size) if scale_factor is None else ("scale_factor", scale_factor)
    if isinstance(value, (list, tuple)):
        _per_axis(value, rank, which, x)
    if rank not in (1, 2, 3) or mode not in ("nearest", "nearest-exact", *RANKS):
        raise NotImplementedError(
            f"Input Error: Only 3D, 4D and 5D input Tensors supported (got {x.dim()}D) for the modes: nearest | linear "
            f"| bilinear | bicubic | trilinear | lanczos | area | nearest-exact (got {mode})"
        )
    if rank != RANKS.get(mode, rank):
        raise NotImplementedError(
            f"Got {x.dim()}D input, but {mode} mode needs {RANKS[mode] + 2}D input; "
            f"use mode {[*RANKS][rank - 1]!r}"
        )
    if align_corners is not None:
        check_bool("interpolate", "align_corners", align_corners)
    if size is not None:
        scales, sizes = [0.0] * rank, _sizes(size, rank, x)
    else:
        scales, sizes = _scaled(scale_factor, rank, x)
        if recompute_scale_factor:
            scales = [0.0] * rank
    number = LINEAR if mode in RANKS else NAMES.index(mode)
    if number != LINEAR and _vectorized(x, sizes):
        number += NEAREST_VECTORIZED - NEAREST
    lifted = (*[0.0] * (3 - rank), *scales)
    return from_3d(interpolate(to_3d(x), lift(sizes, 1), number, bool(align_corners), lifted), rank, True)
