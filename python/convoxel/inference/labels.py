"""From a scan to its labels, on the scan's own grid."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..volume import Volume, write
from ..volume.formats import check_target
from .sliding import sliding_window_inference
from .windows import per_axis, starts, window_size

_PROBES = 4  # batches run to measure the model: the first ones find the allocator's heap tidier
_MARGIN = 16 << 20  # bytes, over what is measured: stacks, the interpreter


def predict_labels(
    model: Callable[[Tensor], Tensor],
    volume: Volume,
    *,
    patch_size: Sequence[int | None] | int | None,
    overlap: Sequence[float] | float = 0.5,
    batch_size: int = 1,
    max_ram: int | None = None,
    out: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Volume:
    """Labels of every voxel: Gaussian-blended float32 logits on the volume's own grid, then argmax.

    The model sees the values as they are: normalise and resample the volume as in training before. A
    module runs in eval mode, without gradients, on the device of its parameters, and is left in the
    modes that it had. A volume smaller than the patch is padded with 0 for the model.

    Args:
        model: (B, C, d, h, w) float32 -> (B, K, d, h, w) logits, K >= 2 classes.
        volume: (D, H, W), seen as one channel, or (C, D, H, W).
        patch_size: (z, y, x) in voxels, or one number for all; None, 0 or negative: the whole axis.
        overlap: of neighbouring patches, in [0, 1), per axis or for all.
        batch_size: patches per call of the model.
        max_ram: most bytes of memory that this process may hold while it works. The need is worked out
            beforehand, from the sizes of the arrays and a few batches that are run to measure the model;
            if it is larger, nothing else is run.
        out: a .nii or .nii.gz file to write the labels to.
        progress: show a bar (needs tqdm).

    Returns:
        Volume (D, H, W) on the same grid: uint8 up to 256 classes, else uint16.

    Raises:
        ValueError: NaN or infinite voxels, NaN logits, a model that does not fit, or `max_ram` too
            small; the message then gives a ceiling that would do.
        TypeError: `volume` is not a Volume, or the model does not return a tensor.
        VolumeError: `out` cannot be written; its folder is looked at before the work begins.

    Example:
        >>> scan = convoxel.volume.read("t1.nii.gz")
        >>> labels = predict_labels(model, scan, patch_size=(64, 96, 96), out="t1_labels.nii.gz")
    """
    if not isinstance(volume, Volume):
        raise TypeError(
            f"predict_labels: expected a Volume, received {type(volume).__name__}; make one with "
            "convoxel.volume.read(path) or Volume(array, spacing)"
        )
    if out is not None:
        check_target(out)
    image = _as_batch(volume)
    roi = window_size(patch_size, image)
    parameter = next(model.parameters(), None) if isinstance(model, torch.nn.Module) else None
    device = torch.device("cpu") if parameter is None else parameter.device

    def logits(windows: Tensor) -> Tensor:
        return _checked_logits(model(windows), windows)

    def infer(x: Tensor, bar: bool = False) -> Tensor:
        return sliding_window_inference(
            x, roi, batch_size, logits, overlap, "gaussian", sw_device=device, device="cpu", progress=bar
        )

    with _evaluating(model), torch.no_grad():
        if max_ram is not None:
            grid = map(starts, image.shape[2:], roi, per_axis("overlap", overlap, 3))
            _require_memory(max_ram, infer, image, roi, min(batch_size, math.prod(map(len, grid))))
        labels = volume.like(_argmax(infer(image, progress)))
    if out is not None:
        write(labels, out)
    return labels


def _as_batch(volume: Volume) -> Tensor:
    """(1, C, D, H, W), float32; the volume's own memory where it can be."""
    array = np.asarray(volume.array, np.float32)
    if not array.flags.writeable or any(step < 0 for step in array.strides):
        array = array.copy()  # torch knows neither read-only nor reversed memory
    planes = (array[index] for index in np.ndindex(array.shape[:-2]))
    bad = sum(plane.size - int(np.isfinite(plane).sum()) for plane in planes)
    if bad:
        raise ValueError(
            f"predict_labels: {bad} of {array.size} voxels are NaN or infinite, and would spoil every window "
            "that holds one; replace them (np.nan_to_num) or crop them away"
        )
    image = torch.from_numpy(array)
    return image[None] if volume.is_multichannel else image[None, None]


def _checked_logits(y: Any, x: Tensor) -> Tensor:
    if not isinstance(y, Tensor):
        raise TypeError(
            f"predict_labels: the model returned {type(y).__name__}, expected one tensor of logits; with "
            "deep supervision wrap it: lambda x: model(x)[0]"
        )
    if y.ndim != x.ndim or y.shape[0] != x.shape[0] or y.shape[2:] != x.shape[2:]:
        raise ValueError(
            f"predict_labels: for patches (B, C, d, h, w) = {tuple(x.shape)} the model returned "
            f"{tuple(y.shape)}, expected (B, K, d, h, w) of the same B, d, h, w"
        )
    if y.shape[1] < 2:
        raise ValueError(
            "predict_labels: the model returns one channel, and the largest of one is always background; "
            "return two, for a logit z: torch.cat([torch.zeros_like(z), z], 1)"
        )
    return y.float()


def _argmax(logits: Tensor) -> NDArray[Any]:
    """(1, K, D, H, W) -> (D, H, W), by slabs: torch's indices take eight bytes per voxel, its maxima four (argmax
    alone takes 25 times as long)."""
    _, classes, depth, height, width = logits.shape
    labels = np.empty((depth, height, width), _label_dtype(classes))
    rows = _slab_rows(height, width)
    for z in range(0, depth, rows):
        slab = logits[0, :, z : z + rows]
        if bool(slab.isnan().any()):
            raise ValueError("predict_labels: the model's logits are NaN; check its weights and the input")
        labels[z : z + rows] = slab.max(0).indices.numpy()
    return labels


def _slab_rows(height: int, width: int) -> int:
    return max(1, (1 << 20) // (height * width))


def _label_dtype(classes: int) -> np.dtype[Any]:
    if classes > 1 << 16:
        raise ValueError(f"predict_labels: {classes} classes do not fit uint16")
    return np.dtype(np.uint8 if classes <= 1 << 8 else np.uint16)


@contextmanager
def _evaluating(model: object) -> Iterator[None]:
    """Eval mode for every module inside, and afterwards the mode that each had."""
    if not isinstance(model, torch.nn.Module):
        yield
        return
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _require_memory(
    max_ram: int, infer: Callable[[Tensor], Tensor], image: Tensor, roi: tuple[int, ...], batch: int
) -> None:
    """Raises if the inference could hold more than `max_ram` bytes.

    need = (the peak while batches of patches run) + (every array as large as the volume) + (half of what
    one batch takes, for holes in the heap).
    """
    d, h, w = roi
    classes, before, peak = 0, _restart_peak(), 0
    for _ in range(_PROBES):
        classes = infer(image[..., :d, :h, :w].expand(batch, -1, -1, -1, -1)).shape[1]
        peak = _peak_memory()
    spare = max(_MARGIN, (peak - before) // 2)
    grid = [max(n, r) for n, r in zip(image.shape[2:], roi, strict=True)]
    padded = 0 if grid == list(image.shape[2:]) else 4 * image.shape[1]  # bytes per voxel of the copy
    per_voxel = 4 * classes + 4 + _label_dtype(classes).itemsize + padded  # logits, weights, labels
    slab = _slab_rows(grid[1], grid[2]) * grid[1] * grid[2] * (classes + 12)  # isnan, max's values and int64
    dense = math.prod(grid) * per_voxel + slab
    need = peak + dense + spare
    if need > max_ram:
        raise ValueError(
            f"predict_labels: max_ram is {max_ram} bytes, {need} are needed: {dense} for whole-volume arrays "
            f"of {classes} classes, {peak} for the program, the volume and one batch, {spare} to be safe; "
            f"max_ram={need} would do, or a smaller batch_size or patch_size"
        )


def _restart_peak() -> int:
    """Lets Linux count this process's peak memory from now on (elsewhere it counts from the start).

    Returns the bytes resident now, or that peak.
    """
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _peak_memory()


def _peak_memory() -> int:
    """Bytes resident at this process's peak."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    try:
        import resource
    except ImportError as error:
        raise ValueError("predict_labels: this system does not tell memory use; leave max_ram out") from error
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
