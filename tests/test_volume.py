"""Volumes and NIfTI: where voxels lie, that nothing moves on the way, and that no file is believed."""

import gzip
import os
import pickle
import random
import re
import struct
import subprocess
import sys
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest

from convoxel.volume import Volume, VolumeError, read, write

nibabel = pytest.importorskip("nibabel")

# x runs to posterior, y to the right, z (tilted) to superior: nothing symmetric, exact in float32
OBLIQUE = np.array([[0, 2, 0.25, -30], [-0.5, 0, 1, 12.5], [0, 0, 4, -7], [0, 0, 0, 1]], float)


def ramp(*shape, dtype=np.float32):
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


def world(volume):
    """{value: RAS+ position} of every voxel of a (D, H, W) volume, from the definition."""
    return {
        volume.array[z, y, x].item(): tuple((volume.affine @ (x, y, z, 1))[:3].round(6))
        for z, y, x in np.ndindex(volume.shape)
    }


# --- the Volume ---------------------------------------------------------------------------------------


def test_default_affine_is_ras_from_the_first_voxel():
    volume = Volume(ramp(2, 3, 4), (5.0, 2.0, 1.0))
    assert np.array_equal(volume.affine, np.diag([1.0, 2.0, 5.0, 1.0]))
    assert volume.orientation == "RAS"
    assert (volume.shape, volume.grid_shape, volume.is_multichannel) == ((2, 3, 4), (2, 3, 4), False)
    assert repr(volume) == (
        "Volume(shape=(2, 3, 4), float32, spacing=(5, 2, 1) mm (z, y, x), RAS, origin=(0, 0, 0) mm)"
    )


def test_spacing_comes_from_the_affine():
    volume = Volume(ramp(2, 2, 3, 4), None, OBLIQUE)
    assert volume.spacing == pytest.approx((np.sqrt(0.0625 + 1 + 16), 2, 0.5))
    assert volume.is_multichannel and volume.grid_shape == (2, 3, 4)
    assert volume.orientation == "PRS"


@pytest.mark.parametrize(
    "array, spacing, affine, error, words",
    [
        (np.zeros((2, 2)), (1, 1, 1), None, ValueError, r"\(D, H, W\).*array\[None\]"),
        (np.zeros((2, 0, 2)), (1, 1, 1), None, ValueError, "at least one voxel"),
        (np.zeros((2, 2, 2), complex), (1, 1, 1), None, TypeError, "complex128"),
        (np.full((1, 1, 1), None), (1, 1, 1), None, TypeError, "object"),
        (np.zeros((2, 2, 2)), (1, 0, 1), None, ValueError, "positive"),
        (np.zeros((2, 2, 2)), (1, np.nan, 1), None, ValueError, "finite"),
        (np.zeros((2, 2, 2)), (1, 1), None, ValueError, "three"),
        (np.zeros((2, 2, 2)), None, None, ValueError, "neither"),
        (np.zeros((2, 2, 2)), (1, 1, 2), np.diag([1, 1, 1, 1]), ValueError, "disagree"),
        (np.zeros((2, 2, 2)), (1, 1, 1), np.diag([1, 1, 0, 1]), ValueError, "singular"),
        (np.zeros((2, 2, 2)), (1, 1, 1), np.eye(3), ValueError, r"\(4, 4\)"),
        (np.zeros((2, 2, 2)), (1, 1, 1), np.diag([1, 1, np.inf, 1]), ValueError, "finite"),
    ],
)
def test_a_wrong_volume_is_refused(array, spacing, affine, error, words):
    with pytest.raises(error, match=words):
        Volume(array, spacing, affine)


def test_attributes_are_fixed_and_copies_are_equal():
    volume = Volume(ramp(2, 3, 4), None, OBLIQUE)
    with pytest.raises(AttributeError, match="like"):
        volume.array = np.zeros((2, 3, 4))
    with pytest.raises(ValueError):
        volume.affine[0, 0] = 3
    again = pickle.loads(pickle.dumps(volume))
    assert np.array_equal(again.array, volume.array) and np.array_equal(again.affine, volume.affine)


def test_like_keeps_the_grid_and_refuses_another():
    volume = Volume(ramp(2, 3, 4), None, OBLIQUE)
    labels = volume.like(np.ones((2, 3, 4), np.uint8))
    assert labels.same_grid(volume) and labels.dtype == np.uint8
    assert volume.like(np.ones((5, 2, 3, 4))).is_multichannel
    with pytest.raises(ValueError, match=r"\(2, 4, 3\).*\(2, 3, 4\)"):
        volume.like(np.ones((2, 4, 3)))


@pytest.mark.parametrize("orientation", ["RAS", "LPS", "SRA", "AIL"])
def test_reorient_moves_no_voxel_and_comes_back_exactly(orientation):
    volume = Volume(ramp(2, 3, 4), None, OBLIQUE + 1e-3 * np.eye(4)[:, :1] @ np.ones((1, 4)) / 3)
    turned = volume.reorient(orientation)
    assert turned.orientation == orientation
    assert world(turned) == world(volume)
    assert turned.spacing == pytest.approx(np.linalg.norm(turned.affine[:3, :3], axis=0)[::-1])
    back = turned.reorient("RAS").reorient(volume.orientation)
    assert np.array_equal(back.array, volume.array) and np.array_equal(back.affine, volume.affine)
    assert back.spacing == volume.spacing


def test_reorient_agrees_with_nibabel_and_keeps_channels():
    array = ramp(2, 3, 4, 5)
    ours = Volume(array, None, OBLIQUE).reorient()
    theirs = nibabel.as_closest_canonical(nibabel.Nifti1Image(array.T, OBLIQUE))
    assert np.array_equal(ours.array.T, np.asanyarray(theirs.dataobj))
    assert np.allclose(ours.affine, theirs.affine)


@pytest.mark.parametrize("orientation", ["RA", "RRS", "XYZ", "ras", ""])
def test_reorient_refuses_nonsense(orientation):
    with pytest.raises(ValueError, match="three letters"):
        Volume(ramp(2, 2, 2), (1, 1, 1)).reorient(orientation)


# --- between voxels -----------------------------------------------------------------------------------


def test_resample_is_torchs_half_voxel_rule():
    import torch

    array = np.random.default_rng(0).normal(size=(2, 5, 7, 6))
    for shape in [(5, 7, 6), (11, 3, 6), (1, 1, 1), (4, 14, 13)]:
        ours = Volume(array, (2, 1, 1)).resample(shape=shape).array
        theirs = torch.nn.functional.interpolate(
            torch.from_numpy(array)[None], shape, mode="trilinear", align_corners=False
        )[0]
        np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-12)


def test_resample_keeps_the_field_of_view():
    volume = Volume(ramp(10, 6, 4), None, OBLIQUE)
    new = volume.resample((1.0, 1.0, 1.0))
    z, y, x = volume.spacing
    assert new.grid_shape == (round(10 * z), round(6 * y), round(4 * x))
    for old_corner, new_corner in [((-0.5, -0.5, -0.5), (-0.5, -0.5, -0.5)), ((3.5, 5.5, 9.5), None)]:
        new_corner = new_corner or tuple(n - 0.5 for n in new.grid_shape[::-1])
        np.testing.assert_allclose(volume.affine @ (*old_corner, 1), new.affine @ (*new_corner, 1), atol=1e-9)
    assert new.spacing == pytest.approx(np.linalg.norm(new.affine[:3, :3], axis=0)[::-1])


def test_linear_data_comes_out_linear_wherever_it_is_sampled():
    def position_sum(volume):  # a linear function of the place in the patient
        d, h, w = volume.grid_shape
        z, y, x = np.ogrid[:d, :h, :w]
        a = volume.affine[:3].sum(0)
        return a[0] * x + a[1] * y + a[2] * z + a[3]

    source = Volume(np.zeros((12, 14, 16)), None, OBLIQUE)
    source = source.like(position_sum(source))
    inner = source.affine @ [[1, 0, 0, 3.3], [0, 1, 0, 2.6], [0, 0, 1, 4.2], [0, 0, 0, 1]]
    turn = np.array([[0.8, -0.5, 0, 0], [0.5, 0.8, 0.1, 0], [0, 0.1, 0.7, 0], [0, 0, 0, 1]])
    target = Volume(np.zeros((5, 6, 7)), None, inner @ turn)
    moved = source.resample_to(target)
    pull = np.linalg.inv(source.affine) @ target.affine
    z, y, x = np.ogrid[:5, :6, :7]
    at = [pull[i, 0] * x + pull[i, 1] * y + pull[i, 2] * z + pull[i, 3] for i in range(3)]
    inside = np.logical_and.reduce([(u >= 0) & (u <= n - 1) for u, n in zip(at, (16, 14, 12), strict=True)])
    assert inside.sum() > 100
    np.testing.assert_allclose(moved.array[inside], position_sum(target)[inside], atol=1e-9)
    assert moved.same_grid(target)


def test_nearest_keeps_labels_and_their_dtype():
    labels = Volume(np.array([[[0, 7, 9]]], np.uint16), (1, 1, 1))
    up = labels.resample(shape=(2, 1, 6), mode="nearest")
    assert up.dtype == np.uint16 and up.array.tolist() == [[[0, 0, 7, 7, 9, 9]]] * 2
    assert up.resample(shape=(1, 1, 3), mode="nearest").array.tolist() == [[[0, 7, 9]]]
    flipped = labels.reorient("LPS")
    assert labels.resample_to(flipped, mode="nearest").array.tolist() == [[[9, 7, 0]]]
    assert labels.resample_to(flipped).array.tolist() == [[[9, 7, 0]]]


def test_outside_the_field_of_view():
    source = Volume(np.array([[[1, 2]]], np.uint8), (1, 1, 1))
    wide = np.eye(4)
    wide[0, 3] = -2
    target = Volume(np.zeros((1, 1, 6)), None, wide)
    assert source.resample_to(target, mode="nearest").array.tolist() == [[[1, 1, 1, 2, 2, 2]]]
    assert source.resample_to(target, mode="nearest", fill=9).array.tolist() == [[[9, 9, 1, 2, 9, 9]]]
    wide[0] = [
        0.25,
        0,
        0,
        -0.75,
    ]  # centres at -0.75, -0.5, ..., 0.5: half a voxel before the first is its border
    inside = source.resample_to(Volume(np.zeros((1, 1, 6)), None, wide), mode="nearest", fill=9)
    assert inside.array.tolist() == [[[9, 1, 1, 1, 1, 2]]]
    wide[0], wide[1, 3] = [1, 0, 0, 0], 50
    with pytest.raises(ValueError, match="do not overlap"):
        source.resample_to(Volume(np.zeros((1, 1, 6)), None, wide))
    with pytest.raises(ValueError, match="fill"):
        source.resample_to(target, mode="nearest", fill=256)
    with pytest.raises(ValueError, match='"linear" or "nearest"'):
        source.resample(shape=(1, 1, 3), mode="cubic")
    with pytest.raises(ValueError, match="either"):
        source.resample()


def test_nan_stays_where_it_is():
    array = np.ones((1, 1, 4), np.float32)
    array[0, 0, 3] = np.nan
    moved = Volume(array, (1, 1, 1)).resample_to(Volume(np.zeros((1, 1, 3)), (1, 1, 1)))
    assert moved.array.tolist() == [[[1, 1, 1]]]


# --- writing and reading back -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz", "SCAN.NII.GZ"])
@pytest.mark.parametrize("shape", [(3, 4, 5), (2, 3, 4, 5), (1, 3, 4, 5)])
def test_round_trip_and_nibabel_sees_the_same(tmp_path, name, shape):
    volume = Volume(ramp(*shape, dtype=np.int16), None, OBLIQUE)
    write(volume, tmp_path / name)
    again = read(tmp_path / name)
    assert np.array_equal(again.array, volume.array) and again.dtype == np.int16
    assert np.array_equal(again.affine, OBLIQUE) and again.affine.dtype == np.float64
    assert again.spacing == pytest.approx(volume.spacing, rel=1e-6)
    theirs = nibabel.load(tmp_path / name) if name.islower() else None
    if theirs is not None:
        assert np.array_equal(np.asanyarray(theirs.dataobj).T, volume.array)
        assert np.array_equal(theirs.affine, OBLIQUE)
    assert os.listdir(tmp_path) == [name]


def test_qform_says_the_same_where_it_can(tmp_path):
    turn = np.array([[0, -2, 0, 5], [1.5, 0, 0, 6], [0, 0, 3, 7], [0, 0, 0, 1]], float)
    write(Volume(ramp(2, 3, 4), None, turn), tmp_path / "rigid.nii")
    header = nibabel.load(tmp_path / "rigid.nii").header
    np.testing.assert_allclose(header.get_qform(), turn, atol=1e-6)
    assert int(header["sform_code"]) == int(header["qform_code"]) == 2
    write(Volume(ramp(2, 3, 4), None, OBLIQUE), tmp_path / "sheared.nii")
    assert int(nibabel.load(tmp_path / "sheared.nii").header["qform_code"]) == 0


@pytest.mark.parametrize(
    "values, dtype, stored",
    [
        ([0, 1], bool, np.uint8),
        ([0, 255], np.int64, np.uint8),
        ([0, 256], np.int64, np.uint16),
        ([0, 65535], np.uint64, np.uint16),
        ([-1, 5], np.int64, np.int16),
        ([-40000, 5], np.int64, np.int32),
        ([0, 2**32 - 1], np.int64, np.uint32),
        ([0, 1], np.float16, np.float32),
        ([0, 1], np.int8, np.int8),
        ([0, 1], np.float64, np.float64),
        ([0, 1], ">i2", np.int16),
    ],
)
def test_stored_dtypes(tmp_path, values, dtype, stored):
    volume = Volume(np.array([[values]], dtype), (1, 1, 1))
    write(volume, tmp_path / "a.nii")
    again = read(tmp_path / "a.nii")
    assert again.dtype == stored and again.array.tolist() == [[values]]


def test_integers_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(VolumeError, match="do not fit"):
        write(Volume(np.array([[[-1, 2**32 - 1]]]), (1, 1, 1)), tmp_path / "a.nii")
    assert not os.listdir(tmp_path)


def test_geometry_of_a_read_file_comes_back_bit_for_bit(tmp_path):
    """qform only, microns, odd codes and a repetition time: labels made with `like` repeat them all."""
    image = nibabel.Nifti1Image(ramp(5, 4, 3), None)
    image.header.set_zooms((700, 800, 900))
    c, s = np.cos(0.3), np.sin(0.3)
    rotated = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.diag([700, 800, 900])
    image.set_qform(nibabel.affines.from_matvec(rotated, [100, 200, 300]), 4)
    image.set_sform(None, 0)
    image.header.set_xyzt_units("micron", "sec")
    image.header["pixdim"][4] = 2.5
    nibabel.save(image, tmp_path / "scan.nii")
    scan = read(tmp_path / "scan.nii")
    assert scan.spacing == pytest.approx((0.9, 0.8, 0.7))
    np.testing.assert_allclose(scan.affine[:3], image.affine[:3] / 1000, rtol=1e-6)
    turned = scan.reorient("LPS").like(np.ones((3, 4, 5), np.uint8)).reorient(scan.orientation)
    write(turned, tmp_path / "labels.nii.gz")
    before, after = (nibabel.load(tmp_path / name).header for name in ("scan.nii", "labels.nii.gz"))
    for field in ["pixdim", "xyzt_units", "qform_code", "sform_code", "quatern_d", "qoffset_x", "srow_x"]:
        assert np.array_equal(before[field], after[field]), field
    assert np.array_equal(read(tmp_path / "labels.nii.gz").affine, scan.affine)


def test_a_reoriented_scan_is_written_where_it_lies(tmp_path):
    write(Volume(ramp(2, 3, 4), None, OBLIQUE), tmp_path / "a.nii")
    turned = read(tmp_path / "a.nii").reorient("LPS")
    write(turned, tmp_path / "b.nii")
    again = read(tmp_path / "b.nii")
    assert again.orientation == "LPS" and world(again) == world(turned)


def test_nifti2_keeps_float64_and_long_axes(tmp_path):
    affine = OBLIQUE + np.diag([1 / 3, 0, 0, 0])
    nibabel.save(nibabel.Nifti2Image(ramp(4, 3, 2), affine), tmp_path / "two.nii")
    volume = read(tmp_path / "two.nii")
    assert np.array_equal(volume.affine, affine)
    write(volume, tmp_path / "again.nii")
    assert np.array_equal(read(tmp_path / "again.nii").affine, affine)
    write(Volume(np.zeros((1, 1, 40000), np.uint8), (1, 1, 1)), tmp_path / "long.nii")
    assert read(tmp_path / "long.nii").shape == (1, 1, 40000)


@pytest.mark.parametrize(
    "stored, slope, inter, dtype",
    [
        (np.int16, 1, -1024, np.float32),
        (np.uint8, 0.5, 3, np.float32),
        (np.int32, 0.5, 0, np.float64),
        (np.int16, 1e36, 0, np.float64),
        (np.float32, 2, 1, np.float32),
        (np.int16, 1, 0, np.int16),
        (np.int16, 0, 5, np.int16),
        (np.int16, np.nan, 5, np.int16),
    ],
)
def test_slope_and_intercept(tmp_path, stored, slope, inter, dtype):
    path = tmp_path / "a.nii"
    nibabel.save(nibabel.Nifti1Image(ramp(4, 3, 2, dtype=stored), np.eye(4)), path)
    edit(path, 112, "<ff", slope, inter)
    volume = read(path)
    wanted = ramp(4, 3, 2, dtype=np.float64).T
    if dtype != np.int16:
        wanted = wanted * float(np.float32(slope)) + inter
    assert volume.dtype == dtype
    np.testing.assert_allclose(volume.array, wanted, rtol=1e-7)


@pytest.mark.parametrize(
    "file_shape, shape",
    [
        ((5, 4), (1, 4, 5)),
        ((5, 4, 3, 1), (1, 3, 4, 5)),
        ((5, 4, 3, 2, 1, 1), (2, 3, 4, 5)),
        ((5, 4, 3, 1, 2), (2, 3, 4, 5)),
    ],
)
def test_dimensions(tmp_path, file_shape, shape):
    array = ramp(*file_shape[::-1])
    nibabel.save(nibabel.Nifti1Image(array.T, np.eye(4)), tmp_path / "a.nii")
    assert np.array_equal(read(tmp_path / "a.nii").array, array.reshape(shape))


def test_big_endian(tmp_path):
    header = nibabel.Nifti1Header(endianness=">")
    header.set_data_dtype(">i2")
    nibabel.save(nibabel.Nifti1Image(ramp(4, 3, 2, dtype=">i2"), np.eye(4), header), tmp_path / "a.nii")
    volume = read(tmp_path / "a.nii")
    assert volume.dtype == np.int16 and volume.dtype.isnative
    assert np.array_equal(volume.array, ramp(4, 3, 2).T)


# --- what is warned about -----------------------------------------------------------------------------


def test_two_places_warn_and_the_sform_wins(tmp_path):
    image = nibabel.Nifti1Image(ramp(4, 3, 2), np.diag([2.0, 2, 2, 1]))
    image.set_qform(np.diag([2.0, 2, 2, 1]), 1)
    moved = np.diag([2.0, 2, 2, 1])
    moved[0, 3] = 10
    image.set_sform(moved, 4)
    nibabel.save(image, tmp_path / "a.nii")
    with pytest.warns(UserWarning, match=r"sform \(code 4\) and qform \(code 1\).*10 mm apart") as record:
        assert np.array_equal(read(tmp_path / "a.nii").affine, moved)
    assert record[0].filename == __file__


def test_no_place_at_all_warns(tmp_path):
    image = nibabel.Nifti1Image(ramp(4, 3, 2), None)
    nibabel.save(image, tmp_path / "a.nii")
    with pytest.warns(UserWarning, match="does not say how the scan lies"):
        volume = read(tmp_path / "a.nii")
    assert volume.orientation == "LAS"
    assert np.array_equal(volume.affine, nibabel.load(tmp_path / "a.nii").affine)


def test_other_voxel_size_than_the_affines_warns(tmp_path):
    path = tmp_path / "a.nii"
    write(Volume(ramp(2, 3, 4), (1, 1, 1)), path)
    edit(path, 252, "<h", 0)  # no qform, which would disagree too
    edit(path, 80, "<f", 2.0)
    with pytest.warns(UserWarning, match="affine's is taken"):
        assert read(path).spacing == (1, 1, 1)


# --- what is refused ----------------------------------------------------------------------------------


def edit(path, offset, form, *values):
    data = bytearray(path.read_bytes())
    struct.pack_into(form, data, offset, *values)
    path.write_bytes(data)


DAMAGE = [  # byte offset in the NIfTI-1 header, struct format, value, words of the error
    (0, "<i", 347, "not a NIfTI file"),
    (344, "<4s", b"n+3\0", "NIfTI mark"),
    (344, "<4s", b"ni1\0", "pair"),
    (40, "<h", 0, "0 dimensions"),
    (40, "<h", 1, "1 dimensions"),
    (40, "<h", 8, "8 dimensions"),
    (42, "<h", 0, "at least 1"),
    (42, "<h", -4, "at least 1"),
    (42, "<h", 32767, "cannot hold"),
    (42, "<hhh", (32767, 32767, 32767), "cannot hold"),
    (42, "<h", 3, "goes on after"),
    (40, "<hhhhhhhh", (7, 1, 1, 2, 2, 2, 1, 3), "split the file"),
    (70, "<h", 32, "complex64"),
    (70, "<h", 128, "RGB"),
    (70, "<h", 77, r"unknown \(code 77\)"),
    (72, "<h", 8, "bitpix 8"),
    (80, "<f", 0.0, "voxel size"),
    (80, "<f", -1.0, "voxel size"),
    (76, "<f", 3.0, "qfac"),
    (84, "<f", np.nan, "voxel size"),
    (88, "<f", np.inf, "voxel size"),
    (88, "<f", 1e30, "voxel size"),
    (108, "<f", np.nan, "puts the voxels at byte nan"),
    (108, "<f", 100.0, "puts the voxels"),
    (108, "<f", 352.5, "puts the voxels"),
    (108, "<f", 1e9, "puts the voxels"),
    (108, "<f", 400.0, "cannot hold"),
    (112, "<ff", (2.0, np.nan), "scl_inter"),
    (123, "<B", 5, "unit of length"),
    (252, "<h", 77, "qform_code is 77"),
    (254, "<h", -1, "sform_code is -1"),
    (256, "<f", 5.0, "qform is invalid"),
    (268, "<f", np.inf, "qform is not finite"),
    (280, "<f", np.nan, "sform is not finite"),
    (280, "<ffff", (0, 0, 0, 0), "singular"),
    (280, "<ffff", (0, 1, 0, 0), "voxel size"),
    (280, "<f", 1e38, "voxel size"),
]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize("offset, form, values, words", DAMAGE)
def test_damaged_headers(tmp_path, ending, offset, form, values, words):
    path = tmp_path / "a.nii"
    write(Volume(ramp(2, 3, 4), (1, 1, 1)), path)
    if words == "singular":
        edit(path, 296, "<ffff", 1e-3, 1.0, 0, 0)
        values = (1e-3, 1.0, 0, 0)
    edit(path, offset, form, *(values if isinstance(values, tuple) else (values,)))
    if ending == ".nii.gz":
        data, path = path.read_bytes(), tmp_path / "a.nii.gz"
        path.write_bytes(gzip.compress(data))
        words = words.replace("cannot hold", "cannot hold|cut off")
    with pytest.raises(VolumeError, match=words) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}: ") and "; " in str(caught.value)


def test_files_that_are_no_scans(tmp_path):
    def refused(path, words):
        with pytest.raises(VolumeError, match=words):
            read(path)

    refused(tmp_path / "missing.nii", "No such file")
    (tmp_path / "folder.nii").mkdir()
    refused(tmp_path / "folder.nii", "folder")
    for name, data, words in [
        ("empty.nii", b"", "empty"),
        ("short.nii", b"\\\x01\0\0", "cut off"),
        ("text.nii", b"hello, world" * 50, "not a NIfTI file"),
        ("packed.nii", gzip.compress(b"x"), "rename it to .nii.gz"),
        ("plain.nii.gz", b"x" * 400, "not gzip"),
        ("scan.png", b"x", "ends in .nii"),
        ("pair.hdr", b"x", "pairs"),
        ("nul\0.nii", None, "cannot open"),
    ]:
        if data is not None:
            (tmp_path / name).write_bytes(data)
        refused(tmp_path / name, words)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.nii")
        refused(tmp_path / "pipe.nii", "not a regular file")


@pytest.mark.parametrize("keep", [1, 3, 12, -1, -8, -12])
def test_truncated(tmp_path, keep):
    for name in ("a.nii", "a.nii.gz"):
        path = tmp_path / name
        write(Volume(ramp(2, 3, 4), (1, 1, 1)), path)
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(VolumeError, match="cut off|cannot hold|not gzip"):
            read(path)


def test_checksum_is_looked_at(tmp_path):
    path = tmp_path / "a.nii.gz"
    write(Volume(ramp(2, 3, 4), (1, 1, 1)), path)
    edit(path, len(path.read_bytes()) - 8, "<I", 0)
    with pytest.raises(VolumeError, match="damaged"):
        read(path)


def test_overflow_by_the_slope_is_refused(tmp_path):
    path = tmp_path / "a.nii"
    write(Volume(np.full((1, 1, 2), 1e30, np.float32), (1, 1, 1)), path)
    edit(path, 112, "<f", 1e30)
    with pytest.raises(VolumeError, match="exceed float32"):
        read(path)


def test_the_limit_holds_before_memory_is_taken(tmp_path):
    """32 MiB of zeros in 32 KiB of gzip: refused with the limit, and without touching the bytes."""
    volume = Volume(np.zeros((32, 1024, 1024), np.uint8), (1, 1, 1))
    write(volume, tmp_path / "bomb.nii.gz")
    assert read(tmp_path / "bomb.nii.gz", max_bytes=1 << 25).array.max() == 0
    tracemalloc.start()
    with pytest.raises(VolumeError, match="limit is 33554431"):
        read(tmp_path / "bomb.nii.gz", max_bytes=(1 << 25) - 1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_fuzz(tmp_path, name):
    """Random bytes, cuts and insertions: a VolumeError or a sound Volume, and little memory, every time."""
    rng = random.Random(20240 + len(name))
    path = tmp_path / name
    write(Volume(ramp(3, 5, 7, dtype=np.int16), None, OBLIQUE), path)
    good = path.read_bytes()
    refused = 0
    tracemalloc.start()
    for _ in range(300):
        data = bytearray(good)
        if name.endswith(".gz") and rng.random() < 0.6:  # damage inside, with a right checksum
            data = bytearray(gzip.compress(mutate(bytearray(gzip.decompress(good)), rng), mtime=0))
        else:
            data = mutate(data, rng)
        path.write_bytes(data)
        try:
            volume = read(path)
        except VolumeError as error:
            refused += 1
            assert str(path) in str(error)
            continue
        assert volume.array.size * volume.array.itemsize <= 1032 * len(data)
        assert np.isfinite(volume.affine).all() and min(volume.spacing) > 0
        volume.reorient("RAS")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 30 < refused < 300
    assert peak < 8 << 20


def mutate(data, rng):
    kind = rng.randrange(4)
    if kind == 0:
        return data[: rng.randrange(len(data))]
    if kind == 1:
        at = rng.randrange(len(data))
        return data[:at] + rng.randbytes(rng.randrange(1, 20)) + data[at:]
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(min(352, len(data)) if kind == 2 else len(data))
        data[at] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])
    return data


# --- writing is all or nothing ------------------------------------------------------------------------


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.nii.gz"
    volume = Volume(ramp(2, 3, 4), (1, 1, 1))
    write(volume, path)
    before = path.read_bytes()

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(VolumeError, match="No space left"):
        write(volume.like(volume.array + 1), path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.nii.gz"]


def test_where_nothing_can_be_written(tmp_path):
    volume = Volume(ramp(2, 3, 4), (1, 1, 1))
    with pytest.raises(VolumeError, match="folder exists"):
        write(volume, tmp_path / "none" / "a.nii")
    with pytest.raises(VolumeError, match="ends in .nii"):
        write(volume, tmp_path / "a.png")
    shifted = np.eye(4)
    shifted[0, 3] = 1e39
    with pytest.raises(VolumeError, match="float32"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        write(Volume(ramp(2, 3, 4), None, shifted), tmp_path / "a.nii")


def test_the_same_volume_gives_the_same_bytes_and_usual_permissions(tmp_path):
    volume = Volume(ramp(2, 3, 4), (1, 1, 1))
    for name in ("a.nii.gz", "b.nii.gz"):
        write(volume, tmp_path / name)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()
    assert (tmp_path / "a.nii.gz").read_bytes()[3:8] == bytes(5)  # neither name nor time
    (tmp_path / "plain").touch()
    assert (tmp_path / "a.nii.gz").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_without_nibabel_the_message_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "nibabel", None)
    with pytest.raises(ImportError, match=r"convoxel\[io\]"):
        read(tmp_path / "a.nii")


def test_import_convoxel_does_not_import_nibabel():
    code = "import convoxel, sys; assert 'nibabel' not in sys.modules; convoxel.volume.read; convoxel.no_such"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "AttributeError: module 'convoxel' has no attribute 'no_such'" in run.stderr


def test_the_user_page_runs(tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[1] / "docs" / "volume.md").read_text()
    monkeypatch.chdir(tmp_path)
    blocks = re.findall("```python\n(.*?)```", page, re.S)
    assert len(blocks) == 3
    exec("\n".join(blocks), {})
    assert f"# {capsys.readouterr().out}" in page
