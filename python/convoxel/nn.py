"""The names of torch.nn: our layers where we have them, torch's everywhere else.

Each is a subclass of torch's own class: same constructor, parameters, `state_dict` and printed form, and
`isinstance(layer, torch.nn.Conv3d)` holds; only the arithmetic is convoxel's.

>>> from convoxel import nn
>>> net = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn as _nn
from torch import Tensor
from torch.nn import *  # noqa: F403

from . import functional as F

# Convolution and linear ---------------------------------------------------------------------------


def _padded(layer: _nn.modules.conv._ConvNd, input: Tensor) -> tuple[Tensor, Any]:
    """Reflect, replicate and circular padding is torch's; zeros are the kernel's own."""
    if layer.padding_mode == "zeros":
        return input, layer.padding
    return F.pad(input, layer._reversed_padding_repeated_twice, mode=layer.padding_mode), 0


class Conv1d(_nn.Conv1d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        input, padding = _padded(self, input)
        return F.conv1d(input, weight, bias, self.stride, padding, self.dilation, self.groups)


class Conv2d(_nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        input, padding = _padded(self, input)
        return F.conv2d(input, weight, bias, self.stride, padding, self.dilation, self.groups)


class Conv3d(_nn.Conv3d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        input, padding = _padded(self, input)
        return F.conv3d(input, weight, bias, self.stride, padding, self.dilation, self.groups)


def _transposed(
    layer: Any, input: Tensor, output_size: list[int] | None, function: Callable[..., Tensor]
) -> Tensor:
    if layer.padding_mode != "zeros":
        raise ValueError(
            f"{type(layer).__name__}: only `zeros` padding mode is supported, got {layer.padding_mode!r}"
        )
    rank = len(layer.kernel_size)
    output_padding = layer._output_padding(
        input, output_size, layer.stride, layer.padding, layer.kernel_size, rank, layer.dilation
    )
    return function(
        input,
        layer.weight,
        layer.bias,
        layer.stride,
        layer.padding,
        output_padding,
        layer.groups,
        layer.dilation,
    )


class ConvTranspose1d(_nn.ConvTranspose1d):
    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return _transposed(self, input, output_size, F.conv_transpose1d)


class ConvTranspose2d(_nn.ConvTranspose2d):
    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return _transposed(self, input, output_size, F.conv_transpose2d)


class ConvTranspose3d(_nn.ConvTranspose3d):
    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return _transposed(self, input, output_size, F.conv_transpose3d)


class Linear(_nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, self.bias)


class LazyConv1d(_nn.LazyConv1d, Conv1d):
    cls_to_become = Conv1d


class LazyConv2d(_nn.LazyConv2d, Conv2d):
    cls_to_become = Conv2d


class LazyConv3d(_nn.LazyConv3d, Conv3d):
    cls_to_become = Conv3d


class LazyConvTranspose1d(_nn.LazyConvTranspose1d, ConvTranspose1d):
    cls_to_become = ConvTranspose1d


class LazyConvTranspose2d(_nn.LazyConvTranspose2d, ConvTranspose2d):
    cls_to_become = ConvTranspose2d


class LazyConvTranspose3d(_nn.LazyConvTranspose3d, ConvTranspose3d):
    cls_to_become = ConvTranspose3d


class LazyLinear(_nn.LazyLinear, Linear):
    cls_to_become = Linear


# Interpolation ------------------------------------------------------------------------------------


class Upsample(_nn.Upsample):
    def forward(self, input: Tensor) -> Tensor:
        return F.interpolate(
            input,
            self.size,
            self.scale_factor,
            self.mode,
            self.align_corners,
            recompute_scale_factor=self.recompute_scale_factor,
        )


class UpsamplingNearest2d(_nn.UpsamplingNearest2d, Upsample):
    pass


class UpsamplingBilinear2d(_nn.UpsamplingBilinear2d, Upsample):
    pass
