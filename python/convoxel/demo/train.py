"""Training by the model API: `compile`, `fit`, and a learning rate that rises once and falls to nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import combinations

import torch
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR

from .. import nn
from ..callbacks import Callback
from ..metrics import Dice
from ..model import Model
from ..models import UNet
from .augment import Patches
from .data import CLASSES, TRAIN, Brain


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what is trained, and for how long; sizes in voxels, (z, y, x)."""

    features: tuple[int, ...] = (16, 32, 64)
    patch: tuple[int, int, int] = (32, 32, 32)
    batch: int = 1
    epochs: int = 30
    steps: int = 100  # per epoch
    learning_rate: float = 4e-3


FULL = Recipe()
QUICK = Recipe(features=(8, 16), patch=(24, 24, 24), epochs=3, steps=5)


def recipe(quick: bool, epochs: int | None = None) -> Recipe:
    """The full or the short recipe, with another number of epochs if one is given (ValueError below 1)."""
    chosen = QUICK if quick else FULL
    if epochs is None:
        return chosen
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1, received {epochs}")
    return replace(chosen, epochs=epochs)


def patches(brain: Brain, recipe: Recipe, seed: int) -> Patches:
    """The patches of one epoch, from the training half and nothing else."""
    image, labels = brain.image.array[:, TRAIN], brain.labels.array[:, TRAIN]
    return Patches(image, labels, recipe.patch, recipe.steps * recipe.batch, seed)


class MirrorMean(nn.Module):
    """The mean of a network's class probabilities over the eight mirror images of its input.

    (N, C, D, H, W) -> probabilities (N, K, D, H, W). Patches were mirrored in training too, so every image is
    one that the network knows, and what noise does to one of them the others do not repeat.

    >>> MirrorMean(network)(torch.zeros(1, 1, 8, 8, 8)).sum(1).unique()
    tensor([1.])
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor | float = 0.0
        for n in range(4):
            for axes in combinations((2, 3, 4), n):
                total = total + self.network(x.flip(axes)).softmax(1).flip(axes)
        return torch.as_tensor(total) / 8


@dataclass
class Curve(Callback):
    """Moves the learning rate after each step, and keeps what the learning curve shows."""

    schedule: OneCycleLR
    loss: list[float] = field(default_factory=list)

    def on_train_batch_end(self, batch: int, logs: Mapping[str, float]) -> None:
        self.schedule.step()
        self.loss.append(logs["loss"])


def train(brain: Brain, recipe: Recipe, seed: int) -> tuple[UNet, dict[str, list[float]]]:
    """Train a U-Net on the training half alone.

    Returns the network and its learning curve: "loss" per step, "dice" (mean over the three tissues, on
    the augmented training patches) per epoch. The same seed gives the same network.
    """
    torch.manual_seed(seed)
    network = UNet(rank=3, in_channels=1, out_channels=len(CLASSES), features=recipe.features)
    optimizer = torch.optim.AdamW(network.parameters(), lr=recipe.learning_rate)
    total = recipe.epochs * recipe.steps
    curve = Curve(OneCycleLR(optimizer, recipe.learning_rate, total_steps=total + 1, pct_start=0.15))
    model = Model(network)
    model.compile(optimizer, "dice_ce", Dice())
    history = model.fit(
        patches(brain, recipe, seed),
        batch_size=recipe.batch,
        epochs=recipe.epochs,
        shuffle=False,
        callbacks=[curve],
    )
    return network, {"loss": curve.loss, "dice": history.history["dice"]}
