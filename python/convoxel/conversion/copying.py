"""A network's modules anew, around the same parameters and buffers."""

from __future__ import annotations

from collections import OrderedDict
from copy import copy
from types import MethodType
from typing import Any, TypeVar

from torch import nn

Network = TypeVar("Network", bound=nn.Module)
REGISTRIES = frozenset(nn.Module().__dict__) - {
    "training"
}  # a module's own books: parameters, modules, hooks


def anew(network: Network) -> Network:
    """The network's modules as new objects. Parameters, buffers, hooks and whatever else they hold are the same
    objects; references to modules of the network, in lists and dicts too, lead to the new ones, and what is reached
    by two names stays one."""
    made: Made = {id(m): (m, m.__class__.__new__(m.__class__)) for m in network.modules()}
    for module in network.modules():
        state = {k: copy(v) if k in REGISTRIES else v for k, v in module.__dict__.items()}
        made[id(module)][1].__dict__.update({k: _redirected(v, made) for k, v in state.items()})
    return made[id(network)][1]


Made = dict[
    int, tuple[Any, Any]
]  # by the old object's id: the old one, which keeps the id taken, and the new


def _redirected(value: Any, made: Made) -> Any:
    """The value, with new modules in place of old ones; itself where there are none."""
    if id(value) in made:
        return made[id(value)][1]
    if isinstance(value, MethodType) and id(value.__self__) in made:
        return MethodType(value.__func__, made[id(value.__self__)][1])
    if type(value) not in (list, tuple, dict, OrderedDict):
        return value
    old = list(value.items()) if isinstance(value, dict) else list(value)
    new = [_redirected(v, made) for v in old]
    if all(a is b for a, b in zip(old, new, strict=True)):
        return value
    made[id(value)] = value, type(value)(new)
    return made[id(value)][1]
