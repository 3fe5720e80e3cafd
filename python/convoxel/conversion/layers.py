"""Which class a module gets: ours for torch's layers; for containers one whose forward waits (chain.py).

A class of the second kind is made for each class that it stands for, and inherits from it: `isinstance` holds,
attributes and methods stay. It is made again where a pickled or copied module comes to life.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
from torch import nn

from .. import nn as ours
from . import layout
from .chain import LAZY, force, sequential
from .rewrite import Unreadable, lazily

STANDS_FOR = (
    "_convoxel_stands_for"  # of a class made here: the class that it stands for, and whether it is a root
)
MARK = "_convoxel_converted"  # of a layer whose class was torch's before

LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    getattr(nn, name): own
    for name, own in vars(ours).items()
    if isinstance(own, type) and own.__module__ == ours.__name__ and hasattr(nn, name)
}


def check_module(name: str, model: object) -> None:
    """TypeError unless `model`, the argument of the function `name`, is a module."""
    if not isinstance(model, nn.Module):
        received = model.__name__ + ", a class" if isinstance(model, type) else type(model).__name__
        raise TypeError(f"{name}: expected a torch.nn.Module, received {received}; pass the network itself")


def original(module: nn.Module) -> type[nn.Module]:
    """The class that this module had before it was converted."""
    own = type(module)
    if MARK in module.__dict__:
        return next(base for base in own.__mro__ if base in LAYERS)
    return getattr(own, STANDS_FOR, (own,))[0]


def kept(module: nn.Module) -> str | None:
    """Why this module keeps its class (a root: its forward as it is); "" if it is a mere list of modules, None if
    it does not keep it."""
    own = original(module)
    if own in LAYERS:
        return None
    if own in (nn.ModuleList, nn.ModuleDict):
        return ""
    if own.__module__ == ours.__name__:
        return "is convoxel's already"
    if isinstance(module, torch.jit.ScriptModule | torch.jit.ScriptFunction):
        return "is compiled by torch.jit"
    if nn.utils.parametrize.is_parametrized(module):
        return "is parametrised: its parameters are computed in every call"
    if base := next((b for b in own.__mro__ if b in LAYERS), None):
        return f"is a subclass of {base.__name__}, which may change what that does"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    if own.forward is nn.Sequential.forward:
        return None
    if own.__module__.startswith("torch."):
        return "convoxel has no such layer"
    try:
        lazily(own.forward)
    except Unreadable as why:
        return str(why)
    return None


def convert(module: nn.Module, root: bool) -> None:
    """Gives the module its class; `root`: it is the outermost of its network."""
    own: Any = type(module)
    if own in LAYERS:
        module.__class__ = LAYERS[own]
        module.__dict__[MARK] = True
    elif root and _is_network(module):
        module.__class__ = stand_in(cast(Any, original(module)), True)
    elif kept(module) is None and not hasattr(own, STANDS_FOR) and MARK not in module.__dict__:
        module.__class__ = stand_in(own, False)


def _is_network(module: nn.Module) -> bool:
    """Whether this module holds others and may get another class."""
    fixed = isinstance(module, torch.jit.ScriptModule) or nn.utils.parametrize.is_parametrized(module)
    return not fixed and any(True for _ in module.children())


def restore(module: nn.Module) -> None:
    """Gives the module back the class that it had."""
    module.__class__ = original(module)
    module.__dict__.pop(MARK, None)


def stand_in(own: Any, root: bool) -> type[nn.Module]:
    """The class that stands for `own`. A root sets the memory format, so nothing waits in front of or behind it."""
    return _made(own, own.forward, root)


@cache
def _made(own: Any, original: Callable[..., Any], root: bool) -> type[nn.Module]:
    waits = _waiting(original)

    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if root:
            return layout.channels_last(lambda *a, **k: force(waits(self, *a, **k)), args, kwargs)
        return force(waits(self, *args, **kwargs))

    body = {
        "forward": forward,
        LAZY: None if root else staticmethod(waits),
        STANDS_FOR: (own, root),
        "__module__": own.__module__,
        "__qualname__": own.__qualname__,
        "__doc__": own.__doc__,
        "__reduce_ex__": _reduce,
    }
    return type(own.__name__, (own,), body)


def _waiting(forward: Callable[..., Any]) -> Callable[..., Any]:
    if forward is nn.Sequential.forward:
        return sequential
    try:
        return lazily(forward)
    except Unreadable:
        return forward


def _reduce(self: nn.Module, protocol: Any) -> Any:
    """As the original class has it, but for the class itself, which nobody can import: `_new` makes it again."""
    own, root = getattr(type(self), STANDS_FOR)
    make, arguments, *rest = own.__reduce_ex__(self, protocol)
    if not arguments or arguments[0] is not type(self):
        return make, arguments, *rest
    return _new, (make, own, root, *arguments[1:]), *rest


def _new(make: Callable[..., Any], own: Any, root: bool, *arguments: Any) -> nn.Module:
    return make(stand_in(own, root), *arguments)
