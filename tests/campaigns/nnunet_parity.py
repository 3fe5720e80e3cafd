"""convoxel beside nnU-Net's own predictor, on the same models and scans: differing voxels, time, peak memory.

    PYTHONPATH=python python tests/campaigns/nnunet_parity.py            # the cases of tests/nnunet_model.py
    PYTHONPATH=python python tests/campaigns/nnunet_parity.py --large    # one CT, each program in its own process
    PYTHONPATH=python python tests/campaigns/nnunet_parity.py --store    # writes tests/data/nnunet_expected.npz

needs `pip install torch==2.13.0 nnunetv2==2.8.1 convoxel[predict]`. nnU-Net sums windows in float16 and resamples
in it; "float32" is the same program with torch.half replaced by torch.float32 while it runs.
"""

import argparse
import contextlib
import io
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.update({name: "/nowhere" for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")})
os.environ.setdefault("nnUNet_def_n_proc", "2")  # its threads

import numpy as np
import torch

import nnunet_model
from convoxel import importers, memory, volume

STORE = Path(__file__).parents[1] / "data" / "nnunet_expected.npz"
SAMPLES = 64  # voxels of the preprocessed image that are stored, at seeded places


@contextlib.contextmanager
def sums_in(dtype: torch.dtype) -> Iterator[None]:
    half, torch.half = torch.half, dtype
    try:
        yield
    finally:
        torch.half = half


def theirs(model: Path, files: list[Path], out: Path, dtype: torch.dtype) -> np.ndarray:
    """nnU-Net's labels (D, H, W), through its own writer and back; and its preprocessed image."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
        predictor.initialize_from_trained_model_folder(str(model), None, "checkpoint_final.pth")
        reader = predictor.plans_manager.image_reader_writer_class()
        data, properties = reader.read_images([str(file) for file in files])
        with sums_in(dtype):
            labels = predictor.predict_single_npy_array(data, properties)
        reader.write_seg(labels, str(out), properties)
    return volume.read(out).array


def their_image(model: Path, files: list[Path]) -> np.ndarray:
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
        predictor.initialize_from_trained_model_folder(str(model), None, "checkpoint_final.pth")
        preprocessor = predictor.configuration_manager.preprocessor_class(verbose=False)
        return preprocessor.run_case(
            [str(f) for f in files], None, predictor.plans_manager, predictor.configuration_manager,
            predictor.dataset_json,
        )[0]  # fmt: skip


def places(shape: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(0)
    return tuple(rng.integers(0, n, SAMPLES) for n in shape)


def small(names: list[str], store: bool) -> None:
    stored: dict[str, Any] = {}
    print(f"{'case':24}{'voxels':>8}{'classes':>8}{'differ (nnU-Net)':>18}{'differ (float32)':>18}")
    for name in names or nnunet_model.CASES:
        with tempfile.TemporaryDirectory() as folder:
            model, files = nnunet_model.CASES[name].make(Path(folder))
            half, full = (
                theirs(model, files, Path(folder) / "out.nii.gz", dtype)
                for dtype in (torch.half, torch.float32)
            )
            ours = importers.load(model).predict([volume.read(file) for file in files]).array
            image = their_image(model, files)
        stored.update({f"{name}/labels": full.astype(np.uint8), f"{name}/shape": np.array(image.shape)})
        stored[f"{name}/values"] = image[places(image.shape)].astype(np.float32)
        counts = [int((other != ours).sum()) for other in (half, full)]
        print(f"{name:24}{ours.size:8}{len(np.unique(full)):8}{counts[0]:18}{counts[1]:18}", flush=True)
    if store:
        STORE.parent.mkdir(exist_ok=True)
        np.savez_compressed(STORE, **stored)
        print(f"{STORE}: {STORE.stat().st_size} bytes")


def large(classes: int) -> None:
    """A CT of 128 x 256 x 256 at (2, 1, 1) mm, a network for (1.5, 1.5, 1.5) mm, no mirroring."""
    labels = {"background": 0, **{f"organ {i}": i for i in range(1, classes)}}
    plan = nnunet_model.plans(spacing=(1.5, 1.5, 1.5), patch_size=(64, 64, 64))
    case = nnunet_model.Case(plan, nnunet_model.dataset(labels=labels), mirror=None, shape=(128, 256, 256),
                             spacing=(2.0, 1.0, 1.0))  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        model, files = case.make(Path(folder))
        results = {}
        print(f"{classes} classes, {case.shape} voxels; {'program':12}{'seconds':>10}{'peak GB':>10}")
        for program in ("nnunet", "convoxel"):
            out = Path(folder) / f"{program}.nii.gz"
            command = [sys.executable, __file__, "--run", program, str(model), str(files[0]), str(out)]
            print(
                f"{program:12}{subprocess.run(command, check=True, capture_output=True, text=True).stdout}",
                end="",
            )
            results[program] = volume.read(out).array
        differ = int((results["nnunet"] != results["convoxel"]).sum())
        print(f"{differ} of {results['nnunet'].size} voxels differ (nnU-Net sums in float16)")


def run(program: str, model: Path, file: Path, out: Path) -> None:
    """One program in this process; prints its seconds, loading included, and the process's peak."""
    start = time.perf_counter()
    if program == "nnunet":
        theirs(model, [file], out, torch.half)
    else:
        memory.keep_freed(True)
        volume.write(importers.load(model).predict([volume.read(file)]), out)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"{seconds:10.1f}{peak / 1e9:10.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", choices=[[], *nnunet_model.CASES], metavar="CASE")
    parser.add_argument("--store", action="store_true")
    parser.add_argument("--large", type=int, nargs="?", const=20, metavar="CLASSES")
    parser.add_argument("--run", nargs=4, metavar=("PROGRAM", "MODEL", "SCAN", "OUT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ["nnUNet_def_n_proc"]))
    if args.run:
        run(args.run[0], *map(Path, args.run[1:]))
    elif args.large:
        large(args.large)
    else:
        small(args.cases, args.store)


if __name__ == "__main__":
    main()
