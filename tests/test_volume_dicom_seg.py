"""DICOM segmentations: read back by highdicom, every label is where it was, whatever way it came."""

import os

import numpy as np
import pytest

from convoxel.volume import Volume, VolumeError, read, write, write_dicom_seg
from dicoms import ROOT, oblique, values, write_enhanced, write_series

highdicom = pytest.importorskip("highdicom")


@pytest.fixture
def scan(tmp_path):
    write_series(tmp_path / "ct", values(), oblique())
    return read(tmp_path / "ct")


def labels_on(scan):
    """2, 5 and 300, none symmetric; the last plane is empty."""
    labels = np.zeros(scan.grid_shape, np.uint16)
    labels[0, 1:3, 2:5], labels[1, 0, 0], labels[2, 4, 1:] = 2, 5, 300
    return scan.like(labels)


def written(path):
    """{segment label: {LPS place of a voxel}} as highdicom has it."""
    seg = highdicom.seg.segread(path)
    volume = seg.get_volume(combine_segments=True)
    places = {}
    for number in seg.segment_numbers:
        index = np.argwhere(volume.array == number)
        at = volume.map_indices_to_reference(index)
        places[seg.get_segment_description(number).SegmentLabel] = sorted(map(tuple, at.round(3) + 0.0))
    return places


def wanted(labels, names):
    places = {}
    for value, name in names.items():
        index = np.argwhere(labels.array == value)[:, ::-1]
        at = (labels.affine @ np.c_[index, np.ones(len(index))].T)[:3].T * (-1, -1, 1)
        places[name] = sorted(map(tuple, at.round(3) + 0.0))
    return places


NAMES = {2: "liver", 5: "label 5", 300: "tumour"}


@pytest.mark.parametrize("orientation", [None, "RAS", "SPL"])
def test_every_label_is_where_it_was(tmp_path, scan, orientation):
    labels = labels_on(scan)
    turned = labels.reorient(orientation) if orientation else labels
    write_dicom_seg(turned, tmp_path / "seg.dcm", tmp_path / "ct", names={2: "liver", 300: "tumour"})
    assert written(tmp_path / "seg.dcm") == wanted(labels, NAMES)
    seg = highdicom.seg.segread(tmp_path / "seg.dcm")
    assert (seg.PatientID, seg.StudyInstanceUID, seg.FrameOfReferenceUID) == ("0", ROOT + "9", ROOT + "8")
    assert seg.SeriesInstanceUID != ROOT + "1" and seg.SeriesDescription == "Segmentation"


def test_labels_may_come_from_a_nifti_file_and_the_scan_be_one_file(tmp_path, scan):
    pytest.importorskip("nibabel")
    labels = labels_on(scan)
    write(labels, tmp_path / "labels.nii.gz")
    paths = sorted((tmp_path / "ct").iterdir())
    write_dicom_seg(read(tmp_path / "labels.nii.gz"), tmp_path / "seg.dcm", paths[1], names=NAMES)
    assert written(tmp_path / "seg.dcm") == wanted(labels, NAMES)


def test_frames_of_an_enhanced_file_in_any_order(tmp_path, scan):
    path = write_enhanced(tmp_path / "enhanced.dcm", values(), oblique())
    write_dicom_seg(labels_on(scan), tmp_path / "seg.dcm", path, names=NAMES)
    assert written(tmp_path / "seg.dcm") == wanted(labels_on(scan), NAMES)


def test_bool_is_one_label(tmp_path, scan):
    mask = scan.like(scan.array > -1000)
    write_dicom_seg(mask, tmp_path / "seg.dcm", tmp_path / "ct", names={1: "body"})
    assert written(tmp_path / "seg.dcm") == wanted(mask, {1: "body"})


def test_the_folder_may_hold_the_segmentation_too(tmp_path, scan):
    write_dicom_seg(labels_on(scan), tmp_path / "ct" / "seg.dcm", tmp_path / "ct")
    write_dicom_seg(labels_on(scan), tmp_path / "ct" / "seg.dcm", tmp_path / "ct", series=ROOT + "1")
    assert np.array_equal(read(tmp_path / "ct").array, scan.array)


def test_labels_of_another_grid_are_refused(tmp_path, scan):
    labels = labels_on(scan)
    moved = Volume(labels.array, labels.spacing, labels.affine + np.eye(4)[:, :1] * [[0, 0, 0, 0.05]])
    for other in (moved, labels.resample((2.5, 1.4, 0.8), mode="nearest")):
        with pytest.raises(VolumeError, match="resample_to"):
            write_dicom_seg(other, tmp_path / "seg.dcm", tmp_path / "ct")
    assert not (tmp_path / "seg.dcm").exists()


@pytest.mark.parametrize(
    "array, names, error, words",
    [
        (np.zeros((4, 5, 6), np.uint8), None, VolumeError, "every label is 0"),
        (np.full((4, 5, 6), -1), None, ValueError, "run from -1"),
        (np.ones((4, 5, 6)), None, ValueError, "whole numbers"),
        (np.ones((2, 4, 5, 6), int), None, ValueError, "whole numbers"),
        (np.ones((4, 5, 6), int), {"liver": 1}, ValueError, "'liver': 1"),
        (np.ones((4, 5, 6), int), {0: "background"}, ValueError, "labels from 1"),
        (np.ones((4, 5, 6), int), {1: "x" * 65}, ValueError, "64 characters"),
    ],
)
def test_labels_and_names_that_are_none(tmp_path, scan, array, names, error, words):
    with pytest.raises(error, match=words):
        write_dicom_seg(scan.like(array), tmp_path / "seg.dcm", tmp_path / "ct", names=names)


def test_writing_is_all_or_nothing(tmp_path, scan, monkeypatch):
    with pytest.raises(VolumeError, match="ends in .dcm"):
        write_dicom_seg(labels_on(scan), tmp_path / "seg.nii", tmp_path / "ct")
    with pytest.raises(VolumeError, match="folder exists"):
        write_dicom_seg(labels_on(scan), tmp_path / "none" / "seg.dcm", tmp_path / "ct")
    with pytest.raises(VolumeError, match="no DICOM scan"):
        write_dicom_seg(labels_on(scan), tmp_path / "seg.dcm", tmp_path)
    right = highdicom.seg.Segmentation

    def upside_down(**named):
        return right(**named | {"pixel_array": named["pixel_array"][::-1]})

    monkeypatch.setattr(highdicom.seg, "Segmentation", upside_down)
    with pytest.raises(VolumeError, match="read back, the segmentation differs"):
        write_dicom_seg(labels_on(scan), tmp_path / "seg.dcm", tmp_path / "ct")
    assert os.listdir(tmp_path) == ["ct"]


def test_a_tilted_gantry_and_a_single_slice(tmp_path):
    with pytest.warns(UserWarning, match="tilted"):
        write_series(tmp_path / "tilted", values(), oblique(0.5))
        labels = labels_on(read(tmp_path / "tilted"))
        write_dicom_seg(labels, tmp_path / "seg.dcm", tmp_path / "tilted")
    assert len(highdicom.seg.segread(tmp_path / "seg.dcm").segment_numbers) == 3
    write_series(tmp_path / "one", values(1), oblique(), SliceThickness=None)
    one = read(tmp_path / "one")
    write_dicom_seg(one.like(one.array > -1020), tmp_path / "seg.dcm", tmp_path / "one", names={1: "x"})
    assert len(written(tmp_path / "seg.dcm")["x"]) == 25
