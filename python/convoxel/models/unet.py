"""U-Net (Ronneberger 2015; Çiçek 2016 in 3D) with nnU-Net's choices as defaults.

Stage s of the encoder has features[s] channels; its first convolution has stride strides[s], all others
have stride 1, every one is convolution - norm - activation. The decoder goes back up: a transposed
convolution with kernel = stride = strides[s + 1], concatenated with the encoder's output of stage s,
then decoder_convs[s] convolutions. A 1x1 convolution gives the logits.

With `residual` it is nnU-Net's ResidualEncoderUNet (Isensee 2024): a first convolution at full resolution (the
stem), then stages of convs[s] residual blocks (blocks.py), of which the first has the stage's stride.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from .. import nn
from .blocks import CONV, CONV_TRANSPOSE, Ascent, Residual, Style, block, he_init, size, twice

NORMS = ("instance", "batch", "group", None)
ACTIVATIONS = ("relu", "leaky_relu")

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
    convs: convolutions per stage of the encoder, or residual blocks of two each; an int or one per stage.
    residual: an encoder of residual blocks.
    decoder_convs: convolutions per stage of the decoder, an int or one per stage from full resolution down, one
        stage fewer than the encoder has; None: as many as the encoder's stage, with `residual` one.
    deep_supervision: in training mode return a list of logits, one per decoder stage, full resolution
        first; in evaluation mode always the full-resolution logits alone.
    checkpointing: an attribute, False at first. Set it, on an accelerated network too, and while training each
        stage keeps no more than its inputs and runs a second time for its gradients, which are the same bits.
    Weights start from torch's `kaiming_normal_` for the activation, biases from 0, and so does what a residual
    block adds to its shortcut.
    Raises ValueError for settings that fit no network and inputs that do not fit this one.

    >>> net = UNet(rank=3, in_channels=1, out_channels=4, features=(8, 16, 32))
    >>> net(torch.zeros(1, 1, 8, 16, 16)).shape
    torch.Size([1, 4, 8, 16, 16])
    """

    checkpointing: bool = False

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
        residual: bool = False,
        decoder_convs: int | Sequence[int] | None = None,
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
        usual = [1] * (stages - 1) if residual else counts[:-1]
        if decoder_convs is None:
            decoder_convs = usual
        decoder_counts = [n[0] for n in _per_stage("decoder_convs", decoder_convs, stages - 1, 1)]
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
        if residual:  # the keys of today's files are those of files without these
            self.config["residual"] = True
        if decoder_counts != usual:
            self.config["decoder_convs"] = decoder_counts

        style, ones = Style(rank, norm, activation), [1] * rank
        Block = Residual if residual else block

        def stage(s: int) -> nn.Sequential:
            stem = [block(style, in_channels, channels[0], kernels[0], ones)] if residual and s == 0 else []
            inputs = channels[0] if stem else [in_channels, *channels][s]
            first = Block(style, inputs, channels[s], kernels[s], steps[s])
            rest = (Block(style, channels[s], channels[s], kernels[s], ones) for _ in range(counts[s] - 1))
            return nn.Sequential(*stem, first, *rest)

        def up(s: int) -> nn.Module:
            step = size(steps[s + 1])
            return CONV_TRANSPOSE[rank](channels[s + 1], channels[s], step, step)

        def decoder(s: int) -> nn.Sequential:
            inputs = [2 * channels[s]] + [channels[s]] * (decoder_counts[s] - 1)
            return nn.Sequential(*(block(style, n, channels[s], kernels[s], ones) for n in inputs))

        lower = range(stages - 1)
        self.encoder = nn.ModuleList(stage(s) for s in range(stages))
        self.ascent = Ascent()
        self.up = nn.ModuleList(up(s) for s in lower)
        self.decoder = nn.ModuleList(decoder(s) for s in lower)
        heads = lower if self.deep_supervision else lower[:1]
        self.heads = nn.ModuleList(CONV[rank](channels[s], out_channels, 1) for s in heads)
        he_init(self, activation)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        self._check_input(x)
        skips = []
        for stage in self.encoder:
            x = self._through(stage, x)
            skips.append(x)
        outputs = []
        supervised = self.deep_supervision and self.training
        for s in reversed(range(len(self.decoder))):
            x = self._through(self.ascent, skips[s], x, self.up[s], self.decoder[s])
            if s == 0 or supervised:
                outputs.append(self.heads[s](x))
        return outputs[::-1] if supervised else outputs[0]

    def _through(self, stage: nn.Module, *inputs: Tensor | nn.Module) -> Tensor:
        again = self.checkpointing and self.training and torch.is_grad_enabled()
        return twice(stage, *inputs) if again else stage(*inputs)

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
