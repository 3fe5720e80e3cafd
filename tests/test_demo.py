"""The demonstration: its data, its augmentation, its numbers, and one short run from end to end."""

import json
import sys

import nibabel
import numpy as np
import pytest
import torch
from matplotlib.image import imread

from convoxel import nn, runtime
from convoxel.bench.networks import torch_twin
from convoxel.demo import data, measure, report, run, train
from convoxel.demo.augment import Patches
from convoxel.models import UNet

SPEEDS = {f"{work}, {whose}": 1e6 for work in ("training", "inference") for whose in ("convoxel", "torch")}


@pytest.fixture(scope="module")
def brain():
    return data.load_brain()


def test_template_lies_as_nilearn_says(brain):
    """Voxel (x, y, z) of nilearn's array is [z, y, x] of ours, with the same affine."""
    from nilearn.datasets import load_mni152_template

    theirs = load_mni152_template(resolution=2)
    assert brain.image.shape == (95, 117, 99)
    assert brain.image.spacing == (2.0, 2.0, 2.0)
    assert brain.image.orientation == "RAS"
    np.testing.assert_array_equal(brain.image.affine, theirs.affine)
    assert brain.image.array[40, 50, 30] == np.float32(theirs.get_fdata()[30, 50, 40])
    assert np.bincount(brain.labels.array.ravel()).tolist() == [865010, 19743, 136174, 79458]


def test_halves_share_no_plane(brain):
    marks = report.halves(brain).array
    used = [set(np.unique(np.nonzero(marks == half)[1])) for half in (1, 2)]
    assert used == [set(range(63, 117)), set(range(54))]
    assert (marks == marks[:1, :, :1]).all()  # never split left and right


def test_disturbance_is_the_stated_one_and_seeded():
    ones = np.ones((30, 40, 50), np.float32)
    image = data.disturb(ones, seed=3)
    field = data.smooth_field(ones.shape, torch.Generator().manual_seed(3)).numpy()
    rest = image - (1 + data.BIAS * field)
    assert np.abs(field).max() == pytest.approx(1)
    assert rest.std() == pytest.approx(data.NOISE, rel=0.02)
    assert abs(np.diff(field, axis=0)).max() < 0.2  # smooth
    np.testing.assert_array_equal(image, data.disturb(ones, seed=3))
    assert (image != data.disturb(ones, seed=4)).any()


def test_patches_keep_image_and_labels_together(monkeypatch):
    """Without the intensity part, nearest-neighbour labels of a two-valued image are its rounded values."""
    monkeypatch.setattr(Patches, "_intensity", lambda self, image: image)
    labels = np.zeros((20, 18, 16), np.uint8)
    labels[4:14, 3:12, 5:] = 1
    patches = Patches(labels.astype(np.float32), labels, (12, 10, 8), count=8, seed=0)
    seen = set()
    for index in range(8):
        x, y = patches[index]
        assert x.shape == (1, 12, 10, 8) and x.dtype == torch.float32
        assert y.shape == (12, 10, 8) and y.dtype == torch.int64
        sure = (x[0] - 0.5).abs() > 0.4
        assert sure.float().mean() > 0.5
        assert torch.equal(x[0][sure].round().long(), y[sure])
        seen.add(y.sum().item())
    assert len(seen) > 1
    with pytest.raises(IndexError):
        patches[8]


def test_bias_field_of_a_patch_varies_as_slowly_as_a_scans(brain):
    """A patch sees a part of a field as large as a scan: neighbouring voxels differ by little."""
    patches = train.patches(brain, train.FULL, seed=0)
    steps = [max(patches._field().diff(dim=axis).abs().max().item() for axis in range(3)) for _ in range(5)]
    assert patches._field().shape == train.FULL.patch
    assert 0 < max(steps) < 0.1


def test_mirror_mean_is_the_mean_over_eight_mirror_images():
    """A network that sees only position: its eight mirror images make every corner the same."""
    position = torch.arange(8.0).reshape(1, 1, 2, 2, 2)

    class Position(nn.Module):
        def forward(self, x):
            return torch.cat([position * x, torch.zeros_like(x)], dim=1)

    x = torch.ones(1, 1, 2, 2, 2)
    mean = train.MirrorMean(Position())(x)
    assert mean.shape == (1, 2, 2, 2, 2)
    torch.testing.assert_close(mean[:, 0], torch.full((1, 2, 2, 2), position.sigmoid().mean().item()))
    torch.testing.assert_close(mean.sum(1), torch.ones(1, 2, 2, 2))


def test_patches_follow_their_seed(brain):
    recipe = train.recipe(quick=True)
    first, again, other = (train.patches(brain, recipe, seed)[0] for seed in (5, 5, 6))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


def test_training_never_sees_the_test_half(brain):
    """Everything outside the training half may change: the patches do not."""
    recipe = train.recipe(quick=True)
    image, labels = brain.image.array.copy(), brain.labels.array.copy()
    image[:, : data.TRAIN.start], labels[:, : data.TRAIN.start] = 9, 3
    spoilt = data.Brain(brain.image.like(image), brain.labels.like(labels))
    for (x, y), (u, v) in zip(train.patches(brain, recipe, 0), train.patches(spoilt, recipe, 0), strict=True):
        assert torch.equal(x, u) and torch.equal(y, v)


def test_thresholds_are_the_best_pair():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 4, 2000)
    image = truth / 4 + 0.1 * rng.standard_normal(2000)
    levels = np.unique(np.percentile(image[truth > 0], np.linspace(0, 100, 20)))

    def score(cuts):
        return np.mean(measure.dice(measure.by_threshold(image, truth > 0, cuts), truth))

    best = max(score((a, b)) for a in levels for b in levels if a < b)
    assert score(measure.fit_thresholds(image, truth, levels=20)) == pytest.approx(best)
    assert best > 0.7


def test_threshold_baseline_scores_what_the_issue_says(brain):
    """0.94 on the clean image, about 0.70 under the disturbance: the task is worth learning."""
    truth = brain.labels.array
    found = []
    for image in (brain.image.array, data.disturb(brain.image.array, 1000)):
        cuts = measure.fit_thresholds(image[:, data.TRAIN], truth[:, data.TRAIN])
        labels = measure.by_threshold(image, truth > 0, cuts)
        found.append(np.mean(measure.dice(labels[:, data.TEST], truth[:, data.TEST])))
    assert found == pytest.approx([0.93, 0.70], abs=0.02)


def test_torch_twin_has_torch_layers_and_the_same_numbers():
    network = UNet(rank=3, in_channels=1, out_channels=4, features=(4, 8))
    twin = torch_twin(network)
    assert type(twin) is UNet and type(network.heads[0]) is nn.Conv3d
    assert not any(type(layer).__module__.startswith("convoxel.nn") for layer in twin.modules())
    assert type(twin.heads[0]) is torch.nn.Conv3d
    x = torch.randn(1, 1, 8, 8, 8)
    runtime.reset_stats()
    theirs = twin(x)
    assert runtime.stats() == {}
    torch.testing.assert_close(network(x), theirs, rtol=1e-4, atol=1e-4)
    assert runtime.stats() != {}


@pytest.mark.parametrize(
    "network, threshold, words",
    [
        ((0.9, 0.8, 0.7), 0.70, None),
        ((0.9, 0.8, 0.6), 0.60, "the mean Dice is 0.767, the target is 0.80"),
        ((0.9, 0.8, 0.8), 0.77, "the mean Dice 0.833 is less than 0.08 above the threshold's 0.770"),
        ((0.9, 0.9, float("nan")), 0.70, "the mean Dice is nan, the target is 0.80"),
    ],
)
def test_the_target(network, threshold, words):
    assert report.Scores([1.0] * 3, [threshold] * 3, list(network)).missed() == words


def test_short_run_produces_everything(tmp_path, capfd, brain):
    assert run(tmp_path / "out", quick=True, epochs=1, threads=1) is True
    out, err = capfd.readouterr()
    for words in ("no clinical claim", "Short form", "threshold, disturbed image", "3D U-Net", "torch's 0."):
        assert words in out
    assert "Target" not in out
    assert "epoch 1/1" in err and "loss" in err

    folder = tmp_path / "out"
    prediction = nibabel.load(folder / "prediction.nii.gz")
    assert prediction.shape == (99, 117, 95) and prediction.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(prediction.affine, brain.image.affine)
    labels = np.asarray(prediction.dataobj).transpose(2, 1, 0)
    assert set(np.unique(labels)) <= {0, 1, 2, 3}
    truth = np.asarray(nibabel.load(folder / "truth.nii.gz").dataobj).transpose(2, 1, 0)
    np.testing.assert_array_equal(truth, brain.labels.array)

    numbers = json.loads((folder / "numbers.json").read_text())
    assert numbers["dice"]["network"] == measure.dice(labels[:, data.TEST], truth[:, data.TEST])
    assert len(numbers["curve"]["loss"]) == train.QUICK.steps
    assert all(speed > 0 for speed in numbers["voxels_per_second"].values())
    assert not runtime.is_strict()
    for picture in ("overlay.png", "learning_curve.png"):
        pixels = imread(folder / picture)
        assert min(pixels.shape[:2]) > 400
        assert (pixels[..., :3].min(-1) < 0.9).mean() > 0.01  # not blank


def test_a_missed_target_is_exit_code_1(tmp_path, monkeypatch, capsys):
    """The full form's verdict, on a network that has learned nothing."""
    from convoxel import cli

    monkeypatch.setattr(train, "FULL", train.QUICK)
    monkeypatch.setattr(measure, "speeds", lambda *_: SPEEDS)
    assert cli.main(["demo", "--out", str(tmp_path), "--epochs", "1", "--threads", "1"]) == 1
    out = capsys.readouterr().out
    assert "Target missed: the mean Dice is 0." in out.splitlines()[-1]


@pytest.mark.parametrize(
    "package, module", [("nilearn", "nilearn"), ("matplotlib", "matplotlib.figure")], ids=lambda v: v
)
def test_a_missing_package_is_one_line_that_names_the_extra(package, module, tmp_path, monkeypatch, capsys):
    from convoxel import cli

    monkeypatch.setitem(sys.modules, module, None)
    assert cli.main(["demo", "--quick", "--out", str(tmp_path / "out")]) == 1
    err = capsys.readouterr().err
    assert err == f'convoxel demo: the demo needs {package}: pip install "convoxel[demo]"\n'
