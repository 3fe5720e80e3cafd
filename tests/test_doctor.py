"""The doctor: each named fault, planted into a sound phantom dataset, is found by its name, and nothing else is.

FAULTS is the table: a fault's name, what plants it, and the names of other findings that follow from it.
"""

import gzip
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

import dicoms
from convoxel import cli, doctor
from convoxel.doctor.labels import find_runs, pieces
from convoxel.phantom import make_dataset
from convoxel.volume import Volume, read, write

nibabel = pytest.importorskip("nibabel")

DOCS = (Path(__file__).parents[1] / "docs" / "doctor.md").read_text()
CASES = 10
IMAGE, LABEL = "imagesTr/phantom_001_0000.nii.gz", "labelsTr/phantom_001.nii.gz"
OTHER, OTHER_LABEL = "imagesTr/phantom_002_0000.nii.gz", "labelsTr/phantom_002.nii.gz"
SECOND = "imagesTr/phantom_001_0001.nii.gz"  # the second channel, in the MR dataset
STACK = "imagesTr/phantom_001.nii.gz"  # both channels, in the Decathlon's format

# --- what plants a fault ------------------------------------------------------------------------------


def voxels(name, change):
    """change(array) -> array on the same grid."""

    def plant(folder):
        volume = read(folder / name)
        write(volume.like(change(volume.array)), folder / name)

    return plant


def grid(name, change, array=lambda a: a):
    """change(affine) -> affine."""

    def plant(folder):
        volume = read(folder / name)
        write(Volume(array(volume.array), None, change(volume.affine.copy())), folder / name)

    return plant


def content(name, change):
    """change(bytes of the uncompressed file) -> bytes."""

    def plant(folder):
        path = folder / name
        path.write_bytes(gzip.compress(change(bytearray(gzip.decompress(path.read_bytes()))), 1))

    return plant


def header(name, **fields):
    """Fields of the header; a pair (index, value) sets one element."""

    def change(data):
        head = nibabel.Nifti1Header(bytes(data[:348]), check=False)
        for field, value in fields.items():
            if isinstance(value, tuple):
                head[field][value[0]] = value[1]
            else:
                head[field] = value
        return head.binaryblock + data[348:]

    return content(name, change)


def described(change):
    """change(the dict of dataset.json)."""

    def plant(folder):
        path = folder / "dataset.json"
        described = json.loads(path.read_text())
        change(described)
        path.write_text(json.dumps(described))

    return plant


def text(change):
    """change(the text of dataset.json) -> text."""
    return lambda folder: (folder / "dataset.json").write_text(change((folder / "dataset.json").read_text()))


def raw(name, change):
    """change(bytes of the file) -> bytes."""
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def rename(old, new):
    return lambda folder: (folder / old).rename(folder / new)


def remove(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def version_1(described):
    """nnU-Net's first version: the Decathlon's lists, without the channel in the files' names."""
    described["modality"] = described.pop("channel_names")
    described["labels"] = {str(v): k for k, v in described["labels"].items()}
    del described["file_ending"]
    names = [f"phantom_{i:03d}.nii.gz" for i in range(described["numTraining"])]
    described["training"] = [{"image": f"./imagesTr/{n}", "label": f"./labelsTr/{n}"} for n in names]


def copy(old, new):
    return lambda folder: shutil.copy(folder / old, folder / new)


def both(*plants):
    return lambda folder: [plant(folder) for plant in plants]


def every(pattern, plant):
    """plant(name) for every file that fits."""
    return lambda folder: [
        plant(str(path.relative_to(folder)))(folder) for path in sorted(folder.glob(pattern))
    ]


def crop(name, first, stop):
    return grid(name, lambda affine: affine, lambda array: array[first:stop])


def turn(name):
    return lambda folder: write(read(folder / name).reorient("RAS"), folder / name)


def shifted(*mm):
    return lambda affine: affine + np.pad(np.array(mm, float)[:, None], ((0, 1), (3, 0)))


def scaled(*factors):
    return lambda affine: affine @ np.diag([*factors, 1.0])


def sheared(size):
    return lambda affine: affine @ (np.eye(4) + size * np.eye(4)[:, [2]] @ np.eye(4)[[1]])


def relabel(old, new):
    return lambda labels: np.where(labels == old, new, labels.astype(np.int16))


def put(array, values):
    """The array as float32 with values in its first voxels."""
    array = array.astype(np.float32)
    array.reshape(-1)[: len(values)] = values
    return array


def specks(labels):
    labels = np.zeros_like(labels)
    labels[::2, ::2, ::2] = 1
    return labels


def lose_label(number, keep=()):
    return lambda folder: [
        voxels(f"labelsTr/{path.name}", relabel(number, 0))(folder)
        for i, path in enumerate(sorted((folder / "labelsTr").iterdir()))
        if i not in keep
    ]


def unit_spacing(name):
    """No transform, voxels of 1 x 1 x 1, as programs write that were never told."""
    return header(name, sform_code=0, qform_code=0, pixdim=[1] * 8)


def corrupt(data):
    """A bit of the last eight bytes, which are gzip's checksum and length."""
    return data[:-6] + bytes([data[-6] ^ 1]) + data[-5:]


# --- the table: dataset, name, plant, (other findings that follow) ---------------------------------------

CT, MR, MSD = "ct", "mr", "msd"
SET_LABELS = {"background": 0, "liver": 1, "spleen": 2, "kidneys": 3, "vessels": 4, "lesion": 5}
FAULTS = [
    # a file by itself
    (CT, "empty-file", raw(IMAGE, lambda data: b"")),
    (CT, "truncated", raw(IMAGE, lambda data: data[: len(data) * 2 // 3])),
    (CT, "truncated", content(IMAGE, lambda data: data[:-100])),
    (CT, "damaged", raw(IMAGE, corrupt)),
    (CT, "damaged", raw(IMAGE, lambda data: data[:12] + b"\xff" * 40 + data[52:])),
    (CT, "trailing-data", content(LABEL, lambda data: data + bytes(64))),
    (CT, "not-gzip", raw(IMAGE, gzip.decompress)),
    (CT, "wrong-content", raw(IMAGE, lambda data: gzip.compress(b"<html>404 Not Found</html>" * 99))),
    (CT, "unsupported-type", header(IMAGE, datatype=128, bitpix=24)),
    (CT, "five-dimensional", header(IMAGE, dim=[5, 4, 4, 4, 2, 2, 1, 1])),
    (CT, "bad-voxel-size", header(IMAGE, pixdim=(2, 0.0))),
    (CT, "bad-affine", header(IMAGE, srow_x=[7, 7, 0, 0], srow_y=[7, 7, 0, 0], qform_code=0)),
    (CT, "unreadable", header(IMAGE, vox_offset=99)),
    (CT, "nan", voxels(IMAGE, lambda a: put(a, [np.nan] * 3))),
    (CT, "infinite", voxels(IMAGE, lambda a: put(a, [np.inf, -np.inf]))),
    (CT, "qform-sform-conflict", header(IMAGE, qoffset_x=77.0)),
    (CT, "voxel-size-conflict", header(IMAGE, pixdim=(3, 9.0), qform_code=0)),
    (CT, "no-orientation", header(IMAGE, sform_code=0, qform_code=0), {"label-orientation", "orientation-mixed"}),
    (CT, "no-spacing", both(unit_spacing(IMAGE), unit_spacing(LABEL)),
     {"no-orientation", "orientation-mixed", "spacing-outlier", "extent-outlier"}),
    (CT, "tiny-spacing", both(grid(IMAGE, scaled(0.001, 0.001, 0.001)), grid(LABEL, scaled(0.001, 0.001, 0.001))),
     {"spacing-outlier", "extent-outlier"}),
    (CT, "huge-spacing", both(grid(IMAGE, scaled(1, 1, 10)), grid(LABEL, scaled(1, 1, 10))),
     {"spacing-outlier", "extent-outlier"}),
    (CT, "axes-not-orthogonal", both(grid(IMAGE, sheared(0.2)), grid(LABEL, sheared(0.2)))),
    (CT, "axes-nearly-orthogonal", both(grid(IMAGE, sheared(0.002)), grid(LABEL, sheared(0.002)))),
    (CT, "unit-unknown", header(IMAGE, xyzt_units=0)),
    (CT, "thin", both(crop(IMAGE, 8, 13), crop(LABEL, 8, 13)),
     {"extent-outlier"}),
    (CT, "anisotropic", both(grid(IMAGE, scaled(0.1, 0.1, 1)), grid(LABEL, scaled(0.1, 0.1, 1))),
     {"spacing-outlier", "extent-outlier"}),
    # the values of an image
    (CT, "constant", voxels(IMAGE, lambda a: np.zeros_like(a))),
    (CT, "nearly-constant", voxels(IMAGE, lambda a: np.where(np.arange(a.size).reshape(a.shape) < 20, a, -1024)),
     {"label-on-nothing"}),
    (CT, "few-values", voxels(IMAGE, lambda a: (a > 0).astype(np.int16) * 7), {"intensity-outlier"}),
    (MR, "eight-bit", voxels(IMAGE, lambda a: np.clip(a // 8, 0, 255).astype(np.uint8))),
    (MR, "clipped", voxels(IMAGE, lambda a: np.minimum(a, np.percentile(a, 90).astype(a.dtype)))),
    (CT, "ct-rescaled", voxels(IMAGE, lambda a: ((a + 1024) / 2048).astype(np.float32)), {"intensity-outlier"}),
    (CT, "ct-rescaled", voxels(IMAGE, lambda a: np.clip((a + 200) * 0.5, 0, 254).astype(np.float32))),
    (CT, "ct-raw-offset", voxels(IMAGE, lambda a: a + np.int16(1024))),
    (CT, "ct-no-air", voxels(IMAGE, lambda a: np.clip(a, -160, 600))),
    (CT, "ct-padding", voxels(IMAGE, lambda a: np.where(a < -1000, -3024, a).astype(np.int16))),
    (CT, "ct-too-bright", voxels(IMAGE, lambda a: a.astype(np.int32) * 100), {"intensity-outlier"}),
    (MR, "intensity-outlier", voxels(IMAGE, lambda a: (a / 1e5).astype(np.float32))),
    # the grids of a case
    (CT, "four-dimensional", voxels(IMAGE, lambda a: np.stack([a, a + np.int16(1)]))),
    (MSD, "channel-count", voxels(STACK, lambda a: a[:1])),
    (MSD, "channel-count", voxels(STACK, lambda a: np.concatenate([a, a[:1] + np.int16(1)]))),
    (CT, "label-shape", grid(LABEL, lambda a: a, lambda a: a[:-1])),
    (CT, "label-shape", grid(LABEL, lambda a: a, lambda a: a.transpose(2, 0, 1))),
    (CT, "label-spacing", grid(LABEL, scaled(1, 1, 1.02))),
    (CT, "label-orientation", grid(LABEL, scaled(-1, 1, 1)), set()),
    (CT, "label-place", grid(LABEL, shifted(0, 0, 30))),
    (CT, "label-place-small", grid(LABEL, shifted(2, 0, 0))),
    (CT, "label-rounding", grid(LABEL, shifted(0, 0.01, 0))),
    (MR, "missing-channel", remove(SECOND)),
    (MR, "extra-channel", copy(OTHER, IMAGE.replace("_0000", "_0002")),
     {"channel-shape", "duplicate-image"}),
    (MR, "channel-shape", grid(SECOND, lambda a: a, lambda a: a[:, 1:])),
    (MR, "channel-spacing", grid(SECOND, scaled(1.01, 1, 1))),
    (MR, "channel-orientation", grid(SECOND, scaled(1, -1, 1))),
    (MR, "channel-place", grid(SECOND, shifted(0, 25, 0))),
    (MR, "channel-place-small", grid(SECOND, shifted(0, 2, 0))),
    (MR, "channel-rounding", grid(SECOND, shifted(0.01, 0, 0))),
    (MR, "duplicate-channel", copy(IMAGE, SECOND)),
    (MSD, "duplicate-channel", voxels(STACK, lambda a: a[[0, 0]])),
    (CT, "image-without-label", remove(LABEL)),
    (CT, "label-without-image", remove(IMAGE), {"num-training"}),
    # labels
    (CT, "label-not-integer", voxels(LABEL, lambda a: a * np.float32(0.5))),
    (CT, "label-not-finite", voxels(LABEL, lambda a: put(a, [np.nan]))),
    (CT, "label-negative", voxels(LABEL, relabel(3, -1))),
    (CT, "label-unknown-value", voxels(LABEL, relabel(3, 255))),
    (MSD, "label-unknown-value", voxels(LABEL, relabel(1, 77))),
    (CT, "label-four-dimensional", voxels(LABEL, lambda a: np.stack([a == 0, a == 1]).astype(np.uint8))),
    (CT, "label-many-values", copy(OTHER, LABEL), {"label-shape", "label-spacing"}),
    (CT, "label-empty", voxels(LABEL, np.zeros_like)),
    (CT, "label-full", voxels(LABEL, lambda a: np.maximum(a, 1)), {"label-on-nothing"}),
    (CT, "label-on-nothing", voxels(LABEL, lambda a: np.roll(a, a.shape[1] // 2, 1)), {"label-mirrored"}),
    (CT, "label-mirrored", both(voxels(IMAGE, lambda a: a[..., ::-1]), voxels(LABEL, lambda a: a[..., ::-1]))),
    (CT, "label-float", voxels(LABEL, lambda a: a.astype(np.float32))),
    (CT, "label-specks", voxels(LABEL, specks), {"label-on-nothing"}),
    (CT, "label-unused", described(lambda d: d["labels"].update(pancreas=6))),
    (CT, "label-unused", lose_label(5)),
    (CT, "label-rare", lose_label(5, keep=(4,))),
    # the dataset
    (CT, "json-missing", remove("dataset.json")),
    (CT, "json-invalid", text(lambda t: t[:-9])),
    (CT, "json-invalid", text(lambda t: f"[{t}]")),
    (CT, "json-duplicate-key", text(lambda t: t.replace('"spleen"', '"liver"')), {"labels-gap", "label-unknown-value"}),
    (CT, "json-incomplete", described(lambda d: d.pop("labels"))),
    (CT, "json-incomplete", described(lambda d: d.pop("file_ending"))),
    (CT, "json-incomplete", described(lambda d: d.update(labels={"background": None})), set()),
    (MSD, "json-incomplete", described(lambda d: d["training"].append({"image": 3})), {"num-training"}),
    (CT, "json-old-format", described(lambda d: d.update(modality=d.pop("channel_names"),
                                                        labels={str(v): k for k, v in SET_LABELS.items()}))),
    (CT, "json-old-format", described(version_1)),
    (CT, "file-ending", described(lambda d: d.update(file_ending="nii")), {"no-cases", "num-training"}),
    (CT, "num-training", described(lambda d: d.update(numTraining=99))),
    (MR, "channel-names", described(lambda d: d.update(channel_names={"0": "T1", "2": "T2"}))),
    (CT, "labels-inverted", described(lambda d: d.update(labels={str(v): k for k, v in SET_LABELS.items()}))),
    (MSD, "labels-inverted", described(lambda d: d.update(labels=SET_LABELS))),
    (CT, "labels-gap", described(lambda d: d["labels"].update(lesion=9)), {"label-unknown-value", "label-unused"}),
    (CT, "labels-same-value", described(lambda d: d["labels"].update(tumour=5))),
    (CT, "no-background", described(lambda d: d["labels"].pop("background"))),
    (CT, "ignore-not-last", described(lambda d: d.update(labels={k.replace("spleen", "ignore"): v
                                                                for k, v in SET_LABELS.items()}))),
    (CT, "regions-order", described(lambda d: d["labels"].update(liver=[1, 5]))),
    (CT, "channel-suffix", rename(IMAGE, "imagesTr/phantom_001.nii.gz"), {"label-without-image", "num-training"}),
    (CT, "label-suffix", rename(LABEL, "labelsTr/phantom_001_0000.nii.gz")),
    (MSD, "listed-file-missing", remove(STACK), {"num-training"}),
    (MSD, "listed-file-missing", remove(LABEL), {"image-without-label"}),
    (MSD, "file-not-listed", copy(STACK, "imagesTr/forgotten.nii.gz")),
    (CT, "no-cases", lambda folder: [shutil.rmtree(folder / d) for d in ("imagesTr", "labelsTr")], {"num-training"}),
    (CT, "few-cases", both(remove(*(f"{d}/phantom_00{i}{s}.nii.gz" for i in range(3, CASES)
                                    for d, s in (("imagesTr", "_0000"), ("labelsTr", "")))),
                           described(lambda d: d.update(numTraining=3)))),
    (CT, "stray-file", copy(IMAGE, "imagesTr/._phantom_001_0000.nii.gz")),
    (MSD, "stray-file", lambda folder: (folder / "imagesTr" / "Thumbs.db").write_bytes(b"")),
    (CT, "test-in-training", copy(IMAGE, "imagesTs/phantom_010_0000.nii.gz"), {"label-shape"}),
    (CT, "duplicate-image", both(copy(IMAGE, OTHER), copy(LABEL, OTHER_LABEL))),
    (CT, "duplicate-label", both(copy(IMAGE, OTHER), copy(LABEL, OTHER_LABEL),
                                 voxels(OTHER, lambda a: a + np.int16(3)))),
    (CT, "orientation-mixed", both(turn(IMAGE), turn(LABEL))),
    (CT, "spacing-outlier", both(grid(IMAGE, scaled(1, 1, 0.25)), grid(LABEL, scaled(1, 1, 0.25))), {"extent-outlier"}),
    (CT, "extent-outlier", both(crop(IMAGE, 8, 12), crop(LABEL, 8, 12))),
]  # fmt: skip


SOUND = {"ct": {}, "mr": {"modalities": ("T1", "T2")}, "msd": {"modalities": ("T1", "T2"), "format": "msd"}}


def sound_dataset(folder, kind, seed, shape=(24, 32, 32), cases=CASES):
    return make_dataset(
        folder / "Dataset001_Phantom", cases=cases, test_cases=2, seed=seed, shape=shape, **SOUND[kind]
    )


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """The sound datasets by kind, made once; copied before a fault is planted."""
    return {kind: sound_dataset(tmp_path_factory.mktemp(kind), kind, seed=0) for kind in SOUND}


def serious(findings):
    return {f.name for f in findings if f.severity != "note"}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault[0]}-{fault[1]}")
def test_a_planted_fault_is_found_by_its_name_and_nothing_else_is(fault, sound, tmp_path):
    kind, name, plant, *follows = fault
    folder = tmp_path / "Dataset001_Phantom"
    shutil.copytree(sound[kind], folder)
    plant(folder)
    found = doctor.examine(folder)
    assert name in {f.name for f in found}, found
    assert serious(found) <= {name, *(follows[0] if follows else ())}, found
    for finding in found:
        assert (finding.severity, finding.remedy != "") == (doctor.CATALOGUE[finding.name][0], True)
        assert Path(finding.path).is_relative_to(folder) and finding.found


def test_the_table_has_the_faults_of_the_catalogue():
    here = {"too-large", "disk-space", "large-scores", "several-volumes", "hidden-gzip", "header-pair",
            "unsupported-format", "reader-warning", "folder-name", "no-origin",
            *(name for name, _ in SERIES)}  # fmt: skip
    planted = {name for _, name, *_ in FAULTS}
    assert len(planted) >= 80
    assert planted | here == set(doctor.CATALOGUE) and not planted & here


@pytest.mark.parametrize("kind", SOUND)
@pytest.mark.parametrize("seed", [1, 2])
def test_sound_datasets_have_no_finding(kind, seed, tmp_path):
    assert doctor.examine(sound_dataset(tmp_path, kind, seed, shape=(20, 40, 40), cases=6)) == []


def test_what_is_said_names_file_numbers_and_remedy(sound, tmp_path):
    folder = tmp_path / "Dataset001_Phantom"
    shutil.copytree(sound[CT], folder)
    grid(LABEL, shifted(0, 0, 30))(folder)
    (finding,) = doctor.examine(folder)
    voxel = min(read(folder / IMAGE).spacing)
    assert finding.path == str(folder / LABEL)
    assert finding.found == f"up to 30 mm ({30 / voxel:.2g} voxels) from the same voxel of the image"
    assert "image.like(label.array)" in finding.remedy
    assert str(finding).startswith(f"error: label-place: {folder / LABEL}: up to 30 mm")


@pytest.mark.parametrize("name, plant", [("hidden-gzip", rename(IMAGE, IMAGE.removesuffix(".gz"))),
                                         ("several-volumes", voxels(IMAGE, lambda a: np.stack([a, a + np.int16(1)]))),
                                         ("truncated", raw(IMAGE, lambda data: data[:-30]))])  # fmt: skip
def test_scans_without_a_dataset(name, plant, sound, tmp_path):
    folder = tmp_path / "Dataset001_Phantom"
    shutil.copytree(sound[CT], folder)
    plant(folder)
    assert doctor.examine(folder / "labelsTr") == []
    found = doctor.examine(folder / "imagesTr")
    assert [f.name for f in found] == [name]
    assert doctor.examine(folder / OTHER) == []


@pytest.mark.parametrize("ending", [".mha", ".nrrd"])
def test_other_formats(ending, sound, tmp_path):
    folder = tmp_path / "Dataset001_Phantom"
    shutil.copytree(sound[CT], folder)
    for path in sorted(folder.rglob("*.nii.gz")):
        write(read(path), path.with_name(path.name.replace(".nii.gz", ending)))
        path.unlink()
    described(lambda d: d.update(file_ending=ending))(folder)
    assert doctor.examine(folder) == []
    victim, label = (folder / name.replace(".nii.gz", ending) for name in (IMAGE, LABEL))
    victim.write_bytes(victim.read_bytes()[:-100])
    label.write_bytes(b"%PDF-1.4\n" * 50)
    assert {(f.path, f.name) for f in doctor.examine(folder)} == {
        (str(victim), "truncated"),
        (str(label), "wrong-content"),
    }


def test_nrrd_without_a_place(tmp_path):
    scan = tmp_path / "scan.nrrd"
    fields = ["NRRD0004", "type: uint8", "dimension: 3", "sizes: 9 9 9", "encoding: raw",
              "space: left-posterior-superior",
              "space directions: (1,0,0) (0,1,0) (0,0,1)", "", ""]  # fmt: skip
    scan.write_bytes("\n".join(fields).encode() + bytes(range(243)) * 3)
    assert [f.name for f in doctor.examine(scan)] == ["no-origin"]


# name, what goes wrong with the series' files; a series of 12 slices lies in the folder
SERIES = [
    ("slices-missing", lambda paths: paths[4].unlink()),
    ("slices-uneven", lambda paths: edit_slices(paths, lambda z, ds: place(ds, z * (1 + z / 50)))),
    ("slices-doubled", lambda paths: edit_slices(paths, lambda z, ds: place(ds, z // 2))),
    (
        "slices-mixed",
        lambda paths: edit_slices(paths[3:4], lambda z, ds: setattr(ds, "PixelSpacing", [3, 3])),
    ),
    ("slice-damaged", lambda paths: paths[2].write_bytes(paths[2].read_bytes()[:200])),
    (
        "several-series",
        lambda paths: edit_slices(paths[6:], lambda z, ds: setattr(ds, "SeriesInstanceUID", "1.2.3")),
    ),
    ("gantry-tilt", lambda paths: edit_slices(paths, lambda z, ds: place(ds, z, y=0.4 * z))),
]


def edit_slices(paths, change):
    import pydicom

    for z, path in enumerate(paths):
        ds = pydicom.dcmread(path)
        change(z, ds)
        ds.save_as(path)


def place(ds, z, y=0.0):
    ds.ImagePositionPatient = [0, y, z * 2.5]


@pytest.mark.parametrize("name, plant", SERIES, ids=[name for name, _ in SERIES])
def test_dicom_series(name, plant, tmp_path):
    pytest.importorskip("pydicom")
    array = np.random.default_rng(0).integers(0, 2000, (12, 10, 11)).astype(np.int16)
    folder = tmp_path / "patient" / "scan"
    folder.mkdir(parents=True)
    paths = dicoms.write_series(folder, array, np.diag([1.0, 1, 2.5, 1]))
    assert doctor.examine(tmp_path) == []
    plant(paths)
    (found,) = doctor.examine(tmp_path)
    assert (found.name, found.path) == (name, str(folder))


def test_what_is_no_scan_at_all(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "brain.hdr").write_bytes(bytes(348))
    assert [f.name for f in doctor.examine(tmp_path)] == ["no-cases"]
    assert [f.name for f in doctor.examine(tmp_path / "notes.txt")] == ["unsupported-format"]
    assert [f.name for f in doctor.examine(tmp_path / "brain.hdr")] == ["header-pair"]
    with pytest.raises(FileNotFoundError):
        doctor.examine(tmp_path / "nowhere")


def test_limits_of_the_machine(sound, monkeypatch):
    small = doctor.examine(sound[CT], max_bytes=1000)
    assert {f.name for f in small} >= {"too-large"} and len(small) >= 2 * CASES
    monkeypatch.setattr("convoxel.doctor.cohort.machine_memory", lambda: 100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 8, 1))
    assert [f.name for f in doctor.examine(sound[CT])] == ["disk-space", "large-scores"]


def test_a_warning_that_the_doctor_does_not_know_is_passed_on(sound, monkeypatch):
    def read_with_a_warning(path, **options):
        import warnings

        warnings.warn(f"{path}: something new", UserWarning, stacklevel=2)
        return read(path, **options)

    monkeypatch.setattr("convoxel.doctor.scans.read", read_with_a_warning)
    (finding,) = doctor.examine(sound[CT] / IMAGE)
    assert (finding.name, finding.found) == ("reader-warning", "something new")


def test_a_folder_of_another_name_is_a_note(sound, tmp_path):
    shutil.copytree(sound[CT], tmp_path / "my data")
    assert [f.name for f in doctor.examine(tmp_path / "my data")] == ["folder-name"]


def test_a_dataset_that_maps_its_files(sound, tmp_path):
    folder = tmp_path / "Dataset001_Phantom"
    shutil.copytree(sound[CT], folder)
    entries = {f"a{i}": {"images": [f"imagesTr/phantom_00{i}_0000.nii.gz"], "label": f"labelsTr/phantom_00{i}.nii.gz"}
               for i in range(CASES)}  # fmt: skip
    described(lambda d: d.update(dataset=entries))(folder)
    assert doctor.examine(folder) == []
    (folder / LABEL).unlink()
    assert serious(doctor.examine(folder)) == {"listed-file-missing", "image-without-label"}


@pytest.mark.parametrize("seed", range(6))
def test_pieces_are_those_of_a_flood(seed):
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(1, 9, 3))
    labels = rng.integers(0, 3, shape) * (rng.random(shape) < 0.4)
    left = {tuple(int(i) for i in at): labels[tuple(at)] for at in np.argwhere(labels)}
    expected = []
    while left:
        at, value = left.popitem()
        todo, size = [at], 1
        while todo:
            z, y, x = todo.pop()
            for step in np.ndindex(3, 3, 3):
                near = (z + step[0] - 1, y + step[1] - 1, x + step[2] - 1)
                if left.get(near) == value:
                    del left[near]
                    todo.append(near)
                    size += 1
        expected.append(size)
    assert sorted(pieces(find_runs(labels), shape).tolist()) == sorted(expected)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(test=7),
        lambda d: d.update(test=["a\0b", "x" * 3000, None]),
        lambda d: d.update(training=[None]),
        lambda d: d.update(labels={"0": None}),
        lambda d: d.update(labels={"0": 1e300, "1": [[]]}),
        lambda d: d.update(modality={}),
        lambda d: d.update(file_ending=3, training=None),
        lambda d: d.update(training={}, dataset={"a": 1, "b": {"images": [1], "label": None}}),
    ],
)
def test_any_dataset_json_is_examined_to_the_end(change, sound, tmp_path):
    folder = tmp_path / "Dataset001_Phantom"
    shutil.copytree(sound[MSD], folder)
    described(change)(folder)
    assert {f.name for f in doctor.examine(folder)} & {"json-incomplete", "listed-file-missing"}


def test_label_values_beyond_integers(sound, tmp_path):
    folder = tmp_path / "Dataset001_Phantom"
    shutil.copytree(sound[CT], folder)
    voxels(LABEL, lambda a: put(a, [1e30]))(folder)
    assert [f.name for f in doctor.examine(folder)] == ["label-many-values"]


def test_command(sound, tmp_path, capsys):
    good, bad = sound[CT], tmp_path / "Dataset001_Phantom"
    shutil.copytree(good, bad)
    assert cli.main(["doctor", str(good)]) == 0
    assert f"0 errors, 0 doubtful, 0 notes in {2 * CASES + 4} files" in capsys.readouterr().out
    every("labelsTr/*", lambda name: grid(name, shifted(0, 0, 30)))(bad)
    unit_spacing(OTHER)(bad)
    saved = tmp_path / "findings.json"
    assert cli.main(["doctor", str(good), str(bad), "--json", str(saved)]) == 1
    out = capsys.readouterr().out
    assert (
        f"label-place  ({CASES - 1} times)" in out and f"... and {CASES - 4} more (--all lists them)" in out
    )
    assert out.count(str(bad / "labelsTr")) <= 8
    first, second = json.loads(saved.read_text())
    assert first["findings"] == [] and second["path"] == str(bad)
    assert set(second["findings"][0]) == {"severity", "name", "path", "found", "remedy"}
    assert cli.main(["doctor", str(bad), "--all"]) == 1
    assert "more (--all" not in capsys.readouterr().out


def test_command_line_mistakes(tmp_path, capsys):
    assert cli.main(["doctor", str(tmp_path / "nowhere")]) == 1
    assert capsys.readouterr().err == f"convoxel doctor: {tmp_path / 'nowhere'}: No such file or directory\n"
    assert cli.main(["doctor"]) == 2
    capsys.readouterr()
    assert cli.main(["doctor", str(tmp_path), "--json", str(tmp_path / "no" / "f.json")]) == 1
    assert capsys.readouterr().err.endswith("no/f.json: its folder does not exist\n")


def test_the_page_names_every_fault():
    named = dict(re.findall(r"^\| `([a-z0-9-]+)` \| (error|doubtful|note) \|", DOCS, re.M))
    assert named == {name: severity for name, (severity, _) in doctor.CATALOGUE.items()}
