"""The memory format inside a network: channels-last, which the kernels work in; its results in that of its input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..geometry import is_channels_last

FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def channels_last(run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """run(*args, **kwargs) with images (N, C, H, W) and (N, C, D, H, W) channels-last, and its results as the first
    of them was: contiguous if that was not channels-last."""
    images = [t for t in pytree.tree_leaves((args, kwargs)) if _is_image(t)]
    if not images or is_channels_last(images[0]):
        return run(*args, **kwargs)
    args, kwargs = pytree.tree_map(to_last, (args, kwargs))
    return pytree.tree_map(_to_contiguous, run(*args, **kwargs))


def _is_image(t: Any) -> bool:
    return (
        isinstance(t, Tensor) and t.dim() in FORMATS and t.is_floating_point() and t.layout == torch.strided
    )


def to_last(t: Any) -> Any:
    """One channel has both formats at once, and is taken for contiguous: its strides are set to say channels-last."""
    if not _is_image(t):
        return t
    if t.shape[1] == 1 and t.is_contiguous():
        return t.squeeze(1).unsqueeze(-1).movedim(-1, 1)
    return t.contiguous(memory_format=FORMATS[t.dim()])


def _to_contiguous(t: Any) -> Any:
    if not isinstance(t, Tensor) or t.layout != torch.strided or t.dim() < 4 or t.is_contiguous():
        return t
    plain = torch.compiler.is_compiling() or not _is_image(t)
    return t.contiguous() if plain else _Contiguous.apply(t)


class _Contiguous(torch.autograd.Function):
    """t.contiguous(), its gradient channels-last: in the other format every gradient behind it would need a copy."""

    generate_vmap_rule = True

    @staticmethod
    def forward(t: Tensor) -> Tensor:
        return t.contiguous()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return to_last(dy)
