"""Cases, and folders of them as nnU-Net and the Medical Segmentation Decathlon lay them out."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..progress import bar
from ..volume import Volume, write
from . import imaging
from .anatomy import LABELS, draw
from .imaging import MODALITIES
from .shapes import Grid, rotation, smooth_noise

SHAPE = (72, 128, 128)  # (z, y, x)
FORMATS = ("nnunet", "msd")
_FIELD_OF_VIEW = (255.0, 350.0, 350.0)  # (z, y, x) in mm, where no spacing is given
_SMALLEST = 8  # voxels along an axis
_CENTRE = (0.0, -2.0, 20.0)  # of the field of view, in the patient


@dataclass(frozen=True)
class Case:
    """One patient: an image per modality, all on one grid, and the truth (uint8, LABELS)."""

    images: tuple[Volume, ...]
    labels: Volume


def make_case(
    seed: int | Sequence[int],
    *,
    shape: Sequence[int] = SHAPE,
    spacing: Sequence[float] | None = None,
    modalities: Sequence[str] = ("CT",),
    vary: bool = True,
) -> Case:
    """A patient and their scan.

    Args:
        seed: an integer, or several; another seed is another patient and another scan.
        shape: (D, H, W) voxels, at least 8 each.
        spacing: (z, y, x) in mm; None: what shows the whole upper abdomen, 255 x 350 x 350 mm. A smaller
            field of view is centred on it and leaves organs out.
        modalities: any of "CT", "T1", "T2".
        vary: shape and spacing are typical ones, and each case has its own around them (up to a fifth
            less or more); False: exactly these.

    Returns:
        Case: int16 images, LPS, CT in Hounsfield units, MR in arbitrary ones and oblique.

    Raises:
        ValueError: a shape, spacing or modality that cannot be.

    Example:
        >>> case = make_case(7, shape=(48, 96, 96), vary=False)
        >>> case.images[0].shape, sorted(set(case.labels.array.ravel().tolist()))
        ((48, 96, 96), [0, 1, 2, 3, 4, 5])
    """
    size, voxel = _check(shape, spacing, modalities)
    rng = np.random.default_rng(seed)
    if vary:
        size, voxel = _vary(size, voxel, rng)
    grid = _grid(size, voxel, rng, oblique="CT" not in modalities)
    canvas = draw(grid, imaging.tissues(modalities, rng), rng)
    volume = Volume(canvas.labels, None, grid.affine)
    images = tuple(
        volume.like(imaging.acquire(image, modality, voxel, rng))
        for image, modality in zip(canvas.images, modalities, strict=True)
    )
    return Case(images, volume)


def make_dataset(
    out: str | Path,
    *,
    cases: int = 20,
    test_cases: int | None = None,
    seed: int = 0,
    shape: Sequence[int] = SHAPE,
    spacing: Sequence[float] | None = None,
    modalities: Sequence[str] = ("CT",),
    vary: bool = True,
    format: str = "nnunet",
    progress: bool = False,
) -> Path:
    """Writes a dataset: imagesTr, labelsTr, imagesTs, labelsTs (the truth of the test cases) and dataset.json.

    Case i of a seed is the same patient however many cases there are.

    Args:
        out: a folder that does not exist yet or is empty.
        cases: training cases; test_cases: None: a quarter of them, at least one.
        seed, shape, spacing, modalities, vary: as in `make_case`.
        format: "nnunet" (version 2: one file per channel) or "msd" (one file per case, channels in it).
        progress: show a bar (needs tqdm).

    Returns:
        The folder.

    Raises:
        ValueError: settings that cannot be, or a folder that holds something.
        ImportError: nibabel (or for the bar tqdm) is missing: pip install "convoxel[io]".

    Example:
        >>> make_dataset("Dataset001_Phantom", cases=8, modalities=("T1", "T2"))
        PosixPath('Dataset001_Phantom')
    """
    folder = Path(out)
    tests = max(1, cases // 4) if test_cases is None else test_cases
    _check(shape, spacing, modalities)
    if cases < 1 or tests < 0 or seed < 0:
        raise ValueError(
            f"phantom: expected at least 1 case, 0 test cases and a seed from 0 on, received {cases}, {tests}, {seed}"
        )
    if format not in FORMATS:
        raise ValueError(f"phantom: format must be one of {', '.join(FORMATS)}, received {format!r}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(
            f"{folder}: exists and is not an empty folder; choose another, nothing is overwritten"
        )
    names = {part: [f"phantom_{start + i:03d}" for i in range(n)] for part, n, start in
             (("Tr", cases, 0), ("Ts", tests, cases))}  # fmt: skip
    for part in names:
        for kind in ("images", "labels"):
            (folder / f"{kind}{part}").mkdir(parents=True, exist_ok=True)
    todo = [(part, i, name) for part in names for i, name in enumerate(names[part])]
    for part, i, name in bar(todo, "cases") if progress else todo:
        case = make_case(
            (seed, part == "Ts", i), shape=shape, spacing=spacing, modalities=modalities, vary=vary
        )
        _write_case(folder, part, name, case, format)
    description = _nnunet(modalities, cases) if format == "nnunet" else _msd(modalities, names)
    (folder / "dataset.json").write_text(json.dumps(description, indent=2) + "\n")
    return folder


def _check(
    shape: Sequence[int], spacing: Sequence[float] | None, modalities: Sequence[str]
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    if len(shape) != 3 or any(int(n) != n or n < _SMALLEST for n in shape):
        raise ValueError(
            f"phantom: shape must be three whole numbers (z, y, x) from {_SMALLEST} on, received {tuple(shape)}"
        )
    if not modalities or len(set(modalities)) != len(modalities) or set(modalities) - set(MODALITIES):
        raise ValueError(
            f"phantom: modalities must be different ones of {', '.join(MODALITIES)}, received {list(modalities)}"
        )
    if spacing is None:
        spacing = [extent / n for extent, n in zip(_FIELD_OF_VIEW, shape, strict=True)]
    if len(spacing) != 3 or not all(0 < s < 1000 for s in spacing):
        raise ValueError(f"phantom: spacing must be three sizes (z, y, x) in mm, received {tuple(spacing)}")
    return tuple(int(n) for n in shape), tuple(float(s) for s in spacing)


def _vary(
    shape: tuple[int, ...], spacing: tuple[float, ...], rng: np.random.Generator
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Slices vary more than planes, and a plane keeps its proportions, as on a scanner's console."""
    slices, plane = rng.uniform(0.85, 1.2), rng.uniform(0.92, 1.06)
    number, matrix = rng.uniform(0.85, 1.05) / slices, rng.uniform(0.92, 1.08)
    d, h, w = shape
    size = tuple(max(_SMALLEST, round(n * f)) for n, f in ((d, number), (h, matrix), (w, matrix)))
    z, y, x = spacing
    return size, tuple(round(s, 4) for s in (z * slices, y * plane / matrix, x * plane / matrix))


def _grid(
    shape: tuple[int, ...], spacing: tuple[float, ...], rng: np.random.Generator, oblique: bool
) -> Grid:
    """LPS voxels around the patient's middle; the patient lies a little turned and bent."""
    steps = np.diag([-spacing[2], -spacing[1], spacing[0]])
    affine = np.eye(4)
    affine[:3, :3] = (rotation(rng.uniform(-8, 8, 3)) if oblique else np.eye(3)) @ steps
    middle = affine[:3, :3] @ ((np.array(shape[::-1]) - 1) / 2)
    table = rng.uniform((-20, -20, -400), (20, 20, 400)).round(2)  # where the scanner has its origin
    affine[:3, 3] = table - middle
    affine = affine.astype(np.float32).astype(np.float64)  # what NIfTI can hold
    pose = np.eye(4)
    pose[:3, :3] = rotation(rng.uniform(-4, 4, 3))
    pose[:3, 3] = np.array(_CENTRE) + rng.uniform((-6, -6, -15), (6, 6, 15)) - pose[:3, :3] @ table
    to_patient = (pose @ affine).astype(np.float32)
    z, y, x = np.meshgrid(*(np.arange(n, dtype=np.float32) for n in shape), indexing="ij", sparse=True)
    points = np.stack([m[0] * x + m[1] * y + m[2] * z + m[3] for m in to_patient[:3]])
    bend = 0.0
    for axis in points:
        shift = np.float32(3.5) * smooth_noise(rng, shape, np.array(shape) * spacing / 75)
        axis += shift
        bend = max(bend, float(np.abs(shift).max()))
    return Grid(affine, pose, points, bend * np.sqrt(3))


def _write_case(folder: Path, part: str, name: str, case: Case, format: str) -> None:
    if format == "nnunet":
        for i, image in enumerate(case.images):
            write(image, folder / f"images{part}" / f"{name}_{i:04d}.nii.gz")
    else:
        channels: NDArray[Any] = np.stack([image.array for image in case.images])
        stack = case.labels.like(channels if len(channels) > 1 else channels[0])
        write(stack, folder / f"images{part}" / f"{name}.nii.gz")
    write(case.labels, folder / f"labels{part}" / f"{name}.nii.gz")


_ABOUT = "Generated by convoxel phantom: no patient, truth known"


def _nnunet(modalities: Sequence[str], cases: int) -> dict[str, Any]:
    return {
        "name": "Phantom",
        "description": _ABOUT,
        "channel_names": {str(i): modality for i, modality in enumerate(modalities)},
        "labels": LABELS,
        "numTraining": cases,
        "file_ending": ".nii.gz",
    }


def _msd(modalities: Sequence[str], names: dict[str, list[str]]) -> dict[str, Any]:
    return {
        "name": "Phantom",
        "description": _ABOUT,
        "tensorImageSize": "4D" if len(modalities) > 1 else "3D",
        "modality": {str(i): modality for i, modality in enumerate(modalities)},
        "labels": {str(value): name for name, value in LABELS.items()},
        "numTraining": len(names["Tr"]),
        "numTest": len(names["Ts"]),
        "training": [
            {"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"}
            for name in names["Tr"]
        ],
        "test": [f"./imagesTs/{name}.nii.gz" for name in names["Ts"]],
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `convoxel phantom`."""
    parser.add_argument("out", metavar="OUT", help="folder to make, such as Dataset001_Phantom")
    parser.add_argument(
        "--cases", type=int, default=20, metavar="N", help="training cases (default: %(default)s)"
    )
    parser.add_argument(
        "--test-cases", type=int, metavar="N", help="default: a quarter of the training cases"
    )
    parser.add_argument("--seed", type=int, default=0, help="another seed, other patients (default: 0)")
    parser.add_argument(
        "--shape",
        type=int,
        nargs=3,
        default=SHAPE,
        metavar=("Z", "Y", "X"),
        help="voxels (default: 72 128 128)",
    )
    parser.add_argument(
        "--spacing",
        type=float,
        nargs=3,
        metavar=("Z", "Y", "X"),
        help="mm (default: the whole upper abdomen)",
    )
    parser.add_argument(
        "--modalities", nargs="+", default=["CT"], metavar="M", help="CT, T1, T2 (default: CT)"
    )
    parser.add_argument(
        "--same-grid", action="store_true", help="every case with exactly this shape and spacing"
    )
    parser.add_argument("--format", choices=FORMATS, default="nnunet", help="folder format (default: nnunet)")


def run_command(args: argparse.Namespace) -> int:
    """`convoxel phantom`: 0 when the dataset is written."""
    folder = make_dataset(
        args.out,
        cases=args.cases,
        test_cases=args.test_cases,
        seed=args.seed,
        shape=args.shape,
        spacing=args.spacing,
        modalities=args.modalities,
        vary=not args.same_grid,
        format=args.format,
        progress=sys.stderr.isatty(),
    )
    tests = sum(1 for _ in (folder / "labelsTs").iterdir())
    print(
        f"{folder}: {args.cases} training and {tests} test cases, {', '.join(args.modalities)}; dataset.json says what"
    )
    return 0
