"""torch.nn.functional's convolutions of any rank, and linear, by the 3-D operators of ops/conv.py: tensors are lifted
with unit extents, the operators check them, and what is wrong is said in the caller's axes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..geometry import SPATIAL_NAMES, Ints, as_tuple, conv_transpose_out_size, lift
from .conv import conv, conv_input_grad
from .conv_geometry import check, check_dtypes, mixed
from .library import Operator, autocasts, from_3d, to_3d


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


def _check_dtypes(name: str, x: Tensor, w: Tensor) -> None:
    """The operators take a float32 weight beside bfloat16, torch's functions only under autocast."""
    if mixed(x, w) and not autocasts(x.device):
        check_dtypes(name, x, w)


def _batched(name: str, rank: int, x: Tensor, w: Tensor) -> tuple[Tensor, bool]:
    for what, t in (("input", x), ("weight", w)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}(): argument '{what}' must be Tensor, not {type(t).__name__}")
    _check_dtypes(name, x, w)
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
    _check_dtypes("linear", x, w)
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
        check_dtypes("linear", x, b, w=w)
        return linear(x, w, None) + b
    if k == 0:  # a convolution has outputs; this keeps the graph of a layer that has none
        return x[..., :0] + w.sum() if b is None else x[..., :0] + w.sum() + b
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    one, zero = (1, 1, 1), (0, 0, 0)
    # Rows are the pixels of one channels-last image (1, C, 1, 1, rows); no rows are no images.
    pixels = rows[None, None, None].permute(0, 4, 1, 2, 3) if len(rows) else rows[:, :, None, None, None]
    y = conv(pixels, w.reshape(k, x.shape[-1], 1, 1, 1), b, one, zero, one, 1)
    return y.permute(0, 2, 3, 4, 1).reshape(shape)
