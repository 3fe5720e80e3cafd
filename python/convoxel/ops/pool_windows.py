"""Windows of a pooling: torch's arguments as one tuple of three axes, and what is wrong with them.

`How` is (out, kernel, stride, padding, dilation), three ints each. The last four empty means adaptive: window o of
an axis is [floor(o * in / out), ceil((o + 1) * in / out)).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..geometry import SPATIAL_NAMES, Ints, as_tuple, check_bool, lift, pool_out_size
from .library import to_3d

How = Sequence[Any]

LARGEST = 2**31 - 1  # voxels of an axis where windows are adaptive, and taps of a window: codes are int32

# Of the operators ---------------------------------------------------------------------------------


def check_steps(op: str, kernel: Ints, stride: Ints, padding: Ints, dilation: Ints) -> None:
    """RuntimeError where torch refuses the windows whatever the input is."""
    for name, values in (("kernel size", kernel), ("stride", stride), ("dilation", dilation)):
        if min(values) < 1:
            raise RuntimeError(f"{op}: {name} must be greater than zero, but got {tuple(values)}")
    if min(padding) < 0:
        raise RuntimeError(f"{op}: padding must be non-negative, but got {tuple(padding)}; crop x instead")
    if any(2 * p > k for p, k in zip(padding, kernel, strict=True)):
        raise RuntimeError(
            f"{op}: padding should be at most half of kernel size, but got padding {tuple(padding)} and kernel "
            f"size {tuple(kernel)}; pad x with torch.nn.functional.pad where you need more"
        )


def check(op: str, x_shape: Ints, how: How) -> tuple[int, ...]:
    """The shape of y (N, C, OD, OH, OW); RuntimeError if these windows do not belong to such an x."""
    out, *steps = how
    if len(x_shape) != 5:
        raise RuntimeError(f"{op}: expected x with 5 axes (N, C, D, H, W), received {tuple(x_shape)}")
    if min(x_shape[2:]) < 1:
        raise RuntimeError(f"{op}: expected spatial axes that are not empty, received x {tuple(x_shape)}")
    if len(out) != 3 or any(len(s) != len(steps[0]) or len(s) not in (0, 3) for s in steps):
        raise RuntimeError(
            f"{op}: expected 3 entries in out, and 3 (or, if adaptive, none) in each of kernel, stride, padding and "
            f"dilation, received {how}"
        )
    if not steps[0]:
        if min(out) < 0 or max(*out, *x_shape[2:]) > LARGEST:
            raise RuntimeError(
                f"{op}: expected output sizes from 0 to {LARGEST} and x no larger, received output size "
                f"{tuple(out)}, x {tuple(x_shape)}"
            )
        return (*x_shape[:2], *out)
    kernel, stride, padding, dilation = steps
    check_steps(op, kernel, stride, padding, dilation)
    axes = list(zip(x_shape[2:], kernel, stride, padding, dilation, strict=True))
    for o, axis in zip(out, axes, strict=True):
        if o < 1 or o not in (pool_out_size(*axis), pool_out_size(*axis, True)):
            raise RuntimeError(
                f"{op}: x {tuple(x_shape)} (N, C, D, H, W) with kernel {tuple(kernel)}, stride {tuple(stride)}, "
                f"padding {tuple(padding)}, dilation {tuple(dilation)} has no such output: received {tuple(out)}; "
                "see convoxel.geometry.pool_out_size"
            )
    return (*x_shape[:2], *out)


def extents(size: Ints, how: How) -> tuple[int, ...]:
    """The kernel, or what no adaptive window along an axis exceeds: 12 inputs in 5 windows -> 4."""
    out, kernel, *_ = how
    if kernel:
        return tuple(kernel)
    return tuple(i // max(o, 1) + (2 if o and i % o else 0) for i, o in zip(size, out, strict=True))


def code_dtype(op: str, size: Ints, how: How) -> torch.dtype:
    taps = prod(extents(size, how))
    if taps > LARGEST:
        raise RuntimeError(f"{op}: windows of at most {LARGEST} voxels are supported, received {taps}")
    return torch.uint8 if taps <= 256 else torch.int32


# Of the public functions ---------------------------------------------------------------------------


def lifted(name: str, rank: int, x: Tensor, filled: int | None) -> tuple[Tensor, bool]:
    """x as (N, C, D, H, W), and whether it had a batch axis. The last `filled` axes may not be empty, or
    (None) all but the first: torch's rules differ."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}(): argument 'input' must be Tensor, not {type(x).__name__}")
    axes = SPATIAL_NAMES[rank]
    if x.dim() not in (rank + 1, rank + 2):
        error = IndexError if name == "avg_pool2d" and x.dim() < 3 else RuntimeError  # as torch
        raise error(
            f"{name}: expected {rank + 2}D input (N, C, {axes}) or, without a batch, {rank + 1}D (C, {axes}), but got "
            f"input of size {tuple(x.shape)}"
        )
    batched = x.dim() == rank + 2
    if 0 in x.shape[1 if filled is None else x.dim() - filled :]:
        raise RuntimeError(
            f"{name}: expected input with non-zero size for its non-batch dimensions (C, {axes}), but got input of "
            f"size {tuple(x.shape)}; leave it out"
        )
    if not batched:
        x = x.unsqueeze(0)
    if rank == 1 or not batched:  # torch knows no channels-last here: results are contiguous
        x = x.contiguous()
    return to_3d(x), batched


def windows(name: str, rank: int, size: Ints, kernel: Any, stride: Any, padding: Any, dilation: Any,
             ceil_mode: bool) -> How:  # fmt: skip
    """torch's arguments as (out, kernel, stride, padding, dilation) of three axes."""
    if stride is None or isinstance(stride, (tuple, list)) and not stride:
        stride = kernel
    named = (("kernel_size", kernel), ("stride", stride), ("padding", padding), ("dilation", dilation))
    k, s, p, d = (as_tuple(value, rank, name, what) for what, value in named)
    ceil = check_bool(name, "ceil_mode", ceil_mode)
    check_steps(name, k, s, p, d)
    k, s, p, d = lift(k, 1), lift(s, 1), lift(p, 0), lift(d, 1)
    out = tuple(pool_out_size(*axis, ceil) for axis in zip(size, k, s, p, d, strict=True))
    if min(out) < 1:
        raise RuntimeError(
            f"{name}: given input size {tuple(size)[-rank:]}, calculated output size {out[-rank:]}, which is too "
            f"small; kernel {k[-rank:]}, padding {p[-rank:]}, dilation {d[-rank:]}: enlarge the input"
        )
    return out, k, s, p, d


def adaptive(name: str, rank: int, size: Ints, output_size: Any) -> How:
    if rank > 1 and isinstance(output_size, (tuple, list)) and len(output_size) == rank:
        output_size = tuple(i if o is None else o for o, i in zip(output_size, size[-rank:], strict=True))
    if isinstance(output_size, (tuple, list)) and len(output_size) != rank:
        raise RuntimeError(f"{name}: output_size must have {rank} entries, one for each of {SPATIAL_NAMES[rank]}, got "
                           f"{output_size}")  # fmt: skip
    out = as_tuple(output_size, rank, name, "output_size")
    if min(out) < 0:
        raise RuntimeError(f"{name}: elements of output_size must not be negative, received {output_size}")
    return lift(out, 1), (), (), (), ()
