"""A dataset for `convoxel train` of the MNI152 template: half of a brain to learn from, the other half to test on.

Grey matter, white matter and CSF of the template that nilearn brings along (no download), in nnU-Net's folders. One
case is enough to show the way; it says nothing of other people's brains.

    pip install "convoxel[train,demo]"
    python examples/brain_tissues.py Dataset152_Brain
    convoxel train Dataset152_Brain -o run --folds all --patch-size 48 32 48 --base-features 16 \\
        --epochs 4 --steps-per-epoch 50
    convoxel predict run Dataset152_Brain/imagesTs -o labels
    convoxel evaluate labels Dataset152_Brain/labelsTs
"""

import json
import sys
from pathlib import Path

from convoxel import volume
from convoxel.demo.data import CLASSES, TEST, TRAIN, load_brain
from convoxel.volume import Volume


def main(folder: Path) -> None:
    brain = load_brain()
    for scan, kind in ((brain.image, "images"), (brain.labels, "labels")):
        for half, part, end in ((TRAIN, "Tr", "frontal"), (TEST, "Ts", "occipital")):
            target = folder / f"{kind}{part}"
            target.mkdir(parents=True, exist_ok=True)
            volume.write(
                cut(scan, half), target / (f"{end}_0000.nii.gz" if kind == "images" else f"{end}.nii.gz")
            )
    about = {
        "channel_names": {"0": "T1"},
        "labels": {name: value for value, name in enumerate(CLASSES)},
        "numTraining": 1,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(about, indent=1))
    print(f"{folder}: half of the template to train on, half to test on")


def cut(scan: Volume, planes: slice) -> Volume:
    """Some of the planes along y, where they are in space."""
    affine = scan.affine.copy()
    affine[:3, 3] += affine[:3, 1] * planes.start
    return Volume(scan.array[:, planes].copy(), spacing=None, affine=affine)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/brain_tissues.py FOLDER")
    main(Path(sys.argv[1]))
