"""Which layers of a chain run as one: convolution, norm, addition and activation, in this order.

A group begins at a norm, or at a convolution that a norm follows. Layers that do nothing now (dropout in
evaluation, Identity) are passed over. What does not fit (other dtypes and devices, shapes that broadcast, unbatched
images) is left to the layers themselves, which serve it or say what is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .. import nn as ours
from ..geometry import lift
from ..ops import convolution as _conv
from ..ops import norm as _norm
from ..ops.conv_block import conv_moments
from ..ops.joined import Parts, conv_joined
from ..ops.library import autocast, autocasts, from_3d, to_3d, why_not
from ..ops.norm_act import KINDS, Act, norm_act

Norm = ours._BatchNorm | ours._InstanceNorm | ours.GroupNorm

_KINDS: dict[type, str] = {
    **dict.fromkeys((ours.Conv1d, ours.Conv2d, ours.Conv3d), "conv"),
    **dict.fromkeys((ours.BatchNorm1d, ours.BatchNorm2d, ours.BatchNorm3d), "norm"),
    **dict.fromkeys((ours.InstanceNorm1d, ours.InstanceNorm2d, ours.InstanceNorm3d, ours.GroupNorm), "norm"),
    **dict.fromkeys((ours.ReLU, ours.LeakyReLU, nn.PReLU, nn.ELU, nn.SiLU, nn.GELU), "activation"),
    **dict.fromkeys((nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Identity), "nothing"),
}
_RANKS: dict[type, int] = {
    getattr(ours, f"{name}{rank}d"): rank + 2 for name in ("BatchNorm", "InstanceNorm") for rank in (1, 2, 3)
}
_seen: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def kind(layer: nn.Module) -> str | None:
    """conv, norm, activation or nothing: what this layer is to a chain now. None: it runs at once, alone."""
    found = _KINDS.get(type(layer))
    if found == "nothing" and layer.training and getattr(layer, "p", 0.0) > 0:
        return None
    return found


def seen(layer: nn.Module) -> str:
    """With what this layer ran as one the last time, "conv + norm + relu"; "" if alone."""
    return _seen.get(layer, "")


def act_of(layer: Any) -> Act | None:
    """An activation layer as the operator `norm_act` has it; None for those that it has not."""
    match layer:
        case Act():
            act = layer
        case nn.LeakyReLU():
            act = Act("leaky_relu", layer.negative_slope)
        case nn.ReLU():
            act = Act("relu")
        case nn.PReLU():
            act = Act("prelu", slopes=layer.weight)
        case nn.ELU():
            act = Act("elu", layer.alpha)
        case nn.SiLU():
            act = Act("silu")
        case nn.GELU():
            act = Act("gelu" if layer.approximate == "none" else "gelu_tanh")
        case _:
            return None
    return act if act.kind in KINDS else None


def joins(parts: Parts, link: Any) -> bool:
    """Whether this layer is a convolution that reads the parts of a concatenation where they are."""
    conv, xs = link.layer, parts.tensors
    if (
        link.kind != "conv"
        or conv.groups > 1
        or conv.padding_mode != "zeros"
        or isinstance(conv.padding, str)
    ):
        return False
    fits = xs[0].dim() == conv.weight.dim() and sum(x.shape[1] for x in xs) == conv.in_channels
    same = xs[0].dtype == conv.weight.dtype or autocasts(xs[0].device)
    return fits and same and why_not(*xs, conv.weight, conv.bias) is None


class Convolved(NamedTuple):
    """A convolution's result on its way to the norm behind it, so that nobody holds what it was made of meanwhile: its
    mean and variance, the layer, what it ran as."""

    y: Tensor
    moments: tuple[Tensor, Tensor]
    conv: Any
    words: list[str]


def group(x: Tensor | Parts | Convolved, links: Sequence[Any], at: int) -> tuple[Any, int] | None:
    """Runs what goes together from links[at] on, on x (N, C, *): its value and the first link after it. None where
    no group begins. Parts are for a convolution that `joins` them; a value that is Convolved is for the norm
    links[at] of the same group."""
    if isinstance(x, Convolved):
        return _block(x.y, x.words, links, at, x.conv, x.moments)
    if links[at].kind == "conv":
        return _convolution(x, links, at)
    if links[at].kind != "norm" or isinstance(x, Parts):
        return None
    norm, residual, act, layers, _ = _tail(links, at)
    if len(layers) == 1 and residual is None or not _fits(norm, x, residual, act):
        return None
    return _block(x, [], links, at)


def _convolution(x: Tensor | Parts, links: Sequence[Any], at: int) -> tuple[Tensor | Convolved, int]:
    """A group that begins with a convolution, if only of that."""
    conv, at = links[at].layer, _next(links, at + 1)
    norm = links[at].layer if at < len(links) and links[at].kind == "norm" else None
    words = ["concatenation", "conv"] if isinstance(x, Parts) else ["conv"]
    if norm is not None and _folds(conv, norm):
        _remember([*words, "norm (folded)"], conv, norm)
        return _folded(conv, norm, x), at + 1
    share = None if norm is None else _share(norm)
    if share is None or not _normalises(norm, conv, x):
        if isinstance(x, Parts):
            _remember(words, conv)
        return _convolved(conv, x, conv.weight, conv.bias)[0], at
    y, moments = _with_moments(conv, x, *share)
    norm, residual, act, *_ = _tail(links, at)
    return (Convolved(y, moments, conv, words) if _fits(norm, y, residual, act) else y), at


def _block(
    x: Tensor, words: list[str], links: Sequence[Any], at: int, conv: Any = None, moments: Any = None
) -> tuple[Tensor, int]:
    """x through the norm links[at] and what goes with it; words: what conv made x of."""
    norm, residual, act, layers, end = _tail(links, at)
    words = [*words, "norm", *["residual"] * (residual is not None), *([act.kind] if act else [])]
    _remember(words, conv, *layers)
    return _normalised(norm, x, act or Act("identity"), residual, moments), end


def _tail(links: Sequence[Any], at: int) -> tuple[Any, Any, Act | None, list[Any], int]:
    """The norm links[at] with what follows it: norm, residual, activation, their layers, and the next link."""
    residual, act, layers, end = None, None, [links[at].layer], _next(links, at + 1)
    if end < len(links) and links[end].kind == "add":
        residual, end = links[end].layer, _next(links, end + 1)
    if end < len(links) and links[end].kind == "activation" and (act := act_of(links[end].layer)):
        layers.append(links[end].layer)
        end += 1
    return links[at].layer, residual, act, layers, end


def _next(links: Sequence[Any], at: int) -> int:
    """The first link from `at` on that does something."""
    while at < len(links) and links[at].kind == "nothing":
        at += 1
    return at


def _remember(words: Sequence[str], *layers: Any) -> None:
    if not torch.compiler.is_compiling():
        _seen.update((layer, " + ".join(words)) for layer in layers if isinstance(layer, nn.Module))


def _fits(norm: Norm, x: Tensor, residual: Any, act: Act | None) -> bool:
    """Whether `norm_act` takes these."""
    slopes = None if act is None else act.slopes
    if residual is not None:
        if not isinstance(residual, Tensor) or residual.shape != x.shape or residual.dtype != x.dtype:
            return False
    if slopes is not None and slopes.numel() not in (1, x.shape[1] if x.dim() > 1 else 1):
        return False
    channels = norm.num_channels if isinstance(norm, ours.GroupNorm) else norm.num_features
    rank = _RANKS.get(type(norm), x.dim())  # other ranks are unbatched images, or mistakes
    fits = x.dim() == rank > 1 and x.shape[1] == channels and x.numel() > 0
    return fits and why_not(x, residual, slopes, norm.weight) is None


def _share(norm: Any) -> tuple[int, bool] | None:
    """How many channels share a mean, as `norm` (ops/norm.py) has it: groups and over_batch; None where it is fixed."""
    if isinstance(norm, ours.GroupNorm):
        return norm.num_groups, False
    batch = isinstance(norm, ours._BatchNorm)
    fixed = not norm.training and (norm.track_running_stats or batch) and norm.running_mean is not None
    return None if fixed else (norm.num_features, batch)


def _normalises(norm: Any, conv: Any, x: Tensor | Parts) -> bool:
    """Whether `conv_moments` takes these, and the norm what comes out."""
    channels = norm.num_channels if isinstance(norm, ours.GroupNorm) else norm.num_features
    if isinstance(x, Parts):
        return conv.out_channels == channels
    fits = x.dim() == conv.weight.dim() and x.numel() > 0 and conv.out_channels == channels
    same = x.dtype == conv.weight.dtype or autocasts(x.device)
    return fits and same and why_not(x, conv.weight, conv.bias) is None


def _with_moments(
    conv: Any, x: Tensor | Parts, groups: int, over_batch: bool
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """conv(x), and its mean and variance. Where a norm takes each channel's own mean away, a bias changes nothing
    behind it: its gradient is zero, and is not summed up."""
    b = conv.bias
    counts = (
        b is not None and b.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling()
    )
    centred = counts and groups == conv.out_channels
    y, moments = _convolved(conv, x, conv.weight, b.detach() if centred else b, (groups, over_batch))
    return (_WithoutEffect.apply(y, b) if centred else y), moments


def _convolved(conv: Any, x: Tensor | Parts, w: Tensor, b: Tensor | None, share: Any = None) -> Any:
    """conv(x) with these weights, and its mean and variance, of `share` (groups, over_batch), if that is given."""
    if share is None and isinstance(x, Tensor):
        return conv._conv_forward(x, w, b), None
    if isinstance(x, Parts):
        w, b, *xs = cast(list[Any], autocast(w, b, *x.tensors, weight=0))
        how = (lift(conv.stride, 1), lift(conv.padding, 0), lift(conv.dilation, 1), *(share or (0, False)))
        y, *moments = conv_joined([to_3d(t) for t in xs], to_3d(w), b, *how)
        return from_3d(y, w.dim() - 2, True), moments
    x, w, b = cast(tuple[Tensor, Tensor, Tensor | None], autocast(x, w, b, weight=1))
    x, padding = ours._padded(conv, x)
    found: list[Tensor] = []

    def operator(x: Tensor, w: Tensor, b: Tensor | None, *how: Any) -> Tensor:
        y, *moments = conv_moments(x, w, b, *how, *share)
        found.extend(moments)
        return y

    how = (conv.stride, padding, conv.dilation, conv.groups)
    return _conv.convolution(w.dim() - 2, x, w, b, *how, conv=operator), found


class _WithoutEffect(torch.autograd.Function):
    """y, as one that also depends on b, with gradient zero."""

    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor, b: Tensor) -> Tensor:
        return y.detach()  # the same memory; a view of one image would lose its memory format

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.b = inputs[1].shape, inputs[1].dtype

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        shape, dtype = ctx.b
        return dy, dy.new_zeros(shape, dtype=dtype)


def _normalised(norm: Any, x: Tensor, act: Act, residual: Tensor | None, moments: Any = None) -> Tensor:
    """act(norm(x) + residual), with the layer's own bookkeeping. moments: mean and var of x, if they are known."""

    def own(x: Tensor, w: Tensor | None, b: Tensor | None, groups: int, over_batch: bool, eps: float) -> Any:
        return norm_act(x, w, b, groups, over_batch, eps, act, residual, moments)

    def fixed(x: Tensor, w: Tensor | None, b: Tensor | None, mean: Tensor, var: Tensor, eps: float) -> Any:
        return norm_act(x, w, b, x.shape[1], True, eps, act, residual, (mean, var), True)[0]

    if isinstance(norm, ours._BatchNorm):
        return norm.through(partial(_norm.batch_norm, norm=own, norm_fixed=fixed), x)
    if isinstance(norm, ours._InstanceNorm):
        return norm.through(partial(_norm.instance_norm, norm=own, norm_fixed=fixed), x)
    return norm.through(partial(_norm.group_norm, norm=own), x)


def _folds(conv: Any, norm: Norm) -> bool:
    """Whether the norm is a fixed scale and shift that nobody differentiates: then it goes into the weights."""
    fixed = isinstance(norm, ours._BatchNorm) and not norm.training and norm.running_mean is not None
    parameters = (conv.weight, conv.bias, norm.weight, norm.bias)
    if not fixed or torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in parameters):
        return False
    return conv.weight.shape[0] == norm.num_features and norm.running_var is not None


def _folded(conv: Any, norm: Any, x: Tensor | Parts) -> Tensor:
    """norm(conv(x)) with w' = w a and b' = (b - mean) a + beta, a = gamma / sqrt(var + eps), worked out in float64
    in every call: they are never stale."""
    a = (norm.running_var.double() + norm.eps).rsqrt()
    a = a if norm.weight is None else a * norm.weight
    b = -norm.running_mean if conv.bias is None else conv.bias - norm.running_mean
    b = b * a if norm.bias is None else b * a + norm.bias
    w = conv.weight * a.view(-1, *(1,) * (conv.weight.dim() - 1))
    return _convolved(conv, x, w.to(conv.weight.dtype), b.to(conv.weight.dtype))[0]
