"""The names of torch.nn.functional: same arguments, defaults and results, on convoxel's kernels.

Names that are not overridden here are torch's own. Calls that the kernels do not serve (integer and complex
tensors, float16 on the CPU, forward-mode differentiation, GPUs) go to torch, are counted in
`convoxel.stats()`, and raise in strict mode.

>>> y = convoxel.functional.conv3d(torch.randn(1, 4, 16, 16, 16), torch.randn(8, 4, 3, 3, 3), padding=1)
>>> y.shape
torch.Size([1, 8, 16, 16, 16])
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as _torch
from torch import Tensor
from torch.nn.functional import *  # noqa: F403

from . import runtime
from .geometry import check_float
from .ops import activation as _activation
from .ops import cat as _cat
from .ops import convolution as _conv
from .ops import norm as _norm
from .ops import pool as _pool
from .ops import resample as _resample
from .ops.library import autocast, autocasts, full_precision, registered, why_not

Size = int | tuple[int, ...]
TENSORS = {"input", "weight", "bias", "running_mean", "running_var"}


def _served(count: int, lower_precision: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Serves a function of the same name in torch.nn.functional, its first `count` arguments being tensors or
    None. What the kernels do not take goes to torch, counted; `lower_precision` marks autocast's list."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        name = function.__name__
        fallback = getattr(_torch, name)
        names = list(inspect.signature(function).parameters)[:count]
        must_be_tensors = TENSORS.intersection(names)

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            tensors = [a for a in (*args[:count], *kwargs.values()) if isinstance(a, Tensor)]
            for what, value in (*zip(names[: len(args)], args[:count], strict=True), *kwargs.items()):
                if value is not None and what in must_be_tensors and not isinstance(value, Tensor):
                    raise TypeError(f"{name}(): argument '{what}' must be Tensor, not {type(value).__name__}")
            if tensors and (reason := why_not(*tensors)):
                runtime.handed(name, reason)
                return _by_torch(name, reason, fallback, args, kwargs)
            if lower_precision and tensors and autocasts(tensors[0].device):
                args = (*autocast(*args[:count], weight=names.index("weight")), *args[count:])
                kwargs = {
                    k: autocast(v, weight=0 if k == "weight" else None)[0] if isinstance(v, Tensor) else v
                    for k, v in kwargs.items()
                }
            try:
                return function(*args, **kwargs)
            except RuntimeError as error:
                op, _, rest = str(error).partition(": ")
                if op not in registered():
                    raise
                raise type(error)(f"{name}: {rest}") from None  # the operator's, named as it was called

        wrapper.__doc__ = f"torch.nn.functional.{name}, on convoxel's kernels."
        return wrapper

    return decorate


def _by_torch(name: str, reason: str, fallback: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """torch's result; what it refuses for a dtype names the function and a remedy."""
    try:
        return fallback(*args, **kwargs)
    except RuntimeError as error:
        if not reason.startswith("dtype"):
            raise
        raise type(error)(
            f"{name}: torch takes this call ({reason}) and says: {error}; convert the tensors to one floating "
            "point dtype, for example with .float()"
        ) from None


# Convolution and linear ---------------------------------------------------------------------------


@_served(3, lower_precision=True)
def conv1d(input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Size = 1, padding: Size | str = 0,
           dilation: Size = 1, groups: int = 1) -> Tensor:  # fmt: skip
    return _conv.convolution(1, input, weight, bias, stride, padding, dilation, groups)


@_served(3, lower_precision=True)
def conv2d(input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Size = 1, padding: Size | str = 0,
           dilation: Size = 1, groups: int = 1) -> Tensor:  # fmt: skip
    return _conv.convolution(2, input, weight, bias, stride, padding, dilation, groups)


@_served(3, lower_precision=True)
def conv3d(input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Size = 1, padding: Size | str = 0,
           dilation: Size = 1, groups: int = 1) -> Tensor:  # fmt: skip
    return _conv.convolution(3, input, weight, bias, stride, padding, dilation, groups)


@_served(3, lower_precision=True)
def conv_transpose1d(input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Size = 1, padding: Size = 0,
                     output_padding: Size = 0, groups: int = 1, dilation: Size = 1) -> Tensor:  # fmt: skip
    return _conv.conv_transpose(1, input, weight, bias, stride, padding, output_padding, groups, dilation)


@_served(3, lower_precision=True)
def conv_transpose2d(input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Size = 1, padding: Size = 0,
                     output_padding: Size = 0, groups: int = 1, dilation: Size = 1) -> Tensor:  # fmt: skip
    return _conv.conv_transpose(2, input, weight, bias, stride, padding, output_padding, groups, dilation)


@_served(3, lower_precision=True)
def conv_transpose3d(input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Size = 1, padding: Size = 0,
                     output_padding: Size = 0, groups: int = 1, dilation: Size = 1) -> Tensor:  # fmt: skip
    return _conv.conv_transpose(3, input, weight, bias, stride, padding, output_padding, groups, dilation)


@_served(3, lower_precision=True)
def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return _conv.linear(input, weight, bias)


# Interpolation ------------------------------------------------------------------------------------


Extent = int | Sequence[int] | None
Factor = float | Sequence[float] | None


def _outside(mode: str, antialias: bool) -> str | None:
    """Why an interpolation is torch's, or None."""
    if antialias:
        return "antialias=True"
    return f"mode {mode}" if mode in ("area", "bicubic", "lanczos") else None


@_served(1)
def interpolate(
    input: Tensor,
    size: Extent = None,
    scale_factor: Factor = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Tensor:
    how = (size, scale_factor, mode, align_corners, recompute_scale_factor)
    if reason := _outside(mode, antialias):
        runtime.handed("interpolate", reason)
        return _torch.interpolate(input, *how, antialias)  # type: ignore[arg-type]
    return _resample.resize(input, *how)


def _deprecated(name: str) -> None:
    warnings.warn(
        f"`nn.functional.{name}` is deprecated. Use `nn.functional.interpolate` instead.", stacklevel=3
    )


def upsample(
    input: Tensor,
    size: Extent = None,
    scale_factor: Factor = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
) -> Tensor:
    """torch.nn.functional.upsample: the former name of `interpolate`."""
    _deprecated("upsample")
    return interpolate(input, size, scale_factor, mode, align_corners)


def upsample_nearest(input: Tensor, size: Extent = None, scale_factor: Factor = None) -> Tensor:
    """torch.nn.functional.upsample_nearest: `interpolate` with mode "nearest"."""
    _deprecated("upsample_nearest")
    return interpolate(input, size, scale_factor, mode="nearest")


def upsample_bilinear(input: Tensor, size: Extent = None, scale_factor: Factor = None) -> Tensor:
    """torch.nn.functional.upsample_bilinear: `interpolate` with mode "bilinear" and align_corners=True."""
    _deprecated("upsample_bilinear")
    return interpolate(input, size, scale_factor, mode="bilinear", align_corners=True)


# Norms and activations ----------------------------------------------------------------------------


@_served(5)
def batch_norm(
    input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
):
    return _norm.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


@_served(5)
def instance_norm(
    input,
    running_mean=None,
    running_var=None,
    weight=None,
    bias=None,
    use_input_stats=True,
    momentum=0.1,
    eps=1e-5,
):
    return _norm.instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)


@_served(4)
def group_norm(input, num_groups, weight=None, bias=None, eps=1e-5):
    return _norm.group_norm(input, num_groups, weight, bias, eps)


@_served(4)
def layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5):
    return _norm.layer_norm(input, normalized_shape, weight, bias, eps)


@_served(1)
def relu(input, inplace=False):
    return _activation.activation(input, None, inplace)


@_served(1)
def leaky_relu(input, negative_slope=0.01, inplace=False):
    return _activation.activation(input, check_float("leaky_relu", "negative_slope", negative_slope), inplace)


def cat(tensors: tuple[Tensor, ...] | list[Tensor], dim: int = 0) -> Tensor:
    """torch.cat, large dense tensors of one layout in memory of the pool: y is (..., sum of the extents, ...)."""
    return _cat.cat(tensors, dim)


# Pooling. torch's autocast computes 3-D in float32, except max_pool3d with indices -----------------


@_served(1)
def max_pool1d(input: Tensor, kernel_size: Size, stride: Size | None = None, padding: Size = 0, dilation: Size = 1,
               ceil_mode: bool = False, return_indices: bool = False) -> Any:  # fmt: skip
    return _pool.maximum(1, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)


@_served(1)
def max_pool2d(input: Tensor, kernel_size: Size, stride: Size | None = None, padding: Size = 0, dilation: Size = 1,
               ceil_mode: bool = False, return_indices: bool = False) -> Any:  # fmt: skip
    return _pool.maximum(2, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)


@_served(1)
def max_pool3d(input: Tensor, kernel_size: Size, stride: Size | None = None, padding: Size = 0, dilation: Size = 1,
               ceil_mode: bool = False, return_indices: bool = False) -> Any:  # fmt: skip
    input = input if return_indices else full_precision(input)
    return _pool.maximum(3, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)


@_served(1)
def avg_pool1d(input: Tensor, kernel_size: Size, stride: Size | None = None, padding: Size = 0,
               ceil_mode: bool = False, count_include_pad: bool = True) -> Tensor:  # fmt: skip
    return _pool.average(1, input, kernel_size, stride, padding, ceil_mode, count_include_pad, None)


@_served(1)
def avg_pool2d(input: Tensor, kernel_size: Size, stride: Size | None = None, padding: Size = 0,
               ceil_mode: bool = False, count_include_pad: bool = True,
               divisor_override: int | None = None) -> Tensor:  # fmt: skip
    return _pool.average(
        2, input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
    )


@_served(1)
def avg_pool3d(input: Tensor, kernel_size: Size, stride: Size | None = None, padding: Size = 0,
               ceil_mode: bool = False, count_include_pad: bool = True,
               divisor_override: int | None = None) -> Tensor:  # fmt: skip
    input = full_precision(input)
    return _pool.average(
        3, input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
    )


@_served(1)
def adaptive_max_pool1d(input: Tensor, output_size: Extent, return_indices: bool = False) -> Any:
    return _pool.adaptive_maximum(1, input, output_size, return_indices)


@_served(1)
def adaptive_max_pool2d(input: Tensor, output_size: Extent, return_indices: bool = False) -> Any:
    return _pool.adaptive_maximum(2, input, output_size, return_indices)


@_served(1)
def adaptive_max_pool3d(input: Tensor, output_size: Extent, return_indices: bool = False) -> Any:
    return _pool.adaptive_maximum(3, full_precision(input), output_size, return_indices)


@_served(1)
def adaptive_avg_pool1d(input: Tensor, output_size: Extent) -> Tensor:
    return _pool.adaptive_average(1, input, output_size)


@_served(1)
def adaptive_avg_pool2d(input: Tensor, output_size: Extent) -> Tensor:
    return _pool.adaptive_average(2, input, output_size)


@_served(1)
def adaptive_avg_pool3d(input: Tensor, output_size: Extent) -> Tensor:
    return _pool.adaptive_average(3, full_precision(input), output_size)
