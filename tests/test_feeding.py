"""What the network sees: cases and folds, the cache, patches, augmentation and the feed."""

import dataclasses
import json
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import child
from convoxel import volume
from convoxel.importers.nnunet_recipe import NnunetRecipe, Resampling
from convoxel.phantom import make_dataset
from convoxel.preprocessing import resize, resize_labels
from convoxel.training import augment as augment_module
from convoxel.training import cache, feed, intensities
from convoxel.training.augment import Augmentation, augment
from convoxel.training.cache import Stored, store
from convoxel.training.cases import find_cases, folds
from convoxel.training.feed import Feed
from convoxel.training.patches import Drawn, draw, is_forced

pytest.importorskip("nibabel")

PROBABILITIES = [f.name for f in dataclasses.fields(Augmentation) if f.name.startswith("p_")]
NOTHING = dataclasses.replace(Augmentation(), flip_axes=(), **dict.fromkeys(PROBABILITIES, 0.0))


def only(**changes) -> Augmentation:
    """Certain, and nothing else."""
    return dataclasses.replace(NOTHING, p_channel=1.0, **changes)


def recipe(**changes) -> NnunetRecipe:
    spline = Resampling("resample_data_or_seg_to_shape", 3, 0, None, "linear", 3.0)
    return NnunetRecipe(**{
        "channels": ("CT",), "labels": {"background": 0, "liver": 1}, "region_order": (), "reader": "NibabelIO",
        "transpose": (0, 1, 2), "spacing": (9.0, 7.0, 7.0), "patch_size": (16, 24, 24), "schemes": ("CTNormalization",),
        "masked": (False,), "intensities": ((40.0, 300.0, -800.0, 900.0),), "data": spline,
        "logits": dataclasses.replace(spline, order=1), "mirror": (0, 1, 2), **changes,
    })  # fmt: skip


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory) -> Path:
    return make_dataset(
        tmp_path_factory.mktemp("data") / "Dataset001_Phantom", cases=5, test_cases=0, shape=(24, 40, 40)
    )


@pytest.fixture
def folder(phantoms, tmp_path) -> Path:
    """A dataset that may be spoilt."""
    return Path(shutil.copytree(phantoms, tmp_path / "Dataset001_Phantom"))


def edit(folder: Path, **changes) -> None:
    path = folder / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def made(shape=(12, 14, 16), channels=1, name="made", spacing=(1.0, 1.0, 1.0), labels=None) -> Stored:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, shape).astype(np.int16) if labels is None else labels
    image = rng.standard_normal((channels, *labels.shape), np.float32)
    places = {int(v): np.argwhere(labels == v).astype(np.int32) for v in np.unique(labels)}
    return Stored(name, image, labels, places, {v: len(p) for v, p in places.items()}, spacing)


def ramps(shape, spacing=(1.0, 1.0, 1.0), threshold=0.4) -> Stored:
    """The image says where it is, in mm from the middle, and the labels are a half space of it."""
    axes = [(np.arange(n) - (n - 1) / 2) * s for n, s in zip(shape, spacing, strict=True)]
    image = np.stack(np.meshgrid(*axes, indexing="ij")).astype(np.float32)
    labels = (image.sum(0) > threshold).astype(np.int16)
    return dataclasses.replace(made(shape, 3, spacing=spacing, labels=labels), image=image)


def patch_of(case, size, settings, start=(0, 0, 0), seed=0) -> tuple[np.ndarray, np.ndarray]:
    x, y = torch.full((len(case.image), *size), torch.nan), torch.full(size, -1)
    augment(case, Drawn(0, start, None, seed), settings, x, y)
    return x.numpy(), y.numpy()


# cases and folds


def test_both_folder_formats_give_the_same_cases(phantoms, tmp_path):
    other = make_dataset(tmp_path / "msd", cases=5, test_cases=2, shape=(24, 40, 40), format="msd")
    ours, theirs = find_cases(phantoms), find_cases(other)
    assert ours.names == theirs.names == [f"phantom_{i:03d}" for i in range(5)]
    assert ours.channels == theirs.channels == ("CT",)
    assert ours.labels == theirs.labels and list(ours.labels.values()) == [0, 1, 2, 3, 4, 5] == list(
        ours.values
    )
    assert ours.ignore is None and not ours.has_regions
    assert ours.cases[2].images == (phantoms / "imagesTr" / "phantom_002_0000.nii.gz",)
    assert ours.cases[2].label == phantoms / "labelsTr" / "phantom_002.nii.gz"
    assert theirs.cases[2].images == (other / "imagesTr" / "phantom_002.nii.gz",)


def test_regions_ignore_and_channels(tmp_path):
    path = make_dataset(
        tmp_path / "Dataset002_MR", cases=2, test_cases=0, shape=(8, 9, 9), modalities=("T1", "T2")
    )
    edit(
        path,
        labels={"background": 0, "organ": [1, 2, 3], "vessel": [4], "ignore": 5},
        regions_class_order=[1, 4],
    )
    found = find_cases(path)
    assert found.labels == {"background": 0, "organ": (1, 2, 3), "vessel": 4}
    assert (found.ignore, found.region_order, found.values) == (5, (1, 4), (0, 1, 2, 3, 4, 5))
    assert found.has_regions and found.channels == ("T1", "T2")
    assert [file.name for file in found.cases[1].images] == [
        "phantom_001_0000.nii.gz",
        "phantom_001_0001.nii.gz",
    ]


@pytest.mark.parametrize(
    "spoil,message",
    [
        (lambda f: (f / "labelsTr/phantom_001.nii.gz").unlink(), "phantom_001 has no label"),
        (lambda f: (f / "imagesTr/phantom_001_0000.nii.gz").unlink(), "phantom_001"),
        (lambda f: (f / "dataset.json").unlink(), "dataset.json"),
        (lambda f: edit(f, labels={"background": 0, "liver": "many"}), "labels"),
        (lambda f: edit(f, labels={"background": 0, "liver": 1 << 15}), "32767|without a gap"),
        (lambda f: edit(f, channel_names={"0": "CT", "1": "PET"}), "no channel 0001"),
    ],
)
def test_what_is_wrong_with_a_dataset_is_said(folder, spoil, message):
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        find_cases(folder)
    with pytest.raises(FileNotFoundError):
        find_cases(folder / "nowhere")


@pytest.mark.parametrize("count,k", [(5, 5), (17, 5), (20, 3)])
def test_folds_are_nnunets(count, k):
    selection = pytest.importorskip("sklearn.model_selection")
    names = [f"case_{i:02d}" for i in range(count)]
    expected = [
        ([names[i] for i in train], [names[i] for i in val])
        for train, val in selection.KFold(k, shuffle=True, random_state=12345).split(names)
    ]
    assert folds(reversed(names), k) == expected
    assert folds(names, k, seed=1) != expected
    with pytest.raises(ValueError, match="cannot make"):
        folds(names, count + 1)


def test_splits_of_the_folder_are_honoured(folder):
    names = find_cases(folder).names
    for splits, message in (
        ([{"train": names[:3], "val": names[3:]}], None),
        ([{"train": names[:3], "val": [*names[2:]]}], "trains and validates on phantom_002"),
        ([{"train": [*names, "ghost"], "val": []}], "ghost"),
        ({"train": []}, "expected a list"),
    ):
        (folder / "splits_final.json").write_text(json.dumps(splits))
        if message is None:
            assert find_cases(folder).folds() == [(names[:3], names[3:])]
        else:
            with pytest.raises(ValueError, match=message):
                find_cases(folder).folds()


# the cache


@pytest.mark.parametrize("shape,separate", [((7, 9, 11), None), ((20, 9, 6), None), ((9, 20, 21), 0)])
def test_label_maps_are_resized_as_nnunet_does_where_a_label_has_half(shape, separate):
    labels = (np.random.default_rng(0).integers(0, 5, (10, 12, 9)) * 2).astype(np.int16)
    shares = np.stack(
        [resize((labels == v)[None].astype(float), shape, 1, separate)[0] for v in (0, 2, 4, 6, 8)]
    )
    found = resize_labels(labels, shape, separate)
    assert found.dtype == np.int16 and found.shape == shape
    half = shares >= 0.5 - 1e-6
    for i, value in enumerate((0, 2, 4, 6, 8)):
        certain = half[i] & ~half[i + 1 :].any(0)
        assert certain.any() and (found[certain] == value).all()
    of_found = np.take_along_axis(shares, (found // 2)[None].astype(int), 0)[0]
    np.testing.assert_allclose(of_found, shares.max(0), atol=2e-6)


def test_the_cache_holds_what_prediction_sees(phantoms, tmp_path):
    dataset, ours = find_cases(phantoms), recipe()
    stored = store(dataset, ours, tmp_path / "cache", names=dataset.names[1:3])
    assert [case.name for case in stored] == dataset.names[1:3]
    case, scan = stored[0], volume.read(dataset.cases[1].images[0])
    seen = recipe(patch_size=(1, 1, 1)).prepare([scan], 0.5).image.numpy()
    assert case.image.dtype == np.float32 and np.array_equal(case.image, seen)
    assert case.labels.dtype == np.int16 and case.labels.shape == seen.shape[1:] == case.shape
    assert isinstance(case.image, np.memmap) and not case.image.flags.writeable
    extent = np.multiply(scan.spacing, scan.grid_shape)
    np.testing.assert_allclose(np.multiply(case.spacing, case.shape), extent)
    assert {v: int((case.labels == v).sum()) for v in case.counts} == case.counts
    assert sum(case.counts.values()) == case.labels.size
    for value, places in case.places.items():
        assert (case.labels[tuple(places.T)] == value).all() and len(places) == min(
            10_000, case.counts[value]
        )
        assert len(np.unique(places, axis=0)) == len(places)


def test_many_places_are_thinned_and_ignored_ones_left_out():
    labels = np.zeros((30, 30, 30), np.int16)
    labels[:, :, 0] = 1
    places = cache._places(labels, [0, 1])
    assert (np.bincount(places[:, 0]) == [10_000, 900]).all()
    assert abs(places[:10_000, 1].mean() - 14.5) < 0.5  # from everywhere
    assert set(cache._places(labels, [1])[:, 0]) == {1}


def test_only_what_changed_is_made_again(folder, tmp_path, monkeypatch):
    built = []
    write = cache._write
    monkeypatch.setattr(cache, "_write", lambda case, *rest: built.append(case.name) or write(case, *rest))

    def again(expected: list[str], **changes) -> None:
        built.clear()
        store(find_cases(folder), recipe(**changes), tmp_path / "cache")
        assert sorted(built) == expected

    names = find_cases(folder).names
    again(names)
    again([])
    again([], patch_size=(8, 8, 8), mirror=())  # what does not touch the numbers
    again(names, spacing=(9.0, 8.0, 8.0))
    path = folder / "labelsTr" / "phantom_003.nii.gz"
    labels = volume.read(path)
    changed = labels.array.copy()
    changed[0, 0, 0] = 3
    volume.write(labels.like(changed), path)
    again(["phantom_003"])
    image = folder / "imagesTr" / "phantom_001_0000.nii.gz"
    status = image.stat()
    damaged = bytearray(image.read_bytes())
    damaged[4] ^= 1  # the time in gzip's header: same size, same time of change
    image.write_bytes(damaged)
    os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns))
    again(["phantom_001"])


def test_two_at_once_do_the_work_once(phantoms, tmp_path, monkeypatch):
    built = []
    write = cache._write
    monkeypatch.setattr(cache, "_write", lambda case, *rest: built.append(case.name) or write(case, *rest))
    dataset = find_cases(phantoms)
    results: list = []
    threads = [
        threading.Thread(target=lambda: results.append(store(dataset, recipe(), tmp_path / "cache")))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(built) == dataset.names and len(results) == 3
    assert not [path for path in (tmp_path / "cache").iterdir() if path.name.startswith(".")]


def test_killed_while_writing_leaves_no_half_entry(phantoms, tmp_path):
    code = f"""
        import os, signal, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from convoxel.training import cache
        from convoxel.training.cases import find_cases
        from test_feeding import recipe
        save, saved = cache._save, []
        def dying(path, array):
            save(path, array)
            saved.append(path)
            if len(saved) == 5:  # the second case's labels
                path.write_bytes(path.read_bytes()[:-100])
                os.kill(os.getpid(), signal.SIGKILL)
        cache._save = dying
        cache.store(find_cases({str(phantoms)!r}), recipe(), {str(tmp_path)!r}, workers=1)
    """
    with pytest.raises(AssertionError, match="exit code -9"):
        child.python(code, fails=False)
    whole = [path for path in tmp_path.iterdir() if not path.name.startswith(".")]
    assert len(whole) == 1 and any(path.name.endswith(".part") for path in tmp_path.iterdir())
    when = whole[0].stat().st_mtime_ns
    stored = store(find_cases(phantoms), recipe(), tmp_path)
    assert len(stored) == 5 and whole[0].stat().st_mtime_ns == when
    assert len(list(tmp_path.iterdir())) == 5


@pytest.mark.parametrize(
    "spoil,message",
    [
        (lambda labels: labels.like(labels.array + 4), "holds the value 6"),
        (lambda labels: volume.Volume(labels.array, labels.spacing), "does not lie"),
    ],
)  # fmt: skip
def test_a_wrong_label_map_stops_with_the_cases_name(folder, tmp_path, spoil, message):
    path = folder / "labelsTr" / "phantom_002.nii.gz"
    volume.write(spoil(volume.read(path)), path)
    with pytest.raises(ValueError, match=f"phantom_002.*{message}"):
        store(find_cases(folder), recipe(), tmp_path / "cache", names=["phantom_002"])
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] in ([], [".lock"])


def test_a_full_disk_and_a_damaged_entry_are_said(phantoms, tmp_path, monkeypatch):
    dataset = find_cases(phantoms)
    entry = tmp_path / cache.entry_name(dataset.cases[0], dataset, recipe())
    with monkeypatch.context() as patched:
        patched.setattr(cache.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 64 << 20))
        with pytest.raises(OSError, match="phantom_000.*GB and the disk has 0.00 GB"):
            store(dataset, recipe(), tmp_path, names=dataset.names[:1])
    assert not entry.exists()
    store(dataset, recipe(), tmp_path, names=dataset.names[:1])
    (entry / "labels.npy").write_bytes(b"")
    with pytest.raises(ValueError, match="delete this folder"):
        store(dataset, recipe(), tmp_path, names=dataset.names[:1])


# patches


def drawn(cases, count, patch=(4, 5, 6), batch=3, **options) -> list[Drawn]:
    return [
        draw(cases, patch, seed=7, step=i // batch, index=i % batch, batch=batch, **options)
        for i in range(count)
    ]


def test_cases_come_in_turn_and_patches_lie_inside():
    cases = [made((12, 14, 16)), made((5, 30, 8)), made((20, 20, 20)), made((3, 14, 5))]
    found = drawn(cases, 400)
    assert found == drawn(cases, 400) and found[300] == draw(
        cases, (4, 5, 6), seed=7, step=100, index=0, batch=3
    )
    for turn in range(100):
        assert sorted(d.case for d in found[4 * turn : 4 * turn + 4]) == [0, 1, 2, 3]
    assert len({tuple(d.case for d in found[4 * turn : 4 * turn + 4]) for turn in range(100)}) > 15
    for d in found:
        for first, p, n in zip(d.start, (4, 5, 6), cases[d.case].shape, strict=True):
            assert 0 <= first <= n - p if n >= p else first == -((p - n) // 2)
    starts = np.array([d.start for d in found if d.case == 0 and d.label is None])
    assert (starts.min(0) == 0).all() and (starts.max(0) == [8, 9, 10]).all()
    assert len({d.seed for d in found}) == 400
    assert draw(cases, (4, 5, 6), seed=8, step=0, index=0, batch=3) != found[0]


@pytest.mark.parametrize("batch,share", [(1, 1 / 3), (2, 1 / 2), (3, 1 / 3), (4, 1 / 4), (12, 1 / 3)])
def test_a_third_is_centred_on_a_label_that_the_case_has(batch, share):
    labels = np.zeros((20, 20, 20), np.int16)
    labels[2:6, 10:14, 0:4], labels[15, 15, 15] = 1, 7  # 64 voxels and one: equally often
    found = drawn([made(labels=labels), made(labels=np.zeros((9, 9, 9), np.int16))], 1200, (5, 5, 5), batch)
    forced = [is_forced(i // batch, i % batch, batch, 1 / 3) for i in range(1200)]
    assert sum(forced) == pytest.approx(1200 * share)
    for d, force in zip(found, forced, strict=True):
        assert (d.label is not None) == (force and d.case == 0)
        if d.label is not None:
            inside = labels[tuple(slice(a, a + 5) for a in d.start)]
            middle = inside[2, 2, 2 if min(d.start) else slice(0, 3)]  # at the border x may be moved
            assert d.label in np.atleast_1d(middle)
    share_of_seven = np.mean([d.label == 7 for d in found if d.label is not None])
    assert 0.4 < share_of_seven < 0.6


def test_with_an_ignore_label_no_patch_is_empty():
    labels = np.full((40, 40, 40), 9, np.int16)
    labels[5, 5, :3], labels[30, 30, 30] = 0, 1
    case = made(labels=labels)
    case = dataclasses.replace(case, places={v: p for v, p in case.places.items() if v != 9})
    for d in drawn([case], 60, annotated=True):
        assert (labels[tuple(slice(a, a + p) for a, p in zip(d.start, (4, 5, 6), strict=True))] != 9).any()


# augmentation


@pytest.mark.parametrize("settings", [None, NOTHING])
@pytest.mark.parametrize("start", [(0, 0, 0), (3, 4, 5), (-2, 9, -3)])
def test_nothing_changes_nothing_and_zeros_lie_around(settings, start):
    case, size = made(channels=2), (6, 7, 20)
    rim = [(0, 0)] + [(8, 8 + p) for p in size]
    box = tuple(slice(a + 8, a + 8 + p) for a, p in zip(start, size, strict=True))
    x, y = patch_of(case, size, settings, start)
    assert np.array_equal(x, np.pad(case.image, rim)[(slice(None), *box)])
    assert np.array_equal(y, np.pad(case.labels, rim[1:])[box])


def test_flips_are_exact_and_equally_likely():
    case, size, start = made(), (6, 7, 8), (-1, 3, 4)
    raw = patch_of(case, size, None, start)
    axes_seen = []
    for seed in range(64):
        x, y = patch_of(case, size, only(flip_axes=(0, 2)), start, seed)
        flips = [
            axes
            for axes in ((), (0,), (2,), (0, 2))
            if np.array_equal(x, np.flip(raw[0], [a + 1 for a in axes]))
        ]
        assert len(flips) == 1 and np.array_equal(y, np.flip(raw[1], flips[0]))
        axes_seen += flips
    assert min(axes_seen.count(axes) for axes in ((), (0,), (2,), (0, 2))) >= 8


@pytest.mark.parametrize("in_plane", [False, True])
@pytest.mark.parametrize("change", ["rotation", "scale", "elastic", "all"])
def test_image_and_labels_move_together(change, in_plane):
    size, spacing = (12, 13, 14), (2.0, 1.0, 1.0)
    case = ramps((60, 60, 60), spacing)
    names = ("rotation", "scale", "elastic") if change == "all" else (change,)
    settings = only(in_plane=in_plane, **{f"p_{name}": 1.0 for name in names}, flip_axes=(0, 1, 2))
    far = 0
    for seed in range(8):
        x, y = patch_of(case, size, settings, (24, 23, 23), seed)
        where = x.sum(0) - 0.4
        certain = np.abs(where) > np.sum(spacing) / 2  # half a voxel on every axis
        assert np.array_equal(y[certain], (where > 0)[certain])
        assert 0.1 < certain.mean() and 0.02 < y.mean() < 0.98
        moved = x - patch_of(case, size, None, (24, 23, 23))[0]
        far += np.abs(moved[1:]).max() > 0.2
        steps = [np.diff(x, axis=1 + axis) for axis in range(3)]
        if change == "rotation":  # lengths in mm stay, also across anisotropic voxels
            for step, mm in zip(steps, spacing, strict=True):
                np.testing.assert_allclose(np.linalg.norm(step, axis=0), mm, rtol=1e-3)
        if change == "scale":
            factors = [
                np.linalg.norm(step, axis=0).mean() / mm for step, mm in zip(steps, spacing, strict=True)
            ]
            assert np.ptp(factors[1:]) < 1e-4 and 0.7 <= factors[1] <= 1.4
            assert factors[0] == pytest.approx(1.0 if in_plane else factors[1], abs=1e-4)
        if in_plane:
            assert np.ptp(x[0], axis=(1, 2)).max() < 1e-5  # slices stay slices
    assert far >= 6


def test_a_quarter_turn_reads_every_voxel_as_it_is():
    labels = np.random.default_rng(1).integers(0, 30_000, (3, 9, 9)).astype(np.int16)
    case = made(labels=labels)
    turn = np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]])
    for read in (augment_module._read, augment_module._read_planes):
        x, y = torch.empty(1, 3, 9, 9), torch.empty(3, 9, 9, dtype=torch.int64)
        read(case, (0, 0, 0), turn, 0.0, np.random.default_rng(0), x, y)
        assert np.array_equal(y, np.rot90(labels, 1, (1, 2)))
        np.testing.assert_allclose(x, np.rot90(case.image, 1, (2, 3)), atol=1e-5)


@pytest.mark.parametrize("patch,in_plane,rotation", [((96, 96, 96), False, 30.0), ((16, 64, 64), True, 180.0),
                                                     ((64, 64), True, 180.0), ((32, 64), True, 15.0)])  # fmt: skip
def test_settings_for_a_patch_are_nnunets(patch, in_plane, rotation):
    found = Augmentation.for_patch(patch)
    assert (found.in_plane, found.rotation, found.p_elastic) == (in_plane, rotation, 0.0)
    assert found.flip_axes == ((1, 2) if len(patch) == 2 else (0, 1, 2))


@pytest.mark.parametrize("wrong", [{"p_noise": 1.5}, {"scale": (2.0, 1.0)}, {"flip_axes": (3,)}])
def test_settings_that_cannot_be_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Augmentation(**wrong)


def changed(settings: Augmentation, x: torch.Tensor, seed: int = 0) -> torch.Tensor:
    out = x.clone()
    intensities.change(out, settings, np.random.default_rng(seed))
    return out


@pytest.mark.parametrize(
    "name", ["noise", "blur", "brightness", "contrast", "low_resolution", "gamma", "gamma_inverted"]
)
def test_each_change_does_what_it_says(name):
    x = torch.randn(2, 10, 12, 14) * 2 + 1
    settings = only(**{f"p_{name}": 1.0})
    y = changed(settings, x, 3)
    assert torch.equal(y, changed(settings, x, 3)) and not torch.equal(y, changed(settings, x, 4))
    if name == "noise":
        deviations = [(changed(settings, x, seed) - x).std().item() for seed in range(40)]
        assert (
            0 < min(deviations)
            and max(deviations) < 0.103
            and np.mean(deviations) == pytest.approx(0.05, abs=0.015)
        )
    if name == "brightness":
        ratio = y / x
        assert (
            torch.allclose(ratio, ratio[:, :1, :1, :1], rtol=1e-4)
            and 0.75 <= ratio.min() <= ratio.max() <= 1.25
        )
    if name == "contrast":
        inner = (y > x.amin((1, 2, 3), True)) & (y < x.amax((1, 2, 3), True))
        mean = x.mean((1, 2, 3), keepdim=True)
        ratio = ((y - mean) / (x - mean))[inner & ((x - mean).abs() > 0.1)]
        assert inner.float().mean() > 0.9 and 0.74 < ratio.min() <= ratio.max() < 1.26
        assert (y.amax((1, 2, 3)) <= x.amax((1, 2, 3))).all()
    if name.startswith("gamma"):
        assert torch.allclose(y.mean((1, 2, 3)), x.mean((1, 2, 3)), atol=1e-4)
        assert torch.allclose(y.std((1, 2, 3)), x.std((1, 2, 3)), rtol=1e-4)
        order = x[0].flatten().argsort()
        assert (y[0].flatten()[order].diff() >= -1e-5).all()
    if name in ("blur", "low_resolution"):
        assert torch.allclose(changed(settings, torch.full_like(x, 3.0)), torch.tensor(3.0), rtol=1e-5)
        assert (y.std((1, 2, 3)) < x.std((1, 2, 3))).all()


def test_blur_and_low_resolution_are_the_fields_own():
    ndimage = pytest.importorskip("scipy.ndimage")
    x = torch.randn(9, 11, 30)
    blurred = x.clone()
    intensities._separable(
        blurred, [intensities._gaussian(n, s) for n, s in zip(x.shape, (0.5, 0.8, 1.0), strict=True)]
    )
    expected = ndimage.gaussian_filter(x.numpy(), (0.5, 0.8, 1.0), mode="nearest", truncate=4)
    np.testing.assert_allclose(blurred, expected, atol=2e-3)
    coarse = x.clone()
    intensities._separable(coarse, [intensities._coarse(n, 0.6) for n in x.shape])
    few = F.interpolate(x[None, None], [round(n * 0.6) for n in x.shape], mode="nearest-exact")
    np.testing.assert_allclose(coarse, F.interpolate(few, x.shape, mode="trilinear")[0, 0], atol=1e-5)


def test_gains_lie_below_one_as_often_as_above():
    rng = np.random.default_rng(0)
    found = np.array([intensities._about_one((0.7, 1.5), rng) for _ in range(2000)])
    assert 0.45 < (found < 1).mean() < 0.55 and found.min() < 0.71 and found.max() > 1.48


# the feed


def cases_for_feed() -> list[Stored]:
    return [made((20 + i, 24, 26), channels=2, name=f"case_{i}") for i in range(3)]


def certain(patch) -> Augmentation:
    """Everything at once."""
    return dataclasses.replace(Augmentation.for_patch(patch), **dict.fromkeys(PROBABILITIES, 0.7))


@pytest.mark.parametrize("patch", [(16, 16, 16), (4, 20, 20), (18, 20)])
def test_the_same_bits_whatever_the_workers_and_the_first_step(patch):
    cases = cases_for_feed()
    options = {"seed": 5, "augmentation": certain(patch)}
    whole = list(Feed(cases, patch, 2, workers=0, steps=range(8), **options))
    assert len(whole) == 8 and whole[0][0].shape == (2, 2, *patch) and whole[0][1].shape == (2, *patch)
    assert whole[0][0].dtype == torch.float32 and whole[0][1].dtype == torch.int64
    assert torch.cat([x for x, _ in whole]).isfinite().all()
    for workers in (1, 3):
        for (x, y), (a, b) in zip(Feed(cases, patch, 2, workers=workers, steps=range(5, 8), **options), whole[5:],
                                  strict=True):  # fmt: skip
            assert torch.equal(x, a) and torch.equal(y, b)
    assert not torch.equal(whole[0][0], whole[3][0])
    assert torch.get_num_threads() == 2


def test_processes_share_one_batch():
    cases, options = cases_for_feed(), {"augmentation": certain((8, 8, 8)), "steps": range(3)}
    whole = list(Feed(cases, (8, 8, 8), 6, **options))
    parts = [list(Feed(cases, (8, 8, 8), 6, rank=rank, world_size=3, **options)) for rank in range(3)]
    for step, (x, y) in enumerate(whole):
        for rank in range(3):
            assert torch.equal(parts[rank][step][0], x[rank::3]) and torch.equal(
                parts[rank][step][1], y[rank::3]
            )


@pytest.mark.parametrize("workers", [0, 2])
def test_a_fault_in_a_worker_names_the_case(workers):
    cases = cases_for_feed()
    cases[1] = dataclasses.replace(cases[1], image=cases[1].image[:, :5])  # shorter than its labels
    seen = 0
    with pytest.raises(RuntimeError, match=r"case case_1, patch \d of step \d"):
        for _ in Feed(cases, (16, 16, 16), 2, workers=workers, steps=range(10)):
            seen += 1
    assert seen < 3 and torch.get_num_threads() == 2
    assert not [t for t in threading.enumerate() if t.name.startswith("convoxel-feed")]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_threads_end_with_the_loop(error):
    with pytest.raises(error):
        for _ in Feed(cases_for_feed(), (8, 8, 8), 2, workers=2, steps=range(1000)):
            raise error
    assert not [t for t in threading.enumerate() if t.name.startswith("convoxel-feed")]


def test_few_batches_wait_and_waiting_is_counted(monkeypatch):
    pause, made_ready = threading.Event(), []

    def slow(case, *rest):
        pause.wait(0.02)
        made_ready.append(case.name)
        rest[-2].zero_(), rest[-1].zero_()

    monkeypatch.setattr(feed, "augment", slow)
    source = Feed(cases_for_feed(), (8, 8, 8), 2, workers=1, steps=range(50), ahead=2)
    batches = iter(source)
    next(batches)
    assert 0.03 < source.waited < 0.5
    pause.wait(0.4)
    assert len(made_ready) <= 2 * 3  # one handed over, two waiting
    before = source.waited
    next(batches)
    assert source.waited - before < 0.01
    batches.close()
    assert len(made_ready) <= 2 * 4


@pytest.mark.parametrize(
    "wrong,message",
    [({"batch_size": 3, "world_size": 2}, "cannot be shared"), ({"stored": []}, "at least one case"),
     ({"patch_size": (4,)}, "patch_size"), ({"stored": [made(), made(channels=2)]}, "numbers of channels")],
)  # fmt: skip
def test_sizes_that_do_not_fit_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Feed(**{"stored": [made()], "patch_size": (4, 4, 4), "batch_size": 2, "steps": range(3), **wrong})
