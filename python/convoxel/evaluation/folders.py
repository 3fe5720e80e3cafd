"""Two folders of label maps, case by case."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..progress import bar
from ..volume import VolumeError
from .cases import Case, find, load
from .result import Result, completed
from .scoring import Scores, need_scipy, score
from .structures import (
    DEFAULT_TOLERANCE,
    Structures,
    Tolerance,
    check_tolerance,
    find_dataset,
    read_structures,
    tolerance_of,
)

AnyPath = str | os.PathLike[str]


def evaluate(
    predictions: AnyPath,
    truth: AnyPath,
    *,
    dataset: AnyPath | None = None,
    tolerance: Tolerance = DEFAULT_TOLERANCE,
    against: AnyPath | None = None,
    lesions: bool = False,
    cases: Sequence[str] | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Result:
    """Scores of every structure in every case, as `scores` has them, and their summaries.

    A truth without a prediction's file counts as if nothing had been predicted there (`Result.missing`); a
    prediction without a truth is not scored (`Result.unmatched`).

    Args:
        predictions, truth: folders of label maps of the same names; or two files.
        dataset: a dataset.json that names labels, regions and the ignore label; None: the one in the truths' folder or
            above it; where there is none, every value in the files but 0 is a structure, named by its number.
        tolerance: in mm, of the surface Dice; or name -> mm, "" for the others (default 1 mm).
        against: a second model's predictions of the same cases.
        lesions: count connected pieces that were found, missed, and falsely predicted.
        cases: only these; None: all that have a truth.
        seed: of the bootstrap.
        progress: show a bar (needs tqdm).

    Raises:
        FileNotFoundError: a folder is not there.
        ValueError: nothing fits together; or files that cannot be read, lie on another grid than
            the truth, or hold values that dataset.json does not name: each is named, and there is no result.
        ImportError: scipy or nibabel is missing: pip install "convoxel[evaluate]".

    Example:
        >>> result = evaluate("predictions", "Dataset001_Phantom/labelsTs")
        >>> result.summary["liver"]["dice"]
        Summary(n=5, mean=0.962, median=0.965, interval=(0.953, 0.971))
    """
    need_scipy()
    path = find_dataset(Path(truth)) if dataset is None else Path(dataset)
    structures = None if path is None else read_structures(path)
    check_tolerance(tolerance, None if structures is None else structures.values)
    folders = [predictions] if against is None else [predictions, against]
    models = [find(Path(folder), Path(truth), cases) for folder in folders]
    errors: list[str] = []
    found = [_score(model, structures, tolerance, lesions, errors, progress) for model, _ in models]
    if errors:
        number = sum(len(model) for model, _ in models)
        raise ValueError(f"{len(errors)} of {number} predictions cannot be scored: {'; '.join(errors)}")
    if structures is None:
        structures = _numbered(found)
        check_tolerance(tolerance, structures.values)
    names = list(structures.values)
    first, *others = (
        Result(
            model,
            completed(scores, names, lesions),
            structures.values,
            {name: tolerance_of(tolerance, name) for name in names},
            path,
            structures.ignore,
            unmatched,
            seed,
        )
        for (model, unmatched), scores in zip(models, found, strict=True)
    )
    return replace(first, other=others[0]) if others else first


def _numbered(found: list[dict[str, dict[str, Scores]]]) -> Structures:
    values = sorted({int(name) for scores in found for case in scores.values() for name in case})
    if not values:
        raise ValueError("no truth and no prediction holds anything but 0; nothing can be scored")
    return Structures({str(v): (v,) for v in values})


def _score(
    cases: list[Case],
    structures: Structures | None,
    tolerance: Tolerance,
    lesions: bool,
    errors: list[str],
    progress: bool,
) -> dict[str, dict[str, Scores]]:
    """case -> structure -> scores, of the structures in either file; what is wrong goes to `errors`."""
    found: dict[str, dict[str, Scores]] = {}
    for case in bar(cases, "cases") if progress else cases:
        try:
            prediction, truth, unknown = load(case, structures)
        except VolumeError as error:
            errors.append(f"{case.name}: {error}")
            continue
        if structures is None:
            named = Structures({str(v): (v,) for v in sorted({*prediction.values, *truth.values})})
        else:
            named = structures
        found[case.name] = {
            name: score(prediction, truth, several, tolerance_of(tolerance, name), unknown, lesions)
            for name, several in named.values.items()
        }
    return found
