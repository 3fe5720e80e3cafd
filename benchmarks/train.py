"""The same recipe learnt on convoxel's kernels, on torch's, and by nnU-Net's own trainer: Dice, time, memory.

    python benchmarks/train.py OUT [--seeds 0 1 2] [--steps 150] [--columns convoxel torch] [--nnunet PYTHON]

Twenty phantoms to train on, ten others to score (`convoxel phantom`, seed 0). All columns have the same network (U-Net
of 32 channels and more), patch, batch, optimiser, schedule, augmentation's probabilities and number of steps; every
training is a process of its own, in turn, on cases made ready before. Dice is that of whole test scans, predicted by
`convoxel predict` without mirroring in every column, and scored by `convoxel evaluate`'s rules; differences are paired
by case, over the mean of the seeds. Time: the training process from start to end, with its checkpoints and validation
patches; steps: without. Memory: its peak (its helpers' added for nnU-Net, which loads in processes of its own). nnU-Net
(PYTHON: one that has nnunetv2) gets our spacing, patch, batch, network, AdamW and learning rate; its 250 steps an epoch
become ours. Time, steps and memory are the first seed's: let that one run alone on the machine.
What is done already in OUT is not done again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from convoxel import runtime
from convoxel.evaluation import evaluate
from convoxel.evaluation.statistics import compare
from convoxel.phantom import make_dataset
from convoxel.training import run as running
from convoxel.training.cache import store
from convoxel.training.settings import as_yaml

SHAPE = (48, 96, 96)
PATCH = (32, 64, 64)
EPOCH = 25  # steps
RATE = 1e-3  # AdamW's: in so few steps nnU-Net's SGD does not find the smaller organs
COLUMNS = {  # settings of each; nnU-Net has none of ours
    "convoxel": ("--engine", "convoxel"),
    "convoxel bfloat16": ("--engine", "convoxel", "--precision", "bfloat16"),
    "torch": ("--engine", "torch"),
    "nnU-Net": (),
}


def settings(steps: int) -> dict[str, Any]:
    return {"patch_size": list(PATCH), "batch_size": 2, "epochs": steps // EPOCH, "steps_per_epoch": EPOCH,
            "optimizer": "adamw", "learning_rate": RATE, "validation_patches": 8, "preview_every": 0,
            "tensorboard": False}  # fmt: skip


def prepare(out: Path, steps: int) -> Path:
    """The phantoms, the settings and the cache; the dataset's folder."""
    data = out / "raw" / "Dataset001_Phantom"
    if not (data / "dataset.json").is_file():
        make_dataset(data, cases=20, test_cases=10, shape=SHAPE)
    (out / "settings.yaml").write_text(as_yaml(settings(steps)))
    made = running.open_run(data, out / "plan", settings(steps))
    store(made.dataset, made.plan.recipe, out / "cache")
    return data


class Watched:
    """A process, and the largest sum of what it and its children held (PSS, so that shared pages count once)."""

    def __init__(self, argv: list[str], log: Path, env: dict[str, str]) -> None:
        with log.open("w") as file:
            began = time.perf_counter()
            process = subprocess.Popen(argv, stdout=file, stderr=subprocess.STDOUT, env=env)
            self.peak = 0
            thread = threading.Thread(target=self._watch, args=(process,))
            thread.start()
            code = process.wait()
            self.seconds = time.perf_counter() - began
            thread.join()
        if code:
            raise SystemExit(f"{' '.join(argv)}: exit code {code}\n{log.read_text()[-3000:]}")

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        while process.poll() is None:
            self.peak = max(self.peak, sum(_pss(pid) for pid in _family(process.pid)))
            time.sleep(0.5)


def _family(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return [pid]
    return [pid, *(one for child in children for one in _family(int(child)))]


def _pss(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def train(out: Path, data: Path, column: str, seed: int, args: argparse.Namespace) -> Path:
    """Trains one column with one seed; the folder with `about.json`, and the model that `convoxel predict` takes."""
    folder = out / column / f"seed_{seed}"
    about = folder / "about.json"
    if about.is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    env = {**os.environ}
    if column == "nnU-Net":
        env |= {f"nnUNet_{name}": str(out / name) for name in ("raw", "preprocessed")}
        env |= {
            "nnUNet_results": str(folder / "results"),
            "nnUNet_n_proc_DA": str(len(os.sched_getaffinity(0))),
        }
        script = [args.nnunet, str(Path(__file__).with_name("train_nnunet.py"))]
        plan = out / "plan" / "plan.json"
        if not (out / "preprocessed" / "Dataset001_Phantom" / "ready").is_file():
            Watched([*script, "prepare", str(plan)], out / "nnunet_prepare.log", env)
        argv = [*script, "train", str(seed), str(args.steps // EPOCH), str(EPOCH), "4", str(RATE)]
    else:
        argv = [sys.executable, "-m", "convoxel", "train", str(data), "-o", str(folder / "run"), "--folds", "all", "-q",
                "--settings", str(out / "settings.yaml"), "--cache", str(out / "cache"), "--seed", str(seed),
                *COLUMNS[column]]  # fmt: skip
    done = Watched(argv, folder / "log.txt", env)
    step = _step_seconds(folder, column)
    about.write_text(json.dumps({"seconds": done.seconds, "peak": done.peak, "step_seconds": step}))
    return folder


def _step_seconds(folder: Path, column: str) -> float:
    """Median over epochs of the mean seconds of a training step, waiting for patches included."""
    if column == "nnU-Net":
        return float(json.loads(next(folder.rglob("steps.json")).read_text())["step_seconds"])
    lines = next(folder.rglob("log.csv")).read_text().splitlines()
    index = lines[0].split(",").index("step_seconds")
    return statistics.median(float(line.split(",")[index]) for line in lines[1:])


def predict(folder: Path, data: Path, column: str) -> Path:
    """The test scans' labels."""
    labels = folder / "labels"
    if column == "nnU-Net":
        model = next(folder.glob("results/*/nnUNetTrainer__nnUNetPlans__3d_fullres"))
    else:
        model = folder / "run"
    argv = [sys.executable, "-m", "convoxel", "predict", str(model), str(data / "imagesTs"), "-o", str(labels), "-q",
            "--no-mirror"]  # fmt: skip
    Watched(argv, folder / "predict.log", {**os.environ})
    return labels


def dice(out: Path, data: Path, column: str, seeds: list[int]) -> tuple[list[str], np.ndarray]:
    """Structures, and (cases, structures): the mean over seeds."""
    found = []
    for seed in seeds:
        result = evaluate(out / column / f"seed_{seed}" / "labels", data / "labelsTs")
        found.append(result.array("dice"))
    return list(result.values), np.mean(found, axis=0)


def report(out: Path, data: Path, columns: list[str], args: argparse.Namespace) -> str:
    tables = {column: dice(out, data, column, args.seeds) for column in columns}
    names = tables["convoxel"][0]
    about = {
        column: json.loads((out / column / f"seed_{args.seeds[0]}" / "about.json").read_text())
        for column in columns
    }
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for i, name in enumerate(names):
        lines.append(
            f"| Dice {name} | " + " | ".join(f"{np.nanmean(tables[c][1][:, i]):.3f}" for c in columns) + " |"
        )
    for word, key, scale, form in (("training, s", "seconds", 1, ".0f"), ("a step, s", "step_seconds", 1, ".3f"),
                                   ("peak memory, MB", "peak", 1e-6, ".0f")):  # fmt: skip
        lines.append(f"| {word} | " + " | ".join(f"{scale * about[c][key]:{form}}" for c in columns) + " |")
    for column in columns[1:]:
        lines += ["", f"Dice, convoxel minus {column}, paired over {len(tables[column][1])} cases:", ""]
        for name, found in zip(names, compare(tables["convoxel"][1] - tables[column][1]), strict=True):
            low, high = found.interval or (float("nan"), float("nan"))
            lines.append(f"- {name}: {found.difference:+.4f} ({low:+.4f} to {high:+.4f}), p = {found.p:.2f}, "
                         f"better in {found.wins} of {found.n}")  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=150, help=f"a multiple of {EPOCH}")
    parser.add_argument(
        "--columns", nargs="+", default=list(COLUMNS)[:-1], choices=COLUMNS, help="convoxel among them"
    )
    parser.add_argument("--nnunet", metavar="PYTHON", help="a Python that has nnunetv2, for the third column")
    args = parser.parse_args()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    data = prepare(out, args.steps)
    columns = [*args.columns, *["nnU-Net"] * bool(args.nnunet)]
    for seed in args.seeds:
        for column in columns:
            folder = train(out, data, column, seed, args)
            predict(folder, data, column)
            print(f"{column}, seed {seed}: {(folder / 'about.json').read_text()}", flush=True)
    print(f"\n{runtime.info()}\n\n{args.steps} steps, batch 2, patch {PATCH}, seeds {args.seeds}\n")
    print(report(out, data, columns, args))


if __name__ == "__main__":
    main()
