"""Scans made ready for a network, once: plain .npy files, memory-mapped, in a folder per case.

    CACHE/liver_03-1f0c…/image.npy   (C, d, h, w) float32, as the recipe's networks will see scans in prediction
                         labels.npy  (d, h, w) int16, resampled by `preprocessing.resize_labels`
                         places.npy  (n, 4) int32: a label's value and a voxel (z, y, x) of it, at most 10,000 a label
                         case.json   spacing, and how many voxels each label has

A folder's name holds the case's name and a hash of everything that its content follows from; other files, another
spacing or another normalisation have another name. It is filled under a name of its own, flushed and renamed: what
has its name is whole. One process fills it at a time, others wait for it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..importers.trained import SAME_PLACE, check_scans
from ..progress import bar
from ..runtime import cores
from ..volume import Volume, read
from ..volume.files import machine_memory
from .cases import Case, Dataset

VERSION = 1  # of what is computed: raised when the same files and recipe give other numbers
PLACES = 10_000  # voxels of a label that are kept to centre patches on (nnU-Net: the same)
_ENDS = 1 << 20  # bytes at both ends of a file that are hashed; compressed files have their checksum there
_SPARE = 64 << 20  # bytes of the disk that are left alone


class Recipe(Protocol):
    """What the cache needs of `importers.nnunet_recipe.NnunetRecipe`."""

    @property
    def channels(self) -> tuple[str, ...]: ...
    @property
    def preprocessing(self) -> dict[str, Any]: ...
    def on_grid(self, scans: Sequence[Volume]) -> Any: ...
    def labels_on_grid(self, labels: NDArray[Any], placed: Any) -> NDArray[Any]: ...


@dataclass(frozen=True)
class Stored:
    """One case, ready to draw patches from; the arrays are read-only maps of files."""

    name: str
    image: NDArray[np.float32]  # (C, d, h, w)
    labels: NDArray[np.int16]  # (d, h, w)
    places: Mapping[int, NDArray[np.int32]]  # value: (n, 3) voxels (z, y, x), at most PLACES; without ignore
    counts: Mapping[int, int]  # value: how many voxels it has; ignore included
    spacing: tuple[float, float, float]  # (z, y, x) in mm, of this grid

    @property
    def shape(self) -> tuple[int, int, int]:
        """(d, h, w)."""
        d, h, w = self.labels.shape
        return d, h, w


def store(
    dataset: Dataset,
    recipe: Recipe,
    folder: str | os.PathLike[str],
    *,
    names: Sequence[str] | None = None,
    workers: int | None = None,
    progress: bool = False,
) -> list[Stored]:
    """The cases of a dataset made ready; those that are in `folder` already are only opened.

    Args:
        recipe: an NnunetRecipe.
        folder: the cache; made if it is not there. May be shared by datasets, recipes and processes.
        names: of the cases, and their order; None: all.
        workers: cases at a time, each on its own thread; None: the cores at hand, fewer where memory is short.
        progress: show a bar (needs tqdm).

    Raises:
        ValueError: a scan that cannot be read or does not fit its label or the recipe, with the case's name.
        OSError: the disk is full, or would be.

    Warns:
        UserWarning: labelled voxels where every channel is 0, outside the box that networks see.

    >>> cases = store(dataset, recipe, "cache", names=dataset.folds()[0][0])
    >>> cases[0].image.shape, sorted(cases[0].places)
    ((1, 72, 128, 128), [0, 1, 2, 3, 4, 5])
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    by_name = {case.name: case for case in dataset.cases}
    chosen = list(by_name) if names is None else list(names)
    if unknown := [name for name in chosen if name not in by_name]:
        raise ValueError(
            f"{dataset.folder}: no case {unknown[0]}; there are {', '.join(list(by_name)[:5])} ..."
        )
    entries = {name: target / entry_name(by_name[name], dataset, recipe) for name in chosen}
    missing = [name for name in entries if not entries[name].is_dir()]
    _build([(by_name[name], entries[name]) for name in missing], dataset, recipe, workers, progress)
    return [open_stored(entries[name]) for name in chosen]


def entry_name(case: Case, dataset: Dataset, recipe: Recipe) -> str:
    """The case's name and a hash of its files, the recipe's preprocessing and the labels' values.

    Of a file count its name, size, time of change and, byte by byte, its first and last MiB.
    """
    said = [VERSION, case.name, recipe.preprocessing, recipe.channels, dataset.values, dataset.ignore]
    digest = hashlib.blake2b(json.dumps(said).encode(), digest_size=10)
    for path in (*case.images, case.label):
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            _hash_file(file, digest)
    return f"{re.sub(r'[^A-Za-z0-9_.-]', '_', case.name).lstrip('.')[:100]}-{digest.hexdigest()}"


def _hash_file(path: Path, digest: Any) -> None:
    if path.is_dir():
        return
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        digest.update(f"\0{path.name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
        digest.update(file.read(_ENDS))
        file.seek(max(file.tell(), status.st_size - _ENDS))
        digest.update(file.read(_ENDS))


def open_stored(entry: Path) -> Stored:
    """The case in a folder of the cache. ValueError if that is damaged."""
    try:
        about = json.loads((entry / "case.json").read_bytes())
        places = np.load(entry / "places.npy")
        z, y, x = about["spacing"]
        return Stored(
            name=about["name"],
            image=np.load(entry / "image.npy", mmap_mode="r"),
            labels=np.load(entry / "labels.npy", mmap_mode="r"),
            places={int(v): places[places[:, 0] == v, 1:] for v in np.unique(places[:, 0])},
            counts={int(value): int(count) for value, count in about["counts"].items()},
            spacing=(z, y, x),
        )
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{entry}: damaged ({error}); delete this folder and start again") from error


def _build(
    todo: Sequence[tuple[Case, Path]],
    dataset: Dataset,
    recipe: Recipe,
    workers: int | None,
    progress: bool,
) -> None:
    if not todo:
        return
    workers = workers or at_a_time([case for case, _ in todo])
    with ThreadPoolExecutor(min(len(todo), workers), "convoxel-cache") as pool:
        futures = [pool.submit(_fill, case, entry, dataset, recipe) for case, entry in todo]
        try:
            done = as_completed(futures)
            for future in bar(done, "cases made ready", len(futures)) if progress else done:
                if message := future.result():
                    warnings.warn(message, UserWarning, stacklevel=3)
        finally:
            for future in futures:
                future.cancel()


def at_a_time(cases: Sequence[Case]) -> int:
    """How many cases are read at a time: one a core, but no more than fit into half of the memory."""
    # A case in work: gzip holds int16 in a third, float32 is twice that, and resampling has it twice.
    largest = max(sum(path.stat().st_size for path in case.images) for case in cases)
    return max(1, min(cores(), machine_memory() // 2 // max(1, 12 * largest)))


def _fill(case: Case, entry: Path, dataset: Dataset, recipe: Recipe) -> str | None:
    """Makes one entry, unless another process has done so meanwhile; returns a warning."""
    with _locked(entry):
        if entry.is_dir():
            return None
        for left in entry.parent.glob(f".{entry.name}.*.part"):  # of a process that was killed
            shutil.rmtree(left)
        aside = entry.with_name(f".{entry.name}.{os.getpid()}.part")
        aside.mkdir()
        try:
            message = _write(case, aside, dataset, recipe)
            _sync(aside)
            os.replace(aside, entry)
            _sync(entry.parent)
        except OSError as error:
            raise OSError(error.errno, f"case {case.name}: cannot write to the cache ({error.strerror or error})",
                          str(entry.parent)) from error  # fmt: skip
        except ValueError as error:
            raise ValueError(f"case {case.name}: {error}") from error
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return message


def _write(case: Case, folder: Path, dataset: Dataset, recipe: Recipe) -> str | None:
    scans, labels = read_case(case, dataset, recipe.channels)
    placed = recipe.on_grid(scans)
    grid = placed.image.shape[1:]
    _check_disk(folder, placed.image.nbytes + 2 * math.prod(grid))
    spacing = [s * n / m for s, n, m in zip(placed.spacing, placed.cropped, grid, strict=True)]
    cut = int(np.count_nonzero(labels)) - int(np.count_nonzero(placed.frame(labels)))
    small = recipe.labels_on_grid(labels, placed)
    counts = {int(v): int(n) for v, n in zip(*np.unique(small, return_counts=True), strict=True)}
    _save(folder / "image.npy", placed.image)
    _save(folder / "labels.npy", small)
    _save(folder / "places.npy", _places(small, [v for v in counts if v != dataset.ignore]))
    about = {"name": case.name, "spacing": spacing, "counts": counts}
    with (folder / "case.json").open("w") as file:
        json.dump(about, file)
        file.flush()
        os.fsync(file.fileno())
    return (
        f"case {case.name}: {cut} labelled voxels lie where every channel is 0, and were cropped"
        if cut
        else None
    )


def read_case(
    case: Case, dataset: Dataset, channels: Sequence[str]
) -> tuple[list[Volume], NDArray[np.int16]]:
    """One Volume per channel and the label map (D, H, W), all on one grid and with values that dataset.json names.

    Raises ValueError, with the remedy, where they are not.
    """
    scans = check_scans([read(path) for path in case.images], channels)
    return scans, _read_labels(case, scans[0], dataset)


def _read_labels(case: Case, scan: Volume, dataset: Dataset) -> NDArray[np.int16]:
    volume = read(case.label)
    if volume.is_multichannel or not scan.same_grid(volume, SAME_PLACE):
        raise ValueError(
            f"the label map {case.label} does not lie on the image's voxels: {volume} and {scan}; resample the one to "
            "the other (Volume.resample_to, labels with mode='nearest')"
        )
    found = np.unique(volume.array)
    if foreign := sorted(set(found.tolist()) - set(dataset.values)):
        raise ValueError(f"{case.label} holds the value {foreign[0]:g}, dataset.json names {list(dataset.values)}; "
                         "correct the label map, or name the value")  # fmt: skip
    return volume.array.astype(np.int16)


def _places(labels: NDArray[np.int16], values: Sequence[int]) -> NDArray[np.int32]:
    """(n, 4): value, z, y, x; of labels with more than PLACES voxels so many by chance, always the same."""
    parts = [np.empty((0, 4), np.int32)]
    for value in values:
        flat = np.flatnonzero(labels == value)
        if len(flat) > PLACES:
            flat = flat[np.sort(np.random.default_rng(value).choice(len(flat), PLACES, replace=False))]
        parts.append(
            np.stack([np.full(len(flat), value), *np.unravel_index(flat, labels.shape)], 1).astype(np.int32)
        )
    return np.concatenate(parts)


def _check_disk(folder: Path, need: int) -> None:
    free = shutil.disk_usage(folder).free - _SPARE
    if need > free:
        raise OSError(28, f"it takes {need / 1e9:.2f} GB and the disk has {max(free, 0) / 1e9:.2f} GB; free some, or "
                      "choose another folder for the cache")  # fmt: skip


def _save(path: Path, array: NDArray[Any]) -> None:
    with path.open("wb") as file:
        np.save(file, array)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def _locked(entry: Path) -> Iterator[None]:
    """One at a time, among threads and processes; the system lets go of it when a process ends, however it ends.

    Windows has no fcntl: there two processes may do the same work, of which the rename keeps one.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    path = entry.with_name(f".{entry.name}.lock")
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
        if entry.is_dir():  # whoever waits for the lock, or makes it anew, will find the entry
            path.unlink(missing_ok=True)
