"""A trained model in nnU-Net v2's folder format, small and of random weights with a fixed seed, for tests.

nnunetv2 2.8.1 reads what this writes: tests/campaigns/nnunet_parity.py predicts with both.
"""

import copy
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from convoxel import volume
from convoxel.importers import networks

RESAMPLING = {
    **{f"resampling_fn_{what}": "resample_data_or_seg_to_shape" for what in ("data", "seg", "probabilities")},
    "resampling_fn_data_kwargs": {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None},
    "resampling_fn_seg_kwargs": {"is_seg": True, "order": 1, "order_z": 0, "force_separate_z": None},
    "resampling_fn_probabilities_kwargs": {
        "is_seg": False,
        "order": 1,
        "order_z": 0,
        "force_separate_z": None,
    },
}


def architecture(name: str, rank: int) -> dict[str, Any]:
    blocks = "n_conv_per_stage" if name == "PlainConvUNet" else "n_blocks_per_stage"
    module = {"PlainConvUNet": "unet", "ResidualEncoderUNet": "unet"}.get(name, "unet")
    return {
        "network_class_name": f"dynamic_network_architectures.architectures.{module}.{name}",
        "arch_kwargs": {
            "n_stages": 3,
            "features_per_stage": [8, 12, 16],
            "conv_op": f"torch.nn.modules.conv.Conv{rank}d",
            "kernel_sizes": [[3] * rank] * 3,
            "strides": [[1] * rank, [2] * rank, [2] * rank],
            blocks: [1, 1, 1],
            "n_conv_per_stage_decoder": [1, 1],
            "conv_bias": True,
            "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{rank}d",
            "norm_op_kwargs": {"eps": 1e-05, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def plans(
    schemes: tuple[str, ...] = ("CTNormalization",),
    masked: tuple[bool, ...] = (False,),
    spacing: tuple[float, ...] = (2.0, 1.2, 1.2),
    patch_size: tuple[int, ...] = (16, 24, 32),
    transpose: tuple[int, int, int] = (0, 1, 2),
    name: str = "PlainConvUNet",
    configuration: str = "3d_fullres",
    reader: str = "SimpleITKIO",
    resampling: dict[str, Any] | None = None,
) -> dict[str, Any]:
    properties = {"mean": 40.0, "std": 300.0, "percentile_00_5": -800.0, "percentile_99_5": 900.0}
    return {
        "dataset_name": "Dataset901_Random",
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": [2.0, 1.2, 1.2],
        "original_median_shape_after_transp": [40, 50, 60],
        "image_reader_writer": reader,
        "transpose_forward": list(transpose),
        "transpose_backward": [int(i) for i in np.argsort(transpose)],
        "configurations": {
            configuration: {
                "data_identifier": f"nnUNetPlans_{configuration}",
                "preprocessor_name": "DefaultPreprocessor",
                "batch_size": 2,
                "patch_size": list(patch_size),
                "median_image_size_in_voxels": [40.0, 50.0, 60.0],
                "spacing": list(spacing),
                "normalization_schemes": list(schemes),
                "use_mask_for_norm": list(masked),
                **copy.deepcopy(RESAMPLING),
                **(resampling or {}),
                "architecture": architecture(name, len(patch_size)),
                "batch_dice": False,
            }
        },
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {str(i): properties for i in range(len(schemes))},
    }


def dataset(
    channels: tuple[str, ...] = ("CT",), labels: dict[str, Any] | None = None, **more: Any
) -> dict[str, Any]:
    return {
        "channel_names": {str(i): name for i, name in enumerate(channels)},
        "labels": labels or {"background": 0, "liver": 1, "lesion": 2, "vessel": 3},
        "numTraining": 4,
        "file_ending": ".nii.gz",
        **more,
    }


def write(
    folder: Path,
    plan: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    folds: tuple[str, ...] = ("0",),
    mirror: tuple[int, ...] | None = (0, 1, 2),
    seed: int = 0,
    trainer: str = "nnUNetTrainer",
) -> Path:
    """A model folder, and its path. The weights of each fold are those of its own seed, with losses and scores as
    numpy's numbers beside them, as training leaves them."""
    plan, data = plan or plans(), data or dataset()
    name = next(iter(plan["configurations"]))
    path = folder / f"{trainer}__nnUNetPlans__{name}"
    path.mkdir(parents=True)
    (path / "plans.json").write_text(json.dumps(plan))
    (path / "dataset.json").write_text(json.dumps(data))
    for i, fold in enumerate(folds):
        target = path / f"fold_{fold}"
        target.mkdir()
        network = random_network(plan, data, seed + i)
        checkpoint = {
            "network_weights": network.state_dict(),
            "optimizer_state": torch.optim.SGD(network.parameters(), 0.01).state_dict(),
            "grad_scaler_state": None,
            "logging": {"train_losses": [np.float32(0.5), np.float64(0.25)], "dice": [[np.float64(0.9)] * 3]},
            "_best_ema": np.float64(0.87),
            "current_epoch": 1000,
            "init_args": {
                "plans": plan, "configuration": name, "fold": fold, "dataset_json": data,
                "device": torch.device("cpu"),
            },
            "trainer_name": trainer,
            "inference_allowed_mirroring_axes": mirror,
        }  # fmt: skip
        torch.save(checkpoint, target / "checkpoint_final.pth")
    return path


def random_network(plan: dict[str, Any], data: dict[str, Any], seed: int) -> torch.nn.Module:
    """Its weights are He's, but the head's, which are large: classes then differ by more than rounding."""
    found = next(iter(plan["configurations"].values()))["architecture"]
    labels = [value for key, value in data["labels"].items() if key != "ignore"]
    regions = any(isinstance(value, list) and len(value) > 1 for value in labels)
    network = networks._maker({
        "name": f"nnunet.{found['network_class_name'].rpartition('.')[2]}",
        "config": {**found["arch_kwargs"], "input_channels": len(data["channel_names"]),
                   "num_classes": len(labels) - regions, "deep_supervision": False},
    })()  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    for key, value in network.named_parameters():
        with torch.no_grad():
            fan = max(1, value[0].numel()) if value.dim() > 1 else 4
            value.copy_(torch.randn(value.shape, generator=generator) * (2 / fan) ** 0.5)
            if key.endswith("norm.weight"):
                value.add_(1)
    return network


def _torch_resampling() -> dict[str, Any]:
    options = {"force_separate_z": None, "memefficient_seg_resampling": False}
    return {
        key: value
        for what in ("data", "seg", "probabilities")
        for key, value in (
            (f"resampling_fn_{what}", "resample_torch_fornnunet"),
            (f"resampling_fn_{what}_kwargs", {"is_seg": what == "seg", **options}),
        )
    }


def _no_resampling() -> dict[str, Any]:
    return {
        key: value
        for what in ("data", "seg", "probabilities")
        for key, value in (
            (f"resampling_fn_{what}", "no_resampling_hack"),
            (f"resampling_fn_{what}_kwargs", {}),
        )
    }


@dataclass(frozen=True)
class Case:
    """A model, and a scan for it."""

    plan: dict[str, Any] = field(default_factory=plans)
    data: dict[str, Any] = field(default_factory=dataset)
    folds: tuple[str, ...] = ("0",)
    mirror: tuple[int, ...] | None = (0, 1, 2)
    shape: tuple[int, int, int] = (20, 35, 40)
    spacing: tuple[float, float, float] = (2.5, 1.5, 1.0)  # (z, y, x) mm
    hollow: bool = False
    axes: tuple[tuple[float, ...], ...] = ((-0.98, -0.199, 0), (0.199, -0.98, 0), (0, 0, 1))

    def make(self, folder: Path) -> tuple[Path, list[Path]]:
        """The model folder and the files of the scan's channels, both below `folder`."""
        model = write(folder, self.plan, self.data, self.folds, self.mirror)
        affine = np.eye(4)
        affine[:3, :3] = _orthogonal(self.axes) @ np.diag(self.spacing[::-1])
        affine[:3, 3] = 3, -20, 7
        files = []
        for i in range(len(self.data["channel_names"])):
            path = folder / f"case_{i:04d}.nii.gz"
            volume.write(volume.Volume(scan(self.shape, i, self.hollow), self.spacing, affine), path)
            files.append(path)
        return model, files


CASES = {
    "CT": Case(),
    "anisotropic model": Case(plans(spacing=(5.0, 1.1, 1.1), patch_size=(8, 32, 32)), mirror=None),
    "anisotropic scan": Case(spacing=(6.0, 1.0, 1.0), mirror=(1, 2)),
    "transposed": Case(plans(transpose=(2, 0, 1)), mirror=(0,)),
    "MR within a mask": Case(
        plans(("ZScoreNormalization",) * 2, (True, False)), dataset(("T1", "T2")), hollow=True, mirror=None
    ),
    "2-D": Case(plans(configuration="2d", spacing=(1.2, 1.1), patch_size=(32, 24)), mirror=(0, 1)),
    "regions": Case(
        data=dataset(
            labels={"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3},
            regions_class_order=[1, 2, 3],
        ),
        mirror=None,
    ),
    "smaller than the patch": Case(shape=(9, 20, 25)),
    "two folds, residual": Case(plans(name="ResidualEncoderUNet"), folds=("0", "1"), mirror=None),
    "other normalisations": Case(
        plans(("RescaleTo01Normalization", "NoNormalization", "ZScoreNormalization"), (False,) * 3),
        dataset(("a", "b", "c")),
        mirror=None,
    ),
    "turned to RAS": Case(
        plans(reader="NibabelIOWithReorient"), axes=((0, 0, -1), (1, 0, 0), (0, -1, 0)), mirror=None
    ),
    "torch's resampling": Case(
        plans(spacing=(5.0, 1.1, 1.1), patch_size=(8, 32, 32), resampling=_torch_resampling()), mirror=None
    ),
    "no resampling": Case(plans(resampling=_no_resampling()), mirror=None),
    "an ignore label": Case(mirror=None, data=dataset(labels={"background": 0, "organ": 1, "ignore": 2})),
}


def _orthogonal(axes: tuple[tuple[float, ...], ...]) -> np.ndarray:
    """The rotation nearest to these columns."""
    u, _, v = np.linalg.svd(np.array(axes, float))
    return u @ v


def scan(shape: tuple[int, int, int], seed: int = 0, hollow: bool = False) -> np.ndarray:
    """Smooth random Hounsfield units (D, H, W) int16 from -1000 to 1000; `hollow`: an ellipsoid of them in 0."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(1, 1, *(max(2, n // 4) for n in shape), generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, shape, mode="trilinear")[0, 0]
    noise = torch.randn(shape, generator=generator)
    image = (400 * smooth + 50 * noise).clamp(-1000, 1000).to(torch.int16)
    if hollow:
        grids = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in shape), indexing="ij")
        image[sum(g**2 for g in grids) > 0.7] = 0
        image[tuple(slice(n // 2, n // 2 + 2) for n in shape)] = 0  # a hole, that masks fill
    return image.numpy()
