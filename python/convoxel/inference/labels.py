"""From a scan to its labels, on the scan's own grid."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ..volume import Volume, write
from ..volume.formats import check_target
from .axis import Axis
from .grid import predict_on_grid
from .maps import Maps, remove_small
from .network import Model
from .windows import pad, window_size

_SLAB = 1 << 22  # voxels that are converted or resampled at a time


def predict_labels(
    model: Model | Sequence[Model],
    volume: Volume,
    *,
    patch_size: Sequence[int | None] | int | None,
    overlap: Sequence[float] | float = 0.5,
    batch_size: int = 1,
    spacing: Sequence[float] | None = None,
    normalize: Callable[[Tensor], Tensor] | None = None,
    mirror_axes: Sequence[int] = (),
    regions: Sequence[int] | None = None,
    least_component: int = 0,
    max_ram: int | str | None = None,
    scratch: str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str] | None = None,
    probabilities: str | os.PathLike[str] | None = None,
    entropy: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Volume:
    """Labels of every voxel: Gaussian-blended float32 logits, resampled to the volume's own grid, then argmax.

    Logits of the whole scan are never held: finished voxels are settled and forgotten while windows go on, with the
    same labels (only voxels whose two best classes differ by rounding may differ). The model sees the values as they
    are, or as `normalize` makes them. A module runs in eval mode, without gradients, on the device of its parameters,
    and is left in the modes that it had. A volume smaller than the patch is padded with 0 for the model.

    Args:
        model: (B, C, d, h, w) float32 -> (B, K, d, h, w) logits, K >= 2 classes; or several, whose logits are
            averaged. With a patch of two numbers a 2-D network, (B, C, h, w) -> (B, K, h, w), run slice by slice.
        volume: (D, H, W), seen as one channel, or (C, D, H, W).
        patch_size: (z, y, x) in voxels of the network's grid, (y, x) for a 2-D network, or one number for all; None,
            0 or negative: the whole axis.
        overlap: of neighbouring patches, in [0, 1), per axis or for all.
        batch_size: patches per call of the model.
        spacing: (z, y, x) in mm that the network was trained on; the scan is resampled to it linearly, its logits
            back (voxel centres, edges clamped: torch's align_corners=False). None: the volume's.
        normalize: (C, d, h, w) float32 -> the same, on the network's grid, before anything is padded.
        mirror_axes: of 0, 1, 2 (z, y, x): logits are averaged over all mirror images along these.
        regions: one label per channel, for regions that overlap (each channel a sigmoid): a voxel gets the label of
            the last channel whose logit is positive, else 0. None: the channels are classes.
        least_component: connected parts of a label with fewer voxels become 0 (needs scipy).
        max_ram: most bytes of memory that this process may hold while it works, a number or "4GB". The need is
            worked out beforehand, from the schedule of the windows and a few batches that are run to measure the
            model; if it is larger, nothing else is run.
        scratch: a folder for what `max_ram` has no room for; None: none.
        out: a .nii or .nii.gz file to write the labels to.
        probabilities, entropy: .nii or .nii.gz files to write them to: softmax (of regions: sigmoids), (K, D, H, W)
            float32; -sum p ln p in nats, (D, H, W) float32. Probabilities wait on the disk, beside their file.
        progress: print the forecast of time and memory, show a bar with the time left (needs tqdm), print the peak.

    Returns:
        Volume (D, H, W) on the same grid: uint8, or uint16 where a label is above 255.

    Raises:
        ValueError: NaN or infinite voxels, NaN logits, a model that does not fit, or `max_ram` too
            small; the message then gives a ceiling that would do.
        TypeError: `volume` is not a Volume, or the model does not return a tensor.
        VolumeError: `out` or a map cannot be written; folders are looked at before the work begins.

    Example:
        >>> scan = convoxel.volume.read("t1.nii.gz")
        >>> labels = predict_labels(model, scan, patch_size=(64, 96, 96), spacing=(1, 1, 1), max_ram="4GB",
        ...                         out="t1_labels.nii.gz")
    """
    if not isinstance(volume, Volume):
        raise TypeError(
            f"predict_labels: expected a Volume, received {type(volume).__name__}; make one with "
            "convoxel.volume.read(path) or Volume(array, spacing)"
        )
    if out is not None:
        check_target(out)
    image = _on_grid(volume, volume.grid_shape if spacing is None else _grid(volume, spacing))
    if normalize is not None:
        image = normalize(image)
    inner = tuple(image.shape[1:])
    flat = isinstance(patch_size, Sequence) and len(patch_size) == 2
    wanted = [1, *patch_size] if flat and isinstance(patch_size, Sequence) else patch_size
    roi = window_size(wanted, image[None])
    padded, before = pad(image[None], roi, "constant", 0.0)
    axes = [Axis.linear(n, m).shifted(b) for n, m, b in zip(inner, volume.grid_shape, before, strict=True)]
    # Of one label, which may fill the scan: its mask, and the numbers of its parts.
    components = 6 * math.prod(volume.grid_shape) if least_component > 1 else 0
    with Maps(volume, regions is not None, probabilities, entropy) as maps:
        array = predict_on_grid(
            model,
            padded[0],
            patch_size=roi[1:] if flat else roi,
            overlap=overlap,
            axes=axes,
            batch_size=batch_size,
            mirror_axes=mirror_axes,
            regions=regions,
            max_ram=max_ram,
            scratch=scratch,
            scores=maps.add if maps else None,
            held=maps.held + components,
            progress=progress,
        )
        if least_component > 1:
            remove_small(array, least_component)
        maps.write()
    labels = volume.like(array)
    if out is not None:
        write(labels, out)
    return labels


def _grid(volume: Volume, spacing: Sequence[float]) -> tuple[int, ...]:
    """(d, h, w): as many voxels of `spacing` as fill the field of view."""
    if len(spacing) != 3 or not all(0 < s < float("inf") for s in spacing):
        raise ValueError(
            f"predict_labels: spacing must be three positive numbers (z, y, x) in mm, received {spacing}"
        )
    sizes = zip(volume.grid_shape, volume.spacing, spacing, strict=True)
    return tuple(max(1, round(n * old / new)) for n, old, new in sizes)


def _on_grid(volume: Volume, shape: Sequence[int]) -> Tensor:
    """(C, d, h, w) float32 over the volume's field of view; its own memory where it can be.

    Linear between voxel centres. By slabs: a scan of short integers is never held in float32 at its own size.
    """
    array = volume.array if volume.is_multichannel else volume.array[None]
    _check_finite(array)
    if tuple(shape) == array.shape[1:]:
        values = np.asarray(array, np.float32)
        if not values.flags.writeable or any(step < 0 for step in values.strides):
            values = values.copy()  # torch knows neither read-only nor reversed memory
        return torch.from_numpy(values)
    image = torch.empty(len(array), *shape)
    axis = Axis.linear(array.shape[1], shape[0])
    rows = max(1, _SLAB // (array.shape[2] * array.shape[3]))
    for c in range(len(array)):
        for z in range(0, shape[0], rows):
            low, high, t = axis.low[z : z + rows], axis.high[z : z + rows], axis.t[z : z + rows, None, None]
            slab = array[c, low] * (1 - t) + array[c, high] * t
            plane = torch.from_numpy(slab.astype(np.float32, copy=False))[:, None]
            image[c, z : z + rows] = F.interpolate(plane, tuple(shape[1:]), mode="bilinear")[:, 0]
    return image


def _check_finite(array: NDArray[np.generic]) -> None:
    if array.dtype.kind != "f":
        return
    planes = (array[index] for index in np.ndindex(array.shape[:-2]))
    bad = sum(plane.size - int(np.isfinite(plane).sum()) for plane in planes)
    if bad:
        raise ValueError(
            f"predict_labels: {bad} of {array.size} voxels are NaN or infinite, and would spoil every window "
            "that holds one; replace them (np.nan_to_num) or crop them away"
        )
