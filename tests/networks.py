"""The networks that `convoxel.accelerate` is tested on: nnU-Net's, MONAI's, and some as users write them.

Each is a function without arguments that builds it of torch's layers, small, for images (N, 1, 32, 32[, 32]); `smooth`
puts SiLU in place of the activations, whose kinks make gradients a matter of luck where an input rounds across zero.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F


def dynamic(name: str, **options: object) -> nn.Module:
    """A network of nnU-Net's (dynamic-network-architectures)."""
    unet = pytest.importorskip("dynamic_network_architectures.architectures.unet")
    return getattr(unet, name)(
        input_channels=1, n_stages=3, features_per_stage=(8, 16, 24), conv_op=nn.Conv3d, kernel_sizes=3,
        strides=(1, 2, 2), num_classes=3, conv_bias=True, norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True}, nonlin=nn.LeakyReLU, nonlin_kwargs={"inplace": True}, **options,
    )  # fmt: skip


def monai(name: str, *arguments: object, **options: object) -> nn.Module:
    return getattr(pytest.importorskip("monai.networks.nets"), name)(*arguments, **options)


class Residual(nn.Module):
    """A block of torchvision's kind: one activation used twice, an addition in place."""

    def __init__(self, rank: int, inside: int, outside: int) -> None:
        super().__init__()
        conv, norm = (getattr(nn, f"{name}{rank}d") for name in ("Conv", "BatchNorm"))
        self.conv1 = conv(inside, outside, 3, padding=1, bias=False)
        self.bn1 = norm(outside)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv(outside, outside, 3, padding=1, bias=False)
        self.bn2 = norm(outside)
        self.downsample = (
            None if inside == outside else nn.Sequential(conv(inside, outside, 1), norm(outside))
        )

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Own(nn.Module):
    """A U-Net as people write them: functional calls, nested calls, a skip by torch.cat."""

    def __init__(self, rank: int = 2, channels: int = 8) -> None:
        super().__init__()
        conv, up = getattr(nn, f"Conv{rank}d"), getattr(nn, f"ConvTranspose{rank}d")
        self.mode = {2: "bilinear", 3: "trilinear"}[rank]
        self.first = conv(1, channels, 3, padding=1)
        self.norm = nn.GroupNorm(2, channels)
        self.act = nn.PReLU(channels)
        self.down = conv(channels, 2 * channels, 3, stride=2, padding=1)
        self.block = nn.ModuleList(
            [Residual(rank, 2 * channels, 2 * channels), Residual(rank, 2 * channels, channels)]
        )
        self.up = up(channels, channels, 2, 2)
        self.last = nn.Sequential(nn.Dropout(0.0), conv(2 * channels, channels, 3, padding=1),
                                  getattr(nn, f"InstanceNorm{rank}d")(channels, affine=True), nn.ELU())  # fmt: skip
        self.head = conv(channels, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.act(self.norm(self.first(x)))
        x = F.relu(self.down(skip))
        for block in self.block:
            x = block(x)
        x = self.last(torch.cat([skip, self.up(x)], dim=1))
        return self.head(x) + F.interpolate(self.head(x), scale_factor=1.0, mode=self.mode)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "PlainConvUNet": lambda: dynamic("PlainConvUNet", n_conv_per_stage=2, n_conv_per_stage_decoder=2),
    "PlainConvUNet, deep supervision": lambda: dynamic("PlainConvUNet", n_conv_per_stage=1,
                                                       n_conv_per_stage_decoder=1, deep_supervision=True),
    "ResidualEncoderUNet": lambda: dynamic("ResidualEncoderUNet", n_blocks_per_stage=(1, 2, 2),
                                           n_conv_per_stage_decoder=(1, 1)),
    "UNet": lambda: monai("UNet", 3, 1, 3, (8, 16, 24), (2, 2), num_res_units=2),
    "BasicUNet": lambda: monai("BasicUNet", 3, 1, 3, (8, 8, 16, 16, 24, 8)),
    "DynUNet": lambda: monai("DynUNet", 3, 1, 3, [3] * 4, [1, 2, 2, 2], [2] * 3, filters=[8, 16, 24, 32]),
    "DynUNet, residual": lambda: monai("DynUNet", 3, 1, 3, [3] * 3, [1, 2, 2], [2] * 2, filters=[8, 16, 24],
                                       res_block=True, deep_supervision=True, deep_supr_num=1),
    "SegResNet": lambda: monai("SegResNet", 3, 8, 1, 3),
    "AttentionUnet": lambda: monai("AttentionUnet", 3, 1, 3, (8, 16, 24), (2, 2)),
    "VNet": lambda: monai("VNet", 3, 1, 3, dropout_prob_down=None, dropout_prob_up=(None, 0.0)),
    "own, 2-D": Own,
    "own, 3-D": lambda: Own(3),
}  # fmt: skip


def build(name: str, smooth: bool = False) -> nn.Module:
    torch.manual_seed(0)
    network = NETWORKS[name]()
    if smooth:
        _smooth(network)
    for layer in network.modules():  # VNet's last dropout is random whatever its arguments
        if isinstance(layer, nn.modules.dropout._DropoutNd):
            layer.p = 0.0
    return network


def _smooth(network: nn.Module) -> None:
    for module in network.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU | nn.LeakyReLU | nn.PReLU | nn.ELU):
                setattr(module, name, nn.SiLU())


def image(name: str, batch: int = 2) -> Tensor:
    rank = 2 if "2-D" in name else 3
    return torch.randn(batch, 1, *(32,) * rank, generator=torch.Generator().manual_seed(1))


def outputs(y: object) -> list[Tensor]:
    """All tensors that a network returns."""
    return [y] if isinstance(y, Tensor) else [t for part in y for t in outputs(part)]  # type: ignore[attr-defined]
