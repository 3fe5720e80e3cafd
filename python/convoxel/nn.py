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


# Norms and activations ----------------------------------------------------------------------------


class _BatchNorm(_nn.modules.batchnorm._BatchNorm):
    """torch's bookkeeping, our arithmetic."""

    def forward(self, input: Tensor) -> Tensor:
        return self.through(F.batch_norm, input)

    def through(self, function: Callable[..., Tensor], input: Tensor) -> Tensor:
        """`function`, which has batch_norm's arguments, of the input and this layer's state."""
        self._check_input_dim(input)
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # the mean of all batches so far
                momentum = 1.0 / float(self.num_batches_tracked)
        tracked = self.track_running_stats or not self.training
        mean, var = (self.running_mean, self.running_var) if tracked else (None, None)
        training = self.training or (self.running_mean is None and self.running_var is None)
        return function(input, mean, var, self.weight, self.bias, training, momentum, self.eps)


class BatchNorm1d(_BatchNorm, _nn.BatchNorm1d):
    pass


class BatchNorm2d(_BatchNorm, _nn.BatchNorm2d):
    pass


class BatchNorm3d(_BatchNorm, _nn.BatchNorm3d):
    pass


class _InstanceNorm(_nn.modules.instancenorm._InstanceNorm):
    def _apply_instance_norm(self, input: Tensor) -> Tensor:
        return self.through(F.instance_norm, input)

    def through(self, function: Callable[..., Tensor], input: Tensor) -> Tensor:
        """`function`, which has instance_norm's arguments, of the input and this layer's state."""
        use_input_stats = self.training or not self.track_running_stats
        momentum = 0.0 if self.momentum is None else self.momentum
        return function(
            input,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            use_input_stats,
            momentum,
            self.eps,
        )


class InstanceNorm1d(_InstanceNorm, _nn.InstanceNorm1d):
    pass


class InstanceNorm2d(_InstanceNorm, _nn.InstanceNorm2d):
    pass


class InstanceNorm3d(_InstanceNorm, _nn.InstanceNorm3d):
    pass


class LazyBatchNorm1d(_nn.LazyBatchNorm1d, BatchNorm1d):
    cls_to_become = BatchNorm1d


class LazyBatchNorm2d(_nn.LazyBatchNorm2d, BatchNorm2d):
    cls_to_become = BatchNorm2d


class LazyBatchNorm3d(_nn.LazyBatchNorm3d, BatchNorm3d):
    cls_to_become = BatchNorm3d


class LazyInstanceNorm1d(_nn.LazyInstanceNorm1d, InstanceNorm1d):
    cls_to_become = InstanceNorm1d


class LazyInstanceNorm2d(_nn.LazyInstanceNorm2d, InstanceNorm2d):
    cls_to_become = InstanceNorm2d


class LazyInstanceNorm3d(_nn.LazyInstanceNorm3d, InstanceNorm3d):
    cls_to_become = InstanceNorm3d


class GroupNorm(_nn.GroupNorm):
    def forward(self, input: Tensor) -> Tensor:
        return self.through(F.group_norm, input)

    def through(self, function: Callable[..., Tensor], input: Tensor) -> Tensor:
        """`function`, which has group_norm's arguments, of the input and this layer's state."""
        return function(input, self.num_groups, self.weight, self.bias, self.eps)


class LayerNorm(_nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class ReLU(_nn.ReLU):
    def forward(self, input: Tensor) -> Tensor:
        return F.relu(input, self.inplace)


class LeakyReLU(_nn.LeakyReLU):
    def forward(self, input: Tensor) -> Tensor:
        return F.leaky_relu(input, self.negative_slope, self.inplace)


# Pooling ------------------------------------------------------------------------------------------


class MaxPool1d(_nn.MaxPool1d):
    def forward(self, input: Tensor) -> Tensor:
        how = (self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode)
        return F.max_pool1d(input, *how, return_indices=self.return_indices)


class MaxPool2d(_nn.MaxPool2d):
    def forward(self, input: Tensor) -> Tensor:
        how = (self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode)
        return F.max_pool2d(input, *how, return_indices=self.return_indices)


class MaxPool3d(_nn.MaxPool3d):
    def forward(self, input: Tensor) -> Tensor:
        how = (self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode)
        return F.max_pool3d(input, *how, return_indices=self.return_indices)


class AvgPool1d(_nn.AvgPool1d):
    def forward(self, input: Tensor) -> Tensor:
        how = (self.kernel_size, self.stride, self.padding, self.ceil_mode, self.count_include_pad)
        return F.avg_pool1d(input, *how)


class AvgPool2d(_nn.AvgPool2d):
    def forward(self, input: Tensor) -> Tensor:
        how = (self.kernel_size, self.stride, self.padding, self.ceil_mode, self.count_include_pad)
        return F.avg_pool2d(input, *how, self.divisor_override)


class AvgPool3d(_nn.AvgPool3d):
    def forward(self, input: Tensor) -> Tensor:
        how = (self.kernel_size, self.stride, self.padding, self.ceil_mode, self.count_include_pad)
        return F.avg_pool3d(input, *how, self.divisor_override)


class AdaptiveMaxPool1d(_nn.AdaptiveMaxPool1d):
    def forward(self, input: Tensor) -> Tensor:
        return F.adaptive_max_pool1d(input, self.output_size, self.return_indices)


class AdaptiveMaxPool2d(_nn.AdaptiveMaxPool2d):
    def forward(self, input: Tensor) -> Tensor:
        return F.adaptive_max_pool2d(input, self.output_size, self.return_indices)


class AdaptiveMaxPool3d(_nn.AdaptiveMaxPool3d):
    def forward(self, input: Tensor) -> Tensor:
        return F.adaptive_max_pool3d(input, self.output_size, self.return_indices)


class AdaptiveAvgPool1d(_nn.AdaptiveAvgPool1d):
    def forward(self, input: Tensor) -> Tensor:
        return F.adaptive_avg_pool1d(input, self.output_size)


class AdaptiveAvgPool2d(_nn.AdaptiveAvgPool2d):
    def forward(self, input: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(input, self.output_size)


class AdaptiveAvgPool3d(_nn.AdaptiveAvgPool3d):
    def forward(self, input: Tensor) -> Tensor:
        return F.adaptive_avg_pool3d(input, self.output_size)
