"""What is scored: labels and regions as dataset.json has them, and their tolerances."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..doctor.dataset import _read_json

Tolerance = float | Mapping[str, float]
DEFAULT_TOLERANCE = 1.0  # mm


@dataclass(frozen=True)
class Structures:
    """Names and the label values of each, and the value that is ignored."""

    values: dict[str, tuple[int, ...]]
    ignore: int | None = None

    @property
    def known(self) -> set[int]:
        """Values that may be in a file."""
        return {0, *(v for values in self.values.values() for v in values)} | (
            set() if self.ignore is None else {self.ignore}
        )


def read_structures(path: Path) -> Structures:
    """Labels, regions and the ignore label of a dataset.json, nnU-Net's or the Decathlon's; without background.

    ValueError says what is wrong with it.
    """
    content, findings = _read_json(path)
    if content is None or findings:
        raise ValueError(f"{path}: {findings[0].found}; {findings[0].remedy}")
    labels = content.get("labels")
    if not isinstance(labels, dict) or not labels:
        raise ValueError(f'{path}: expected "labels" with names and numbers, received {labels!r}')
    if all(re.fullmatch(r"\d+", key) for key in labels) and all(isinstance(v, str) for v in labels.values()):
        labels = {name: int(number) for number, name in labels.items()}
    values = {name: _values(name, value, path) for name, value in labels.items()}
    ignore = values.pop("ignore", None)
    if ignore is not None and len(ignore) != 1:
        raise ValueError(f"{path}: ignore must be one number, received {list(ignore)}")
    values = {name: several for name, several in values.items() if several != (0,)}
    if not values:
        raise ValueError(f"{path}: no label besides the background; nothing can be scored")
    return Structures(values, None if ignore is None else ignore[0])


def _values(name: str, value: Any, path: Path) -> tuple[int, ...]:
    several = value if isinstance(value, list) else [value]
    try:
        numbers = tuple(sorted({int(v) for v in several}))
    except (TypeError, ValueError):
        numbers = ()
    if not numbers or numbers[0] < 0 or (numbers[0] == 0 and len(numbers) > 1):
        raise ValueError(
            f"{path}: label {name!r}: expected a number or a list of numbers from 1 on, received {value!r}"
        )
    return numbers


def find_dataset(truth: Path) -> Path | None:
    """The dataset.json beside the truths: in their folder, or in the folder above, as nnU-Net has it."""
    folder = truth if truth.is_dir() else truth.parent
    places = (folder / "dataset.json", folder.resolve().parent / "dataset.json")
    return next((path for path in places if path.is_file()), None)


def tolerance_of(tolerance: Tolerance, name: str) -> float:
    """In mm, of one structure.

    >>> tolerance_of({"": 2.0, "lesion": 1.0}, "liver")
    2.0
    """
    if isinstance(tolerance, Mapping):
        return float(tolerance.get(name, tolerance.get("", DEFAULT_TOLERANCE)))
    return float(tolerance)


def check_tolerance(tolerance: Tolerance, names: Collection[str] | None) -> None:
    """ValueError for a tolerance below 0, or for a structure that is not there; names: None: not known yet."""
    given = tolerance if isinstance(tolerance, Mapping) else {"": float(tolerance)}
    for name, value in given.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"tolerance{f' of {name}' * bool(name)} must be 0 mm or more, received {value}")
        if name and names is not None and name not in names:
            raise ValueError(f"tolerance of {name}: no such structure; there are {', '.join(names)}")
