"""Dice against the number of training cases, with and without augmentation, as a table and a picture.

    python benchmarks/few_labels.py OUT [--cases 1 2 4 8 16] [--seeds 0] [--steps 600]

Phantoms of `convoxel phantom`, seed 0: the first n of sixteen are trained on (fold "all" of a folder that has only
these), ten others are predicted whole and scored. Every training has as many steps, whatever the number of its cases.
What is done already in OUT is not done again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from convoxel.evaluation import evaluate
from convoxel.phantom import make_dataset
from convoxel.training.settings import as_yaml

SETTINGS = {"patch_size": [32, 48, 48], "batch_size": 2, "base_features": 8, "steps_per_epoch": 100,
            "optimizer": "adamw", "learning_rate": 3e-3, "validation_patches": 2, "preview_every": 0,
            "tensorboard": False}  # fmt: skip


def subset(data: Path, folder: Path, count: int) -> Path:
    """A dataset of the first cases."""
    if folder.is_dir():
        return folder
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
        for path in sorted((data / name).iterdir())[:count]:
            shutil.copy2(path, folder / name)
    about = json.loads((data / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps({**about, "numTraining": count}))
    return folder


def dice(out: Path, data: Path, count: int, augment: bool, seed: int, settings: Path) -> np.ndarray:
    """(cases, structures) of the test scans."""
    folder = out / f"cases_{count}_{'augmented' if augment else 'plain'}_{seed}"
    if not (folder / "done").is_file():
        cases = subset(data, out / f"Dataset{100 + count}_Phantom", count)
        switch = "--augment" if augment else "--no-augment"
        convoxel("train", cases, "-o", folder, "--folds", "all", "--settings", settings, "--seed", seed, switch,
                 "--cache", out / "cache", "-q")  # fmt: skip
        convoxel("predict", folder, data / "imagesTs", "-o", folder / "labels", "--no-mirror", "-q")
        (folder / "done").touch()
    return evaluate(folder / "labels", data / "labelsTs").array("dice")


def convoxel(*words: object) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "convoxel", *map(str, words)], capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"convoxel {' '.join(map(str, words))}\n{done.stdout}\n{done.stderr}")


def draw(path: Path, counts: list[int], table: dict[bool, np.ndarray]) -> None:
    """table: augmented -> (counts, seeds), the mean over cases and structures."""
    figure = Figure(figsize=(6.5, 4.2), layout="constrained")
    ax = figure.subplots()
    for augmented, values in table.items():
        label = "with augmentation" if augmented else "without"
        mean = values.mean(1)
        ax.plot(counts, mean, marker="o", label=label)
        ax.fill_between(counts, values.min(1), values.max(1), alpha=0.2)
    ax.set_xscale("log", base=2)
    ax.set_xticks(counts, [str(n) for n in counts])
    ax.set_xlabel("training cases")
    ax.set_ylabel("mean Dice of whole test scans")
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--cases", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=600)
    args = parser.parse_args()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    data = out / "Dataset001_Phantom"
    if not (data / "dataset.json").is_file():
        make_dataset(data, cases=max(args.cases), test_cases=10, shape=(32, 56, 56))
    settings = out / "settings.yaml"
    settings.write_text(as_yaml({**SETTINGS, "epochs": args.steps // SETTINGS["steps_per_epoch"]}))
    table = {augment: np.empty((len(args.cases), len(args.seeds))) for augment in (True, False)}
    for j, seed in enumerate(args.seeds):
        for i, count in enumerate(args.cases):
            for augment, values in table.items():
                values[i, j] = np.nanmean(dice(out, data, count, augment, seed, settings))
                print(
                    f"{count} cases, {'augmented' if augment else 'plain'}, seed {seed}: {values[i, j]:.3f}",
                    flush=True,
                )
    draw(out / "few_labels.png", args.cases, table)
    print("\n| training cases | " + " | ".join(map(str, args.cases)) + " |\n|---|" + "---|" * len(args.cases))
    for augment, values in table.items():
        word = "with augmentation" if augment else "without"
        print(f"| {word} | " + " | ".join(f"{row.mean():.3f}" for row in values) + " |")


if __name__ == "__main__":
    main()
