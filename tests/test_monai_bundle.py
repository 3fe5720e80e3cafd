"""MONAI bundles: the labels that MONAI's own transforms and inferer give, and configurations that are not run."""

import copy
import json
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from convoxel import cli, importers, volume
from convoxel.importers.monai_bundle import Config
from convoxel.volume import Volume

pytest.importorskip("nibabel")
pytest.importorskip("monai")

NETWORK = {
    "_target_": "UNet", "spatial_dims": 3, "in_channels": 1, "out_channels": 3, "channels": [4, 8, 8],
    "strides": [2, 2], "num_res_units": 1, "norm": "batch",
}  # fmt: skip


def transform(name: str, **options: Any) -> dict[str, Any]:
    return {"_target_": name, "keys": "@image_key", **options}


def after(name: str, **options: Any) -> dict[str, Any]:
    return {"_target_": name, "keys": "pred", **options}


READ = [transform("LoadImaged"), transform("EnsureChannelFirstd")]
RAS = transform("Orientationd", axcodes="RAS")
SPACED = transform("Spacingd", pixdim=[1.5, 1.5, 2.0], mode="bilinear")
CT = transform("ScaleIntensityRanged", a_min=-500, a_max=700, b_min=0, b_max=1, clip=True)
SOFTMAX, SIGMOID = after("Activationsd", softmax=True), after("Activationsd", sigmoid=True)
LINEAR = after(
    "Invertd", transform="@preprocessing", orig_keys="@image_key", nearest_interp=False, to_tensor=True
)
NEAREST = {**LINEAR, "nearest_interp": True}
ARGMAX, HALF = after("AsDiscreted", argmax=True), after("AsDiscreted", threshold=0.5)
GAUSSIAN = {"roi_size": [24, 16, 20], "sw_batch_size": 2, "overlap": 0.5, "mode": "gaussian"}

CASES: dict[str, dict[str, Any]] = {
    "spleen's": {"before": [*READ, RAS, SPACED, CT], "after": [SOFTMAX, LINEAR, ARGMAX]},
    "logits go back": {"before": [*READ, RAS, SPACED, CT], "after": [LINEAR, SOFTMAX, ARGMAX], "window": GAUSSIAN},
    "whole body's": {
        # No voxel lies halfway between two: there MONAI's rounding noise decides.
        "before": [*READ, RAS, {**SPACED, "pixdim": [1.37, 1.73, 2.11]}, transform("NormalizeIntensityd", nonzero=True),
                   transform("ScaleIntensityd", minv=-1.0, maxv=1.0)],
        "after": [SOFTMAX, ARGMAX, NEAREST],
        "angle": 0.0,
    },
    "nothing moves": {"before": [*READ, transform("ScaleIntensityd")], "after": [SOFTMAX, ARGMAX]},
    "one region": {
        "before": [*READ, RAS, SPACED, CT], "after": [SIGMOID, LINEAR, HALF], "network": {"out_channels": 1},
    },
    "logits of one region go back": {
        "before": [*READ, SPACED, CT], "after": [LINEAR, SIGMOID, HALF], "network": {"out_channels": 1},
    },
    "tumours': masks of regions": {
        "before": [*READ, transform("NormalizeIntensityd", nonzero=True, channel_wise=True)],
        "after": [SIGMOID, after("Invertd", transform="@preprocessing", orig_keys="@image_key"), HALF],
    },
    "cropped": {
        "before": [*READ, RAS, SPACED, transform("CropForegroundd", source_key="@image_key"), CT],
        "after": [SOFTMAX, LINEAR, ARGMAX],
        "hollow": True,
    },
    "smaller than the window": {
        "before": [*READ, RAS, SPACED, CT], "after": [SOFTMAX, LINEAR, ARGMAX],
        "window": {"roi_size": [48, 48, 32], "overlap": 0.25},
    },
}  # fmt: skip


def configuration(case: dict[str, Any]) -> dict[str, Any]:
    return copy.deepcopy({
        "imports": ["$import glob", "$import os"],
        "image_key": "image",
        "bundle_root": ".",
        "dataset_dir": "$os.environ['HOME']",
        "datalist": "$list(sorted(glob.glob(@dataset_dir + '/*.nii.gz')))",
        "device": "$torch.device('cpu')",
        "network_def": {**NETWORK, **case.get("network", {})},
        "network": "$@network_def.to(@device)",
        "preprocessing": {"_target_": "Compose", "transforms": [*case["before"], transform("EnsureTyped")]},
        "inferer": {"_target_": "SlidingWindowInferer", **case.get("window", {**GAUSSIAN, "mode": "constant"})},
        "postprocessing": {"_target_": "Compose", "transforms": [
            *case["after"], after("SaveImaged", output_dir="$@bundle_root + '/eval'", _disabled_=True)]},
        "handlers": [{"_target_": "CheckpointLoader", "load_path": "$@bundle_root + '/models/model.pt'"}],
    })  # fmt: skip


def write(folder: Path, config: dict[str, Any], channels: int = 1) -> Path:
    """A bundle with a network of random weights, and its path."""
    from monai.networks import nets

    bundle = folder / "bundle"
    (bundle / "configs").mkdir(parents=True)
    (bundle / "models").mkdir()
    arguments = {key: value for key, value in config["network_def"].items() if key != "_target_"}
    torch.manual_seed(0)
    network = nets.UNet(**arguments)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape) * (1.2 / max(1, parameter[0].numel())) ** 0.5)
    torch.save(network.state_dict(), bundle / "models" / "model.pt")
    heads = arguments["out_channels"]
    metadata = {
        "network_data_format": {
            "inputs": {"image": {"channel_def": {str(i): f"modality {i}" for i in range(channels)}}},
            "outputs": {"pred": {"channel_def": {str(i): f"organ {i}" for i in range(heads)}}},
        }
    }
    (bundle / "configs" / "metadata.json").write_text(json.dumps(metadata))
    (bundle / "configs" / "inference.json").write_text(json.dumps(config))
    return bundle


def put(path: Path, hollow: bool = False, angle: float = 0.1) -> Path:
    nnunet_model = pytest.importorskip("nnunet_model")
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([-1.0, -1.2, 2.5])  # LPS, oblique unless angle is 0
    affine[:3, 3] = 5, 6, -7
    volume.write(Volume(nnunet_model.scan((18, 31, 36), 1, hollow), None, affine), path)
    return path


def monais(bundle: Path, scan: Path) -> np.ndarray:
    """What MONAI itself makes of it: (D, H, W), or (K, D, H, W) masks."""
    from monai.bundle import ConfigParser

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parser = ConfigParser(json.loads((bundle / "configs" / "inference.json").read_text()))
        network = parser.get_parsed_content("network")
        network.load_state_dict(torch.load(bundle / "models" / "model.pt"))
        data = parser.get_parsed_content("preprocessing")({"image": str(scan)})
        with torch.no_grad():
            data["pred"] = parser.get_parsed_content("inferer")(data["image"][None], network.eval())[0]
        labels = parser.get_parsed_content("postprocessing")(data)["pred"].numpy()
    labels = np.swapaxes(labels, -1, -3).astype(np.uint8)
    return labels[0] if len(labels) == 1 else labels


@pytest.mark.parametrize("name", CASES)
def test_labels_are_monais(name, tmp_path):
    case = CASES[name]
    bundle, path = (
        write(tmp_path, configuration(case)),
        put(tmp_path / "scan.nii.gz", case.get("hollow", False), case.get("angle", 0.1)),
    )
    expected, scan = monais(bundle, path), volume.read(path)
    labels = importers.load(bundle).predict([scan])
    assert labels.same_grid(scan, 0.0) and labels.array.shape == expected.shape
    assert len(np.unique(expected)) > 1
    differ = int((labels.array != expected).sum())
    assert differ <= expected.size // 5_000, f"{differ} of {expected.size}"


def test_imported_it_predicts_the_same(tmp_path):
    bundle, path = write(tmp_path, configuration(CASES["spleen's"])), put(tmp_path / "scan.nii.gz")
    assert cli.main(["import", str(bundle), str(tmp_path / "own.safetensors")]) == 0
    for model, out in ((bundle, "a.nii.gz"), (tmp_path / "own.safetensors", "b.nii.gz")):
        assert cli.main(["predict", str(model), str(path), "-o", str(tmp_path / out), "-q"]) == 0
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()
    model = importers.load(tmp_path / "own.safetensors")
    assert model.recipe.channels == ("modality 0",) and model.recipe.labels["organ 2"] == 2


def test_probabilities_are_those_of_the_labels(tmp_path):
    bundle, path = write(tmp_path, configuration(CASES["spleen's"])), put(tmp_path / "scan.nii.gz")
    argv = [
        "predict",
        str(bundle),
        str(path),
        "-o",
        str(tmp_path / "out.nii.gz"),
        "-q",
        "--save-probabilities",
    ]
    assert cli.main(argv) == 0
    p = volume.read(tmp_path / "out_probabilities.nii.gz").array
    np.testing.assert_allclose(p.sum(0), 1, atol=1e-5)
    assert (p.argmax(0) != volume.read(tmp_path / "out.nii.gz").array).sum() <= 2  # ties, after rounding


@pytest.mark.parametrize("inside", ["", "bundle/"])
def test_a_zip_file(tmp_path, inside):
    bundle = write(tmp_path, configuration(CASES["spleen's"]))
    packed = tmp_path / "zip" / "bundle.zip"
    packed.parent.mkdir()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("../../evil", "x")
        for file in bundle.rglob("*.*"):
            archive.write(file, inside + str(file.relative_to(bundle)))
    model = importers.load(packed)
    assert model.name == "bundle" and not (tmp_path.parent / "evil").exists()
    data = packed.read_bytes()
    packed.write_bytes(data[:3000] + bytes(200) + data[3200:])
    with pytest.raises(ValueError, match="is damaged|no whole torch checkpoint|not JSON"):
        importers.load(packed)


def test_yaml_configurations_and_nested_weights(tmp_path):
    yaml = pytest.importorskip("yaml")
    bundle = write(tmp_path, configuration(CASES["spleen's"]))
    config = bundle / "configs" / "inference.json"
    (bundle / "configs" / "inference.yaml").write_text(yaml.safe_dump(json.loads(config.read_text())))
    config.unlink()
    weights = bundle / "models" / "model.pt"
    torch.save({"model": torch.load(weights)}, weights)
    assert importers.load(bundle).recipe.patch == (24, 16, 20)
    (bundle / "configs" / "inference.yaml").write_text("!!python/object/apply:os.system [exit]")
    with pytest.raises(ValueError, match="not YAML"):
        importers.load(bundle)


def test_references_are_followed_and_nothing_is_run():
    config = Config({
        "a": {"b": [1, {"c": "@d"}]}, "d": "$[1, 2]", "e": "@a::b::1::c", "f": "$@a#b#0", "g": "$__import__('os')",
        "loop": "@loop", "gone": "@a::x", "none": "$None",
    })  # fmt: skip
    assert config.section("e") == [1, 2] and config.section("f") == 1 and config.section("none") is None
    assert config.section("g").text == "$__import__('os')"
    with pytest.raises(ValueError, match="lead to each other"):
        config.section("loop")
    with pytest.raises(ValueError, match="refers to @a::x, which the configuration does not have"):
        config.section("gone")


def change(path: str, value: Any):
    def edit(config: dict[str, Any]) -> None:
        found: Any = config
        *parts, last = path.split("/")
        for part in parts:
            found = found[int(part) if isinstance(found, list) else part]
        if isinstance(found, list):
            found[int(last)] = value
        else:
            found[last] = value

    return edit


BEFORE, AFTER = "preprocessing/transforms", "postprocessing/transforms"


@pytest.mark.parametrize(
    "edit, words",
    [
        (change("network_def/_target_", "os.system"), "'system' is not on convoxel's list for monai"),
        (
            change("network_def/channels", "$[2 ** i for i in range(3)]"),
            "network_def.channels: .* is Python to be run",
        ),
        (change("network_def/surprise", 1), "no argument surprise"),
        (change("network_def/channels", [4, 8, 16]), "of another shape"),
        (change("network_def/out_channels", "$len(@labels)"), "is Python to be run"),
        (change(f"{BEFORE}/3", transform("Lambdad", func="$lambda x: x")), "is Python to be run"),
        (change(f"{BEFORE}/3", transform("RandFlipd")), "RandFlip is not on convoxel's list"),
        (change(f"{BEFORE}/3/mode", "nearest"), "Spacing with mode='nearest' is not known"),
        (change(f"{BEFORE}/3/pixdim", [1, 2, 3, 4]), "expected three numbers"),
        (change(f"{BEFORE}/2", SPACED), "Spacing is known once"),
        (change(f"{BEFORE}/4/a_max", "$@x"), "refers to @x"),
        (change(f"{BEFORE}/4/sigma", 1), "the transform ScaleIntensityRange with .*sigma.* is not on"),
        (change("inferer/_target_", "SimpleInferer"), "SimpleInferer is not known"),
        (change("inferer/padding_mode", "reflect"), "padding with 0 alone"),
        (change("inferer/mode", "odd"), "the mode constant or gaussian"),
        (change(f"{AFTER}/1", after("KeepLargestConnectedComponentd")), "known are Activations, Invert"),
        (change(AFTER, [SOFTMAX, ARGMAX]), "Invert to bring labels back"),
        (change(AFTER, [SOFTMAX, ARGMAX, LINEAR]), "needs nearest_interp"),
        (change(AFTER, [ARGMAX, NEAREST, SOFTMAX]), "Activations has to come before"),
        (change(AFTER, [SOFTMAX, LINEAR, HALF]), "a threshold on softmax"),
        (change("preprocessing", "$@x"), "refers to @x"),
        (lambda config: config.pop("inferer"), "has no inferer"),
    ],
)
def test_what_is_not_on_the_list_is_named(tmp_path, edit, words):
    config = configuration(CASES["spleen's"])
    bundle = write(tmp_path, config)
    edit(config)
    (bundle / "configs" / "inference.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=words):
        importers.load(bundle)
