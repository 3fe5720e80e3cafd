"""Chains: layers that were called and wait, so that those that go together run as one.

`call(layer, x)` returns a Chain where the layer may be part of a group, its value otherwise; `force` runs a chain
and returns the tensor. What runs as one is decided here, when a chain is forced, from the layers as they are then:
hooks, training flags and parameters may have changed since the last call. The groups are in blocks.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.modules.module as _module
from torch import Tensor, nn

from .. import functional as F
from ..ops.joined import Parts, parts_of
from ..ops.norm_act import Act
from . import blocks

LAZY = "_convoxel_lazily"  # of a converted module's class: its forward with calls that wait
WRITES_ANEW = {"conv", "norm"}  # kinds of layers that never change what they are given
ACTIVATIONS = {F.relu, F.leaky_relu}
FUNCTIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    getattr(torch.nn.functional, name): own
    for name, own in vars(F).items()
    if getattr(own, "__module__", None) == F.__name__ and hasattr(torch.nn.functional, name)
} | {torch.relu: F.relu, torch.cat: F.cat, torch.concat: F.cat}


class Link(NamedTuple):
    """A layer of a chain: of which kind (blocks.kind), and what runs it alone."""

    kind: str
    layer: Any
    alone: Callable[[Any], Any]


class Chain:
    """x (a tensor, or the parts of a concatenation), and the layers that it goes through. It belongs to one name and is
    forced once."""

    __slots__ = ("links", "x")

    def __init__(self, x: Any, links: list[Link]) -> None:
        self.x, self.links = x, links


def _extended(x: Any, link: Link) -> Chain:
    if not isinstance(x, Chain):
        return Chain(x, [link])
    x.links.append(link)
    return x


def call(function: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """function(x, ...), at once or when it is needed; x may be a chain."""
    if not isinstance(function, nn.Module):
        return _call_function(function, x, args, kwargs)
    if args or kwargs or hooked(function):
        return function(force(x), *args, **kwargs)
    if kind := blocks.kind(function):
        return _extended(x, Link(kind, function, function))
    lazily = getattr(type(function), LAZY, None)
    return function(force(x)) if lazily is None else lazily(function, x)


def _call_function(function: Any, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    try:
        function = FUNCTIONS.get(function, function)
    except TypeError:  # a callable without a hash
        return function(force(x), *args, **kwargs)
    if function in ACTIVATIONS:
        alone = partial(_swapped, function, args, kwargs)
        return _extended(x, Link("activation", _act(function, *args, **kwargs), alone))
    if function is F.cat and (parts := parts_of(x, *args, **kwargs)) is not None:
        return Chain(parts, [])
    return function(force(x), *args, **kwargs)


def _act(function: Any, *args: Any, **kwargs: Any) -> Any:
    """A call of F.relu or F.leaky_relu as blocks.py has it; None if its arguments are not what they should be."""
    if function is F.relu:
        return Act("relu")
    slope = args[0] if args else kwargs.get("negative_slope", 0.01)
    return Act("leaky_relu", slope) if isinstance(slope, float | int) else None


def _swapped(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], x: Any) -> Any:
    return function(x, *args, **kwargs)


def add(x: Any, value: Any) -> Any:
    """x += value."""

    def alone(t: Any) -> Any:
        t += value
        return t

    return _extended(x, Link("add", value, alone)) if isinstance(x, Chain) else alone(x)


def force(x: Any) -> Any:
    """The value of a chain; whatever else x is comes back as it is."""
    if not isinstance(x, Chain):
        return x
    value, links, at = x.x, x.links, 0
    x.x = None  # free as soon as the first layers have read it
    while at < len(links):
        value, at = _step(value, links, at)
    return _whole(value)


def beside(waiting: Any, function: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """function(x, ...) while a chain waits: first, where neither can tell, else after the chain."""
    if isinstance(waiting, Chain) and not _independent(waiting, function):
        waiting.x, waiting.links = force(waiting), []
    return force(call(function, x, *args, **kwargs))


def _independent(chain: Chain, function: Any) -> bool:
    """Whether this is a layer, or a Sequential of some, that changes nothing but its own statistics, and the chain only
    reads its x and is made of other layers."""
    if not isinstance(function, nn.Module) or hooked(function) or not chain.links:
        return False
    if getattr(type(function), LAZY, None) is sequential:
        return all(_independent(chain, layer) for layer in function.children())
    reads = {blocks.kind(function), chain.links[0].kind} <= WRITES_ANEW
    return reads and all(link.layer is not function for link in chain.links)


def _step(x: Any, links: list[Link], at: int) -> tuple[Any, int]:
    """Runs the links that go together from `at` on: their value, and the next link."""
    if isinstance(x, Parts) and not blocks.joins(x, links[at]):
        x = x.whole()
    runs = isinstance(x, Tensor | Parts | blocks.Convolved)
    group = blocks.group(x, links, at) if runs else None
    return (links[at].alone(x), at + 1) if group is None else group


def _whole(x: Any) -> Any:
    return x.whole() if isinstance(x, Parts) else x


def hooked(module: nn.Module) -> bool:
    """Whether somebody wants to see what goes in or comes out of this module alone."""
    own = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    everywhere = (_module._global_forward_hooks, _module._global_forward_pre_hooks, _module._global_backward_hooks,
                  _module._global_backward_pre_hooks)  # fmt: skip
    return (
        any(own) or any(everywhere) or "forward" in module.__dict__ or module._compiled_call_impl is not None
    )


def sequential(self: nn.Sequential, x: Any) -> Any:
    """torch.nn.Sequential.forward with calls that wait."""
    for layer in self:
        x = call(layer, x)
    return x
