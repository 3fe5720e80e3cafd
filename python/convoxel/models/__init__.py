"""Networks in plain `nn`, and the registry that lets a file name one: a name and a JSON configuration."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from .unet import UNet

NETWORKS: dict[str, type[nn.Module]] = {"unet": UNet}


def register(name: str, network: type[nn.Module]) -> None:
    """Make a network class known to `create`, `config_of`, `Model.save` and `Model.load`.

    Its instances need a `config`: the keyword arguments (JSON values) that build an equal one, also on torch's
    "meta" device (no values in its constructor), where `Model.load` compares its shapes with the file's.
    """
    if NETWORKS.get(name, network) is not network:
        raise ValueError(f"the name {name!r} is taken by {NETWORKS[name].__name__}; choose another")
    NETWORKS[name] = network


def create(name: str, **config: Any) -> nn.Module:
    """A network by its name; the configuration goes to its constructor.

    Raises ValueError for an unknown name, TypeError for arguments that the network does not have.

    >>> create("unet", rank=2, in_channels=1, out_channels=3, features=(8, 16)).config["features"]
    [8, 16]
    """
    if name not in NETWORKS:
        raise ValueError(f"unknown network {name!r}; expected one of {', '.join(NETWORKS)}")
    network = NETWORKS[name]
    try:
        inspect.signature(network).bind(**config)
    except TypeError as error:
        raise TypeError(f"{name}: {error}; it takes {inspect.signature(network)}") from None
    return network(**config)


def config_of(model: nn.Module) -> dict[str, Any] | None:
    """{"name", "config"} such that create(name, **config) has the model's architecture; None if unregistered.

    >>> config_of(UNet(rank=3, in_channels=1, out_channels=2))["name"]
    'unet'
    """
    for name, network in NETWORKS.items():
        if type(model) is network:
            return {"name": name, "config": model.config}
    return None


__all__ = ["NETWORKS", "UNet", "config_of", "create", "register"]
