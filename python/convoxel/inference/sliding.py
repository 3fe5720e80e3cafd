"""Windows that overlap, blended by weights.

    y(p) = sum_w g(p - p_w) f(x_w)(p - p_w) / sum_w g(p - p_w)

over the windows w at p_w, f the predictor, g = 1 or a Gaussian that trusts the middle of a window more
than its rim. A predictor may answer at another scale: `size` voxels for a window of `roi`; then its
window begins at voxel floor(p_w * size / roi) and the weights are scaled by nearest neighbour.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from ..progress import bar
from .blend import Canvas
from .windows import (
    Window,
    bands,
    buffer_axis,
    checked_weights,
    coordinates,
    pad,
    per_axis,
    starts,
    weight_map,
    window_size,
)


def sliding_window_inference(
    inputs: Tensor,
    roi_size: Sequence[int | None] | int | None,
    sw_batch_size: int,
    predictor: Callable[..., Any],
    overlap: Sequence[float] | float = 0.25,
    mode: str = "constant",
    sigma_scale: Sequence[float] | float = 0.125,
    padding_mode: str = "constant",
    cval: float = 0.0,
    sw_device: torch.device | str | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
    roi_weight_map: Tensor | None = None,
    process_fn: Callable[..., Any] | None = None,
    buffer_steps: int | None = None,
    buffer_dim: int = -1,
    with_coord: bool = False,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Applies `predictor` to overlapping windows of `inputs` and blends what it returns.

    Windows stand `int(roi * (1 - overlap))` voxels apart, the last one moved back to end with the image.
    An image smaller than the window is padded on both sides (the odd voxel behind) and the result
    cropped. Gradients flow to the predictor's parameters; wrap the call in `torch.no_grad()` for
    inference.

    Args:
        inputs: (N, C, *spatial), 1 to 3 spatial axes.
        roi_size: window in voxels, one number per axis or one for all; None, 0 or negative: the whole axis.
        sw_batch_size: windows per call of the predictor; a batch may span two images.
        predictor: (B, C, *roi) -> (B, K, *any), or a tuple, list or dict of such tensors; each may have
            its own K and its own scale, and is blended at that scale.
        overlap: in [0, 1), per axis or for all.
        mode: "constant" (equal weights) or "gaussian" (standard deviation `sigma_scale * roi`, at least
            1e-3 of the peak).
        padding_mode, cval: as in `torch.nn.functional.pad`.
        sw_device, device: where windows go to the predictor, and where results are collected; the
            device of `inputs` by default.
        progress: show a bar (needs tqdm).
        roi_weight_map: (*roi) or (1, 1, *roi), used instead of the weights of `mode`.
        process_fn: called as `process_fn(outputs, windows, weights)` after each call of the predictor,
            with a tuple of tensors, (B, C, *roi) and (*roi); returns the outputs and weights to use,
            the weights as (*roi) or (B or 1, 1, *roi).
        buffer_steps: collect this many window positions along `buffer_dim` on `sw_device` before they
            are added up on `device`; None: every window at once.
        buffer_dim: spatial axis of the buffers.
        with_coord: call `predictor(windows, coords, ...)` with one list of slices (n, channel, *spatial)
            into the padded inputs per window.
        args, kwargs: passed on to the predictor.

    Returns:
        What the predictor returns, blended: a tensor (N, K, *spatial), a tuple or a dict of them, in
        the dtype of `inputs` (that of the prediction where `inputs` are integers); sums are kept in
        float32 at least.

    Raises:
        ValueError, TypeError: arguments or predictions that do not fit each other.

    Source:
        MONAI, monai.inferers.sliding_window_inference (signature and behaviour). Other than there,
        `with_coord` gives every window its own coordinates in buffered mode too, sums of half precision
        are kept in float32, buffers work for several outputs, and weights that sum to zero raise instead of
        giving NaN.

    Example:
        >>> image = torch.rand(1, 1, 100, 90, 80)
        >>> sliding_window_inference(image, 32, 4, lambda x: 2 * x, mode="gaussian").shape
        torch.Size([1, 1, 100, 90, 80])
    """
    if not isinstance(inputs, Tensor):
        raise TypeError(
            f"sliding_window_inference: expected a tensor (N, C, *spatial), received {type(inputs).__name__}; "
            "torch.from_numpy makes one of an array"
        )
    roi = window_size(roi_size, inputs)
    rank, target = len(roi), inputs.device if device is None else torch.device(device)
    worker = inputs.device if sw_device is None else torch.device(sw_device)
    _check_counts(sw_batch_size, buffer_steps)
    padded, before = pad(inputs, roi, padding_mode, cval)
    image = tuple(padded.shape[2:])
    grid = list(map(starts, image, roi, per_axis("overlap", overlap, rank)))
    axis = buffer_axis(buffer_dim, rank) if buffer_steps else None
    parts = bands(len(inputs), grid, axis, buffer_steps)
    sigmas = per_axis("sigma_scale", sigma_scale, rank)
    weights = weight_map(roi, mode, sigmas, roi_weight_map).to(target)

    canvases: list[Canvas] = []
    pack: Callable[[list[Tensor]], Any] = list
    for band, batch, begins, ends in _batches(parts, sw_batch_size, progress):
        where = [coordinates(window, roi) for window in batch]
        x = torch.cat([padded[tuple(w)] for w in where]).to(worker)  # a copy: predictors may work in place
        y = predictor(x, where, *args, **kwargs) if with_coord else predictor(x, *args, **kwargs)
        outputs, pack = _unpack(y, len(batch), rank)
        batch_weights = weights
        if process_fn is not None:
            changed, new = process_fn(tuple(outputs), x, weights[0, 0].to(worker))
            outputs, batch_weights = list(changed), checked_weights(new, len(batch), roi).to(target)
        if not canvases:
            counted = 1 if process_fn is None else len(inputs)  # images whose weights differ
            lead = (len(inputs), counted, roi, image, inputs.dtype, target)
            canvases = [Canvas.blank(y, *lead) for y in outputs]
        if len(outputs) != len(canvases):
            raise ValueError(f"predictor: returned {len(canvases)} outputs at first, now {len(outputs)}")
        for canvas, y in zip(canvases, outputs, strict=True):
            if begins and axis is not None:
                canvas.begin(band, axis, worker)
            canvas.add(y, batch, batch_weights)
            if ends and axis is not None:
                canvas.end()
        del x, y, outputs  # or they would lie beside the next batch
    check = roi_weight_map is not None or process_fn is not None
    return pack([canvas.result(before, tuple(inputs.shape[2:]), check) for canvas in canvases])


def _check_counts(sw_batch_size: int, buffer_steps: int | None) -> None:
    if sw_batch_size < 1 or (buffer_steps is not None and buffer_steps < 0):
        raise ValueError(
            "sliding_window_inference: sw_batch_size must be at least 1 and buffer_steps at least 0 or None, "
            f"received {sw_batch_size} and {buffer_steps}"
        )


def _batches(
    bands: list[list[Window]], size: int, progress: bool
) -> Iterator[tuple[list[Window], list[Window], bool, bool]]:
    """(band, batch, whether it is the band's first, whether its last)."""
    batches = [
        (band, band[i : i + size], i == 0, i + size >= len(band))
        for band in bands
        for i in range(0, len(band), size)
    ]
    yield from bar(batches, "windows") if progress else batches


def _unpack(y: Any, batch: int, rank: int) -> tuple[list[Tensor], Callable[[list[Tensor]], Any]]:
    """The tensors of a prediction, and the function that puts others back in their places."""
    outputs: list[Any] = [y]
    pack: Callable[[list[Tensor]], Any] = tuple
    if isinstance(y, Mapping):
        outputs, pack = list(y.values()), partial(_as_dict, list(y))
    elif isinstance(y, Sequence):
        outputs = list(y)
    if not outputs or not all(isinstance(tensor, Tensor) for tensor in outputs):
        raise TypeError(
            "predictor: expected a tensor, or a tuple, list or dict of tensors, received "
            f"{type(y).__name__} of {[type(tensor).__name__ for tensor in outputs]}"
        )
    for tensor in outputs:
        if tensor.ndim != rank + 2 or len(tensor) != batch or tensor.numel() == 0 or tensor.is_complex():
            raise ValueError(
                f"predictor: expected real outputs (B, K, *spatial), B = {batch} and {rank} spatial axes, "
                f"received {tuple(tensor.shape)}, {tensor.dtype}"
            )
    alone = len(outputs) == 1 and not isinstance(y, Mapping)
    return outputs, itemgetter(0) if alone else pack


def _as_dict(keys: list[Any], tensors: list[Tensor]) -> dict[Any, Tensor]:
    return dict(zip(keys, tensors, strict=True))
