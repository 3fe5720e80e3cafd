"""A network's modules anew, around the same parameters and buffers."""

from __future__ import annotations

from collections import OrderedDict
from types import MethodType
from typing import Any

from torch import nn


def anew(network: nn.Module) -> nn.Module:
    """The network's modules as new objects. Parameters, buffers, hooks and whatever else they hold are the same
    objects; references to modules of the network, in lists and dicts too, lead to the new ones, and a module that
    is reached by two names stays one."""
    made = {id(m): m.__class__.__new__(m.__class__) for m in network.modules()}
    for module in network.modules():
        made[id(module)].__dict__.update({k: _redirected(v, made) for k, v in module.__dict__.items()})
    return made[id(network)]


def _redirected(value: Any, made: dict[int, nn.Module]) -> Any:
    if isinstance(value, nn.Module):
        return made.get(id(value), value)
    if isinstance(value, MethodType) and id(value.__self__) in made:
        return MethodType(value.__func__, made[id(value.__self__)])
    if type(value) in (dict, OrderedDict):
        return type(value)((k, _redirected(v, made)) for k, v in value.items())
    if type(value) in (list, tuple):
        return type(value)(_redirected(v, made) for v in value)
    return value
