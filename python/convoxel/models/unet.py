"""U-Net (Ronneberger 2015; Çiçek 2016 in 3D) with nnU-Net's choices as defaults.

Stage s of the encoder has features[s] channels; its first convolution has stride strides[s], all others
have stride 1, every one is convolution - norm - activation. The decoder goes back up: a transposed
convolution with kernel = stride = strides[s + 1], concatenated with the encoder's output of stage s,
then convs[s] convolutions. A 1x1 convolution gives the logits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from .. import nn

CONV = {2: nn.Conv2d, 3: nn.Conv3d}
CONV_TRANSPOSE = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
INSTANCE_NORM = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
BATCH_NORM = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
NORMS = ("instance", "batch", "group", None)
ACTIVATIONS = ("relu", "leaky_relu")
LEAK = 0.01

PerStage = int | Sequence[int | Sequence[int]]


class UNet(nn.Module):
    """U-Net of rank 2 or 3: (N, in_channels, *size) -> logits (N, out_channels, *size), floating point.

    rank: 2 for (H, W), 3 for (D, H, W).
    features: channels of each stage, from full resolution down; their number is the number of stages.
    strides: an int for every stage after the first, or one entry per stage, each an int or `rank` ints; the
        first must be 1. Along each axis the size must be divisible by the product of the strides.
    kernel_size: an int for all, or one entry per stage, each an int or `rank` ints, odd. (1, 3, 3) with three
        stages means stages of 1, 3 and 3; an anisotropic first stage is ((1, 3, 3), 3, 3).
    norm: "instance" (affine), "batch", "group" (gcd(8, channels) groups) or None (convolutions get a bias).
    activation: "leaky_relu" (slope 0.01) or "relu".
    convs: convolutions per stage, an int or one per stage; the decoder has as many as the encoder's stage.
    deep_supervision: in training mode return a list of logits, one per decoder stage, full resolution
        first; in evaluation mode always the full-resolution logits alone.
    Weights start from torch's `kaiming_normal_` for the activation, biases from 0.
    Raises ValueError for settings that fit no network and inputs that do not fit this one.

    >>> net = UNet(rank=3, in_channels=1, out_channels=4, features=(8, 16, 32))
    >>> net(torch.zeros(1, 1, 8, 16, 16)).shape
    torch.Size([1, 4, 8, 16, 16])
    """

    def __init__(
        self,
        rank: int,
        in_channels: int,
        out_channels: int,
        features: Sequence[int] = (32, 64, 128, 256),
        strides: PerStage = 2,
        kernel_size: PerStage = 3,
        norm: str | None = "instance",
        activation: str = "leaky_relu",
        convs: int | Sequence[int] = 2,
        deep_supervision: bool = False,
    ):
        super().__init__()
        _check_choices(rank, norm, activation)
        channels = [_positive("features", f) for f in features]
        stages = len(channels)
        if stages < 2:
            raise ValueError(f"features: expected two stages or more, received {list(features)}")
        if isinstance(strides, int):
            strides = [1] + [strides] * (stages - 1)
        steps = _per_stage("strides", strides, stages, rank)
        kernels = _per_stage("kernel_size", kernel_size, stages, rank)
        counts = [n[0] for n in _per_stage("convs", convs, stages, 1)]
        if any(s != 1 for s in steps[0]):
            raise ValueError(f"strides: the first stage has full resolution, expected 1, received {steps[0]}")
        if any(k % 2 == 0 for kernel in kernels for k in kernel):
            raise ValueError(f"kernel_size: expected odd sizes (as large out as in), received {kernel_size}")
        self.deep_supervision = bool(deep_supervision)
        self.divisor = [math.prod(axis) for axis in zip(*steps, strict=True)]
        self.config: dict[str, Any] = {
            "rank": rank,
            "in_channels": _positive("in_channels", in_channels),
            "out_channels": _positive("out_channels", out_channels),
            "features": channels,
            "strides": steps,
            "kernel_size": kernels,
            "norm": norm,
            "activation": activation,
            "convs": counts,
            "deep_supervision": self.deep_supervision,
        }

        def stage(inputs: int, s: int, stride: list[int]) -> nn.Sequential:
            first = _block(rank, inputs, channels[s], kernels[s], stride, norm, activation)
            rest = [
                _block(rank, channels[s], channels[s], kernels[s], [1] * rank, norm, activation)
                for _ in range(counts[s] - 1)
            ]
            return nn.Sequential(first, *rest)

        def up(s: int) -> nn.Module:
            step = _size(steps[s + 1])
            return CONV_TRANSPOSE[rank](channels[s + 1], channels[s], step, step)

        lower = range(stages - 1)
        inputs = [in_channels, *channels]
        self.encoder = nn.ModuleList(stage(inputs[s], s, steps[s]) for s in range(stages))
        self.up = nn.ModuleList(up(s) for s in lower)
        self.decoder = nn.ModuleList(stage(2 * channels[s], s, [1] * rank) for s in lower)
        heads = lower if self.deep_supervision else lower[:1]
        self.heads = nn.ModuleList(CONV[rank](channels[s], out_channels, 1) for s in heads)
        _he_init(self, activation)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        self._check_input(x)
        skips = []
        for stage in self.encoder:
            x = stage(x)
            skips.append(x)
        outputs = []
        supervised = self.deep_supervision and self.training
        for s in reversed(range(len(self.decoder))):
            x = self.decoder[s](torch.cat([skips[s], self.up[s](x)], dim=1))
            if s == 0 or supervised:
                outputs.append(self.heads[s](x))
        return outputs[::-1] if supervised else outputs[0]

    def _check_input(self, x: Tensor) -> None:
        rank, channels = self.config["rank"], self.config["in_channels"]
        axes = "(N, C, H, W)" if rank == 2 else "(N, C, D, H, W)"
        if x.ndim != rank + 2 or x.shape[1] != channels:
            raise ValueError(
                f"this UNet expects {axes} with {channels} input channels, received shape {tuple(x.shape)}"
            )
        size = x.shape[2:]
        if any(n % d for n, d in zip(size, self.divisor, strict=True)):
            padded = tuple(-(-n // d) * d for n, d in zip(size, self.divisor, strict=True))
            raise ValueError(
                f"this UNet expects sizes divisible by {tuple(self.divisor)} (the product of its strides), "
                f"received {tuple(size)}; pad or crop, for example to {padded}"
            )


def _block(
    rank: int,
    inputs: int,
    outputs: int,
    kernel: list[int],
    stride: list[int],
    norm: str | None,
    activation: str,
) -> nn.Sequential:
    """Convolution (same padding), norm, activation."""
    padding = _size([k // 2 for k in kernel])
    conv = CONV[rank](inputs, outputs, _size(kernel), _size(stride), padding, bias=norm is None)
    layers: list[nn.Module] = [conv]
    if norm == "instance":
        layers.append(INSTANCE_NORM[rank](outputs, affine=True))
    elif norm == "batch":
        layers.append(BATCH_NORM[rank](outputs))
    elif norm == "group":
        layers.append(nn.GroupNorm(math.gcd(8, outputs), outputs))
    layers.append(nn.ReLU(inplace=True) if activation == "relu" else nn.LeakyReLU(LEAK, inplace=True))
    return nn.Sequential(*layers)


def _he_init(network: nn.Module, activation: str) -> None:
    convolutions = tuple(CONV.values()) + tuple(CONV_TRANSPOSE.values())
    for layer in network.modules():
        if isinstance(layer, convolutions):
            torch.nn.init.kaiming_normal_(layer.weight, a=0.0 if activation == "relu" else LEAK)
            if layer.bias is not None:
                torch.nn.init.zeros_(layer.bias)


def _size(values: list[int]) -> Any:
    """As torch's layers take it; their annotations name a tuple of fixed length."""
    return tuple(values)


def _check_choices(rank: int, norm: str | None, activation: str) -> None:
    if rank not in CONV:
        raise ValueError(f"rank: expected 2 (H, W) or 3 (D, H, W), received {rank!r}")
    if norm not in NORMS:
        raise ValueError(f"norm: expected one of {NORMS}, received {norm!r}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {ACTIVATIONS}, received {activation!r}")


def _positive(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: expected whole numbers of at least 1, received {value!r}")
    return value


def _per_stage(name: str, value: PerStage, stages: int, rank: int) -> list[list[int]]:
    """One list of `rank` ints for each stage, from an int or from one entry per stage.

    >>> _per_stage("kernel_size", ((1, 3, 3), 3), stages=2, rank=3)
    [[1, 3, 3], [3, 3, 3]]
    """
    entries = [value] * stages if isinstance(value, int) else list(cast(Sequence, value))
    if len(entries) != stages:
        raise ValueError(f"{name}: expected an int or one entry per stage ({stages}), received {value!r}")
    full = [[entry] * rank if isinstance(entry, int) else list(entry) for entry in entries]
    if any(len(entry) != rank for entry in full):
        raise ValueError(f"{name}: expected an int or {rank} ints for each stage, received {value!r}")
    return [[_positive(name, v) for v in entry] for entry in full]
