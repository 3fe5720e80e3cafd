"""What the operators of a convolution ask of their tensors, and its geometry as csrc reads it.

Everything is 3-D: x (N, C, D, H, W), w (K, C / groups, KD, KH, KW), y (N, K, OD, OH, OW).
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from .. import runtime
from ..geometry import SPATIAL_NAMES, Ints, Problem, conv_out_size
from . import route

LARGEST = 2**40  # voxels of a padded axis: far beyond memory, and sums of several stay within 64 bits
PARTS = 4  # of an x that lies in several tensors, at most


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


def mixed(x: Tensor, w: Tensor) -> bool:
    """Whether w is float32 beside a bfloat16 x: what autocast leaves as it is, since kernels round it as they read."""
    return w.dtype == torch.float32 and x.dtype == torch.bfloat16


def check_dtypes(op: str, x: Tensor, *others: Tensor | None, w: Tensor | None = None) -> None:
    """All of one dtype that kernels take; w may be `mixed`."""
    weights = None if w is None or mixed(x, w) else w
    dtypes = [t.dtype for t in (x, weights, *others) if t is not None]
    if len(set(dtypes)) > 1:
        raise RuntimeError(
            f"{op}: input, weight and bias should have the same dtype, received {', '.join(map(str, dtypes))}; "
            "convert one of them, or use torch.autocast"
        )
    if dtypes[0] not in runtime.DTYPES:
        raise RuntimeError(f"{op}: kernels take {', '.join(map(str, runtime.DTYPES))}, received {dtypes[0]}")


def numbers(
    x_shape: Ints, w_shape: Ints, y_shape: Ints, stride: Ints, padding: Ints, dilation: Ints, groups: int,
    x_last: bool, y_last: bool, parts: Ints = (), w_last: bool = False, w_float: bool = False,
) -> list[int]:  # fmt: skip
    """The geometry as csrc/bind.cpp reads it, direct; parts: channels of the tensors that make x. A stride beyond the
    padded extent makes one output like any other such stride, a dilation of one tap does nothing: without them no sum
    in csrc exceeds 64 bits."""
    flat = [x_shape[0], x_shape[1], w_shape[0], groups]
    for axes in zip(x_shape[2:], y_shape[2:], w_shape[2:], stride, padding, dilation, strict=True):
        n, out, k, s, p, d = axes
        flat += [n, out, k, min(s, n + 2 * p), p, d if k > 1 else 1]
    parts = parts or (x_shape[1],)
    padded = (*parts, *(0,) * (PARTS - len(parts)))
    return [*flat, int(x_last), int(y_last), *padded, int(w_last), int(w_float), *route.DIRECT.numbers]


def problem(geometry: list[int], dtype: torch.dtype, bias: bool) -> str:
    """The call as a Problem string, for CONVOXEL_VERBOSE: of a gradient, the convolution that it belongs to."""
    axes = [geometry[4 + 6 * a : 10 + 6 * a] for a in range(3)]
    i, _, f, s, p, d = (tuple(a[j] for a in axes) for j in range(6))
    name = next(k for k, v in Problem.DTYPES.items() if v == dtype)
    return str(Problem("conv", geometry[0], geometry[1], geometry[2], i, f, s, p, d, g=geometry[3],
                       bias=bias, last=bool(geometry[22]), dtype=name))  # fmt: skip
