"""DICOM series: slices where they lie, whatever their names and numbers; and what is no scan is refused."""

import gzip
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from convoxel.volume import VolumeError, read
from dicoms import LPS, dataset, oblique, put_pixels, save, values, write_enhanced, write_series

pydicom = pytest.importorskip("pydicom")
GOOD = Path(pydicom.__file__).parent / "data" / "test_files"


def refused(path, words, **named):
    with pytest.raises(VolumeError, match=words) as caught:
        read(path, **named)
    assert "; " in str(caught.value) and "Error:" not in str(caught.value)


def test_a_series_lies_where_simpleitk_puts_it(tmp_path):
    sitk = pytest.importorskip("SimpleITK")
    write_series(tmp_path / "ct", values(), oblique())
    scan = read(tmp_path / "ct")
    assert np.array_equal(scan.array, values() - 1024) and scan.dtype == np.int16
    np.testing.assert_allclose(LPS @ scan.affine, oblique(), atol=1e-6)
    assert scan.spacing == pytest.approx((2.5, 0.7, 0.8))
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(tmp_path / "ct")))
    image = reader.Execute()
    assert np.array_equal(sitk.GetArrayFromImage(image), scan.array)
    for index in [(0, 0, 0), (5, 0, 0), (0, 4, 0), (5, 4, 3)]:
        place = (LPS @ scan.affine @ (*index, 1))[:3]
        np.testing.assert_allclose(place, image.TransformIndexToPhysicalPoint(index), atol=1e-5)


def test_one_file_of_it_is_enough_and_an_enhanced_file_is_the_same(tmp_path):
    paths = write_series(tmp_path / "ct", values(), oblique())
    scan = read(tmp_path / "ct")
    for other in (read(paths[2]), read(write_enhanced(tmp_path / "enhanced.dcm", values(), oblique()))):
        assert np.array_equal(other.array, scan.array) and other.dtype == scan.dtype
        np.testing.assert_allclose(other.affine, scan.affine, atol=1e-9)


def test_a_scanners_enhanced_file_lies_where_simpleitk_puts_it(tmp_path):
    """176 sagittal frames of a Philips scanner, blanked; shipped with nibabel."""
    nibabel, sitk = pytest.importorskip("nibabel"), pytest.importorskip("SimpleITK")
    packed = Path(nibabel.__file__).parent / "nicom" / "tests" / "data" / "philips_mprage.dcm.gz"
    (tmp_path / "a.dcm").write_bytes(gzip.decompress(packed.read_bytes()))
    scan, image = read(tmp_path / "a.dcm"), sitk.ReadImage(str(tmp_path / "a.dcm"))
    assert scan.shape == (176, 256, 256) and image.GetSize() == (256, 256, 176)
    for index in [(0, 0, 0), (255, 0, 0), (0, 255, 175), (0, 0, 175)]:
        place = (LPS @ scan.affine @ (*index, 1))[:3]
        np.testing.assert_allclose(place, image.TransformIndexToPhysicalPoint(index), atol=1e-3)


def test_names_without_an_ending_and_other_files_beside(tmp_path):
    for number, path in enumerate(write_series(tmp_path / "ct", values(), oblique())):
        path.rename(path.with_name(f"1.2.840.{number}"))
    (tmp_path / "ct" / "report.pdf").write_bytes(b"%PDF")
    (tmp_path / "ct" / "DICOMDIR").write_bytes(b"x")
    (tmp_path / "ct" / "more").mkdir()
    assert read(tmp_path / "ct").shape == (4, 5, 6)
    (tmp_path / "ct" / "1.2.840.7").write_bytes(b"cut")
    refused(tmp_path / "ct", "1.2.840.7: .* lies among the files of the series")


def test_several_series_are_named_and_the_user_chooses(tmp_path):
    write_series(tmp_path / "ct", values(), oblique())
    (path,) = write_series(tmp_path / "ct", values(1), oblique(), uid="2", SeriesDescription="scout")
    with pytest.raises(VolumeError) as caught:
        read(tmp_path / "ct")
    names = [
        f"{dataset(uid).SeriesInstanceUID}: CT {title}"
        for uid, title in [("1", "thorax, 4"), ("2", "scout, 1")]
    ]
    assert "2 series" in str(caught.value) and all(name in str(caught.value) for name in names)
    assert read(tmp_path / "ct", series=dataset("1").SeriesInstanceUID).shape == (4, 5, 6)
    assert read(path).shape == (1, 5, 6)
    refused(tmp_path / "ct", "no series 1.2.3 in it; it has", series="1.2.3")
    refused(path, "give its folder", series="1.2.3")


def test_objects_that_are_no_images_do_not_count(tmp_path):
    write_series(tmp_path / "ct", values(), oblique())
    for name in ("liver_1frame.dcm", "rtplan.dcm", "rtdose.dcm", "test-SR.dcm"):
        shutil.copy(GOOD / name, tmp_path / "ct" / name)
    assert read(tmp_path / "ct").shape == (4, 5, 6)
    refused(tmp_path / "ct" / "liver_1frame.dcm", "a segmentation")
    (tmp_path / "dose").mkdir()
    shutil.copy(GOOD / "rtdose.dcm", tmp_path / "dose")
    refused(tmp_path / "dose", r"no DICOM scan in it \(only a dose\)")
    refused(tmp_path, "no DICOM scan in it; one of its own folders, ct, dose")


@pytest.mark.parametrize(
    "slope, intercept, dtype",
    [
        ("1", "-1024", np.int16),
        ("2", "0", np.int16),
        ("1000", "0", np.int32),
        ("0.5", "3", np.float32),
        (lambda z: "1" if z else "0.25", "0", np.float32),
        (lambda z: "1" if z else "-2000", "0", np.int32),  # the last that is read
    ],
)
def test_values_are_what_they_measure(tmp_path, slope, intercept, dtype):
    write_series(tmp_path / "ct", values(), oblique(), RescaleSlope=slope, RescaleIntercept=intercept)
    scan = read(tmp_path / "ct")
    slopes = [float(slope(z) if callable(slope) else slope) for z in range(4)]
    wanted = [plane * k + float(intercept) for plane, k in zip(values().astype(float), slopes, strict=True)]
    assert scan.dtype == dtype and np.array_equal(scan.array, wanted)


def test_only_the_stored_bits_are_values(tmp_path):
    """12 bits of 16, signed, with an overlay in the upper four."""
    stored = np.array([[[0x7FF, 0xF800, 0x1001, 0x0800]]], np.uint16)
    changes = dict(BitsStored=12, HighBit=11, PixelRepresentation=1, RescaleIntercept="0")
    write_series(tmp_path / "a", stored, oblique(), **changes)
    assert read(tmp_path / "a").array.tolist() == [[[2047, -2048, 1, -2048]]]
    shifted = np.array([[[0xFFF7, 0x0010]]], np.uint16)
    changes |= dict(HighBit=15)
    write_series(tmp_path / "b", shifted, oblique(), **changes)
    assert read(tmp_path / "b").array.tolist() == [[[-1, 1]]]


@pytest.mark.parametrize(
    "name, twin",
    [(n, "MR_small.dcm") for n in ("MR_small_RLE.dcm", "MR_small_bigendian.dcm", "MR_small_implicit.dcm")]
    + [("MR_small_jp2klossless.dcm", "MR_small.dcm"), ("MR_small_jpeg_ls_lossless.dcm", "MR_small.dcm")],
)
def test_transfer_syntaxes_give_the_same_voxels(tmp_path, name, twin):
    for folder, file in [("a", name), ("b", twin)]:
        (tmp_path / folder).mkdir()
        shutil.copy(GOOD / file, tmp_path / folder)
    ours, same = read(tmp_path / "a"), read(tmp_path / "b")
    assert np.array_equal(ours.array, same.array) and np.array_equal(ours.affine, same.affine)
    assert np.array_equal(same.array[0], pydicom.dcmread(GOOD / twin).pixel_array)


def test_a_tilted_gantry_shears_the_affine_and_says_so(tmp_path):
    write_series(tmp_path / "ct", values(), oblique(shear=0.5))
    with pytest.warns(UserWarning, match="tilted by 11.31 degrees") as record:
        scan = read(tmp_path / "ct")
    assert record[0].filename == __file__
    np.testing.assert_allclose(LPS @ scan.affine, oblique(shear=0.5), atol=1e-6)
    assert scan.spacing[0] == pytest.approx(np.hypot(2.5, 0.5))


def test_rounded_positions_are_no_tilt_and_no_unevenness(tmp_path):
    lps = np.diag([0.7, 0.7, 0.625, 1.0])

    def rounded(z):
        return [f"{v:.1f}" for v in (0.04 * (z % 2), 0, 0.625 * z)]

    write_series(tmp_path / "ct", values(30), lps, ImagePositionPatient=rounded)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scan = read(tmp_path / "ct")
    assert scan.spacing[0] == pytest.approx(0.625, rel=2e-3)
    assert np.array_equal(scan.affine[:3, 2] != 0, [False, False, True])


def position(place):
    """Slices at other z than the grid's."""
    return lambda z: [f"{v:.9f}" for v in oblique()[:3] @ (0, 0, place(z), 1)]


FAULTS = [
    (dict(ImagePositionPatient=position(lambda z: z + (z > 1))), r"missing slices \(1\): steps of 2.5 mm"),
    (dict(ImagePositionPatient=position(lambda z: z + 0.7 * (z > 1))), "distance between slices changes"),
    (dict(ImagePositionPatient=position(lambda z: z + 0.25 * (z == 2))), "unevenly spaced"),
    (dict(ImagePositionPatient=position(lambda z: min(z, 2))), "4 images at 3 places.*differ in nothing"),
    (
        dict(ImagePositionPatient=position(lambda z: z // 2), EchoTime=lambda z: str(z % 2 + 1)),
        "4 images at 2 places.*EchoTime",
    ),
    (
        dict(ImagePositionPatient=position(lambda z: min(z, 2)), SOPInstanceUID="1.2.3"),
        "are the same image; remove one",
    ),
    (dict(ImagePositionPatient=position(lambda z: 0)), "4 images at 1 places"),
    (dict(ImagePositionPatient=None), "no ImagePositionPatient"),
    (dict(ImagePositionPatient=["1", "2"]), "ImagePositionPatient is"),
    (dict(ImagePositionPatient=lambda z: [str(z), str(z * z), "0"]), "shifted sideways|unevenly|degrees off"),
    (dict(ImageOrientationPatient=None), "no ImageOrientationPatient"),
    (dict(ImageOrientationPatient=["1", "0", "0", "1", "0", "0"]), "no right angle"),
    (dict(ImageOrientationPatient=["0"] * 6), "no right angle"),
    (
        dict(ImageOrientationPatient=lambda z: ["1", "0", "0", "0", str(int(z > 0)), str(int(z == 0))]),
        "different orientation.*scouts",
    ),
    (dict(PixelSpacing=None), "no PixelSpacing"),
    (dict(PixelSpacing=["0", "1"]), "PixelSpacing is"),
    (dict(PixelSpacing=lambda z: ["1", str(1 + z)]), "pixel spacings"),
    (dict(RescaleSlope="0"), "RescaleSlope is 0"),
    (dict(Rows=lambda z: 5 - (z == 0)), "its images differ"),
    (dict(Rows=65535, Columns=65535), "cannot hold"),
    (dict(Rows=0), "Rows is 0"),
    (dict(BitsStored=lambda z: 16 - (z == 0)), "its images differ"),
    (dict(BitsAllocated=12), "12 bits"),
    (dict(BitsStored=17), "BitsStored is 17"),
    (dict(PixelRepresentation=None), "PixelRepresentation is None"),
    (dict(SamplesPerPixel=3), "3 samples"),
    (dict(PhotometricInterpretation="PALETTE COLOR"), "PALETTE"),
    (dict(NumberOfFrames=2), "2 frames have no place"),
    (dict(FrameOfReferenceUID=lambda z: f"1.2.{z}"), "several frames of reference"),
    (dict(PixelData=None), "no PixelData"),
    (dict(ImageType=["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"]), "a mosaic.*dcm2niix"),
    (dict(PixelData=b"12"), "damaged DICOM"),
]


@pytest.mark.parametrize("changes, words", FAULTS, ids=range(len(FAULTS)))
def test_what_is_no_scan_is_refused(tmp_path, changes, words):
    write_series(tmp_path / "ct", values(), oblique(), **changes)
    with pytest.raises(VolumeError, match=words) as caught:
        read(tmp_path / "ct")
    assert str(caught.value).startswith(str(tmp_path)) and "; " in str(caught.value)


def test_files_that_are_cut_off(tmp_path):
    paths = write_series(tmp_path / "ct", values(), oblique())
    good = paths[1].read_bytes()
    for keep in (0, 100, 140, 400, 900, len(good) - 1):
        paths[1].write_bytes(good[:keep])
        with pytest.raises(VolumeError, match=paths[1].name):
            read(tmp_path / "ct")


def test_frames_without_places(tmp_path):
    ds = dataset()
    put_pixels(ds, values())
    ds.NumberOfFrames = 4
    save(ds, tmp_path / "us.dcm")
    refused(tmp_path / "us.dcm", "4 frames have no place")


def test_an_element_of_any_length_takes_no_memory(tmp_path, monkeypatch):
    paths = write_series(tmp_path / "ct", values(), oblique(), ImageType=["ORIGINAL"] * 40)
    monkeypatch.setattr(sys.modules["convoxel.volume.dicom.headers"], "_LONGEST", 200)
    refused(paths[0], "an element of 360 bytes")


def test_deflated_files_are_not_inflated(tmp_path):
    shutil.copy(GOOD / "image_dfl.dcm", tmp_path / "a.dcm")
    refused(tmp_path / "a.dcm", "deflated.*dcmconv")


def test_the_limit(tmp_path):
    paths = write_series(tmp_path / "ct", values(), oblique())
    needed = 4 * 5 * 6 * 2 + max(path.stat().st_size for path in paths)
    assert read(tmp_path / "ct", max_bytes=needed).shape == (4, 5, 6)
    refused(tmp_path / "ct", f"need {needed} bytes", max_bytes=needed - 1)


def test_a_compressed_frame_of_another_size_than_announced(tmp_path):
    for name in ("MR_small_jp2klossless.dcm", "MR_small_jpeg_ls_lossless.dcm", "MR_small_RLE.dcm"):
        ds = pydicom.dcmread(GOOD / name)
        ds.Rows, ds.Columns = 40000, 40000
        folder = tmp_path / name
        folder.mkdir()
        save(ds, folder / "a.dcm")
        refused(folder, "a compressed frame", max_bytes=1 << 40)


def test_a_missing_decoder_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["convoxel.volume.dicom.read"], "_DECODERS", ())
    shutil.copy(GOOD / "MR_small_jp2klossless.dcm", tmp_path)
    refused(tmp_path, "no decoder for its JPEG 2000.*pip install pylibjpeg")


def test_without_pydicom_the_message_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(ImportError, match=r"convoxel\[dicom\]"):
        read(tmp_path)


def test_importing_volume_imports_no_reader():
    code = (
        "import sys, convoxel.volume as v; v.read;"
        "assert not {'pydicom', 'highdicom', 'nibabel', 'SimpleITK'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
