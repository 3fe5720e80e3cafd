"""`convoxel predict` and `convoxel import`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

from .. import memory
from .cases import Case, find
from .trained import TrainedModel

MODEL_HELP = (
    "folder of convoxel train, nnU-Net v2 model folder (with plans.json), MONAI bundle (folder or .zip), or "
    ".safetensors file"
)


def add_predict_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "inputs",
        type=Path,
        nargs="+",
        metavar="INPUT",
        help="scans (also DICOM folders), or folders of CASE_0000.nii.gz",
    )
    parser.add_argument(
        "-o",
        "--out",
        type=Path,
        required=True,
        metavar="OUT",
        help="folder, or a file if there is one scan",
    )
    _add_choice(parser)
    parser.add_argument(
        "--patch-size",
        type=int,
        nargs="+",
        metavar="N",
        help="z y x (2-D: y x) in voxels; for files of Model.save",
    )
    parser.add_argument(
        "--overlap",
        type=float,
        help="of neighbouring windows, 0 to below 1 (default: the model's; nnU-Net 0.5)",
    )
    parser.add_argument(
        "--mirror",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="average over flips along the axes that the model allows: slower by 2 for each (default: on)",
    )
    parser.add_argument(
        "--batch", type=int, default=1, metavar="N", help="windows per call of the network (default 1)"
    )
    parser.add_argument(
        "--max-ram", metavar="BYTES", help='memory that must do: "4GB"; a scratch file in OUT helps'
    )
    parser.add_argument(
        "--save-probabilities", action="store_true", help="also write CASE_probabilities.nii.gz (K, D, H, W)"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="predict again what is there already (default: skip it)"
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress bar, only the summary")


def add_import_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "out", type=Path, metavar="OUT", help="a file to write, its name ends in .safetensors"
    )
    _add_choice(parser)


def _add_choice(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--folds",
        nargs="+",
        metavar="FOLD",
        help="folds of a cross-validation: 0 1 ... or all (default: each)",
    )
    parser.add_argument(
        "--configuration",
        metavar="NAME",
        help="nnU-Net's: 3d_fullres, 3d_lowres or 2d, where there are several",
    )


def run_import(args: argparse.Namespace) -> int:
    from . import load, save

    model = load(args.model, folds=args.folds, configuration=args.configuration)
    save(model, args.out)
    print(f"{args.out}: {_describe(model)}, {args.out.stat().st_size / 1e6:.1f} MB")
    return 0


def run_predict(args: argparse.Namespace) -> int:
    from . import load

    if args.overlap is not None and not 0 <= args.overlap < 1:
        raise ValueError(f"--overlap must be from 0 to below 1, received {args.overlap}")
    if args.batch < 1:
        raise ValueError(f"--batch must be at least 1, received {args.batch}")
    max_ram = None if args.max_ram is None else memory.as_bytes("--max-ram", args.max_ram)
    model = load(args.model, folds=args.folds, configuration=args.configuration, patch_size=args.patch_size)
    cases = find(args.inputs, args.out, len(model.recipe.channels))
    if args.out != cases[0].target:
        args.out.mkdir(parents=True, exist_ok=True)
    memory.keep_freed(max_ram is None)
    print(f"{_describe(model)}; {len(cases)} case(s)")

    def predict(case: Case) -> None:
        from .. import volume

        labels = model.predict(
            [volume.read(file) for file in case.files],
            overlap=args.overlap,
            mirror=args.mirror,
            batch_size=args.batch,
            max_ram=max_ram,
            scratch=case.target.parent,
            probabilities=case.probabilities if args.save_probabilities else None,
            progress=not args.quiet,
        )
        volume.write(labels, case.target)

    return _each(cases, predict, args.overwrite, args.save_probabilities)


def _each(cases: list[Case], predict: Callable[[Case], None], overwrite: bool, probabilities: bool) -> int:
    """Every case, whatever becomes of the others; exit code 0 if all have their labels."""
    from ..cli import USER_ERRORS, plain

    done, skipped, failed = 0, 0, list[str]()
    for i, case in enumerate(cases, 1):
        there = case.target.exists() and (not probabilities or case.probabilities.exists())
        if there and not overwrite:
            skipped += 1
            continue
        print(f"[{i}/{len(cases)}] {case.name}", flush=True)
        start = time.perf_counter()
        try:
            predict(case)
        except USER_ERRORS as error:
            failed.append(case.name)
            print(f"convoxel predict: {case.name}: {plain(error)}", file=sys.stderr, flush=True)
            continue
        done += 1
        print(f"  {case.target} in {time.perf_counter() - start:.1f} s", flush=True)
    words = [f"{done} predicted"]
    if skipped:
        words.append(f"{skipped} there already (--overwrite predicts again)")
    if failed:
        words.append(f"{len(failed)} failed: {', '.join(failed)}")
    print("; ".join(words), file=sys.stderr if failed else sys.stdout)
    return 1 if failed else 0


def _describe(model: TrainedModel) -> str:
    count = len(model.networks)
    recipe = model.recipe
    network = model.description["name"].rpartition(".")[2]
    several = f"{count} x " if count > 1 else ""
    return (
        f"{model.name}: {several}{network}, {len(recipe.channels)} channel(s) ({', '.join(recipe.channels)})"
    )
