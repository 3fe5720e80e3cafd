"""Networks by name: the classes that an imported model may consist of, and the plain arguments that build them.

A description is {"name": "nnunet.PlainConvUNet", "config": {...JSON...}}: the same for a model folder of nnU-Net, a
MONAI bundle and convoxel's own checkpoint. Names are looked up here and nowhere else; nothing is evaluated.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from .. import checkpoint, models

Description = dict[str, Any]

# name: (module that has the class, what to install)
LIBRARIES = {
    "nnunet": ("dynamic_network_architectures.architectures.unet", "dynamic-network-architectures"),
    "monai": ("monai.networks.nets", "monai"),
}
NETWORKS = {
    "nnunet": ("PlainConvUNet", "ResidualEncoderUNet", "ResidualUNet"),
    "monai": (
        *("UNet", "BasicUNet", "DynUNet", "SegResNet", "SegResNetDS", "VNet", "AttentionUnet"),
        *("UNETR", "SwinUNETR"),
    ),
}
_LAYERS = {  # classes that plans name by their path in torch; the last word decides, the rest has to be torch's
    name: getattr(nn, name)
    for name in (
        *(
            f"{kind}{rank}d"
            for kind in ("Conv", "InstanceNorm", "BatchNorm", "Dropout")
            for rank in (1, 2, 3)
        ),
        *("ReLU", "LeakyReLU", "PReLU", "ELU", "GELU", "SiLU", "Dropout", "Identity"),
    )
}
_TYPED = ("conv_op", "norm_op", "dropout_op", "nonlin")  # arguments that are classes
_LARGEST = 1 << 16  # channels, classes, kernel sizes: beyond it a file is wrong or means harm


def describe(library: str, name: str, config: Mapping[str, Any]) -> Description:
    """The description of a network; ValueError for a class or an argument that is not on the list."""
    allowed = NETWORKS[library]
    if name not in allowed:
        raise ValueError(
            f"the network {name!r} is not on convoxel's list for {library}; expected one of {', '.join(allowed)}"
        )
    _check_plain("arguments", dict(config))
    return {"name": f"{library}.{name}", "config": dict(config)}


def build(description: Description, state: Mapping[str, Tensor], where: str) -> nn.Module:
    """The network with these weights, in evaluation mode.

    Args:
        description: of `describe`, or {"name", "config"} of a network registered in `convoxel.models`.
        state: names to tensors; of tensors with several names one is enough. They become the network's own.
        where: the file, for messages.

    Raises:
        ValueError: a description that is not on the list, or weights that do not fit it; ImportError: its library
            is not installed.
    """
    make = _maker(description)
    try:
        with torch.device("meta"):  # shapes without memory: a false size costs nothing
            expected = make()
    except NotImplementedError:
        expected = make()  # SwinUNETR reads numbers off tensors while it is built
    except (TypeError, AssertionError, ValueError, RuntimeError, KeyError) as error:
        raise ValueError(
            f"{where}: {description['name']} cannot be built of its arguments: {error}"
        ) from error
    whole = complete(expected, state)
    checkpoint.check_fits(where, whole, expected.state_dict())
    on_meta = any(t.is_meta for t in (*expected.parameters(), *expected.buffers()))
    expected.load_state_dict(whole, assign=True)
    if on_meta and any(t.is_meta for t in (*expected.parameters(), *expected.buffers())):
        with torch.random.fork_rng(devices=[]):
            expected = make()  # it has buffers that are no weights
        expected.load_state_dict(whole)
    return expected.eval().requires_grad_(False)


def unique(network: nn.Module) -> dict[str, Tensor]:
    """Its weights, each under its first name: nnU-Net's have four."""
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}


def complete(network: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` with every name that the network has for a tensor, where it has one of them."""
    whole, names = dict(state), dict[int, list[str]]()
    for kind in (network.named_parameters, network.named_buffers):
        for name, tensor in kind(remove_duplicate=False):
            names.setdefault(id(tensor), []).append(name)
    for same in names.values():
        known = next((name for name in same if name in state), None)
        if known is not None:
            whole.update((name, state[known]) for name in same if name not in whole)
    return whole


def _maker(description: Description) -> Callable[[], nn.Module]:
    name, config = description.get("name"), description.get("config")
    if not isinstance(name, str) or not isinstance(config, dict):
        raise ValueError(
            f"a network's description must be a name and a config, received {description!r:.200}"
        )
    _check_plain("arguments", config)
    library, _, short = name.partition(".")
    if library not in LIBRARIES:
        return lambda: models.create(name, **config)
    if short not in NETWORKS[library]:
        raise ValueError(
            f"the network {short!r} is not on convoxel's list for {library}; expected one of "
            f"{', '.join(NETWORKS[library])}"
        )
    network = getattr(_library(library), short)
    arguments = {key: _typed(key, value) if key in _TYPED else value for key, value in config.items()}
    known = inspect.signature(network).parameters
    if foreign := sorted(arguments.keys() - known.keys()):
        raise ValueError(f"{name} has no argument {', '.join(foreign)}; it takes {', '.join(known)}")
    return lambda: network(**arguments)


def _library(name: str) -> Any:
    module, package = LIBRARIES[name]
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(f'this model\'s network comes from {package}: pip install "{package}"') from error


def _typed(argument: str, name: Any) -> type[nn.Module] | None:
    """ "torch.nn.modules.conv.Conv3d" -> nn.Conv3d, from the list."""
    if name is None:
        return None
    path, _, short = str(name).rpartition(".")
    if short not in _LAYERS or not (path == "torch.nn" or path.startswith("torch.nn.modules.")):
        raise ValueError(f"{argument}: {name!r} is not on convoxel's list of layers: {', '.join(_LAYERS)}")
    return _LAYERS[short]


def _check_plain(where: str, value: Any) -> None:
    if isinstance(value, dict):
        for key, part in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{where}: the name {key!r} is not a word")
            _check_plain(f"{where}.{key}", part)
    elif isinstance(value, list | tuple):
        for i, part in enumerate(value):
            _check_plain(f"{where}[{i}]", part)
    elif isinstance(value, str) and value.startswith("$"):
        raise ValueError(
            f"{where}: {value!r} is Python to be run, which convoxel does not do; write its value"
        )
    elif not (value is None or isinstance(value, str | bool | int | float)):
        raise ValueError(
            f"{where}: expected plain numbers, words and lists, received a {type(value).__name__}"
        )
    elif isinstance(value, int | float) and not (math.isfinite(value) and abs(value) <= _LARGEST):
        raise ValueError(f"{where}: {value} is out of range; at most {_LARGEST} is expected")
