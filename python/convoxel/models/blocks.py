"""What the U-Net is built of: convolution blocks, residual blocks, stages of the decoder; running them twice.

A convolution block is convolution (same padding) - norm - activation. A residual block is ResNet-D's basic block (He
2019), as nnU-Net's residual encoder has it (Isensee 2024), with s its stride:

    y = act(norm(conv(act(norm(conv_s(x))))) + shortcut(x)),    shortcut = norm(conv_1x1(average_s(x)))

where what changes nothing is left out of the shortcut: the average where s is 1, convolution and norm where the
channels stay. The second norm's weight starts from 0, so that the block starts as act(shortcut(x)).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .. import nn
from ..ops.saved import Run

CONV = {2: nn.Conv2d, 3: nn.Conv3d}
CONV_TRANSPOSE = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
INSTANCE_NORM = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
BATCH_NORM = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
AVERAGE = {2: nn.AvgPool2d, 3: nn.AvgPool3d}
LEAK = 0.01


class Style(NamedTuple):
    """What all blocks of a network share: `rank`, `norm` and `activation` as UNet has them."""

    rank: int
    norm: str | None
    activation: str


def activation(style: Style) -> nn.Module:
    return nn.ReLU(inplace=True) if style.activation == "relu" else nn.LeakyReLU(LEAK, inplace=True)


def conv_norm(style: Style, inputs: int, outputs: int, kernel: list[int], stride: list[int]) -> nn.Sequential:
    """Convolution (same padding; a bias where no norm follows) and norm."""
    rank, norm, _ = style
    padding = size([k // 2 for k in kernel])
    layers: list[nn.Module] = [
        CONV[rank](inputs, outputs, size(kernel), size(stride), padding, bias=norm is None)
    ]
    if norm == "instance":
        layers.append(INSTANCE_NORM[rank](outputs, affine=True))
    elif norm == "batch":
        layers.append(BATCH_NORM[rank](outputs))
    elif norm == "group":
        layers.append(nn.GroupNorm(math.gcd(8, outputs), outputs))
    return nn.Sequential(*layers)


def block(style: Style, inputs: int, outputs: int, kernel: list[int], stride: list[int]) -> nn.Sequential:
    """Convolution, norm, activation."""
    return conv_norm(style, inputs, outputs, kernel, stride).append(activation(style))


class Residual(nn.Module):
    """A residual block: (N, inputs, *size) -> (N, outputs, *size / stride)."""

    def __init__(self, style: Style, inputs: int, outputs: int, kernel: list[int], stride: list[int]):
        super().__init__()
        ones = [1] * style.rank
        self.conv1 = block(style, inputs, outputs, kernel, stride)
        self.conv2 = conv_norm(style, outputs, outputs, kernel, ones)
        self.shortcut = nn.Sequential()
        if stride != ones:
            self.shortcut.append(AVERAGE[style.rank](size(stride)))
        if inputs != outputs:
            self.shortcut.extend(conv_norm(style, inputs, outputs, ones, ones))
        self.act = activation(style)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.shortcut(x)
        x = self.conv2(self.conv1(x))
        x += shortcut
        return self.act(x)


class Ascent(nn.Module):
    """A stage of the decoder, whose modules it is given: blocks(the encoder's output beside up(the stage below))."""

    def forward(self, skip: Tensor, below: Tensor, up: nn.Module, blocks: nn.Module) -> Tensor:
        return blocks(torch.cat([skip, up(below)], dim=1))


def he_init(network: nn.Module, activation: str) -> None:
    """Weights of convolutions from torch's `kaiming_normal_`, biases from 0, and what residual blocks add from 0."""
    convolutions = tuple(CONV.values()) + tuple(CONV_TRANSPOSE.values())
    for layer in network.modules():
        if isinstance(layer, convolutions):
            torch.nn.init.kaiming_normal_(layer.weight, a=0.0 if activation == "relu" else LEAK)
            if layer.bias is not None:
                torch.nn.init.zeros_(layer.bias)
    for layer in network.modules():
        if isinstance(layer, Residual):
            for norm in layer.conv2.children():
                if not isinstance(norm, convolutions):
                    torch.nn.init.zeros_(cast(Tensor, norm.weight))


def twice(stage: nn.Module, *inputs: Tensor | nn.Module) -> Any:
    """stage(*inputs), of which nothing but the inputs is kept: for the gradients it runs a second time."""
    if torch.compiler.is_compiling():
        return checkpoint(stage, *inputs, use_reentrant=False)
    modules = [m for m in (stage, *inputs) if isinstance(m, nn.Module)]

    def runs() -> tuple[Run, _Again]:
        stretch = object()
        return Run(stretch, first=True), _Again(stretch, modules)

    return checkpoint(stage, *inputs, use_reentrant=False, context_fn=runs)


class _Again(Run):
    """The second run: meanwhile the modules' buffers are copies, so that batch norms do not count the same batch
    twice. (torch enters it anew for every backward pass through the same graph.)"""

    def __init__(self, stretch: object, modules: list[nn.Module]):
        super().__init__(stretch, first=False)
        self.books = [m._buffers for part in modules for m in part.modules() if m._buffers]

    def __enter__(self) -> None:
        super().__enter__()
        self.originals = [dict(book) for book in self.books]
        for book in self.books:
            book.update({name: None if b is None else b.clone() for name, b in book.items()})

    def __exit__(self, *error: object) -> None:
        for book, original in zip(self.books, self.originals, strict=True):
            book.update(original)
        super().__exit__(*error)


def size(values: list[int]) -> Any:
    """As torch's layers take it; their annotations name a tuple of fixed length."""
    return tuple(values)
