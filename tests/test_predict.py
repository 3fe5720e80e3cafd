"""Scans to labels with models of nnU-Net: its own predictor's labels, and the command around them."""

import re
from pathlib import Path

import numpy as np
import pytest

from convoxel import checkpoint, cli, importers, models, volume
from convoxel.importers import cases
from convoxel.volume import Volume

pytest.importorskip("nibabel")
pytest.importorskip("dynamic_network_architectures")
import nnunet_model  # noqa: E402  (its networks need the library above)

EXPECTED = np.load(Path(__file__).parent / "data" / "nnunet_expected.npz")
SHAPE = (9, 12, 14)


@pytest.mark.parametrize("name", nnunet_model.CASES)
def test_labels_are_nnunets(name, tmp_path):
    """Those of nnunetv2 2.8.1 with float32 sums; one voxel in ten thousand may round to another class."""
    case = nnunet_model.CASES[name]
    if "within a mask" in name:
        pytest.importorskip("scipy")
    path, files = case.make(tmp_path)
    scans = [volume.read(file) for file in files]
    labels = importers.load(path).predict(scans)
    assert labels.same_grid(scans[0], 0.0) and labels.dtype == np.uint8
    expected = EXPECTED[f"{name}/labels"]
    assert len(np.unique(expected)) > 1
    assert (labels.array != expected).sum() <= expected.size // 10_000


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    plan = nnunet_model.plans(patch_size=(8, 8, 8))
    return nnunet_model.write(tmp_path_factory.mktemp("model"), plan, mirror=(2,))


def put(path: Path, seed: int = 0, spacing: tuple[float, float, float] = (2.0, 1.5, 1.0)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    volume.write(Volume(nnunet_model.scan(SHAPE, seed), spacing), path)
    return path


def run(*argv: object) -> int:
    return cli.main(["predict", *map(str, argv)])


def test_a_folder_of_cases_is_resumed(model, tmp_path, capsys):
    put(tmp_path / "in" / "a_0000.nii.gz", 0), put(tmp_path / "in" / "b_0000.nii.gz", 1)
    put(tmp_path / "in" / "plain.nrrd", 2)
    out = tmp_path / "new" / "out"
    assert run(model, tmp_path / "in", "-o", out, "-q") == 0
    assert sorted(file.name for file in out.iterdir()) == ["a.nii.gz", "b.nii.gz", "plain.nrrd"]
    text = capsys.readouterr().out
    assert "3 case(s)" in text and "[2/3] b" in text and text.endswith("3 predicted\n")
    first = volume.read(out / "a.nii.gz")
    assert first.same_grid(volume.read(tmp_path / "in" / "a_0000.nii.gz"), 0.0)
    assert (out / "a.nii.gz").stat().st_ino  # kept below: b alone is made again
    before = (out / "a.nii.gz").stat().st_mtime_ns
    (out / "b.nii.gz").unlink()
    assert run(model, tmp_path / "in", "-o", out, "-q") == 0
    assert capsys.readouterr().out.endswith("1 predicted; 2 there already (--overwrite predicts again)\n")
    assert (out / "a.nii.gz").stat().st_mtime_ns == before
    assert run(model, tmp_path / "in" / "a_0000.nii.gz", "-o", out, "-q", "--overwrite") == 0
    assert (out / "a.nii.gz").stat().st_mtime_ns > before
    np.testing.assert_array_equal(volume.read(out / "a.nii.gz").array, first.array)


def test_a_failing_case_does_not_stop_the_others(model, tmp_path, capsys):
    put(tmp_path / "in" / "good.nii.gz")
    (tmp_path / "in" / "broken.nii.gz").write_bytes(b"")
    out = tmp_path / "out"
    assert run(model, tmp_path / "in", "-o", out, "-q") == 1
    text = capsys.readouterr()
    assert text.err.startswith("convoxel predict: broken: ") and "the file is empty" in text.err
    assert text.err.endswith("1 predicted; 1 failed: broken\n") and "Traceback" not in text.err
    assert [file.name for file in out.iterdir()] == ["good.nii.gz"]


def test_one_scan_to_one_file_with_probabilities(model, tmp_path):
    scan, out = put(tmp_path / "scan.nii.gz"), tmp_path / "labels.nii.gz"
    assert run(model, scan, "-o", out, "--save-probabilities", "-q") == 0
    labels, p = volume.read(out), volume.read(tmp_path / "labels_probabilities.nii.gz")
    assert p.array.shape == (4, *SHAPE) and p.same_grid(labels, 0.0)
    np.testing.assert_allclose(p.array.sum(0), 1, atol=1e-5)
    np.testing.assert_array_equal(p.array.argmax(0), labels.array)
    assert sorted(file.name for file in tmp_path.iterdir() if file != tmp_path) == [
        "labels.nii.gz", "labels_probabilities.nii.gz", "scan.nii.gz",
    ]  # fmt: skip


def test_probabilities_outside_the_crop_are_background(model, tmp_path):
    image = nnunet_model.scan(SHAPE)
    image[:3], image[:, :, 10:] = 0, 0
    volume.write(Volume(image, (2.0, 1.5, 1.0)), tmp_path / "scan.nii.gz")
    plan = nnunet_model.plans(patch_size=(8, 8, 8), transpose=(1, 2, 0), reader="NibabelIOWithReorient")
    path = nnunet_model.write(tmp_path, plan, mirror=None)
    assert run(path, tmp_path / "scan.nii.gz", "-o", tmp_path / "out", "--save-probabilities", "-q") == 0
    p = volume.read(tmp_path / "out" / "scan_probabilities.nii.gz").array
    outside = np.ones(SHAPE, bool)
    outside[3:, :, :10] = False
    assert (p[0][outside] == 1).all() and (p[1:, outside] == 0).all() and (p[0][~outside] < 1).any()
    labels = volume.read(tmp_path / "out" / "scan.nii.gz").array
    np.testing.assert_array_equal(labels, p.argmax(0))
    assert labels.any()


@pytest.mark.parametrize("missing", [1, 2])
def test_a_scan_a_little_smaller_than_the_patch(missing, tmp_path):
    """On the network's own spacing: what is padded, on one side or on both, does not come back."""
    plan = nnunet_model.plans(patch_size=(12, 8, 8), spacing=(2.0, 1.5, 1.0))
    scan = Volume(nnunet_model.scan((12 - missing, 12, 14), 0), (2.0, 1.5, 1.0))
    labels = importers.load(nnunet_model.write(tmp_path, plan)).predict([scan], mirror=False)
    assert labels.array.shape == scan.array.shape and len(np.unique(labels.array)) > 1


def test_mirroring_overlap_and_batches(model, tmp_path):
    scan = volume.read(put(tmp_path / "scan.nii.gz"))
    loaded = importers.load(model)
    plain = loaded.predict([scan], mirror=False).array
    assert (loaded.predict([scan]).array != plain).any()
    assert (loaded.predict([scan], mirror=False, overlap=0).array != plain).any()
    batched = loaded.predict([scan], mirror=False, batch_size=3).array
    assert (batched != plain).sum() <= 1
    out = tmp_path / "plain.nii.gz"
    assert run(model, tmp_path / "scan.nii.gz", "-o", out, "--no-mirror", "-q") == 0
    np.testing.assert_array_equal(volume.read(out).array, plain)


def test_import_and_predict_with_what_was_imported(model, tmp_path, capsys):
    own, scan = tmp_path / "model.safetensors", put(tmp_path / "scan.nii.gz")
    assert cli.main(["import", str(model), str(own)]) == 0
    assert "Dataset901_Random 3d_fullres: PlainConvUNet, 1 channel(s) (CT)" in capsys.readouterr().out
    assert (
        run(model, scan, "-o", tmp_path / "a.nii.gz", "-q")
        == run(own, scan, "-o", tmp_path / "b.nii.gz", "-q")
        == 0
    )
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


def test_a_checkpoint_of_model_save(tmp_path):
    network = models.create("unet", rank=3, in_channels=1, out_channels=3, features=(4, 8))
    checkpoint.write(tmp_path / "own.safetensors", network.state_dict(), models.config_of(network))
    scan = put(tmp_path / "scan.nii.gz")
    argv = tmp_path / "own.safetensors", scan, "-o", tmp_path / "out.nii.gz", "-q", "--patch-size", 16, 8, 8
    assert run(*argv) == 0
    labels = volume.read(tmp_path / "out.nii.gz")
    assert labels.array.shape == SHAPE and len(np.unique(labels.array)) > 1


@pytest.mark.parametrize(
    "options, words",
    [
        (["--overlap", "1"], "--overlap must be from 0 to below 1, received 1.0"),
        (["--batch", "0"], "--batch must be at least 1, received 0"),
        (["--max-ram", "much"], "--max-ram='much': expected bytes"),
        (["--folds", "7"], "fold 7 has no checkpoint_final.pth"),
    ],
)
def test_a_mistake_is_one_line(model, tmp_path, capsys, options, words):
    assert run(model, put(tmp_path / "a.nii.gz"), "-o", tmp_path / "out", "-q", *options) == 1
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1 and err.startswith("convoxel predict: ")
    assert not (tmp_path / "out").exists()


def test_a_ceiling_that_cannot_be_kept_is_said(model, tmp_path, capsys):
    assert run(model, put(tmp_path / "a.nii.gz"), "-o", tmp_path / "out", "-q", "--max-ram", "1M") == 1
    assert "a: " in (err := capsys.readouterr().err) and "would do" in err
    assert not list((tmp_path / "out").iterdir())


def test_cases_are_found_by_nnunets_names(tmp_path):
    for name in ("x_0000.nii.gz", "x_0001.nii.gz", "y_0001.nii.gz", "y_0000.nii.gz"):
        (tmp_path / name).touch()
    (tmp_path / "notes.txt").touch()
    found = cases.find([tmp_path], tmp_path / "out", 2)
    assert [(case.name, [file.name for file in case.files]) for case in found] == [
        ("x", ["x_0000.nii.gz", "x_0001.nii.gz"]),
        ("y", ["y_0000.nii.gz", "y_0001.nii.gz"]),
    ]
    assert found[0].target == tmp_path / "out" / "x.nii.gz"
    one = cases.find([tmp_path / "x_0000.nii.gz", tmp_path / "x_0001.nii.gz"], tmp_path / "x_labels.mha", 2)
    assert len(one) == 1 and one[0].target.name == "x_labels.mha"
    series = tmp_path / "series"
    series.mkdir()
    (series / "IM0001").touch()
    assert cases.find([series], tmp_path / "out", 1)[0].target == tmp_path / "out" / "series.nii.gz"


@pytest.mark.parametrize(
    "names, channels, out, words",
    [
        (["x_0000.nii.gz", "x_0002.nii.gz"], 2, "out", "takes 2 channel.*x_0000, x_0001; found x_0000"),
        (["x_0000.nii.gz", "x_0001.nii.gz"], 1, "out", "takes 1 channel"),
        (["x.nii.gz", "x_0000.nii.gz"], 1, "out", "the same channel of one case"),
        (["x.nii.gz", "y.nii.gz"], 1, "labels.nii.gz", "is one file, but there are 2 cases"),
        (["a/x.nii.gz", "b/x.nii.gz"], 1, "out", "two cases are named x"),
        ([], 1, "out", "no scans in this folder"),
    ],
)
def test_cases_that_are_none(tmp_path, names, channels, out, words):
    inputs = [tmp_path / name for name in names] or [tmp_path]
    for path in inputs:
        if path != tmp_path:
            path.parent.mkdir(exist_ok=True)
            path.touch()
    with pytest.raises(ValueError, match=words):
        cases.find(inputs, tmp_path / out, channels)


def test_a_scan_that_is_missing(model, tmp_path, capsys):
    assert run(model, tmp_path / "none.nii.gz", "-o", tmp_path / "out") == 1
    assert capsys.readouterr().err == f"convoxel predict: {tmp_path / 'none.nii.gz'}: no such scan\n"


def test_a_ceiling_that_will_do_changes_nothing(model, tmp_path):
    scan = volume.read(put(tmp_path / "a.nii.gz"))
    loaded = importers.load(model)
    with pytest.raises(ValueError, match="would do") as refused:
        loaded.predict([scan], max_ram=1 << 20, scratch=tmp_path)
    least = int(re.findall(r"(\d+) would do|(\d+) with a scratch", str(refused.value))[0][0])
    labels = loaded.predict([scan], max_ram=2 * least, scratch=tmp_path)
    np.testing.assert_array_equal(labels.array, loaded.predict([scan]).array)
