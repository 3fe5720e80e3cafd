"""The networks that `convoxel bench network` and `scaling` run, as they are and by `convoxel.accelerate`."""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from .. import nn as ours
from ..conversion import accelerate
from ..models import UNet
from .extras import extra

CLASSES = 3


@dataclass(frozen=True)
class Network:
    """How to build one, and its usual images (N, channels, *patch)."""

    build: Callable[[], nn.Module]
    patch: tuple[int, ...]
    channels: int = 1
    batch: int = 1


def nnunet(rank: int, *features: int) -> Callable[[], nn.Module]:
    """nnU-Net's plain network as its planner makes it: two convolutions, InstanceNorm and LeakyReLU a stage."""
    conv, norm = (getattr(nn, f"{name}{rank}d") for name in ("Conv", "InstanceNorm"))
    stages = len(features)

    def build() -> nn.Module:
        unet = extra("dynamic_network_architectures.architectures.unet")
        return unet.PlainConvUNet(
            input_channels=1, n_stages=stages, features_per_stage=features, conv_op=conv, kernel_sizes=3,
            strides=(1, *(2,) * (stages - 1)), n_conv_per_stage=2, num_classes=CLASSES, n_conv_per_stage_decoder=2,
            conv_bias=True, norm_op=norm, norm_op_kwargs={"eps": 1e-5, "affine": True}, nonlin=nn.LeakyReLU,
            nonlin_kwargs={"inplace": True},
        )  # fmt: skip

    return build


def monai(name: str, *arguments: object) -> Callable[[], nn.Module]:
    """A network of MONAI's."""
    return lambda: getattr(extra("monai.networks.nets"), name)(*arguments)


NETWORKS = {
    "nnunet3d": Network(nnunet(3, 32, 64, 128, 256, 320, 320), (128, 128, 128)),
    "nnunet2d": Network(nnunet(2, 32, 64, 128, 256, 512, 512, 512, 512), (512, 512)),
    "basicunet": Network(monai("BasicUNet", 3, 1, CLASSES), (96, 96, 96)),
    "dynunet": Network(monai("DynUNet", 3, 1, CLASSES, [3] * 6, [1, 2, 2, 2, 2, 2], [2] * 5), (96, 96, 96)),
    "segresnet": Network(monai("SegResNet", 3, 8, 1, CLASSES), (128, 128, 128)),
    "small": Network(partial(UNet, 3, 1, CLASSES, (8, 16, 32)), (64, 64, 64)),
}


def named(name: str) -> Network:
    """One of NETWORKS, or what a call like "monai.networks.nets.BasicUNet(3, 1, 2)" makes: anything importable, with
    numbers, strings, lists and importable names as arguments.

    Raises ValueError with the remedy where the words are neither, ImportError where they cannot be imported.
    """
    if name in NETWORKS:
        return NETWORKS[name]
    build = partial(_evaluated, name)
    made = build()
    if not isinstance(made, nn.Module):
        raise ValueError(
            f"{name}: expected a call that makes a torch.nn.Module, it makes a {type(made).__name__}"
        )
    first = next((m for m in made.modules() if isinstance(m, nn.modules.conv._ConvNd)), None)
    if first is None or len(first.kernel_size) == 1:
        raise ValueError(f"{name}: expected a network for images (N, C, H, W) or (N, C, D, H, W), found no 2-D or 3-D "
                         "convolution in it")  # fmt: skip
    return Network(build, (96,) * 3 if len(first.kernel_size) == 3 else (256,) * 2, first.in_channels)


def _evaluated(text: str) -> Any:
    """The value of a call written in Python, of importable names and literals alone."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError:
        tree = None
    if not isinstance(tree, ast.Call):
        raise ValueError(f"{text!r}: expected {', '.join(NETWORKS)}, or a call that makes a network, as "
                         '"monai.networks.nets.BasicUNet(3, 1, 2)"')  # fmt: skip
    return _value(tree)


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Call):
        keywords = {str(k.arg): _value(k.value) for k in node.keywords}
        return _value(node.func)(*map(_value, node.args), **keywords)
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(n) for n in node.elts]
    if isinstance(node, ast.Dict):
        return {_value(k): _value(v) for k, v in zip(node.keys, node.values, strict=True) if k is not None}
    if isinstance(node, ast.Attribute):
        return _imported(ast.unparse(node))
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise ValueError(f"{ast.unparse(node)}: expected a number, a string or an importable name with its module, as "
                         "torch.nn.Conv3d") from None  # fmt: skip


def _imported(dotted: str) -> Any:
    """What a dotted name stands for: as much of it as can be imported, and attributes."""
    parts = dotted.split(".")
    found: Any = extra(parts[0])
    for i, part in enumerate(parts[1:], 2):
        if not hasattr(found, part):
            import_module(".".join(parts[:i]))
        found = getattr(found, part)
    return found


def torch_twin(network: nn.Module) -> nn.Module:
    """A copy of the network, weights included, in which torch's own kernels do the work.

    Every layer of `convoxel.nn` is a subclass of the torch layer of the same name, so the copy's layers only
    change their class.
    """
    twin = copy.deepcopy(network)
    for layer in twin.modules():
        own = type(layer)
        if own.__module__ == ours.__name__:
            layer.__class__ = next(base for base in own.__mro__ if base.__module__.startswith("torch.nn"))
    return twin


def build(name: str, size: tuple[int, ...], batch: int, own: bool) -> tuple[nn.Module, Tensor, Tensor]:
    """The network as it is, of torch's layers (`own`), or accelerated; images (N, C, *size) and labels (N, *size),
    the same in every process."""
    torch.manual_seed(0)
    found = named(name)
    plain = torch_twin(found.build())
    images, labels = torch.randn(batch, found.channels, *size), torch.randint(0, CLASSES, (batch, *size))
    return plain if own else accelerate(plain), images, labels
