"""Models that people already have: nnU-Net's folders, MONAI's bundles, convoxel's checkpoints (docs/models.md).

safe           files of other programs, as data
networks       the list of architectures, and how one is built of plain arguments
trained        a model: networks and a recipe
nnunet         model folders of nnU-Net v2; nnunet_recipe what it does with a scan
monai_bundle   MONAI bundles; monai_recipe what they do with a scan
own            convoxel's own checkpoints
cases          scans on the command line, and where their labels go
commands       `convoxel predict` and `convoxel import`
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from . import monai_bundle, nnunet, own
from .trained import TrainedModel

__all__ = ["TrainedModel", "load", "save"]


def load(
    path: str | os.PathLike[str],
    *,
    folds: Sequence[str] | None = None,
    configuration: str | None = None,
    patch_size: Sequence[int] | None = None,
) -> TrainedModel:
    """A trained model, ready to predict: its networks accelerated, in evaluation mode.

    Args:
        path: an nnU-Net v2 model folder (with plans.json), a MONAI bundle (folder or zip), a folder of
            `convoxel train`, or a file of `convoxel train`, `convoxel import` or `Model.save`.
        folds: which folds of a cross-validation; None: all.
        configuration: of nnU-Net, where the folder holds several models: "3d_fullres", "3d_lowres" or "2d".
        patch_size: (z, y, x) in voxels, for a file of `Model.save`.

    Raises:
        FileNotFoundError, ValueError: missing, damaged, or asking for what is not on convoxel's lists; ImportError:
            the library of its network is not installed.

    >>> model = load("Dataset003_Liver/nnUNetTrainer__nnUNetPlans__3d_fullres", folds=["0"])
    >>> labels = model.predict([convoxel.volume.read("liver_0000.nii.gz")])
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(2, "no such model", str(path))
    if nnunet.is_model(path):
        return nnunet.load(path, folds=folds, configuration=configuration)
    if monai_bundle.is_bundle(path):
        return monai_bundle.load(path)
    if own.is_run(path):
        return own.load_run(path, folds)
    if path.is_file() and path.suffix == ".safetensors":
        return own.load(path, folds=folds, patch_size=patch_size)
    raise ValueError(
        f"{path}: not a model that convoxel knows; expected an nnU-Net v2 model folder (with plans.json and "
        "dataset.json), a MONAI bundle (with configs/metadata.json), a folder of convoxel train, or a .safetensors file"
    )


def save(model: TrainedModel, path: str | os.PathLike[str]) -> None:
    """Writes a model as one .safetensors file, without anything executable; `load` reads it again."""
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: expected a name that ends in .safetensors")
    own.save(model, path)
