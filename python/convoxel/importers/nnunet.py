"""Trained models of nnU-Net v2: plans.json, dataset.json, fold_X/checkpoint_final.pth.

Which file says what: the plans have the network, the spacing, the patch and the normalisation; dataset.json the
channels and labels; the checkpoints the weights, the configuration and the axes that may be mirrored. What nnU-Net
does with them is in `nnunet_recipe`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..conversion import accelerate
from . import networks, safe
from .nnunet_recipe import NnunetRecipe, Resampling
from .trained import TrainedModel

CHECKPOINTS = ("checkpoint_final.pth", "checkpoint_best.pth")
_CONFIGURATIONS = ("3d_fullres", "3d_lowres", "2d")  # the order of preference where nothing is said


def is_model(path: Path) -> bool:
    """Whether this is a model folder of nnU-Net, or a folder of several."""
    return path.is_dir() and ((path / "plans.json").is_file() or bool(_model_folders(path)))


def load(path: Path, *, folds: Sequence[str] | None = None, configuration: str | None = None) -> TrainedModel:
    """The networks of a model folder.

    Args:
        path: the folder with plans.json ("nnUNetTrainer__nnUNetPlans__3d_fullres"), or one that holds such folders.
        folds: ("0", "3") or ("all",); None: every fold that has a checkpoint, as nnU-Net does.
        configuration: which of several folders: "3d_fullres", "3d_lowres" or "2d".

    Raises:
        FileNotFoundError, ValueError: a file is missing, damaged, or asks for what is not on the list.
    """
    path = _choose(path, configuration)
    plans, dataset = safe.read_json(path / "plans.json"), safe.read_json(path / "dataset.json")
    files = _checkpoints(path, folds)
    states, trainer, name = [], "", configuration or ""
    mirror: tuple[int, ...] = ()
    for i, file in enumerate(files):
        found = safe.read_checkpoint(file)
        if not isinstance(found, Mapping) or "network_weights" not in found:
            raise ValueError(f"{file}: no network_weights inside, so it is no checkpoint of nnU-Net v2")
        state = safe.state_dict(file, found["network_weights"])
        states.append({key: value.float().clone() for key, value in state.items()})
        if i == 0:
            trainer = str(found.get("trainer_name", ""))
            name = str(_get(found, "init_args", "configuration") or path.name.split("__")[-1])
            mirror = tuple(int(axis) for axis in found.get("inference_allowed_mirroring_axes") or ())
    plan = _configuration(plans, name, path)
    recipe = _recipe(plans, plan, dataset, mirror, path)
    description = _network(plan, recipe, trainer, path)
    nets = [
        accelerate(networks.build(description, state, str(file)), inplace=True)
        for state, file in zip(states, files, strict=True)
    ]
    return TrainedModel(nets, description, recipe, f"{plans.get('dataset_name', path.name)} {name}")


def _choose(path: Path, configuration: str | None) -> Path:
    if (path / "plans.json").is_file():
        return path
    folders = _model_folders(path)
    found = {folder.name: folder for folder in folders}
    wanted = (configuration,) if configuration else _CONFIGURATIONS
    for name in wanted:
        matching = [folder for folder in folders if folder.name.split("__")[-1] == name]
        if len(matching) == 1:
            return matching[0]
        if matching:
            break
    raise ValueError(
        f"{path} holds {', '.join(sorted(found))}; give one of these folders"
        + (f": {configuration} fits not just one" if configuration else "")
    )


def _model_folders(path: Path) -> list[Path]:
    return sorted(file.parent for file in path.glob("*__*__*/plans.json"))


def _checkpoints(path: Path, folds: Sequence[str] | None) -> list[Path]:
    have = {file.name.removeprefix("fold_"): file for file in path.glob("fold_*") if file.is_dir()}
    if folds is None:
        usable = {name: folder for name, folder in have.items() if _checkpoint(folder) is not None}
        numbered = sorted((name for name in usable if re.fullmatch(r"\d+", name)), key=int)
        folds = numbered or [name for name in usable if name == "all"]
        if not folds:
            raise FileNotFoundError(2, f"no fold_X/{CHECKPOINTS[0]} in this model folder", str(path))
    files = []
    for fold in folds:
        file = _checkpoint(have[fold]) if fold in have else None
        if file is None:
            raise ValueError(
                f"{path}: fold {fold} has no {CHECKPOINTS[0]}; there are folds {', '.join(sorted(have)) or 'none'}"
            )
        files.append(file)
    return files


def _checkpoint(folder: Path) -> Path | None:
    return next((folder / name for name in CHECKPOINTS if (folder / name).is_file()), None)


def _configuration(
    plans: Mapping[str, Any], name: str, path: Path, seen: tuple[str, ...] = ()
) -> dict[str, Any]:
    """The configuration `name`, with what it inherits."""
    have = plans.get("configurations")
    if not isinstance(have, Mapping) or not isinstance(have.get(name), Mapping):
        known = ", ".join(have) if isinstance(have, Mapping) else "none"
        raise ValueError(f"{path / 'plans.json'}: no configuration {name!r}; it has {known}")
    if name in seen:
        raise ValueError(
            f"{path / 'plans.json'}: the configurations {', '.join(seen)} inherit from each other"
        )
    own = dict(have[name])
    parent = own.pop("inherits_from", None)
    return {**_configuration(plans, str(parent), path, (*seen, name)), **own} if parent else own


def _recipe(
    plans: Mapping[str, Any],
    plan: Mapping[str, Any],
    dataset: Mapping[str, Any],
    mirror: tuple[int, ...],
    path: Path,
) -> NnunetRecipe:
    if plan.get("previous_stage"):
        raise ValueError(
            f"{path}: this is a cascade, which takes the labels of {plan['previous_stage']} as input; convoxel runs "
            "single networks: give the folder of 3d_fullres, 3d_lowres or 2d"
        )
    preprocessor = plan.get("preprocessor_name", "DefaultPreprocessor")
    if preprocessor != "DefaultPreprocessor":
        raise ValueError(
            f"{path}: its preprocessor is {preprocessor}; convoxel has nnU-Net's DefaultPreprocessor"
        )
    try:
        channels = dataset.get("channel_names") or dataset["modality"]
        names = tuple(str(channels[key]) for key in sorted(channels, key=int))
        properties = plans.get("foreground_intensity_properties_per_channel") or plans.get(
            "foreground_intensity_properties_by_modality", {}
        )
        return NnunetRecipe(
            channels=names,
            labels=dict(dataset["labels"]),
            region_order=tuple(dataset.get("regions_class_order") or ()),
            reader=str(plans.get("image_reader_writer", "SimpleITKIO")),
            transpose=tuple(plans["transpose_forward"]),
            spacing=tuple(plan["spacing"]),
            patch_size=tuple(plan["patch_size"]),
            schemes=tuple(plan["normalization_schemes"]),
            masked=tuple(plan["use_mask_for_norm"]),
            intensities=tuple(_intensities(properties.get(str(i))) for i in range(len(names))),
            data=_resampling(plan, "data"),
            logits=_resampling(plan, "probabilities"),
            mirror=mirror,
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        missing = f"no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{path}: plans.json or dataset.json cannot be used: {missing}") from error


def _intensities(found: Mapping[str, Any] | None) -> tuple[float, ...] | None:
    names = ("mean", "std", "percentile_00_5", "percentile_99_5")
    return None if found is None else tuple(float(found[name]) for name in names)


def _resampling(plan: Mapping[str, Any], what: str) -> Resampling:
    options = dict(plan[f"resampling_fn_{what}_kwargs"])
    return Resampling(
        function=str(plan[f"resampling_fn_{what}"]),
        order=int(options.get("order", 3)),
        order_z=int(options.get("order_z", 0)),
        separate_z=options.get("force_separate_z", False if "order" in options else None),
        mode=str(options.get("mode", "linear")),
        threshold=float(options.get("separate_z_anisotropy_threshold", 3)),
    )


def _network(plan: Mapping[str, Any], recipe: NnunetRecipe, trainer: str, path: Path) -> networks.Description:
    architecture = plan.get("architecture") or _old_architecture(plan, path)
    try:
        name = str(architecture["network_class_name"]).rpartition(".")[2]
        arguments = dict(architecture["arch_kwargs"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path / 'plans.json'}: its architecture lacks {error}") from error
    if trainer == "nnUNetTrainerBN":  # the one trainer of nnU-Net's own that changes what the plans say
        rank = len(recipe.patch_size)
        arguments["norm_op"] = f"torch.nn.modules.batchnorm.BatchNorm{rank}d"
        arguments["norm_op_kwargs"] = {"eps": 1e-5, "affine": True}
    arguments["deep_supervision"] = False
    arguments.update(input_channels=len(recipe.channels), num_classes=recipe.heads)
    try:
        return networks.describe("nnunet", name, arguments)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _old_architecture(plan: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Plans of nnU-Net 2.0 to 2.2 name features and kernels only."""
    try:
        name = str(plan["UNet_class_name"])
        rank, counts = len(plan["patch_size"]), plan["n_conv_per_stage_encoder"]
        base, most = int(plan["UNet_base_num_features"]), int(plan["unet_max_num_features"])
        blocks = "n_conv_per_stage" if name == "PlainConvUNet" else "n_blocks_per_stage"
        return {
            "network_class_name": name,
            "arch_kwargs": {
                "n_stages": len(counts),
                "features_per_stage": [min(base * 2**i, most) for i in range(len(counts))],
                "conv_op": f"torch.nn.modules.conv.Conv{rank}d",
                "kernel_sizes": plan["conv_kernel_sizes"],
                "strides": plan["pool_op_kernel_sizes"],
                blocks: counts,
                "n_conv_per_stage_decoder": plan["n_conv_per_stage_decoder"],
                "conv_bias": True,
                "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{rank}d",
                "norm_op_kwargs": {"eps": 1e-5, "affine": True},
                "dropout_op": None,
                "dropout_op_kwargs": None,
                "nonlin": "torch.nn.LeakyReLU",
                "nonlin_kwargs": {"inplace": True},
            },
        }
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path / 'plans.json'}: it names no network (no {error})") from error


def _get(found: Any, *keys: str) -> Any:
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found
