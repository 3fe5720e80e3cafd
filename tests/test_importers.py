"""Models of nnU-Net and convoxel's own: what is read, what is refused, and that nothing is executed.

tests/data/nnunet_expected.npz holds what nnunetv2 2.8.1 makes of the cases of nnunet_model.py, its windows summed in
float32 (written by tests/campaigns/nnunet_parity.py --store).
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from convoxel import checkpoint, importers, models, volume
from convoxel.importers import networks, nnunet, safe
from convoxel.importers.nnunet_recipe import gaussian
from convoxel.inference.windows import spread
from convoxel.volume import Volume

pytest.importorskip("nibabel")
nnunet_model = pytest.importorskip("nnunet_model")
pytest.importorskip("dynamic_network_architectures")

EXPECTED = np.load(Path(__file__).parent / "data" / "nnunet_expected.npz")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder of one fold."""
    return nnunet_model.write(tmp_path_factory.mktemp("model"))


def edit(folder: Path, name: str, change) -> None:
    path = folder / name
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))


@pytest.fixture
def copy(folder, tmp_path):
    """A model folder that may be spoilt."""
    return nnunet_model.write(tmp_path)


@pytest.mark.parametrize("name", nnunet_model.CASES)
def test_a_scan_is_prepared_as_nnunet_does(name, tmp_path):
    case = nnunet_model.CASES[name]
    if any(case.plan["configurations"][next(iter(case.plan["configurations"]))]["use_mask_for_norm"]):
        pytest.importorskip("scipy")
    path, files = case.make(tmp_path)
    model = importers.load(path)
    ready = model.recipe.prepare(model.check([volume.read(file) for file in files]), 0.5)
    shape = tuple(EXPECTED[f"{name}/shape"])
    rim = [(n - m) // 2 for n, m in zip(ready.image.shape[1:], shape[1:], strict=True)]
    inner = [slice(r, r + m) for r, m in zip(rim, shape[1:], strict=True)]
    image = ready.image.numpy()[:, inner[0], inner[1], inner[2]]
    assert image.shape == shape
    assert np.abs(ready.image.numpy()).sum() == pytest.approx(np.abs(image).sum(), rel=1e-6)  # the rim is 0
    rng = np.random.default_rng(0)
    places = tuple(rng.integers(0, n, 64) for n in shape)
    np.testing.assert_allclose(image[places], EXPECTED[f"{name}/values"], rtol=0, atol=2e-5)


def test_windows_and_weights_are_nnunets():
    assert spread(110, 64, 0.5) == [0, 23, 46]
    assert spread(64, 64, 0.5) == [0]
    assert spread(9, 5, 0.5) == [0, 2, 4]  # MONAI's step, 2 voxels, would take as many
    assert spread(10, 5, 0.5) == [0, 2, 5]  # and there 4 windows
    assert spread(4, 1, 0.5) == [0, 1, 2, 3]  # no window twice
    weights = gaussian((16, 20, 8))
    assert weights.shape == (16, 20, 8) and weights[8, 10, 4] == 10 and weights.min() > 0
    assert torch.equal(weights, weights.half().float())
    away = np.exp(-0.5 * ((3 / 2.0) ** 2 + (1 / 1.0) ** 2))
    assert weights[11, 10, 5].item() == pytest.approx(10 * away, rel=1e-3)


def test_every_fold_or_those_that_are_asked_for(tmp_path):
    path = nnunet_model.write(tmp_path, folds=("0", "2", "all"))
    assert len(importers.load(path).networks) == 2  # "all" is no fold of a cross-validation
    assert len(importers.load(path, folds=["all"]).networks) == 1
    with pytest.raises(ValueError, match="fold 1 has no checkpoint_final.pth; there are folds 0, 2, all"):
        importers.load(path, folds=["1"])
    (path / "fold_2" / "checkpoint_final.pth").rename(path / "fold_2" / "checkpoint_best.pth")
    assert len(importers.load(path).networks) == 2


def test_one_of_several_models(tmp_path):
    nnunet_model.write(tmp_path)
    flat = nnunet_model.plans(configuration="2d", spacing=(1.0, 1.0), patch_size=(16, 16))
    nnunet_model.write(tmp_path, flat, mirror=(0, 1))
    assert importers.load(tmp_path).name.endswith("3d_fullres")
    model = importers.load(tmp_path, configuration="2d")
    assert model.name.endswith("2d") and model.recipe.mirror_axes == (1, 2)
    with pytest.raises(ValueError, match="give one of these folders: 3d_lowres fits not just one"):
        importers.load(tmp_path, configuration="3d_lowres")


def test_plans_of_the_first_versions(copy):
    def change(plan):
        found = plan["configurations"]["3d_fullres"]
        del found["architecture"]
        found.update(
            UNet_class_name="PlainConvUNet", UNet_base_num_features=8, unet_max_num_features=16,
            n_conv_per_stage_encoder=[1, 1, 1], n_conv_per_stage_decoder=[1, 1],
            conv_kernel_sizes=[[3] * 3] * 3, pool_op_kernel_sizes=[[1] * 3, [2] * 3, [2] * 3],
        )  # fmt: skip

    edit(copy, "plans.json", change)
    with pytest.raises(ValueError, match="of another shape"):  # 8, 16, 16 features, the file has 8, 12, 16
        importers.load(copy)


def test_inherited_configurations(copy):
    def change(plan):
        base = plan["configurations"].pop("3d_fullres")
        patch = base.pop("patch_size")
        plan["configurations"].update(
            {"base": base, "3d_fullres": {"inherits_from": "base", "patch_size": patch}}
        )

    edit(copy, "plans.json", change)
    assert importers.load(copy).recipe.patch_size == (16, 24, 32)
    edit(copy, "plans.json", lambda p: p["configurations"]["base"].update(inherits_from="3d_fullres"))
    with pytest.raises(ValueError, match="inherit from each other"):
        importers.load(copy)


def of(**values):
    return lambda plan: plan["configurations"]["3d_fullres"].update(values)


def arguments(**values):
    return lambda plan: plan["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"].update(values)


def network(name):
    return lambda plan: plan["configurations"]["3d_fullres"]["architecture"].update(network_class_name=name)


@pytest.mark.parametrize(
    "file, change, words",
    [
        ("plans.json", of(previous_stage="3d_lowres"), "this is a cascade"),
        ("plans.json", of(preprocessor_name="Mine"), "its preprocessor is Mine"),
        ("plans.json", of(normalization_schemes=["Mine"]), "the normalisation 'Mine' is not one of"),
        ("plans.json", of(normalization_schemes=[]), "there are 1 channels, but 0 normalisations"),
        ("plans.json", of(resampling_fn_data="os.system"), "'os.system' is not nnU-Net's"),
        ("plans.json", of(spacing=[1, 1, 0]), "spacings should be positive"),
        ("plans.json", of(patch_size=[1, 2, 3, 4]), "2 or 3 numbers"),
        (
            "plans.json",
            lambda p: p.update(image_reader_writer="NaturalImage2DIO"),
            "read by NaturalImage2DIO",
        ),
        ("plans.json", lambda p: p.update(transpose_forward=[0, 0, 1]), "should order the axes"),
        ("plans.json", lambda p: p.pop("transpose_forward"), "no 'transpose_forward'"),
        ("plans.json", lambda p: p.pop("configurations"), "no configuration '3d_fullres'; it has none"),
        ("plans.json", network("os.system"), "'system' is not on convoxel's list for nnunet"),
        ("plans.json", arguments(conv_op="os.system"), "'os.system' is not on convoxel's list of layers"),
        ("plans.json", arguments(conv_op="evil.Conv3d"), "'evil.Conv3d' is not on convoxel's list of layers"),
        ("plans.json", arguments(nonlin="$exec('x')"), "is Python to be run"),
        ("plans.json", arguments(features_per_stage=[10**9] * 3), "out of range"),
        ("plans.json", arguments(features_per_stage=[8, 12, 20]), "of another shape"),
        ("plans.json", arguments(n_stages=2), "cannot be built of its arguments"),
        ("plans.json", arguments(surprise=1), "no argument surprise"),
        ("dataset.json", lambda d: d["labels"].update(more=4), "of another shape"),
        ("dataset.json", lambda d: d.pop("labels"), "no 'labels'"),
    ],
)
def test_what_is_not_on_the_list_is_named(copy, file, change, words):
    edit(copy, file, change)
    with pytest.raises(ValueError, match=words):
        importers.load(copy)


class Bomb:
    def __reduce__(self):
        return os.system, ("touch /tmp/convoxel-was-here",)


@pytest.mark.parametrize("where", ["network_weights", "logging", "init_args"])
def test_a_checkpoint_is_never_executed(copy, where, tmp_path):
    path = copy / "fold_0" / "checkpoint_final.pth"
    found = torch.load(path, weights_only=False)
    found[where]["bomb"] = Bomb()
    torch.save(found, path)
    with pytest.raises(ValueError, match=r"holds (posix|nt)\.system, which is not plain data"):
        importers.load(copy)
    assert not Path("/tmp/convoxel-was-here").exists()


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "no whole torch checkpoint"),
        (b"not a checkpoint at all", "no whole torch checkpoint"),
        ({"weights": {}}, "no network_weights inside"),
        ([1, 2], "no network_weights inside"),
        ({"network_weights": {}}, "expected a state_dict of tensors"),
        ({"network_weights": {"a": 1}}, "'a' is a int, expected a state_dict"),
        ({"network_weights": {"a": torch.zeros(2)}}, "missing: .*not expected: a"),
    ],
)
def test_a_checkpoint_that_is_none(copy, content, words):
    path = copy / "fold_0" / "checkpoint_final.pth"
    path.unlink()
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match=words):
        importers.load(copy)


def test_a_checkpoint_cut_short_anywhere(copy):
    path = copy / "fold_0" / "checkpoint_final.pth"
    whole = path.read_bytes()
    for part in (1, 5, 9):
        path.write_bytes(whole[: len(whole) * part // 10])
        with pytest.raises(ValueError, match="no whole torch checkpoint"):
            importers.load(copy)


def test_programs_are_refused(tmp_path):
    path = tmp_path / "model.pt"
    with pytest.warns(DeprecationWarning):
        torch.jit.save(torch.jit.script(torch.nn.ReLU()), path)
    with pytest.raises(ValueError, match="this is a TorchScript program"):
        safe.read_checkpoint(path)


def test_prefixes_of_compiled_and_parallel_networks_are_dropped(copy):
    path = copy / "fold_0" / "checkpoint_final.pth"
    found = torch.load(path, weights_only=False)
    found["network_weights"] = {f"module._orig_mod.{k}": v for k, v in found["network_weights"].items()}
    torch.save(found, path)
    assert len(importers.load(copy).networks) == 1


def test_numpy_1_and_2_name_their_scalars_differently(tmp_path):
    path = tmp_path / "scores.pth"
    torch.save({"a": np.float64(1.5), "b": np.arange(3)}, path)
    for name in (b"numpy._core.multiarray", b"numpy.core.multiarray"):
        data = path.read_bytes()
        if name in data:
            found = safe.read_checkpoint(path)
            assert found["a"] == 1.5 and found["b"].tolist() == [0, 1, 2]
    names = {name for item in safe.NUMPY_NAMES if isinstance(item, tuple) for name in item[1:]}
    assert {"numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"} <= names


def test_imported_and_read_again_is_the_same_model(tmp_path):
    path = nnunet_model.write(tmp_path, folds=("0", "1"))
    model = importers.load(path)
    importers.save(model, tmp_path / "model.safetensors")
    again = importers.load(tmp_path / "model.safetensors")
    assert (
        again.recipe == model.recipe and again.description == model.description and again.name == model.name
    )
    x = torch.randn(1, 1, 16, 24, 32)
    for a, b in zip(model.networks, again.networks, strict=True):
        assert torch.equal(a(x), b(x))
    assert not torch.equal(again.networks[0](x), again.networks[1](x))
    assert len(importers.load(tmp_path / "model.safetensors", folds=["1"]).networks) == 1
    with pytest.raises(ValueError, match="no network 2; it has 2"):
        importers.load(tmp_path / "model.safetensors", folds=["2"])
    once = sum(p.numel() * 4 for network in model.networks for p in network.parameters())
    assert (tmp_path / "model.safetensors").stat().st_size < once + 20_000  # shared weights are kept once


def test_a_spoilt_recipe_is_refused(tmp_path, folder):
    model = importers.load(folder)
    path = tmp_path / "model.safetensors"
    importers.save(model, path)
    state, architecture = checkpoint.read(path)
    recipe = checkpoint.read_recipe(path)
    assert recipe is not None and architecture is not None
    for change in (
        {"kind": "other"},
        {"patch_size": "x"},
        {"networks": None},
        {"data": {}},
        {"spacing": [0, 1, 1]},
    ):
        checkpoint.write(path, state, architecture, {**recipe, **change})
        with pytest.raises(ValueError, match="its recipe cannot be used"):
            importers.load(path)
    checkpoint.write(path, state, {"name": "nnunet.Evil", "config": {}}, recipe)
    with pytest.raises(ValueError, match="'Evil' is not on convoxel's list"):
        importers.load(path)


def test_a_file_of_model_save_needs_a_patch_size(tmp_path):
    network = models.create("unet", rank=3, in_channels=2, out_channels=3, features=(4, 8))
    path = tmp_path / "own.safetensors"
    checkpoint.write(path, network.state_dict(), models.config_of(network))
    with pytest.raises(ValueError, match="says nothing of patches"):
        importers.load(path)
    with pytest.raises(ValueError, match="is a 3-D network: expected --patch-size with 3 numbers"):
        importers.load(path, patch_size=(8, 8))
    model = importers.load(path, patch_size=(8, 16, 8))
    scan = Volume(np.random.default_rng(0).random((2, 5, 20, 9)), (1, 1, 1))
    ready = model.recipe.prepare(model.check([scan]), 0.5)
    assert ready.image.shape == (2, 8, 20, 9) and ready.axes is not None
    z = ready.axes[0]
    assert z.low.tolist() == z.high.tolist() == [1, 2, 3, 4, 5] and not z.t.any()
    np.testing.assert_array_equal(ready.image[:, 1:6].numpy(), scan.array.astype(np.float32))
    checkpoint.write(path, network.state_dict(), None)
    with pytest.raises(ValueError, match="holds weights only"):
        importers.load(path)


def test_a_scan_that_does_not_fit_says_why(folder):
    model = importers.load(folder)
    scan = Volume(np.zeros((4, 5, 6), np.int16), (1, 1, 1))
    with pytest.raises(ValueError, match=r"takes 1 channel\(s\) \(CT\), the scan has 2"):
        model.check([scan, scan])
    bad = np.zeros((4, 5, 6), np.float32)
    bad[0, 0, :2] = np.nan, np.inf
    with pytest.raises(ValueError, match="channel CT: 2 of 120 voxels are NaN or infinite"):
        model.check([scan.like(bad)])
    huge = Volume(np.ones((4, 4, 4), np.int16), (1e4, 1e4, 1e4))
    with pytest.raises(ValueError, match="more than this machine has; check the scan's spacing"):
        model.recipe.prepare([huge], 0.5)


def test_channels_must_lie_on_one_grid(tmp_path):
    plan = nnunet_model.plans(("NoNormalization",) * 2, (False,) * 2)
    model = importers.load(nnunet_model.write(tmp_path, plan, nnunet_model.dataset(("T1", "T2"))))
    a = Volume(np.zeros((4, 5, 6), np.int16), (1, 1, 1))
    shifted = np.diag([1.0, 1, 1, 1])
    shifted[0, 3] = 1
    with pytest.raises(ValueError, match="the channels T1 and T2 do not lie on one grid"):
        model.check([a, Volume(a.array, None, shifted)])
    both = Volume(np.zeros((2, 4, 5, 6), np.int16), (1, 1, 1))
    assert len(model.check([both])) == len(model.check([a, a])) == 2


def test_weights_of_several_names_are_completed():
    net = nnunet_model.random_network(nnunet_model.plans(), nnunet_model.dataset(), 0)
    once = networks.unique(net)
    whole = networks.complete(net, once)
    assert len(once) < len(whole) and whole.keys() == net.state_dict().keys()


def test_what_is_no_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such model"):
        importers.load(tmp_path / "none")
    with pytest.raises(ValueError, match="not a model that convoxel knows"):
        importers.load(tmp_path)
    assert not nnunet.is_model(tmp_path)
    (tmp_path / "plans.json").write_text("[1]")
    with pytest.raises(ValueError, match="expected a JSON object, received a list"):
        importers.load(tmp_path)
