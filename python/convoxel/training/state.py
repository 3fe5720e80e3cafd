"""What a run goes on from after it was killed: one safetensors file, whole or the one before."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from .. import checkpoint
from ..importers.networks import unique

KIND = "convoxel training state"
_SMOOTH = 0.9  # share of the old in the running Dice (nnU-Net: the same)


@dataclass(frozen=True)
class Epoch:
    """One row of the log."""

    epoch: int  # from 1
    step: int  # steps done by its end
    loss: float  # mean over its steps
    dice: tuple[float | None, ...]  # of validation patches, per structure; None: no patch had it
    mean_dice: float | None
    running_dice: float | None  # exponential mean over epochs: what "better" is judged by
    rate: float  # the learning rate of its last step
    seconds: float  # all of it
    step_seconds: float
    waited: float  # share of the training steps' time in which they waited for patches


@dataclass
class Progress:
    """How far a run is; with the tensors of the state file, everything that its future depends on."""

    step: int = 0
    epochs: list[Epoch] = field(default_factory=list)
    loss_sum: float = 0.0  # of the epoch at hand
    best: float = -math.inf  # running Dice
    best_epoch: int = 0
    seconds: float = 0.0  # of the epoch at hand, before this process
    waited: float = 0.0
    finished: bool = False

    def running(self, dice: float | None) -> float | None:
        """The running mean with one more epoch."""
        before = self.epochs[-1].running_dice if self.epochs else None
        if dice is None or before is None:
            return dice if before is None else before
        return _SMOOTH * before + (1 - _SMOOTH) * dice

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "best": None if self.best == -math.inf else self.best}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Progress:
        best = -math.inf if found["best"] is None else found["best"]
        epochs = [Epoch(**{**row, "dice": tuple(row["dice"])}) for row in found["epochs"]]
        return cls(**{**found, "best": best, "epochs": epochs})


def save(
    path: Path, network: nn.Module, optimizer: Optimizer, progress: Progress, run: Mapping[str, Any]
) -> None:
    """Writes weights, the optimizer's memory and the progress.

    run: plain data that says which run this is; `load` refuses another one's.

    Raises OSError where the disk is full; what was there before is then still there, whole.
    """
    tensors = {f"network.{name}": tensor for name, tensor in unique(network).items()}
    tensors |= {
        f"optimizer.{name}.{key}": value
        for name, parameter in network.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }
    checkpoint.write(path, tensors, None, {"kind": KIND, "progress": progress.to_json(), "run": dict(run)})


def load(path: Path, network: nn.Module, optimizer: Optimizer) -> tuple[Progress, dict[str, Any]]:
    """Fills network and optimizer from a file of `save`; the progress, and which run it is.

    Raises ValueError for a file that is damaged or another network's.
    """
    tensors, _ = checkpoint.read(path)
    about = checkpoint.read_recipe(path)
    if about is None or about.get("kind") != KIND:
        raise ValueError(f"{path} is no state of `convoxel train`; give another output folder")
    weights = {name.removeprefix("network."): t for name, t in tensors.items() if name.startswith("network.")}
    expected = unique(network)
    checkpoint.check_fits(path, weights, expected)
    for name, tensor in expected.items():
        tensor.detach().copy_(weights[name])
    for name, parameter in network.named_parameters():
        lead = f"optimizer.{name}."
        found = {key.removeprefix(lead): t for key, t in tensors.items() if key.startswith(lead)}
        if found:
            optimizer.state[parameter] = found
    return Progress.from_json(about["progress"]), about["run"]


def remove_leftovers(folder: Path) -> None:
    """Files half written by a run that was killed."""
    for path in folder.rglob(".*.tmp"):
        os.unlink(path)
