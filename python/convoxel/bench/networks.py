"""The networks that `convoxel bench network` and `scaling` run, with torch's layers and with ours."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from .. import nn as ours
from ..models import UNet
from .extras import extra

CLASSES = 3


@dataclass(frozen=True)
class Network:
    """How to build one of plain layers, and its usual images (N, 1, *patch)."""

    build: Callable[[], nn.Module]
    patch: tuple[int, ...]
    batch: int = 1


def unet(*features: int, rank: int = 3) -> Callable[[], nn.Module]:
    """nnU-Net's plain network: two convolutions, InstanceNorm and LeakyReLU a stage."""
    return partial(UNet, rank, 1, CLASSES, features)


def monai(name: str, *arguments: object, **options: object) -> Callable[[], nn.Module]:
    """A network of MONAI's (with `convoxel[bench]`), built on its terms."""
    return lambda: getattr(extra("monai.networks.nets"), name)(*arguments, **options)


NETWORKS = {
    "nnunet3d": Network(unet(32, 64, 128, 256, 320, 320), (128, 128, 128)),
    "nnunet2d": Network(unet(32, 64, 128, 256, 512, 512, 512, 512, rank=2), (512, 512)),
    "basicunet": Network(monai("BasicUNet", 3, 1, CLASSES), (96, 96, 96)),
    "dynunet": Network(monai("DynUNet", 3, 1, CLASSES, [3] * 6, [1, 2, 2, 2, 2, 2], [2] * 5), (96, 96, 96)),
    "segresnet": Network(monai("SegResNet", 3, 8, 1, CLASSES), (128, 128, 128)),
    "small": Network(unet(8, 16, 32), (64, 64, 64)),
}


def torch_twin(network: nn.Module) -> nn.Module:
    """A copy of the network, weights included, in which torch's own kernels do the work.

    Every layer of `convoxel.nn` is a subclass of the torch layer of the same name, so the copy's layers only
    change their class.
    """
    twin = copy.deepcopy(network)
    for layer in twin.modules():
        own = type(layer)
        if own.__module__.startswith("convoxel.nn"):
            layer.__class__ = next(base for base in own.__mro__ if base.__module__.startswith("torch.nn"))
    return twin


def convoxel_twin(network: nn.Module) -> nn.Module:
    """The reverse: a copy in which ours do the work, where we have the layer."""
    twin = copy.deepcopy(network)
    for layer in twin.modules():
        own = getattr(ours, type(layer).__name__, nn.Module)
        if type(layer).__module__.startswith("torch.nn") and own.__module__ == ours.__name__:
            layer.__class__ = own
    return twin


def build(name: str, size: tuple[int, ...], batch: int, own: bool) -> tuple[nn.Module, Tensor, Tensor]:
    """The network with torch's layers (`own`) or ours, images (N, 1, *size) and labels (N, *size), the same in
    every process."""
    torch.manual_seed(0)
    network = NETWORKS[name].build()
    images, labels = torch.randn(batch, 1, *size), torch.randint(0, CLASSES, (batch, *size))
    return torch_twin(network) if own else convoxel_twin(network), images, labels
