"""convoxel's own checkpoints: one safetensors file, the architecture and the recipe as JSON in its header."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import checkpoint
from ..conversion import accelerate
from ..inference import Axis
from ..preprocessing import padding
from ..volume import Volume
from . import networks
from .monai_recipe import MonaiRecipe
from .nnunet_recipe import NnunetRecipe
from .trained import Overlap, Prepared, Recipe, TrainedModel, stack


@dataclass(frozen=True)
class PlainRecipe(Recipe):
    """For a checkpoint of `Model.save`, which says nothing of scans: the network sees the values as they are."""

    channels: tuple[str, ...]
    patch_size: tuple[int, ...]  # (z, y, x), or (y, x) for a 2-D network

    kind = "plain"
    overlap = 0.5
    labels: Mapping[str, Any] = None  # type: ignore[assignment]
    mirror_axes = ()
    regions = None

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> PlainRecipe:
        return cls(tuple(map(str, found["channels"])), tuple(map(int, found["patch_size"])))

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "channels": self.channels, "patch_size": self.patch_size}

    def prepare(self, scans: Sequence[Volume], overlap: Overlap) -> Prepared:
        image = stack(scans)
        shape = image.shape[1:]
        rim = padding(shape, (1,) * (3 - len(self.patch_size)) + self.patch_size)
        axes = None
        if any(map(any, rim)):
            image = np.pad(image, [(0, 0), *rim])
            axes = [Axis.linear(n, n).shifted(first) for n, (first, _) in zip(shape, rim, strict=True)]
        return Prepared(torch.from_numpy(image), self.patch_size, None, None, axes, lambda array: array)


RECIPES: dict[str, Any] = {recipe.kind: recipe for recipe in (NnunetRecipe, MonaiRecipe, PlainRecipe)}


def save(model: TrainedModel, path: Path) -> None:
    """Writes the model as one file, whole or not at all; nothing executable is in it.

    Weights that a network knows by several names are kept once.

    >>> own.save(nnunet.load(folder), Path("liver.safetensors"))
    """
    state = {
        f"{i}.{name}": tensor
        for i, network in enumerate(model.networks)
        for name, tensor in networks.unique(network).items()
    }
    recipe = {"name": model.name, "networks": len(model.networks), **model.recipe.to_json()}
    checkpoint.write(path, state, model.description, recipe)


def load(
    path: Path, *, folds: Sequence[str] | None = None, patch_size: Sequence[int] | None = None
) -> TrainedModel:
    """A file of `save`, or of `Model.save` together with the patch size (z, y, x) in voxels.

    Args:
        folds: which networks of several, by their number in the file.

    Raises FileNotFoundError and ValueError: no such file, damaged, or its network is not on the list.
    """
    state, description = checkpoint.read(path)
    if description is None:
        raise ValueError(f"{path} holds weights only, without the network's name; save it with Model.save")
    recipe = checkpoint.read_recipe(path)
    if recipe is None:
        plain = _plain(path, description, patch_size)
        return TrainedModel([_network(path, description, state)], description, plain, path.stem)
    try:
        made = RECIPES[recipe["kind"]].from_json(recipe)
        count, name = int(recipe["networks"]), str(recipe["name"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: its recipe cannot be used ({error}); import the model again") from error
    chosen = [str(i) for i in range(count)] if folds is None else list(folds)
    if foreign := [fold for fold in chosen if not fold.isdigit() or int(fold) >= count]:
        raise ValueError(f"{path}: no network {', '.join(foreign)}; it has {count}, counted from 0")
    nets = []
    for i in chosen:
        own = {key.removeprefix(f"{i}."): value for key, value in state.items() if key.startswith(f"{i}.")}
        nets.append(_network(path, description, own))
    return TrainedModel(nets, description, made, name)


def is_run(path: Path) -> bool:
    """Whether this is a folder of `convoxel train` with a trained fold."""
    return path.is_dir() and bool(_trained(path))


def load_run(path: Path, folds: Sequence[str] | None = None) -> TrainedModel:
    """The networks of a folder of `convoxel train`, to be averaged; None: every fold that is trained.

    Raises ValueError for a fold that is not.
    """
    have = _trained(path)
    if folds is None:
        folds = [name for name in have if name != "all"] or list(have)
    if missing := [fold for fold in folds if fold not in have]:
        raise ValueError(f"{path}: fold {missing[0]} is not trained; there are {', '.join(have)}")
    models = [load(have[fold]) for fold in folds]
    first = models[0]
    networks_of_all = [network for model in models for network in model.networks]
    return TrainedModel(
        networks_of_all, first.description, first.recipe, f"{path.name} fold {', '.join(folds)}"
    )


def _trained(path: Path) -> dict[str, Path]:
    return {
        file.parent.name.removeprefix("fold_"): file for file in sorted(path.glob("fold_*/model.safetensors"))
    }


def _network(path: Path, description: networks.Description, state: Mapping[str, Tensor]) -> nn.Module:
    return accelerate(networks.build(description, state, str(path)), inplace=True)


def _plain(path: Path, description: networks.Description, patch_size: Sequence[int] | None) -> PlainRecipe:
    if patch_size is None:
        raise ValueError(
            f"{path} says nothing of patches; give the size it was trained on in voxels: --patch-size 96 96 96 "
            "(z y x)"
        )
    config = description["config"]
    count, rank = config.get("in_channels"), config.get("rank", 3)
    if not isinstance(count, int):
        raise ValueError(f"{path}: its network does not say how many in_channels it takes")
    if len(patch_size) != rank or min(patch_size) < 1:
        raise ValueError(f"{path} is a {rank}-D network: expected --patch-size with {rank} numbers, received "
                         f"{' '.join(map(str, patch_size))}")  # fmt: skip
    return PlainRecipe(tuple(f"channel {i}" for i in range(count)), tuple(int(n) for n in patch_size))
