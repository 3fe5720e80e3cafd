"""Probabilities and entropy of a prediction, block by block as its logits are done."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..volume import Volume, VolumeError
from ..volume.formats import check_planes_target, write_planes
from .forecast import size
from .walk import Region

Target = str | os.PathLike[str] | None
Frame = Callable[[NDArray[Any]], NDArray[Any]]  # (..., D, H, W) of the scan -> the labels' part of it, a view
Probability = Callable[[NDArray[np.float32]], NDArray[np.float32]]  # (..., K) logits -> (..., K)


def probabilities_of(logits: NDArray[np.float32], regions: bool) -> NDArray[np.float32]:
    """(..., K) logits -> (..., K): softmax, or a sigmoid each for regions that overlap."""
    x = torch.from_numpy(np.ascontiguousarray(logits))
    return (torch.sigmoid(x) if regions else torch.softmax(x, -1)).numpy()


def entropy_of(p: NDArray[np.float32], regions: bool) -> NDArray[np.float32]:
    """(..., K) probabilities -> (...): -sum p ln p in nats; of regions, the sum of their binary entropies."""
    x = torch.from_numpy(p)
    whole = torch.special.entr(x) + (torch.special.entr(1 - x) if regions else 0)
    return whole.sum(-1).numpy()


class Maps:
    """Where blocks of logits go: files of probabilities (K, D, H, W) and of entropy (D, H, W), on a volume's grid.

    Probabilities wait in a file without a name beside their target, as large as they are; entropy in memory.

    Args:
        volume: whose grid it is.
        regions: channels are regions that overlap, not classes.
        probabilities, entropy: .nii or .nii.gz files, or None.
        frame: (..., D, H, W) of the volume -> the part of it that blocks are given for, a view. What lies outside is
            certain: background, the first class; no region.
        probability: (..., K) logits, as they are given -> (..., K) probabilities; None: `probabilities_of`.
    """

    def __init__(self, volume: Volume, regions: bool, probabilities: Target, entropy: Target = None,
                 frame: Frame = lambda array: array, probability: Probability | None = None) -> None:  # fmt: skip
        self.volume, self.regions, self.targets, self.frame = volume, regions, (probabilities, entropy), frame
        self.probability = probability or partial(probabilities_of, regions=regions)
        for path in self.targets:
            if path is not None:
                check_planes_target(path)
        self.entropy = None if entropy is None else np.zeros(volume.grid_shape, np.float32)
        self.planes: PlanesOnDisk | None = None

    @property
    def held(self) -> int:
        """Bytes of memory that will be taken."""
        return 0 if self.entropy is None else self.entropy.nbytes

    def __bool__(self) -> bool:
        return any(path is not None for path in self.targets)

    def add(self, where: Region, logits: NDArray[np.float32]) -> None:
        """logits (d, h, w, K) of a region of the frame."""
        p = self.probability(logits)
        if self.entropy is not None:
            self.frame(self.entropy)[where] = entropy_of(p, self.regions)
        if self.targets[0] is not None:
            if self.planes is None:
                self.planes = self._blank(p.shape[-1], Path(self.targets[0]))
            for plane, values in enumerate(np.moveaxis(p, -1, 0)):
                self.frame(self.planes[plane])[where] = values

    def _blank(self, classes: int, target: Path) -> PlanesOnDisk:
        planes = PlanesOnDisk((classes, *self.volume.grid_shape), target.resolve().parent)
        if not self.regions and self.frame(planes[0]).size < planes[0].size:
            for z in range(planes.shape[1]):
                planes[0, z][:] = 1
        return planes

    def __enter__(self) -> Maps:
        return self

    def __exit__(self, *_: object) -> None:
        if self.planes is not None:
            self.planes.close()

    def write(self) -> None:
        probabilities, entropy = self.targets
        if self.planes is not None and probabilities is not None:
            write_planes(self.volume, self.planes, probabilities)
        if self.entropy is not None and entropy is not None:
            write_planes(self.volume, self.entropy, entropy)


class PlanesOnDisk:
    """A float32 array (K, D, H, W), at first 0, in a file without a name.

    What is indexed is mapped for as long as it is held: pages that were touched count as memory of the process until
    they are unmapped.
    """

    def __init__(self, shape: tuple[int, ...], folder: Path) -> None:
        self.shape, self.ndim, self.dtype = shape, len(shape), np.dtype(np.float32)
        needed, free = 4 * math.prod(shape), shutil.disk_usage(folder).free
        if free < needed:
            raise VolumeError(f"{folder}: probabilities {shape} take {size(needed)}, the disk has {size(free)}; "
                              "free some, or write elsewhere")  # fmt: skip
        self._file = tempfile.TemporaryFile(dir=folder)
        self._file.truncate(needed)

    def close(self) -> None:
        self._file.close()

    def __getitem__(self, index: int | tuple[int, ...]) -> NDArray[np.float32]:
        """planes[k] (D, H, W), planes[k, z] (H, W): views that may be written to."""
        return np.memmap(self._file, np.float32, "r+", shape=self.shape)[index]


def remove_small(labels: NDArray[Any], least: int) -> int:
    """Sets connected components (26 neighbours, of one label each) of less than `least` voxels to 0, in place.

    Returns the number of voxels changed. Needs scipy.
    """
    try:
        from scipy import ndimage
    except ImportError as error:
        raise ImportError('removing small components needs scipy: pip install "convoxel[predict]"') from error
    changed = 0
    for label, box in enumerate(ndimage.find_objects(labels), start=1):
        if box is None:
            continue
        part = labels[box]
        numbered, _ = ndimage.label(part == label, np.ones((3, 3, 3)))
        small = np.bincount(numbered.ravel()) < least
        small[0] = False
        gone = small[numbered]
        part[gone] = 0
        changed += int(gone.sum())
    return changed
