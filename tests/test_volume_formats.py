"""NRRD and MetaImage: the same voxels in the same places as SimpleITK has them, and no header believed."""

import os
import tracemalloc
import zlib
from contextlib import nullcontext

import numpy as np
import pytest

from convoxel.volume import Volume, VolumeError, read, write

sitk = pytest.importorskip("SimpleITK")

# x runs to posterior, y to the right, z (tilted, not orthogonal to x) to superior: nothing symmetric
OBLIQUE = np.array([[0, 2, 0.25, -30], [-0.5, 0, 1, 12.5], [0, 0, 4, -7], [0, 0, 0, 1]], float)
LPS = np.diag([-1.0, -1, 1, 1])


def ramp(*shape, dtype=np.int16):
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


def turned():
    """Axes at right angles, none along the patient's."""
    axes = np.linalg.qr(np.random.default_rng(3).normal(size=(3, 3)))[0]
    affine = np.eye(4)
    affine[:3] = np.c_[axes * (0.7, 0.8, 2.5), (-101.25, 40.5, 7)]
    return affine


def same_place(volume, image):
    d, h, w = volume.grid_shape
    for index in [(0, 0, 0), (w - 1, 0, 0), (0, h - 1, 0), (0, 0, d - 1), (w - 1, h - 1, d - 1)]:
        ours = (LPS @ volume.affine @ (*index, 1))[:3]
        np.testing.assert_allclose(ours, image.TransformIndexToPhysicalPoint(index), atol=1e-9)


@pytest.mark.parametrize("compress", [None, False])
@pytest.mark.parametrize("name", ["a.nrrd", "a.mha"])
@pytest.mark.parametrize("shape", [(3, 4, 5), (2, 3, 4, 5)])
def test_simpleitk_reads_what_is_written(tmp_path, name, shape, compress):
    volume = Volume(ramp(*shape), None, turned())
    write(volume, tmp_path / name, compress=compress)
    image = sitk.ReadImage(str(tmp_path / name))
    array = sitk.GetArrayFromImage(image)
    assert np.array_equal(np.moveaxis(array, -1, 0) if len(shape) == 4 else array, volume.array)
    same_place(volume, image)
    again = read(tmp_path / name)
    assert np.array_equal(again.array, volume.array) and again.dtype == volume.dtype
    np.testing.assert_allclose(again.affine, volume.affine, rtol=1e-15, atol=1e-13)
    if name == "a.nrrd":
        assert np.array_equal(again.affine, volume.affine)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ["a.nrrd", "a.nhdr", "a.mha", "a.mhd"])
@pytest.mark.parametrize("vector", [False, True])
def test_what_simpleitk_writes_is_read(tmp_path, name, zipped, vector):
    image = sitk.GetImageFromArray(ramp(3, 4, 5, 2) if vector else ramp(3, 4, 5), isVector=vector)
    lps = LPS @ turned()
    image.SetSpacing([0.7, 0.8, 2.5])
    image.SetDirection((lps[:3, :3] / (0.7, 0.8, 2.5)).ravel())
    image.SetOrigin(lps[:3, 3])
    sitk.WriteImage(image, str(tmp_path / name), useCompression=zipped)
    volume = read(tmp_path / name)
    array = sitk.GetArrayFromImage(image)
    assert np.array_equal(volume.array, np.moveaxis(array, -1, 0) if vector else array)
    assert volume.spacing == pytest.approx((2.5, 0.8, 0.7))
    same_place(volume, image)


@pytest.mark.parametrize("dtype", "u1 i1 u2 i2 u4 i4 f4 f8".split())
@pytest.mark.parametrize("name", ["a.nrrd", "a.mha"])
def test_every_dtype(tmp_path, name, dtype):
    array = np.array([[[0, 1, 100]]], dtype)
    write(Volume(array, (1, 1, 1)), tmp_path / name)
    again = read(tmp_path / name).array
    assert again.dtype == array.dtype and np.array_equal(again, array)
    assert np.array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / name))), array)


@pytest.mark.parametrize("name", ["a.nrrd", "a.mha"])
@pytest.mark.parametrize(
    "array, stored",
    [
        (np.array([[[True, False]]]), np.uint8),
        (np.array([[[0, 117]]]), np.uint8),
        (np.array([[[-1, 2**40]]]), np.int64),
        (np.array([[[2**63]]], np.uint64), np.uint64),
        (np.array([[[0.5]]], np.float16), np.float32),
    ],
)
def test_types_that_files_lack(tmp_path, name, array, stored):
    write(Volume(array, (1, 1, 1)), tmp_path / name)
    again = read(tmp_path / name).array
    assert again.dtype == stored and np.array_equal(again, array)


@pytest.mark.parametrize("name", ["a.nrrd", "a.mha", "a.nii"])
def test_a_sheared_grid_survives_a_chain_of_formats(tmp_path, name):
    volume = Volume(ramp(2, 3, 4), None, OBLIQUE).reorient("LPS")
    write(volume, tmp_path / name)
    again = read(tmp_path / name)
    np.testing.assert_allclose(again.affine, volume.affine, rtol=1e-6)
    assert np.array_equal(again.array, volume.array)


def test_labels_repeat_a_metaimages_geometry_bit_for_bit(tmp_path):
    image = sitk.GetImageFromArray(ramp(3, 4, 5))
    image.SetSpacing([0.1 + 0.2, 1 / 3, np.pi])
    image.SetDirection((turned()[:3, :3] / (0.7, 0.8, 2.5)).ravel())
    sitk.WriteImage(image, str(tmp_path / "a.mha"))
    scan = read(tmp_path / "a.mha")
    write(scan.like(np.ones((3, 4, 5))), tmp_path / "b.mha")
    assert np.array_equal(read(tmp_path / "b.mha").affine, scan.affine)
    assert sitk.ReadImage(str(tmp_path / "b.mha")).GetSpacing() == image.GetSpacing()
    write(scan, tmp_path / "c.nii")  # the fields of one format are not another's
    np.testing.assert_allclose(read(tmp_path / "c.nii").affine, scan.affine, rtol=1e-6)


def test_two_dimensions(tmp_path):
    image = sitk.GetImageFromArray(ramp(4, 5))
    image.SetSpacing([0.5, 0.25])
    for name in ("a.nrrd", "a.mha"):
        sitk.WriteImage(image, str(tmp_path / name))
        with pytest.warns() if name == "a.nrrd" else nullcontext():
            volume = read(tmp_path / name)
        assert np.array_equal(volume.array[0], ramp(4, 5)) and volume.spacing == (1, 0.25, 0.5)


# --- headers ------------------------------------------------------------------------------------------

NRRD = {
    "type": "short",
    "dimension": "3",
    "space": "left-posterior-superior",
    "sizes": "4 3 2",
    "space directions": "(1,0,0) (0,2,0) (0,0,3)",
    "endian": "little",
    "encoding": "raw",
    "space origin": "(10,20,30)",
}
META = {
    "ObjectType": "Image",
    "NDims": "3",
    "BinaryData": "True",
    "BinaryDataByteOrderMSB": "False",
    "TransformMatrix": "1 0 0 0 1 0 0 0 1",
    "Offset": "10 20 30",
    "ElementSpacing": "1 2 3",
    "DimSize": "4 3 2",
    "ElementType": "MET_SHORT",
    "ElementDataFile": "LOCAL",
}


def nrrd(path, data=None, **changes):
    fields = {k: v for k, v in {**NRRD, **changes}.items() if v is not None}
    text = "NRRD0004\n# a comment\nkey:=value\n" + "".join(f"{k}: {v}\n" for k, v in fields.items()) + "\n"
    path.write_bytes(text.encode() + (ramp(2, 3, 4).tobytes() if data is None else data))
    return path


def meta(path, data=None, **changes):
    fields = {k: v for k, v in {**META, **changes}.items() if v is not None}
    fields["ElementDataFile"] = fields.pop("ElementDataFile", None)
    text = "".join(f"{k} = {v}\n" for k, v in fields.items() if v is not None)
    path.write_bytes(text.encode() + (ramp(2, 3, 4).tobytes() if data is None else data))
    return path


@pytest.mark.parametrize("make, name", [(nrrd, "a.nrrd"), (meta, "a.mha")])
def test_the_headers_that_the_faults_are_put_into(tmp_path, make, name):
    volume = read(make(tmp_path / name))
    assert np.array_equal(volume.array, ramp(2, 3, 4)) and volume.spacing == (3, 2, 1)
    assert np.array_equal(volume.affine, LPS @ [[1, 0, 0, 10], [0, 2, 0, 20], [0, 0, 3, 30], [0, 0, 0, 1]])


NRRD_FAULTS = [
    ({"type": "block"}, "type is 'block'"),
    ({"type": None}, "no field 'type'"),
    ({"dimension": "1"}, "dimensions"),
    ({"dimension": "3 3"}, "dimensions"),
    ({"dimension": "many"}, "whole numbers"),
    ({"sizes": "4 3"}, "3 numbers"),
    ({"sizes": "4 3 0"}, "at least 1"),
    ({"sizes": "4 3 -2"}, "at least 1"),
    ({"sizes": "4 3 1e9"}, "whole numbers"),
    ({"sizes": "4 3 2_0"}, "whole numbers"),
    ({"sizes": "9" * 30 + " 1 1"}, "whole numbers"),
    ({"sizes": "999999999999999999 999999999999999999 999999999999999999"}, "cannot hold"),
    ({"sizes": "4 3 3"}, "cannot hold|cut off"),
    ({"sizes": "4 3 1"}, "goes on after"),
    ({"dimension": "5", "sizes": "2 2 2 3 1", "space directions": "none none " + NRRD["space directions"]},
     "3 axes in space and 2 others"),
    ({"kinds": "domain domain"}, "kinds"),
    ({"space": "right-up-left"}, "space is"),
    ({"space": "left-posterior-superior-time"}, "space is"),
    ({"space": None, "space dimension": "7"}, "dimensions"),
    ({"space directions": None}, "no space directions"),
    ({"space directions": "(1,0,0) (0,2,0)"}, "2 space directions"),
    ({"space directions": "(1,0,0) (0,2,0) (0,0,nan)"}, "finite"),
    ({"space directions": "(1,0,0) (0,2,0) (0,0,0)"}, "voxel size"),
    ({"space directions": "(1,0,0) (0,2,0) (0,0,1e300)"}, "voxel size"),
    ({"space directions": "(1,0,0) (0,2,0) (0,2,0)"}, "singular"),
    ({"space directions": "(1,0,0) (0,2,0) up"}, "space directions is"),
    ({"space directions": "(1,0) (0,2) (0,3)"}, "3 finite"),
    ({"space origin": "(1,2)"}, "3 finite"),
    ({"space origin": "(1,2,3) (4,5,6)"}, "one point"),
    ({"space origin": "none"}, "one point"),
    ({"space units": '"mm" "m" "mm"'}, "units"),
    ({"space units": '"furlong" "furlong" "furlong"'}, "units"),
    ({"endian": None}, "no field 'endian'"),
    ({"endian": "middle"}, "endian is"),
    ({"encoding": "bzip2"}, "encoding is"),
    ({"encoding": "gzip"}, "are not"),
    ({"byte skip": "-2"}, "skips -2"),
    ({"byte skip": "9"}, "cannot hold|cut off"),
    ({"line skip": "1"}, "lines of text"),
    ({"data file": "LIST"}, "list of files"),
    ({"data file": "/etc/passwd"}, "own folder"),
    ({"data file": "../other.raw"}, "own folder"),
    ({"data file": "missing.raw"}, "cannot open"),
    ({"Type": "short"}, "twice"),
]  # fmt: skip
META_FAULTS = [
    ({"ObjectType": "Tube"}, "Tube"),
    ({"ObjectType": None, "NDims": None}, "not a MetaImage"),
    ({"NDims": "5"}, "dimensions"),
    ({"NDims": "x"}, "whole numbers"),
    ({"DimSize": "4 3"}, "3 numbers"),
    ({"DimSize": "4 3 0"}, "at least 1"),
    ({"DimSize": "4 3 20000000000"}, "cannot hold"),
    ({"DimSize": "4 3 1"}, "goes on after"),
    ({"DimSize": None}, "whole numbers"),
    ({"ElementType": "MET_STRING"}, "MET_STRING"),
    ({"ElementType": None}, "missing"),
    ({"ElementNumberOfChannels": "0"}, "at least 1"),
    ({"ElementNumberOfChannels": "3"}, "cannot hold|cut off"),
    ({"ElementSpacing": None}, "no ElementSpacing"),
    ({"ElementSpacing": "1 2 -3"}, "positive"),
    ({"ElementSpacing": "1 2 0"}, "positive|voxel size"),
    ({"ElementSpacing": "1 2 1e9"}, "voxel size"),
    ({"ElementSpacing": "1 2"}, "3 finite"),
    ({"TransformMatrix": "1 0 0 0 1 0 0 0 0"}, "length 1"),
    ({"TransformMatrix": "1 0 0 1 0 0 0 0 1"}, "singular"),
    ({"TransformMatrix": "1 0 0"}, "9 finite"),
    ({"TransformMatrix": "1e200 0 0 0 1 0 0 0 1"}, "length 1"),
    ({"Offset": "nan 0 0"}, "finite"),
    ({"DistanceUnits": "inch"}, "DistanceUnits"),
    ({"BinaryData": "False"}, "text"),
    ({"BinaryDataByteOrderMSB": "maybe"}, "True or False"),
    ({"CompressedData": "True"}, "damaged"),
    ({"HeaderSize": "7"}, "HeaderSize"),
    ({"ElementDataFile": "LIST"}, "list of files"),
    ({"ElementDataFile": "slice%03d.raw 1 9 1"}, "list of files"),
    ({"ElementDataFile": "/etc/passwd"}, "own folder"),
    ({"ElementDataFile": "a/../../b.raw"}, "own folder"),
    ({"ElementDataFile": "missing.raw"}, "cannot open"),
    ({"ElementDataFile": None}, "ElementDataFile"),
    ({"Position": "1 2 3"}, "twice"),
]
FAULTS = [(nrrd, *fault) for fault in NRRD_FAULTS] + [(meta, *fault) for fault in META_FAULTS]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("make, changes, words", FAULTS)
def test_damaged_headers(tmp_path, make, changes, words):
    path = make(tmp_path / ("a.nrrd" if make is nrrd else "a.mha"), **changes)
    with pytest.raises(VolumeError, match=words) as caught:
        read(path)
    assert str(caught.value).startswith(str(tmp_path)) and "; " in str(caught.value)


@pytest.mark.parametrize(
    "make, changes, words, affine",
    [
        (nrrd, {"space": None, "space dimension": "3"}, "which way", None),
        (nrrd, {"space": "scanner-xyz"}, "scanner-xyz", None),
        (nrrd, {"space origin": None}, "no space origin", LPS @ np.diag([1.0, 2, 3, 1])),
        (meta, {"TransformMatrix": None}, "no TransformMatrix", None),
    ],
)
def test_what_a_header_leaves_open_is_warned_about(tmp_path, make, changes, words, affine):
    path = make(tmp_path / ("a.nrrd" if make is nrrd else "a.mha"), **changes)
    with pytest.warns(UserWarning, match=words) as record:
        volume = read(path)
    assert record[0].filename == __file__
    usual = LPS @ [[1, 0, 0, 10], [0, 2, 0, 20], [0, 0, 3, 30], [0, 0, 0, 1]]
    assert np.array_equal(volume.affine, usual if affine is None else affine)


def test_nrrd_in_other_words(tmp_path):
    ras = read(nrrd(tmp_path / "a.nrrd", space="RAS", **{"space units": '"m" "m" "m"'}))
    assert np.array_equal(ras.affine[:3, 3], (10000, 20000, 30000)) and ras.orientation == "RAS"
    big = read(nrrd(tmp_path / "b.nrrd", ramp(2, 3, 4).astype(">i2").tobytes(), endian="big"))
    assert np.array_equal(big.array, ramp(2, 3, 4))
    four = {"dimension": "4", "kinds": "domain domain domain list"}
    for sizes, vectors, shape in [
        ("3 2 2 2", NRRD["space directions"] + " none", (2, 2, 2, 3)),
        ("2 3 2 2", "none " + NRRD["space directions"], (2, 2, 2, 3)),
        ("1 4 3 2", "none " + NRRD["space directions"], (2, 3, 4)),
    ]:
        path = nrrd(tmp_path / "c.nrrd", sizes=sizes, **four | {"space directions": vectors})
        volume = read(path)
        assert volume.shape == shape
        stored = ramp(*map(int, sizes.split()[::-1]))
        first = vectors.startswith("none")
        assert np.array_equal(volume.array, np.moveaxis(stored, -1, 0).reshape(shape) if first else stored)
    with pytest.warns(UserWarning, match="how the scan lies"):
        bare = read(nrrd(tmp_path / "d.nrrd", **bare_fields()))
    assert bare.spacing == (3, 2, 1) and bare.orientation == "LPS"


def bare_fields():
    return {**dict.fromkeys(("space", "space directions", "space origin")), "spacings": "1 2 3"}


def test_voxels_in_a_file_beside_the_header(tmp_path):
    (tmp_path / "a.raw").write_bytes(b"12345" + ramp(2, 3, 4).tobytes())
    for path in (
        nrrd(tmp_path / "a.nhdr", b"", **{"data file": "a.raw", "byte skip": "-1"}),
        nrrd(tmp_path / "b.nhdr", b"", **{"data file": "./a.raw", "byte skip": "5"}),
        meta(tmp_path / "a.mhd", b"", ElementDataFile="a.raw", HeaderSize="-1"),
        meta(tmp_path / "b.mhd", b"", ElementDataFile="a.raw", HeaderSize="5"),
    ):
        assert np.array_equal(read(path).array, ramp(2, 3, 4)), path
    (tmp_path / "link.raw").symlink_to("/etc/passwd")
    with pytest.raises(VolumeError, match="own folder"):
        read(meta(tmp_path / "c.mhd", b"", ElementDataFile="link.raw"))


@pytest.mark.parametrize("name", ["a.nrrd", "a.mha"])
@pytest.mark.parametrize("keep", [0, 1, 5, 30, -1, -5, -40])
@pytest.mark.parametrize("compress", [True, False])
def test_truncated(tmp_path, name, keep, compress):
    path = tmp_path / name
    write(Volume(ramp(3, 4, 5), (1, 1, 1)), path, compress=compress)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(VolumeError, match="cut off|cannot hold|empty|not a|no end|come to"):
        read(path)


@pytest.mark.parametrize("name", ["a.nrrd", "a.mha"])
def test_a_damaged_or_longer_stream(tmp_path, name):
    path = tmp_path / name
    write(Volume(ramp(3, 4, 5), (1, 1, 1)), path)
    good = path.read_bytes()
    for bad in (good + b"x", good[:-6] + b"abcdef", good[:-20] + b"\0" + good[-19:]):
        path.write_bytes(bad)
        with pytest.raises(VolumeError, match="goes on|damaged|cut off"):
            read(path)


@pytest.mark.parametrize("name", ["a.nrrd", "a.mha"])
def test_the_limit_holds_before_memory_is_taken(tmp_path, name):
    """32 MiB of zeros in 32 KiB: refused with the limit, and without touching the bytes."""
    write(Volume(np.zeros((32, 1024, 1024), np.uint8), (1, 1, 1)), tmp_path / name)
    assert (tmp_path / name).stat().st_size < 200_000
    assert read(tmp_path / name, max_bytes=1 << 25).array.max() == 0
    tracemalloc.start()
    with pytest.raises(VolumeError, match="limit is 33554431"):
        read(tmp_path / name, max_bytes=(1 << 25) - 1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_metaimage_may_hold_more_streams_than_announced(tmp_path):
    data = zlib.compress(ramp(2, 3, 4).tobytes())
    assert read(meta(tmp_path / "a.mha", data, CompressedData="True")).array[1, 2, 3] == 23
    with pytest.raises(VolumeError, match="goes on"):
        read(meta(tmp_path / "a.mha", data + data, CompressedData="True"))


# --- writing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.nrrd", "a.mha", "a.nii.gz"])
def test_writing_is_all_or_nothing(tmp_path, name, monkeypatch):
    volume = Volume(ramp(2, 3, 4), (1, 1, 1))
    write(volume, tmp_path / name)
    before = (tmp_path / name).read_bytes()
    write(volume, tmp_path / name)
    assert (tmp_path / name).read_bytes() == before  # no time, no name inside

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(VolumeError, match="No space left"):
        write(volume.like(volume.array + 1), tmp_path / name)
    assert (tmp_path / name).read_bytes() == before and os.listdir(tmp_path) == [name]


def test_a_grid_that_the_file_cannot_hold_is_not_written(tmp_path):
    """NIfTI-1 keeps the place in float32: 1e6 mm away, a step of 0.01 mm is lost."""
    affine = np.diag([0.01, 0.01, 0.01, 1])
    affine[:3, 3] = 1e6 + 0.004
    volume = Volume(ramp(2, 3, 4), None, affine)
    with pytest.raises(VolumeError, match=r"a.nii: not written: .* mm from where .*write .nrrd"):
        write(volume, tmp_path / "a.nii")
    assert not os.listdir(tmp_path)
    write(volume, tmp_path / "a.nrrd")
    assert np.array_equal(read(tmp_path / "a.nrrd").affine, affine)


def test_a_wrong_header_is_noticed_before_the_file_has_its_name(tmp_path, monkeypatch):
    from convoxel.volume import metaimage

    monkeypatch.setattr(metaimage, "RAS_FROM_LPS", np.diag([-1.0, 1, 1, 1]))  # a slip in the writer
    right = metaimage._place
    monkeypatch.setattr(metaimage, "_place", lambda *a: unslipped(right(*a)))
    with pytest.raises(VolumeError, match="not written: read back"):
        write(Volume(ramp(2, 3, 4), (1, 1, 1), turned_to((1, 1, 1))), tmp_path / "a.mha")
    assert not os.listdir(tmp_path)


def turned_to(spacing):
    affine = turned()
    affine[:3, :3] *= np.array(spacing) / np.linalg.norm(affine[:3, :3], axis=0)
    return affine


def unslipped(place):
    affine, spacing = place
    return np.diag([1.0, -1, 1, 1]) @ affine, spacing


def test_endings(tmp_path):
    volume = Volume(ramp(2, 3, 4), (1, 1, 1))
    for name in ("a.png", "a.nhdr", "a.mhd", "a"):
        with pytest.raises(VolumeError, match="ends in .nii, .nii.gz, .nrrd, .mha"):
            write(volume, tmp_path / name)
    with pytest.raises(ValueError, match="no series to choose"):
        read(tmp_path / "a.nrrd", series="1.2")
    with pytest.raises(ValueError, match="by its name"):
        write(volume, tmp_path / "a.nii", compress=True)
