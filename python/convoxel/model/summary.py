"""The table of a network: layer, output shape, parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


def summary(network: nn.Module, input_shape: Sequence[int] | None) -> str:
    """One line per layer that has no layers inside (or parameters of its own), and the totals.

    input_shape: (C, ...) of one sample, without N; None leaves the output shapes open. The shapes come from
    one forward of zeros in evaluation mode. A parameter that two layers share counts where it comes first.

    >>> print(summary(nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU()), (1, 28, 28)))
    layer       output shape    parameters
    --------------------------------------
    0 (Conv2d)  (N, 8, 26, 26)          80
    1 (ReLU)    (N, 8, 26, 26)           0
    --------------------------------------
    total                               80
    trainable                           80
    """
    shapes = {} if input_shape is None else output_shapes(network, input_shape)
    lines = [("layer", "output shape", "parameters")]
    seen: set[int] = set()
    for name, layer in network.named_modules():
        own = [p for p in layer.parameters(recurse=False)]
        if any(layer.children()) and not own:
            continue
        new = [p for p in own if id(p) not in seen]
        seen.update(id(p) for p in own)
        count = sum(p.numel() for p in new)
        label = f"{name} ({type(layer).__name__})" if name else type(layer).__name__
        lines.append((label, shapes.get(name, "-"), f"{count:,}"))
    parameters = list(network.parameters())
    totals = [
        ("total", "", f"{sum(p.numel() for p in parameters):,}"),
        ("trainable", "", f"{sum(p.numel() for p in parameters if p.requires_grad):,}"),
    ]
    widths = [max(len(line[i]) for line in lines + totals) for i in range(3)]
    rows = [f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}" for a, b, c in lines + totals]
    rule = "-" * len(rows[0])
    return "\n".join([rows[0], rule, *rows[1:-2], rule, *rows[-2:]])


def output_shapes(network: nn.Module, input_shape: Sequence[int]) -> dict[str, str]:
    """The shape of every layer's last output as text, by the layer's name; N is the batch."""
    shapes: dict[str, str] = {}

    def record(name: str):
        def hook(_layer: nn.Module, _inputs: object, output: object) -> None:
            if isinstance(output, torch.Tensor):
                shapes[name] = f"({', '.join(['N', *map(str, output.shape[1:])])})"

        return hook

    hooks = [layer.register_forward_hook(record(name)) for name, layer in network.named_modules()]
    like = next(network.parameters(), torch.zeros(()))
    try:
        with torch.no_grad():
            network(torch.zeros(1, *input_shape, dtype=like.dtype, device=like.device))
    finally:
        for hook in hooks:
            hook.remove()
    return shapes
