"""What a Problem means: its tensors, its call, its passes, the bytes that it cannot avoid, and its exact result.

forward      y, without a graph
input_grad   dx alone, weight_grad dw alone: of convolutions and linear, each by a graph that is kept
backward     of the others, which compute all gradients at once: dx, and dw and db where there are any
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as T
from torch import Tensor

from ..geometry import NORMS, POOLS, Problem

CHECKED_CHANNELS = (
    4  # of the result are compared with float64; of a convolution, in CHECKED_PLANES planes and the edge
)
CHECKED_PLANES = 4
SUMMED_CHANNELS = 2  # of a weight gradient, in and out: each of its values is a sum over all voxels
CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}
MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}

Results = tuple[Tensor, ...]
Step = Callable[[], Results]


def passes(p: Problem) -> tuple[str, ...]:
    return ("forward", "input_grad", "weight_grad") if p.convolves else ("forward", "backward")


PASSES = ("forward", "input_grad", "weight_grad", "backward")


@dataclass(frozen=True)
class Tensors:
    """x, w, b and dy of a Problem in its dtype; w and b None where it has none."""

    x: Tensor
    w: Tensor | None
    b: Tensor | None
    dy: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> Tensors:
        return Tensors(*(t if t is None else function(t) for t in (self.x, self.w, self.b, self.dy)))  # type: ignore[arg-type]


def tensors(p: Problem, seed: int = 0) -> Tensors:
    """Normal data, weights as He scales them (norms': near 1), contiguous."""
    generator = torch.Generator().manual_seed(seed)

    def normal(shape: tuple[int, ...]) -> Tensor | None:
        return torch.randn(shape, generator=generator) if shape else None

    x, w, b, dy = (normal(shape) for shape in (p.x_shape, p.w_shape, p.b_shape, p.y_shape))
    if w is not None:
        w = w * (2 / w[0].numel()) ** 0.5 if p.convolves else 1 + w / 10
    return Tensors(x, w, b, dy).map(lambda t: t.to(p.torch_dtype))  # type: ignore[arg-type]


def channels_last(t: Tensor) -> Tensor:
    """A copy in channels-last where torch has it. Copied, since torch takes one channel for channels-last by its
    strides alone."""
    layout = CHANNELS_LAST.get(t.dim() - 2)
    return torch.empty_like(t, memory_format=layout).copy_(t) if layout else t


def call(module: Any, p: Problem, x: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
    """The operator as `module`, torch.nn.functional or ours, has it."""
    if p.op == "linear":
        return module.linear(x, w, b)
    if p.convolves:
        function = getattr(module, f"{p.op}{p.rank}d")
        return function(x, w, b, p.s, p.p, *((p.o, p.g, p.d) if p.transposed else (p.d, p.g)))
    if p.op in POOLS:
        function = getattr(module, f"{p.op}{p.rank}d")
        return function(x, p.f, p.s, p.p, *((p.d,) if p.op == "max_pool" else ()))
    if p.op == "interpolate":
        return module.interpolate(x, size=p.y_shape[2:], mode="nearest" if p.nearest else MODES[p.rank])
    if p.op == "batch_norm":
        mean, var = x.new_zeros(p.c), x.new_ones(p.c)
        return module.batch_norm(x, mean, var, w, b, training=True)
    if p.op == "group_norm":
        return module.group_norm(x, p.g, w, b)
    if p.op == "instance_norm":
        return module.instance_norm(x, weight=w, bias=b)
    return getattr(module, p.op)(x)  # relu, leaky_relu


def steps(module: Any, p: Problem, t: Tensors, function: Callable[..., Tensor] = call) -> dict[str, Step]:
    """A call for each pass of the problem; `function` does what `call` does."""

    def forward() -> Results:
        with torch.no_grad():
            return (function(module, p, t.x, t.w, t.b),)

    def gradient(*names: str) -> Step:
        leaves = [None if v is None else v.detach() for v in (t.x, t.w, t.b)]
        wanted = [
            v.requires_grad_()
            for name, v in zip("xwb", leaves, strict=True)
            if v is not None and name in names
        ]
        y = function(module, p, *leaves)
        return lambda: torch.autograd.grad(y, wanted, t.dy, retain_graph=True)

    if p.convolves:
        return {"forward": forward, "input_grad": gradient("x"), "weight_grad": gradient("w")}
    return {"forward": forward, "backward": gradient("x", "w", "b")}


def least_bytes(p: Problem, which: str) -> int:
    """Bytes that the pass must move: each tensor that it reads or writes, once. Backward reads x where dx depends
    on it; what a max_pool must remember of it is not counted."""
    x, w, y = math.prod(p.x_shape), math.prod(p.w_shape) if p.convolves else 0, math.prod(p.y_shape)
    again = x if which == "backward" and p.op in (*NORMS, "relu", "leaky_relu") else 0
    return (x + w + y + again) * p.torch_dtype.itemsize


def exact(p: Problem, which: str, t: Tensors) -> Results:
    """The first part of each result in float64, along every axis, by torch: of a convolution a few channels and
    planes, since it is slow there; of the others, which keep channels or groups of channels apart, a few channels."""
    if p.op in ("conv", "conv_transpose"):
        return (exact_convolution(p, which, t),)
    if p.op == "linear":
        return steps(T, p, t.map(Tensor.double))[which]()
    c = p.c // p.g if p.op == "group_norm" else min(p.c, CHECKED_CHANNELS)
    part = t.map(lambda v: (v[:, :c] if v.dim() > 1 else v[:c]).double())
    return steps(T, replace(p, c=c, k=c, g=1), part)[which]()


def exact_convolution(p: Problem, which: str, t: Tensors) -> Tensor:
    """Of y and dx a few channels of a few planes, of dw a few channels by a few (they sum over all voxels)."""
    x, w, b, dy = t.x, t.w, t.b, t.dy
    if w is None:
        raise ValueError(f"{p} has no weight")
    c, k = p.c // p.g, p.k // p.g  # the first group is a convolution of its own
    p = replace(p, g=1, c=c, k=k)
    x, dy, w = x[:, :c], dy[:, :k], w[:c] if p.transposed else w[:k]  # to be cut before they are made double
    out_axis, in_axis = (1, 0) if p.transposed else (0, 1)
    c, k = min(c, CHECKED_CHANNELS), min(k, CHECKED_CHANNELS)
    if which == "weight_grad":
        c, k = min(c, SUMMED_CHANNELS), min(k, SUMMED_CHANNELS)
        part = w.narrow(out_axis, 0, k).narrow(in_axis, 0, c).double().requires_grad_()
        return torch.autograd.grad(call(T, p, x[:, :c].double(), part, None), part, dy[:, :k].double())[0]
    edge = p.d[0] * (p.f[0] - 1) + p.p[0] + p.o[0] + 1  # planes next to a cut may lack their neighbours
    planes = min(p.i[0], p.s[0] * (CHECKED_PLANES + 2 * edge))
    whole = planes == p.i[0]
    p = replace(p, i=(planes, *p.i[1:]))
    x, dy = x[:, :, :planes], dy[:, :, : p.y_shape[2]]
    if which == "forward":
        bias = None if b is None else b[:k].double()
        part = call(T, p, x.double(), w.narrow(out_axis, 0, k).double(), bias)
    else:
        x = x[:, :c].double().requires_grad_()
        part = torch.autograd.grad(call(T, p, x, w.narrow(in_axis, 0, c).double(), None), x, dy.double())[0]
    return part if whole else part[:, :, :-edge]


def errors(results: Results, references: Results) -> tuple[float, float]:
    """Against float64: the relative L2 error, and the largest difference over the root mean square of the exact
    values; of several results the worst."""
    worst = [0.0, 0.0]
    for result, reference in zip(results, references, strict=True):
        off = result[tuple(slice(n) for n in reference.shape)].double() - reference
        size = reference.norm()
        found = (off.norm() / size).item(), (off.abs().max() * reference.numel() ** 0.5 / size).item()
        worst = [max(pair) for pair in zip(worst, found, strict=True)]
    return worst[0], worst[1]
