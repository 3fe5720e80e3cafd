"""Files of predictions and truths: which belong together, and whether they lie on one grid."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..doctor.cases import compare
from ..doctor.catalogue import NOTE
from ..doctor.dataset import ENDINGS
from ..doctor.scans import grid_of
from ..volume import Volume, VolumeError, read
from .scoring import LabelMap, empty, ignored, whole_numbers
from .structures import Structures


class Case(NamedTuple):
    """A truth and its prediction; None: there is no such file."""

    name: str
    truth: Path
    prediction: Path | None


def find(predictions: Path, truth: Path, names: Sequence[str] | None = None) -> tuple[list[Case], list[str]]:
    """The cases of two folders, by file names without their ending, and predictions that have no truth.

    Two files are one case. names: only these cases; None: every one that has a truth.

    Raises FileNotFoundError, and ValueError where nothing fits together.
    """
    if predictions.is_file() and truth.is_file():
        return [Case(_stem(truth.name), truth, predictions)], []
    ours, theirs = _files(predictions), _files(truth)
    if names is not None:
        if unknown := [name for name in names if name not in theirs]:
            raise ValueError(f"{truth}: no truth for {', '.join(unknown)}")
        theirs = {name: theirs[name] for name in dict.fromkeys(names)}
    if not theirs.keys() & ours.keys():
        some = f"{next(iter(ours))} ..." if ours else "nothing"
        raise ValueError(
            f"{predictions}: no prediction has the name of a truth: expected {next(iter(theirs))} ... as in {truth}, "
            f"found {some}"
        )
    extra = sorted(ours.keys() - theirs.keys()) if names is None else []
    return [Case(name, path, ours.get(name)) for name, path in theirs.items()], extra


def _files(folder: Path) -> dict[str, Path]:
    if not folder.exists():
        raise FileNotFoundError(2, "no such folder", str(folder))
    if not folder.is_dir():
        raise ValueError(f"{folder}: expected two folders or two files")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not path.is_file() or not path.name.endswith(ENDINGS):
            continue
        name = _stem(path.name)
        if name in found:
            raise ValueError(f"{folder}: {found[name].name} and {path.name} are one case twice; remove one")
        found[name] = path
    if not found:
        inside = [name for name in ("labelsTs", "labelsTr") if (folder / name).is_dir()]
        hint = f"; give one of its folders, {folder / inside[0]}" if inside else ""
        raise ValueError(f"{folder}: no label maps here, expected {', '.join(ENDINGS)}{hint}")
    return found


def _stem(name: str) -> str:
    return next((name.removesuffix(ending) for ending in ENDINGS if name.endswith(ending)), name)


def load(case: Case, structures: Structures | None) -> tuple[LabelMap, LabelMap, NDArray[np.bool_] | None]:
    """Prediction (no file: an empty one) and truth, on one grid and of known values, and what is ignored.

    Raises VolumeError, with the file and the remedy.
    """
    truth = read(case.truth)
    prediction = None
    if case.prediction is not None:
        prediction = read(case.prediction)
        for finding in compare("label", grid_of(prediction), case.prediction, grid_of(truth), "the truth"):
            if finding.severity != NOTE:
                raise VolumeError(
                    f"{case.prediction}: {finding.found}; predict on the truth's grid, or resample with "
                    "Volume.resample_to(truth, mode='nearest')"
                )
    ours, theirs = (
        _labels(volume, path)
        for volume, path in ((prediction or empty(truth), case.prediction), (truth, case.truth))
    )
    unknown = None if structures is None else ignored(theirs, structures.ignore)
    maps = LabelMap(ours, truth.spacing, unknown), LabelMap(theirs, truth.spacing, unknown)
    if structures is not None:
        for found, path in zip(maps, (case.prediction, case.truth), strict=True):
            if more := set(found.values) - structures.known:
                raise VolumeError(
                    f"{path}: it has the value {min(more)}, which dataset.json does not name; add it there, or "
                    "correct the file"
                )
    return (*maps, unknown)


def _labels(volume: Volume, path: Path | None) -> NDArray[Any]:
    try:
        return whole_numbers(volume)
    except VolumeError as error:
        raise VolumeError(f"{path}: {error}") from None
