"""The phantom: known truth, one patient per seed, scans as scanners make them, folders as the field reads them."""

import json

import numpy as np
import pytest

from convoxel import cli
from convoxel.phantom import LABELS, MODALITIES, make_case, make_dataset
from convoxel.phantom.shapes import coverage, ellipsoid, smooth_noise, tube
from convoxel.volume import read

pytest.importorskip("nibabel")

SHAPE = (32, 48, 48)


def grid(spacing, n=32):
    """(3, n, n, n) positions (x, y, z) in mm around 0; spacing (z, y, x)."""
    axes = [(np.arange(n, dtype=np.float32) - (n - 1) / 2) * s for s in spacing]
    z, y, x = np.meshgrid(*axes, indexing="ij")
    return np.stack([x, y, z])


@pytest.mark.parametrize("spacing", [(1, 1, 1), (3, 1, 1), (2, 0.7, 1.3)])
def test_partial_volume_adds_up_to_the_volume_of_the_shape(spacing):
    voxel = np.prod(spacing)
    ball = coverage(ellipsoid(grid(spacing), (0.2, -0.1, 0.3), (9.0, 9.0, 9.0)))
    assert ball.min() == 0 and ball.max() == 1
    assert ball.sum() * voxel == pytest.approx(4 / 3 * np.pi * 9**3, rel=0.03)
    stick = coverage(tube(grid(spacing), (0, 0, -100), (0, 0, 100), (4.0, 4.0)))
    assert stick.sum() * voxel == pytest.approx(np.pi * 16 * 32 * spacing[0], rel=0.02)


def test_smooth_noise_is_of_deviation_one_and_smooth():
    noise = smooth_noise(np.random.default_rng(0), (60, 60, 60), (10, 10, 10))
    assert noise.std() == pytest.approx(1, abs=0.1)
    assert np.abs(np.diff(noise, axis=0)).mean() < 0.25 * noise.std()


@pytest.mark.parametrize("seed", range(4))
def test_every_structure_is_there_and_about_as_large_as_in_patients(seed):
    case = make_case(seed, shape=SHAPE)
    voxel = np.prod(case.labels.spacing) / 1000
    ml = dict(zip(LABELS, np.bincount(case.labels.array.ravel(), minlength=len(LABELS)) * voxel, strict=True))
    assert 800 < ml["liver"] < 2600
    assert 100 < ml["spleen"] < 500
    assert 150 < ml["kidneys"] < 600
    assert 60 < ml["vessels"] < 500
    assert 0 < ml["lesion"] < 300


def test_hounsfield_units_are_what_each_tissue_has():
    case = make_case(5, shape=SHAPE)
    (image,), labels = case.images, case.labels.array
    assert image.dtype == np.int16 and image.array.min() == -1024
    assert 60 < np.median(image.array[labels == LABELS["liver"]]) < 150
    assert 120 < np.median(image.array[labels == LABELS["vessels"]]) < 240
    assert np.median(image.array[:, 0]) < -950  # air in front of the patient
    assert image.orientation == "LPS" and image.same_grid(case.labels)
    assert np.array_equal(np.abs(np.diag(image.affine)[:3]) > 0, [True] * 3)


def test_the_liver_lies_on_the_right_and_the_spleen_on_the_left_and_both_above_the_kidneys():
    labels = make_case(0, shape=SHAPE).labels.reorient("RAS")
    middle = {
        name: np.argwhere(labels.array == LABELS[name]).mean(0) for name in ("liver", "spleen", "kidneys")
    }
    assert middle["liver"][2] > 24 > middle["spleen"][2]
    assert middle["kidneys"][0] < min(middle["liver"][0], middle["spleen"][0])


def test_magnetic_resonance_has_a_bias_field_and_contrasts_of_its_own():
    case = make_case(1, shape=SHAPE, modalities=("T1", "T2"))
    t1, t2 = (image.array.astype(float) for image in case.images)
    labels = case.labels.array
    assert t1.min() >= 0 and case.images[0].same_grid(case.images[1])
    vessels, liver = labels == LABELS["vessels"], labels == LABELS["liver"]
    assert np.median(t1[vessels]) > np.median(t1[liver]) and np.median(t2[vessels]) < np.median(t2[liver])
    axes = case.labels.affine[:3, :3] / np.linalg.norm(case.labels.affine[:3, :3], axis=0)
    assert np.abs(axes.T @ axes - np.eye(3)).max() < 1e-5 and np.abs(axes).max() < 1  # oblique, not sheared


def test_the_same_seed_is_the_same_patient_and_another_is_not():
    first, again, other = (make_case(seed, shape=SHAPE) for seed in (3, 3, 4))
    assert np.array_equal(first.images[0].array, again.images[0].array)
    assert np.array_equal(first.labels.array, again.labels.array)
    assert np.array_equal(first.labels.affine, again.labels.affine)
    assert first.labels.affine.tolist() != other.labels.affine.tolist()


def test_fields_of_view_vary_unless_told_otherwise():
    grids = {(c.labels.shape, c.labels.spacing) for c in (make_case(s, shape=SHAPE) for s in range(4))}
    assert len(grids) == 4
    case = make_case(0, shape=SHAPE, spacing=(5, 3, 2.5), vary=False)
    assert case.labels.shape == SHAPE and case.labels.spacing == pytest.approx((5, 3, 2.5))


def test_a_field_of_view_beside_the_organs_is_empty_and_no_error():
    labels = make_case(0, shape=(8, 8, 8), spacing=(1, 1, 1)).labels.array
    assert labels.shape[0] >= 8 and set(np.unique(labels)) <= set(LABELS.values())


def test_nnunet_folder(tmp_path):
    out = make_dataset(tmp_path / "Dataset001_Phantom", cases=2, test_cases=1, seed=9, shape=(16, 24, 24),
                       modalities=("T1", "T2"))  # fmt: skip
    names = sorted(str(p.relative_to(out)) for p in out.rglob("*.gz"))
    assert names == [
        *(f"images{part}/phantom_00{i}_000{c}.nii.gz" for part, ids in (("Tr", (0, 1)), ("Ts", (2,)))
          for i in ids for c in (0, 1)),
        "labelsTr/phantom_000.nii.gz", "labelsTr/phantom_001.nii.gz", "labelsTs/phantom_002.nii.gz",
    ]  # fmt: skip
    described = json.loads((out / "dataset.json").read_text())
    assert described["channel_names"] == {"0": "T1", "1": "T2"}
    assert (described["numTraining"], described["labels"]["lesion"], described["file_ending"]) == (
        2,
        5,
        ".nii.gz",
    )
    case = make_case((9, 0, 1), shape=(16, 24, 24), modalities=("T1", "T2"))
    stored = read(out / "imagesTr" / "phantom_001_0001.nii.gz")
    assert np.array_equal(stored.array, case.images[1].array)
    assert np.array_equal(stored.affine, case.images[1].affine)
    assert np.array_equal(read(out / "labelsTr" / "phantom_001.nii.gz").array, case.labels.array)


def test_decathlon_folder(tmp_path):
    out = make_dataset(tmp_path / "Task01_Phantom", cases=2, shape=(16, 24, 24), modalities=("T1", "T2"),
                       format="msd")  # fmt: skip
    described = json.loads((out / "dataset.json").read_text())
    assert described["modality"] == {"0": "T1", "1": "T2"} and described["labels"]["5"] == "lesion"
    assert described["test"] == ["./imagesTs/phantom_002.nii.gz"]
    for pair in described["training"]:
        image, labels = read(out / pair["image"]), read(out / pair["label"])
        assert image.shape[0] == 2 and image.same_grid(labels)


def test_more_cases_begin_with_the_same(tmp_path):
    few = make_dataset(tmp_path / "few", cases=1, test_cases=0, shape=(8, 16, 16))
    more = make_dataset(tmp_path / "more", cases=2, test_cases=0, shape=(8, 16, 16))
    name = "imagesTr/phantom_000_0000.nii.gz"
    assert (few / name).read_bytes() == (more / name).read_bytes()


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"shape": (4, 64, 64)}, r"from 8 on, received \(4, 64, 64\)"),
        ({"shape": (64, 64)}, "three whole numbers"),
        ({"spacing": (1, 0, 1)}, r"received \(1, 0, 1\)"),
        ({"modalities": ("PET",)}, r"CT, T1, T2, received \['PET'\]"),
        ({"modalities": ()}, "received"),
        ({"modalities": ("CT", "CT")}, "different ones"),
    ],
)
def test_what_cannot_be_is_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        make_case(0, **settings)


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="not an empty folder"):
        make_dataset(tmp_path / "mine")
    with pytest.raises(ValueError, match="at least 1 case.*received 0"):
        make_dataset(tmp_path / "none", cases=0)
    with pytest.raises(ValueError, match="nnunet, msd, received 'bids'"):
        make_dataset(tmp_path / "none", format="bids")
    assert not (tmp_path / "none").exists()


def test_command(tmp_path, capsys):
    out = tmp_path / "out"
    argv = [
        "phantom",
        str(out),
        "--cases",
        "2",
        "--test-cases",
        "1",
        "--shape",
        "8",
        "16",
        "16",
        "--seed",
        "3",
    ]
    assert cli.main([*argv, "--modalities", *MODALITIES]) == 0
    assert capsys.readouterr().out.startswith(f"{out}: 2 training and 1 test cases, CT, T1, T2")
    assert len(list((out / "imagesTr").iterdir())) == 6
    assert cli.main(argv) == 1
    assert "not an empty folder" in capsys.readouterr().err
