"""`convoxel evaluate`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from .folders import evaluate
from .picture import worst_cases
from .result import RULE, Result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `convoxel evaluate`."""
    parser.add_argument("predictions", type=Path, metavar="PREDICTIONS", help="folder of label maps, or one")
    parser.add_argument("truth", type=Path, metavar="TRUTH", help="folder of label maps of the same names")
    parser.add_argument(
        "--dataset",
        type=Path,
        metavar="FILE",
        help="dataset.json with names, regions and ignore label (default: in TRUTH or above it, if there is one)",
    )
    parser.add_argument(
        "--tolerance",
        nargs="+",
        default=[],
        metavar="MM",
        help="of the surface Dice, in mm, also by structure: 2 lesion=1 (default: 1)",
    )
    parser.add_argument(
        "--against", type=Path, metavar="OTHER", help="another model's predictions, compared case by case"
    )
    parser.add_argument(
        "--lesions", action="store_true", help="count connected pieces that were found, missed and made up"
    )
    parser.add_argument("--cases", nargs="+", metavar="CASE", help="only these (default: all in TRUTH)")
    parser.add_argument(
        "-o",
        "--out",
        type=Path,
        metavar="FOLDER",
        help="write metrics.csv, evaluation.json, worst.png into it",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything as JSON")
    parser.add_argument(
        "--images", type=Path, metavar="FOLDER", help="scans to draw the worst cases on, CASE_0000.nii.gz ..."
    )
    parser.add_argument(
        "--worst",
        type=int,
        default=6,
        metavar="K",
        help="so many worst cases in worst.png (default: 6; 0: none)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: 0)")


def run_command(args: argparse.Namespace) -> int:
    """`convoxel evaluate`: 0 when every prediction was scored."""
    if args.worst < 0 or args.seed < 0:
        raise ValueError(f"--worst and --seed must be 0 or more, received {args.worst}, {args.seed}")
    if args.images is not None and args.out is None:
        raise ValueError("--images is for the picture of the worst cases; give a folder for it with -o")
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
    result = evaluate(
        args.predictions,
        args.truth,
        dataset=args.dataset,
        tolerance=tolerances(args.tolerance),
        against=args.against,
        lesions=args.lesions,
        cases=args.cases,
        seed=args.seed,
        progress=sys.stderr.isatty(),
    )
    print(f"{len(result.cases)} cases; labels of {result.dataset or 'the files, no dataset.json'}\n")
    print(result)
    print(f"\n{RULE}")
    _warn(result, args.predictions)
    if result.other is not None:
        _warn(result.other, args.against)
    if args.json is not None:
        args.json.write_text(_json(result))
    if args.out is not None:
        _write(result, args.out, args.worst, args.images)
    return 0


def tolerances(words: list[str]) -> dict[str, float]:
    """By structure, "" for the others.

    >>> tolerances(["2", "lesion=1"])
    {'': 2.0, 'lesion': 1.0}
    """
    found = {}
    for word in words:
        name, _, number = word.rpartition("=")
        try:
            found[name] = float(number)
        except ValueError:
            raise ValueError(f"--tolerance takes mm and name=mm, received {word!r}") from None
    return found


def _warn(result: Result, folder: Path) -> None:
    for names, what in (
        (result.missing, "no prediction's file, counted as missed"),
        (result.unmatched, "no truth, not scored"),
    ):
        if names:
            print(f"{folder}: {what}: {', '.join(names)}", file=sys.stderr)


def _json(result: Result) -> str:
    return json.dumps(result.to_json(), indent=2) + "\n"


def _write(result: Result, out: Path, worst: int, images: Path | None) -> None:
    (out / "metrics.csv").write_text(result.to_csv())
    (out / "evaluation.json").write_text(_json(result))
    written = ["metrics.csv", "evaluation.json"]
    if result.other is not None:
        (out / "metrics_against.csv").write_text(result.other.to_csv())
        written.append("metrics_against.csv")
    if worst and worst_cases(result, out / "worst.png", worst, images):
        written.append("worst.png")
    print(f"{out}: {', '.join(written)}")
