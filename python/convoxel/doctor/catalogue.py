"""Every fault that the doctor knows: its name, how bad it is, and the remedy. docs/doctor.md lists the same.

error: training or prediction would stop, or learn from wrong voxels. doubtful: legal, but rarely what was
meant; look before hours are spent. note: good to know.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ERROR, DOUBTFUL, NOTE = "error", "doubtful", "note"
SEVERITIES = (ERROR, DOUBTFUL, NOTE)


@dataclass(frozen=True, order=True)
class Finding:
    """One thing that is wrong or doubtful.

    severity: "error", "doubtful" or "note". name: of the fault, as in docs/doctor.md. path: the file or
    folder. found: what was found there. remedy: what to do about it.
    """

    severity: str
    name: str
    path: str
    found: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.name}: {self.path}: {self.found}; {self.remedy}"


_AGAIN = "copy or export the file again"
_REGRID = "resample the one onto the grid of the other (Volume.resample_to; labels with mode='nearest')"
_FAULTS: dict[str, dict[str, str]] = {
    ERROR: {
        # a file by itself
        "empty-file": _AGAIN,
        "truncated": _AGAIN,
        "damaged": _AGAIN,
        "trailing-data": "header and content disagree about the size; export the file again",
        "hidden-gzip": "rename it to .nii.gz",
        "not-gzip": "rename it to .nii if it is NIfTI",
        "wrong-content": "check that this is the right file; its name promises another format",
        "header-pair": "convert the .hdr/.img pair to one .nii.gz",
        "unsupported-format": "convert it to .nii.gz",
        "unsupported-type": "convert the voxels to integers or floats of up to 64 bits",
        "five-dimensional": "split time and channels into files",
        "bad-voxel-size": "set the right voxel sizes in the header, or convert from DICOM again",
        "bad-affine": "set the right affine in the header, or convert from DICOM again",
        "too-large": "use a machine with more memory",
        "unreadable": _AGAIN,
        "slices-missing": "copy the series again, whole",
        "slices-uneven": "resample it where slices may lie anywhere, or choose an even part",
        "slices-doubled": "put the images of one scan into a folder of their own",
        "slices-mixed": "put the images of one scan into a folder of their own",
        "slice-damaged": "copy the slice again",
        "nan": "find out where they come from; to replace them: numpy.nan_to_num",
        "infinite": "find out where they come from (a division by zero?) and replace them",
        # a case
        "four-dimensional": "nnU-Net takes one 3D file per channel: CASE_0000, CASE_0001 ... split the file",
        "channel-count": "make the file's channels those that dataset.json names",
        "missing-channel": "add the channel's file, or leave the case out",
        "extra-channel": "name the channel in dataset.json, or remove the file",
        "channel-shape": f"all channels of a case need one grid: {_REGRID}",
        "channel-spacing": f"all channels of a case need one grid: {_REGRID}",
        "channel-orientation": "bring them to one orientation (Volume.reorient)",
        "channel-place": f"register the channels if the patient moved, then {_REGRID}",
        "duplicate-channel": "one of the two was copied under the wrong name; export it again",
        "label-shape": f"image and label need one grid: {_REGRID}",
        "label-spacing": f"one header is wrong if both were drawn on one grid: copy the image's; else {_REGRID}",
        "label-orientation": "bring both to one orientation (Volume.reorient), and look at them together",
        "label-place": "if both were drawn on one grid, copy the image's header (image.like(label.array)); "
        f"else {_REGRID}",
        "image-without-label": "add the label, or move the image to imagesTs",
        "label-without-image": "add the image, or remove the label",
        # labels
        "label-not-integer": "the label was interpolated or scaled; make it again with nearest neighbours",
        "label-not-finite": "replace NaN and infinity by the background, 0",
        "label-negative": "labels count from 0; renumber them",
        "label-unknown-value": "add the value to labels in dataset.json, or correct the label map",
        "label-four-dimensional": "one label map per case: merge one-hot channels by argmax, split time points",
        "label-many-values": "this looks like an image; check that the right file is in the labels' folder",
        # dataset.json and the folder
        "json-missing": "write a dataset.json (docs/doctor.md shows one)",
        "json-invalid": "correct it: an editor that knows JSON shows the place",
        "json-duplicate-key": "JSON readers keep only the last of two equal keys; rename one",
        "json-incomplete": "add what is missing (docs/doctor.md shows a whole dataset.json)",
        "json-old-format": "nnU-Net version 2 wants channel_names, labels as name: number, and file_ending; "
        "its command nnUNetv2_convert_old_nnUNet_dataset converts",
        "file-ending": 'make file_ending that of the images, with its dot: ".nii.gz"',
        "num-training": "set numTraining to the number of cases; a case may be missing",
        "channel-names": 'number them "0", "1", "2" ... without a gap',
        "labels-inverted": 'nnU-Net version 2 wants names first: "liver": 1 (the Decathlon the other way round)',
        "labels-gap": "number the labels 0, 1, 2 ... without a gap, in dataset.json and in the files",
        "labels-same-value": "give every label a number of its own",
        "no-background": 'add "background": 0',
        "ignore-not-last": "the label named ignore has to have the highest number",
        "regions-order": "labels that are lists need regions_class_order",
        "channel-suffix": "end the image's name in its channel: CASE_0000.nii.gz",
        "label-suffix": "a label is named as its case, without a channel: CASE.nii.gz",
        "listed-file-missing": "copy the file to its place, or take it off the list in dataset.json",
        "no-cases": "put the images into imagesTr and the labels into labelsTr",
        "test-in-training": "take the case out of one of the two, or the test says nothing",
    },
    DOUBTFUL: {
        "qform-sform-conflict": "look at the scan over a label or in a viewer that uses the sform; "
        "then store one and the same transform in both",
        "voxel-size-conflict": "the affine's is used; correct pixdim, or the affine",
        "no-orientation": "left and right are not known; convert from DICOM again",
        "no-spacing": "voxels of 1 x 1 x 1 mm by default; convert from DICOM again, or set the true sizes",
        "no-origin": "where the scan lies is not known; labels have to come from the same program",
        "gantry-tilt": "networks and SimpleITK want right angles: resample_to a Volume that has them",
        "several-series": "convert each series by itself: read(path, series=...)",
        "reader-warning": "look at the scan before it is used",
        "tiny-spacing": "microscopy? Else the unit is wrong: set millimetres",
        "huge-spacing": "a localizer, or a wrong unit? Set millimetres, or leave it out",
        "axes-not-orthogonal": "nnU-Net and SimpleITK refuse it or ignore the shear (a tilted gantry): resample it "
        "to orthogonal axes",
        "constant": "the channel holds nothing; export it again or leave the case out",
        "nearly-constant": "almost every voxel has one value; look at the scan",
        "few-values": "a mask instead of an image? Check that the right file is here",
        "ct-rescaled": "export the CT in Hounsfield units (air -1000, water 0), not rescaled or windowed",
        "ct-raw-offset": "the rescale intercept was not applied: subtract 1024 (see DICOM's RescaleIntercept)",
        "ct-no-air": "is this CT, in Hounsfield units and not windowed?",
        "ct-too-bright": "a wrong rescale slope? Export the CT again",
        "intensity-outlier": "another unit or another kind of scan than the rest; look at it",
        "label-empty": "is there really nothing to label? Else the label was lost on the way",
        "label-full": "there is no background at all; look at the label",
        "label-on-nothing": "most of what is labelled lies where the image is empty: shifted, flipped, or of another "
        "patient? Look at both together",
        "label-mirrored": "flipped content, or a rare anatomy (situs inversus); look at image and label",
        "label-unused": "no training case has it: remove it from dataset.json, or find the cases",
        "label-rare": "too few to learn from and to test on; add cases",
        "label-place-small": "a fraction of a voxel: copy the image's header (image.like(label.array)), if both were "
        "drawn on one grid",
        "channel-place-small": "a fraction of a voxel: copy the first channel's header, if they share a grid",
        "duplicate-image": "one of the two is a copy: it weighs double, and leaks into validation; remove it",
        "duplicate-label": "the same label for different images: one of them was copied under the wrong name",
        "orientation-mixed": "networks see other orientations as mirrored patients: bring all to one (Volume.reorient)",
        "spacing-outlier": "planning takes the typical spacing: check the header, or leave the case out",
        "extent-outlier": "a localizer or a cut-out? Look at it, or leave the case out",
        "stray-file": "delete it (programs that list the folder stumble over it), or rename it",
        "file-not-listed": "dataset.json does not name it: add it there, or remove it",
        "disk-space": "make room before the dataset is preprocessed",
    },
    NOTE: {
        "axes-nearly-orthogonal": "rounding of the header: harmless here; some versions of SimpleITK refuse it",
        "unit-unknown": "the header does not name a unit of length; millimetres are taken",
        "thin": "fewer than 8 voxels along an axis; use a 2D network, or strides of 1 along it",
        "anisotropic": "voxels more than 8 times longer than wide: plan strides and kernels of 1 along that axis",
        "several-volumes": "time points or channels in one file: networks take them as channels",
        "eight-bit": "256 grey values: a converted copy? Take the scanner's own values where they exist",
        "clipped": "more than 1 in 50 voxels has the highest value: intensities were cut off",
        "ct-padding": "what lies outside the scanner's circle has a value of its own: clip to -1024",
        "label-float": "whole numbers stored as floats; unsigned bytes take a quarter of the room",
        "label-specks": "remove pieces of a few voxels, unless they are meant",
        "label-rounding": "harmless: the headers differ by rounding",
        "channel-rounding": "harmless: the headers differ by rounding",
        "few-cases": "nnU-Net's five-fold cross-validation needs at least five cases",
        "folder-name": "nnU-Net looks for folders named DatasetNNN_Name",
        "large-scores": "dense class scores would not fit this machine: predict under a memory ceiling",
    },
}  # fmt: skip
CATALOGUE = {
    name: (severity, remedy) for severity, faults in _FAULTS.items() for name, remedy in faults.items()
}


def finding(name: str, path: Path | str, found: str, remedy: str | None = None) -> Finding:
    """The fault of that name, with the catalogue's severity and, unless another is given, its remedy."""
    severity, usual = CATALOGUE[name]
    return Finding(severity, name, str(path), found, remedy or usual)


def in_order(findings: Iterable[Finding]) -> list[Finding]:
    """Errors first; within a severity by name and path."""
    return sorted(findings, key=lambda f: (SEVERITIES.index(f.severity), f.name, f.path, f.found))
