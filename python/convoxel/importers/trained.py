"""A trained model: its networks, and the recipe that takes a scan to them and their labels back to the scan."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from ..inference import Axis, predict_on_grid
from ..inference.maps import Frame, Maps, Probability
from ..inference.walk import Region
from ..volume import Volume
from ..volume.files import machine_memory
from .networks import Description

SAME_PLACE = 0.05  # voxels by which the channels of one scan may lie apart


@dataclass(frozen=True)
class Prepared:
    """A scan as its networks want it, and the way back."""

    image: Tensor  # (C, d, h, w) float32, normalised, on the network's grid, at least as large as the patch
    patch_size: tuple[int, ...]  # (d, h, w), or (h, w) for 2-D networks
    starts: tuple[list[int], ...] | None  # per axis, of the windows; None: convoxel's own
    weights: Tensor | None  # (patch), of the blend; None: MONAI's Gaussian
    axes: list[Axis] | None  # where the labels' voxels lie on the network's grid; None: on its own
    frame: Frame
    activation: Callable[[Tensor], Tensor] | None = None  # of finished logits, before they are resampled
    probability: Probability | None = None  # of what the activation makes; None: softmax or sigmoid of logits


Overlap = float | tuple[float, ...]


class Recipe(ABC):
    """What has to be done with a scan before and after the networks of one model; plain data, so that it is kept
    as JSON beside the weights."""

    kind: str
    channels: tuple[str, ...]  # what the networks take, in order
    labels: Mapping[str, Any]  # name: value, or values of a region
    mirror_axes: tuple[int, ...]  # spatial axes (0, 1, 2) that may be flipped
    regions: tuple[int, ...] | None  # sigmoid channels in ascending precedence, or None: argmax
    overlap: Overlap  # of neighbouring windows, where the user says nothing
    masks: bool = False  # the result is one mask per region, (K, D, H, W), not labels

    @abstractmethod
    def prepare(self, scans: Sequence[Volume], overlap: Overlap) -> Prepared:
        """The channels of one scan, made ready."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """Plain data from which the recipe can be made again."""


@dataclass(frozen=True)
class TrainedModel:
    """Networks of one architecture (the folds of a cross-validation, say), whose logits are averaged."""

    networks: Sequence[nn.Module]
    description: Description
    recipe: Recipe
    name: str

    def predict(
        self,
        scans: Sequence[Volume],
        *,
        overlap: Overlap | None = None,
        mirror: bool = True,
        batch_size: int = 1,
        max_ram: int | None = None,
        scratch: Path | None = None,
        probabilities: Path | None = None,
        progress: bool = False,
    ) -> Volume:
        """The labels of one scan, on its own grid.

        Args:
            scans: one Volume per channel that the model was trained on, all on one grid; or one with all channels.
            overlap: of neighbouring windows, in [0, 1); None: the model's own.
            mirror: average over flips along the axes that the model allows.
            batch_size: windows per call of a network.
            max_ram: most bytes that the process may hold while the networks run; ValueError beforehand if that cannot
                be kept. What preparing the scan takes (8 bytes for a voxel of a channel) is not looked at.
            scratch: a folder for what `max_ram` has no room for; None: none may be used.
            probabilities: a .nii.gz file for the classes' probabilities (K, D, H, W).
            progress: show a bar with the time left.

        Raises:
            ValueError: channels missing, on different grids or not finite; the scan does not fit the model.

        >>> model = importers.load("Dataset003_Liver/nnUNetTrainer__nnUNetPlans__3d_fullres")
        >>> labels = model.predict([convoxel.volume.read("liver_0000.nii.gz")])
        """
        split, recipe = self.check(scans), self.recipe
        overlap = recipe.overlap if overlap is None else overlap
        grid, ready = split[0], recipe.prepare(split, overlap)
        masks = Masks(grid, ready) if recipe.masks else None
        regions = recipe.regions is not None
        with Maps(grid, regions, probabilities, None, ready.frame, ready.probability) as maps:
            takers = [part.add for part in (maps, masks) if part]

            def take(where: Region, scores: NDArray[np.float32]) -> None:
                for add in takers:
                    add(where, scores)

            labels = predict_on_grid(
                self.networks,
                ready.image,
                patch_size=ready.patch_size,
                starts=ready.starts,
                overlap=overlap,
                weights=ready.weights,
                axes=ready.axes,
                batch_size=batch_size,
                mirror_axes=recipe.mirror_axes if mirror else (),
                regions=recipe.regions,
                max_ram=max_ram,
                scratch=scratch,
                activation=ready.activation,
                scores=take if takers else None,
                held=math.prod(grid.grid_shape),
                progress=progress,
            )
            maps.write()
        if masks is not None:
            return grid.like(masks.whole)
        whole = np.zeros(grid.grid_shape, labels.dtype)
        ready.frame(whole)[...] = labels
        return grid.like(whole)

    def check(self, scans: Sequence[Volume]) -> list[Volume]:
        """The scan as one Volume per channel; ValueError if it is not what the model was trained on."""
        return check_scans(scans, self.recipe.channels)


class Masks:
    """One mask (0, 1) per region, (K, D, H, W): regions that overlap, kept apart."""

    whole: NDArray[np.uint8]

    def __init__(self, scan: Volume, ready: Prepared) -> None:
        self.scan, self.ready = scan, ready

    def add(self, where: Region, scores: NDArray[np.float32]) -> None:
        if not hasattr(self, "whole"):
            self.whole = np.zeros((scores.shape[-1], *self.scan.grid_shape), np.uint8)
        z, y, x = where
        self.ready.frame(self.whole)[:, z, y, x] = np.moveaxis(scores > 0, -1, 0)


def check_scans(scans: Sequence[Volume], wanted: Sequence[str]) -> list[Volume]:
    """One Volume per channel, all finite and on one grid; ValueError if they are not the channels `wanted`."""
    split = [part for scan in scans for part in _channels(scan)]
    if len(split) != len(wanted):
        raise ValueError(
            f"the model takes {len(wanted)} channel(s) ({', '.join(wanted)}), the scan has {len(split)}"
        )
    for name, scan in zip(wanted[1:], split[1:], strict=True):
        if not split[0].same_grid(scan, SAME_PLACE):
            raise ValueError(
                f"the channels {wanted[0]} and {name} do not lie on one grid: {split[0]} and {scan}; bring one "
                "to the other with volume.resample_to"
            )
    for name, scan in zip(wanted, split, strict=True):
        bad = sum(plane.size - int(np.isfinite(plane).sum()) for plane in scan.array)
        if bad:
            raise ValueError(
                f"channel {name}: {bad} of {scan.array.size} voxels are NaN or infinite; replace them "
                "(np.nan_to_num) or crop them away"
            )
    return split


def stack(scans: Sequence[Volume]) -> NDArray[np.float32]:
    """(C, D, H, W) float32, a copy."""
    image = np.empty((len(scans), *scans[0].grid_shape), np.float32)
    for channel, scan in zip(image, scans, strict=True):
        channel[:] = scan.array
    return image


def check_size(channels: int, shape: Sequence[int], why: str) -> None:
    """ValueError if an image of that shape is beyond this machine: a wrong spacing, more often than a large scan."""
    need = 4 * channels * math.prod(shape)
    if need > machine_memory():
        raise ValueError(
            f"{why} would be {' x '.join(map(str, shape))} voxels, {need / 1e9:.0f} GB, more than this machine has; "
            "check the scan's spacing, or crop it"
        )


def _channels(scan: Volume) -> list[Volume]:
    return [scan.like(part) for part in scan.array] if scan.is_multichannel else [scan]
