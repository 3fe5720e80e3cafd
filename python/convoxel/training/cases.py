"""A dataset to learn from: the folders of nnU-Net (version 2) and of the Medical Segmentation Decathlon."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..doctor.catalogue import ERROR
from ..doctor.dataset import open_dataset

SPLITS = "splits_final.json"  # nnU-Net's name
_SEED = 12345  # nnU-Net's
_IGNORE = "ignore"

Fold = tuple[list[str], list[str]]  # names of the cases to train on, and to validate on


@dataclass(frozen=True)
class Case:
    """One patient: a file per channel, or one file with all of them, and the label map."""

    name: str
    images: tuple[Path, ...]
    label: Path


@dataclass(frozen=True)
class Dataset:
    """Training cases that all have their channels and their label."""

    folder: Path
    name: str
    channels: tuple[str, ...]
    labels: Mapping[str, int | tuple[int, ...]]  # background included; a region is a tuple; without ignore
    ignore: int | None  # value of voxels that nobody labelled
    region_order: tuple[int, ...]  # of the regions: later ones overwrite (nnU-Net's regions_class_order)
    cases: tuple[Case, ...]  # sorted by name

    @property
    def values(self) -> tuple[int, ...]:
        """The values that a label map may hold, ignore included, ascending.

        >>> find_cases("Dataset001_Phantom").values
        (0, 1, 2, 3, 4, 5)
        """
        found = {
            v for value in self.labels.values() for v in (value if isinstance(value, tuple) else (value,))
        }
        return tuple(sorted(found | ({self.ignore} if self.ignore is not None else set())))

    @property
    def has_regions(self) -> bool:
        return any(isinstance(value, tuple) for value in self.labels.values())

    @property
    def names(self) -> list[str]:
        return [case.name for case in self.cases]

    def folds(self, k: int = 5, seed: int = _SEED) -> list[Fold]:
        """splits_final.json of the folder where there is one, else `folds` of the names.

        Raises ValueError if the file names cases that are not there, or validates on what it trains on.
        """
        path = self.folder / SPLITS
        return _read_splits(path, self.names) if path.is_file() else folds(self.names, k, seed)


def find_cases(folder: str | os.PathLike[str]) -> Dataset:
    """The training cases of a dataset folder (dataset.json, imagesTr, labelsTr).

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: dataset.json is missing or wrong, or a case lacks a channel or its label; what is wrong, where,
            and the remedy. The scans themselves are not opened: `convoxel doctor` looks at them.

    >>> dataset = find_cases("Dataset001_Phantom")
    >>> dataset.channels, dataset.labels["liver"], len(dataset.cases)
    (('CT',), 1, 20)
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(2, "no such dataset folder", str(folder))
    found, findings = open_dataset(folder)
    errors = [f"{f.path}: {f.found}; {f.remedy}" for f in findings if f.severity == ERROR]
    if errors:
        more = f" (and {len(errors) - 1} more: convoxel doctor {folder})" if len(errors) > 1 else ""
        raise ValueError(errors[0] + more)
    if not (folder / "dataset.json").is_file() or found.channels is None:
        raise ValueError(f"{folder / 'dataset.json'}: it does not name the channels and labels; convoxel doctor "
                         f"{folder} says what is wrong")  # fmt: skip
    content = json.loads((folder / "dataset.json").read_bytes())
    labels = _labels(content.get("labels"), folder)
    ignore = labels.pop(_IGNORE, None)
    if isinstance(ignore, tuple):
        raise ValueError(f"{folder / 'dataset.json'}: ignore should be one number, it is {list(ignore)}")
    order = tuple(int(value) for value in content.get("regions_class_order") or ())
    cases = sorted((case for case in found.cases if case.training), key=lambda case: case.name)
    return Dataset(
        folder=folder,
        name=str(content.get("name") or folder.resolve().name),
        channels=tuple(found.channels),
        labels=labels,
        ignore=ignore,
        region_order=order,
        cases=tuple(_case(case) for case in cases),
    )


def _case(found: Any) -> Case:
    images = tuple(path for _, path in sorted(found.images.items()))
    return Case(found.name, images, found.label)


def _labels(found: Any, folder: Path) -> dict[str, Any]:
    """name: value, or values of a region; the Decathlon's value: name turned round."""
    path = folder / "dataset.json"
    if not isinstance(found, dict) or not found:
        raise ValueError(
            f'{path}: labels should be an object such as {{"background": 0, "liver": 1}}, it is {found!r:.80}'
        )
    if all(isinstance(value, str) and not _is_number(value) for value in found.values()):
        found = {name: number for number, name in found.items()}
    try:
        labels = {
            str(name): tuple(map(int, value)) if isinstance(value, list) and len(value) > 1
            else int(value[0] if isinstance(value, list) else value)
            for name, value in found.items()
        }  # fmt: skip
    except (TypeError, ValueError, IndexError) as error:
        raise ValueError(f"{path}: labels has a value that is no number ({error})") from error
    flat = [v for value in labels.values() for v in (value if isinstance(value, tuple) else (value,))]
    if min(flat) < 0 or max(flat) >= 1 << 15:
        raise ValueError(
            f"{path}: label values should be from 0 to 32767, they are {min(flat)} to {max(flat)}"
        )
    return labels


def _is_number(text: str) -> bool:
    return text.lstrip("-").isdigit()


def folds(names: Iterable[str], k: int = 5, seed: int = _SEED) -> list[Fold]:
    """k times (train, validation): every case is validated on once; the order of `names` does not matter.

    With the default seed these are nnU-Net's own folds (sklearn's KFold with shuffle), so that results compare.

    Raises ValueError for fewer cases than folds, or names that are there twice.

    >>> folds(["a", "b", "c", "d"], k=2)
    [(['b', 'c'], ['a', 'd']), (['a', 'd'], ['b', 'c'])]
    """
    cases = sorted(names)
    if len(set(cases)) < len(cases):
        raise ValueError(f"folds: the cases need different names, received {cases}")
    if not 2 <= k <= len(cases):
        raise ValueError(f"folds: {len(cases)} cases cannot make {k} folds; expected 2 to {len(cases)}")
    order = np.arange(len(cases))
    np.random.RandomState(seed).shuffle(order)
    result = []
    for part in np.array_split(order, k):
        held = set(part.tolist())
        train = [case for i, case in enumerate(cases) if i not in held]
        result.append((train, [case for i, case in enumerate(cases) if i in held]))
    return result


def _read_splits(path: Path, names: Sequence[str]) -> list[Fold]:
    try:
        found = json.loads(path.read_bytes())
        splits = [([str(n) for n in fold["train"]], [str(n) for n in fold["val"]]) for fold in found]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f'{path}: expected a list of {{"train": [names], "val": [names]}} ({error}); remove it for folds at random'
        ) from error
    for number, (train, val) in enumerate(splits):
        if missing := sorted(({*train, *val}) - set(names)):
            raise ValueError(f"{path}: fold {number} names {missing[0]}, which the dataset does not have")
        if both := sorted(set(train) & set(val)):
            raise ValueError(
                f"{path}: fold {number} trains and validates on {both[0]}; keep it in one of them"
            )
        if not train:
            raise ValueError(f"{path}: fold {number} has no case to train on")
    return splits
