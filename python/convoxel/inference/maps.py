"""Probabilities and entropy of a prediction, block by block as its logits are done."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..volume import Volume, VolumeError
from ..volume.formats import check_target, write_planes
from .forecast import size
from .walk import Region


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
    """

    def __init__(self, volume: Volume, regions: bool, probabilities: str | os.PathLike[str] | None,
                 entropy: str | os.PathLike[str] | None) -> None:  # fmt: skip
        self.volume, self.regions, self.targets = volume, regions, (probabilities, entropy)
        for path in self.targets:
            if path is not None:
                check_target(path)
        shape = volume.grid_shape
        self.entropy = None if entropy is None else np.empty(shape, np.float32)
        self.planes: PlanesOnDisk | None = None

    @property
    def held(self) -> int:
        """Bytes of memory that will be taken."""
        return 0 if self.entropy is None else self.entropy.nbytes

    def __bool__(self) -> bool:
        return any(path is not None for path in self.targets)

    def add(self, where: Region, logits: NDArray[np.float32]) -> None:
        p = probabilities_of(logits, self.regions)
        if self.entropy is not None:
            self.entropy[where] = entropy_of(p, self.regions)
        if self.targets[0] is not None:
            if self.planes is None:
                folder = Path(self.targets[0]).resolve().parent
                self.planes = PlanesOnDisk((p.shape[-1], *self.volume.grid_shape), folder)
            self.planes.put(where, np.moveaxis(p, -1, 0))

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
    """A float32 array (K, D, H, W) in a file without a name, written in blocks of whole lines, read plane by plane."""

    def __init__(self, shape: tuple[int, ...], folder: Path) -> None:
        self.shape, self.ndim, self.dtype = shape, len(shape), np.dtype(np.float32)
        needed, free = 4 * int(np.prod(shape, dtype=np.int64)), shutil.disk_usage(folder).free
        if free < needed:
            raise VolumeError(f"{folder}: probabilities {shape} take {size(needed)}, the disk has {size(free)}; "
                              "free some, or write elsewhere")  # fmt: skip
        self._stream = tempfile.TemporaryFile(dir=folder)

    def close(self) -> None:
        self._stream.close()

    def put(self, where: Region, block: NDArray[np.float32]) -> None:
        """block (K, d, h, W)."""
        z, y, x = where
        if (x.start, x.stop) != (0, self.shape[3]):
            raise AssertionError("blocks are of whole lines")
        for k, d in np.ndindex(block.shape[:2]):
            at = ((k * self.shape[1] + z.start + d) * self.shape[2] + y.start) * self.shape[3]
            self._stream.seek(4 * at)
            self._stream.write(np.ascontiguousarray(block[k, d]).data)

    def __getitem__(self, index: tuple[int, int]) -> NDArray[np.float32]:
        plane = self.shape[2] * self.shape[3]
        self._stream.seek(4 * (index[0] * self.shape[1] + index[1]) * plane)
        return np.frombuffer(self._stream.read(4 * plane), np.float32).reshape(self.shape[2:])


def remove_small(labels: NDArray[Any], least: int) -> int:
    """Sets connected components (26 neighbours, of one label each) of less than `least` voxels to 0, in place.

    Returns the number of voxels changed. Needs scipy.
    """
    try:
        from scipy import ndimage
    except ImportError as error:
        raise ImportError('removing small components needs scipy: pip install "convoxel[scan]"') from error
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
