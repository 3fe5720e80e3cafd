"""nnU-Net's side of train.py, by a Python that has nnunetv2: `prepare PLAN`, `train SEED EPOCHS STEPS VALIDATION RATE`.

The folders come from nnUNet_raw, nnUNet_preprocessed and nnUNet_results. Its planner and preprocessor run as they are;
then its 3d_fullres configuration gets the spacing, patch, batch and network of convoxel's plan.json.
"""

import json
import multiprocessing
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch

DATASET, CONFIGURATION = "Dataset001_Phantom", "3d_fullres"


def prepare(plan_file: Path) -> None:
    from nnunetv2.experiment_planning import plan_and_preprocess_api as api

    folder = Path(os.environ["nnUNet_preprocessed"]) / DATASET
    api.extract_fingerprints([1], num_processes=2)
    api.plan_experiments([1])
    path = folder / "nnUNetPlans.json"
    plans, ours = json.loads(path.read_text()), json.loads(plan_file.read_text())["plan"]
    theirs, network = plans["configurations"][CONFIGURATION], ours["network"]["config"]
    print(f"its own: {theirs['patch_size']}, batch {theirs['batch_size']}, {theirs['spacing']}")
    theirs.update(
        patch_size=ours["patch_size"], batch_size=ours["batch_size"], spacing=list(ours["recipe"]["spacing"])
    )
    stages = len(network["features"])
    theirs["architecture"]["arch_kwargs"].update(
        n_stages=stages,
        features_per_stage=network["features"],
        kernel_sizes=network["kernel_size"],
        strides=network["strides"],
        n_conv_per_stage=network["convs"],
        n_conv_per_stage_decoder=network["convs"][:-1],
    )
    path.write_text(json.dumps(plans))
    api.preprocess([1], configurations=(CONFIGURATION,), num_processes=(2,))
    (folder / "ready").touch()


def train(seed: int, epochs: int, steps: int, validation: int, rate: float) -> None:
    from nnunetv2.run.run_training import get_trainer_from_args
    from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler

    torch.set_num_threads(multiprocessing.cpu_count())  # as nnUNetv2_train -device cpu does
    torch.manual_seed(seed)
    np.random.seed(seed)
    trainer = get_trainer_from_args("1", CONFIGURATION, "all", device=torch.device("cpu"))
    trainer.num_epochs, trainer.num_iterations_per_epoch = epochs, steps
    trainer.num_val_iterations_per_epoch = validation

    def optimisers() -> tuple:
        adamw = torch.optim.AdamW(trainer.network.parameters(), rate, weight_decay=3e-5)
        return adamw, PolyLRScheduler(adamw, rate, epochs)

    trainer.configure_optimizers = optimisers
    ended: list[float] = []
    step = trainer.train_step

    def timed(batch: dict) -> dict:
        result = step(batch)
        ended.append(time.perf_counter())
        return result

    trainer.train_step = timed
    trainer.run_training()
    apart = np.diff(ended)
    found = {"step_seconds": float(np.median(apart))}
    (Path(os.environ["nnUNet_results"]) / "steps.json").write_text(json.dumps(found))


if __name__ == "__main__":
    if sys.argv[1] == "prepare":
        prepare(Path(sys.argv[2]))
    else:
        train(*map(int, sys.argv[2:6]), float(sys.argv[6]))
