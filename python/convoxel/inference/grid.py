"""Networks over an image of any size, to labels on another grid, without ever holding all logits of all voxels."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from ..memory import as_bytes
from ..progress import bar
from .axis import Axis
from .forecast import forecast, size
from .machine import peak_memory
from .network import Model, Network, evaluating
from .plan import Plan
from .walk import HANDED_OUT, Take, Walk
from .windows import checked_weights, per_axis, spread, weight_map


def predict_on_grid(
    models: Model | Sequence[Model],
    image: Tensor,
    *,
    patch_size: Sequence[int],
    starts: Sequence[Sequence[int]] | None = None,
    overlap: Sequence[float] | float = 0.5,
    weights: Tensor | None = None,
    axes: Sequence[Axis] | None = None,
    batch_size: int = 1,
    mirror_axes: Sequence[int] = (),
    regions: Sequence[int] | None = None,
    max_ram: int | str | None = None,
    scratch: str | os.PathLike[str] | None = None,
    activation: Callable[[Tensor], Tensor] | None = None,
    scores: Take | None = None,
    held: int = 0,
    progress: bool = False,
) -> NDArray[Any]:
    """Labels of an image that is ready for its network: blended logits, brought to the output's grid, reduced.

    Windows are visited so that finished voxels can be settled and forgotten early; logits live for some windows'
    depth of the image at most. Numbers are those of a computation that holds everything: float32 sums, each
    voxel's windows in turn.

    Args:
        models: one, or several whose logits are averaged: (B, C, d, h, w) float32 -> (B, K, d, h, w). A patch of two
            numbers runs 2-D networks, (B, C, h, w) -> (B, K, h, w), on every slice of D.
        image: (C, D, H, W) float32, as the network wants it, no smaller than the patch.
        patch_size: (d, h, w) voxels.
        starts: for each axis the first voxels of its windows, rising from 0 to D - d and without gaps; None: as many as
            steps of patch * (1 - overlap) make, evenly spread.
        weights: (d, h, w) float32, positive: how much each voxel of a window counts. None: a Gaussian of
            deviation patch / 8, at least 1e-3.
        axes: how the output's three axes lie in the image's; None: the same grid.
        batch_size: windows per call of a model.
        mirror_axes: of 0, 1, 2: the mean over all mirror images of a window along these axes.
        regions: None: the label is the largest channel's index. Else one label per channel, for logits of regions
            that overlap: the label of the last channel whose logit is positive, else 0.
        max_ram: most bytes that this process may hold, a number or "4GB". What will be needed is worked out
            beforehand, a few batches being run to measure the network; if it is more, nothing else is run.
        scratch: a folder for rows of the blend that `max_ram` has no room for; None: none may be used.
        activation: (n, W, K) float32 -> the same: what becomes of finished logits before they are brought to the
            output's grid, softmax for models whose probabilities are resampled. None: they stay logits.
        scores: called with the region of the output and its logits (d, h, w, K), some 8 MB, for every block that is
            done.
        held: bytes that the caller will take meanwhile and keep, for the forecast.
        progress: print the forecast, show a bar with the time left (needs tqdm), print the peak.

    Returns:
        (D', H', W') uint8, or uint16 where a label is above 255.

    Raises:
        ValueError: shapes that do not fit, NaN logits, or `max_ram` too small; the message then says what would do.
        TypeError: a model that does not return a tensor.

    Example:
        >>> image = torch.randn(1, 40, 64, 64)
        >>> twice = [Axis.linear(n, 2 * n) for n in (40, 64, 64)]
        >>> predict_on_grid(net, image, patch_size=(32, 32, 32), axes=twice).shape
        (80, 128, 128)
    """
    models = tuple(models) if isinstance(models, Sequence) else (models,)
    patch = _patch(patch_size, image)
    placed = _starts(starts, image.shape[1:], patch, overlap)
    axes = _axes(axes, image.shape[1:])
    if batch_size < 1:
        raise ValueError(f"predict_labels: batch_size must be at least 1, received {batch_size}")
    plan = Plan.smallest(image.shape[1:], patch, placed, axes, batch_size)
    blend = _weights(weights, patch).permute(plan.order).contiguous()
    network = Network(models, image, patch, _mirrors(mirror_axes), flat=len(patch_size) == 2)
    ceiling = None if max_ram is None else as_bytes("max_ram", max_ram)
    with evaluating(models):
        plans = None
        if ceiling is not None or progress:
            held += 0 if scores is None else HANDED_OUT
            plans = forecast(network, plan, regions, held, ceiling, scratch is not None)
            _say(progress, f"convoxel: {plans}")
        rows = plan.rows if plans is None else plans.rows
        aside = Path(scratch) if scratch is not None and rows < plan.rows else None
        with _bar(plan.windows, progress) as advance:
            result = Walk(network, plan, blend, regions, scores, rows, aside, activation).run(advance)
        if plans is not None:
            _say(progress, f"convoxel: peak memory was {size(peak_memory())}")
    return result


def _patch(patch_size: Sequence[int], image: Tensor) -> tuple[int, int, int]:
    if image.ndim != 4 or image.dtype != torch.float32:
        raise ValueError(f"predict_on_grid: expected an image (C, D, H, W), float32, received {tuple(image.shape)}, "
                         f"{image.dtype}")  # fmt: skip
    patch = tuple(int(p) for p in ([1, *patch_size] if len(patch_size) == 2 else patch_size))
    if len(patch) != 3 or any(not 1 <= p <= n for p, n in zip(patch, image.shape[1:], strict=False)):
        raise ValueError(f"predict_on_grid: expected a patch (d, h, w), or (h, w) for a 2-D network, within the image "
                         f"{tuple(image.shape)} (C, D, H, W), received {tuple(patch_size)}; pad the image")  # fmt: skip
    return patch[0], patch[1], patch[2]


def _starts(
    given: Sequence[Sequence[int]] | None,
    size: Sequence[int],
    patch: Sequence[int],
    overlap: Sequence[float] | float,
) -> list[list[int]]:
    if given is None:
        return [spread(n, p, o) for n, p, o in zip(size, patch, per_axis("overlap", overlap, 3), strict=True)]
    placed = [sorted({int(s) for s in some}) for some in given]
    for some, n, p in zip(placed, size, patch, strict=True):
        gaps = any(b - a > p for a, b in zip(some, some[1:], strict=False))
        if not some or some[0] != 0 or some[-1] != n - p or gaps:
            raise ValueError(f"predict_on_grid: expected starts from 0 to {n - p}, windows of {p} voxels without gaps "
                             f"between, received {some}")  # fmt: skip
    return placed


def _axes(given: Sequence[Axis] | None, size: Sequence[int]) -> list[Axis]:
    if given is None:
        return [Axis.linear(n, n) for n in size]
    return [
        axis.check(f"predict_on_grid: axes[{a}]", n)
        for a, (axis, n) in enumerate(zip(given, size, strict=True))
    ]


def _weights(given: Tensor | None, patch: tuple[int, ...]) -> Tensor:
    weights = (
        weight_map(patch, "gaussian", (0.125,) * 3, None)
        if given is None
        else checked_weights(given, 1, patch)
    )
    weights = weights[0, 0].float()
    if not bool((weights > 0).all()):
        raise ValueError("predict_on_grid: weights must be positive: what no window counts for has no label")
    return weights


def _mirrors(axes: Sequence[int]) -> tuple[int, ...]:
    if not set(axes) <= {0, 1, 2} or len(set(axes)) != len(axes):
        raise ValueError(
            f"predict_on_grid: mirror_axes must be some of 0, 1, 2 (D, H, W), received {tuple(axes)}"
        )
    return tuple(axes)


@contextmanager
def _bar(total: int, progress: bool) -> Iterator[Callable[[int], object]]:
    if not progress:
        yield lambda n: None
        return
    with bar(None, "windows", total) as shown:
        yield shown.update


def _say(progress: bool, line: str) -> None:
    if progress:
        print(line, file=sys.stderr)
