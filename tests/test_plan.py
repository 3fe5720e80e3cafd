"""Fingerprint and plan: against nnU-Net's own numbers, budgets, settings that are given, and odd datasets."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import child
from convoxel import models, volume
from convoxel.phantom import make_dataset
from convoxel.preprocessing import Intensities
from convoxel.training.budget import Budget
from convoxel.training.cache import store
from convoxel.training.cases import Case, Dataset, find_cases
from convoxel.training.cost import Layer, network_cost, step_seconds
from convoxel.training.feed import Feed
from convoxel.training.fingerprint import Fingerprint, fingerprint
from convoxel.training.plan import Plan, make_plan
from convoxel.training.settings import Settings
from convoxel.training.topology import SMALLEST, first_patch, nearest_patch, shrink, topology

pytest.importorskip("nibabel")

AMPLE = {"cores": 64, "memory_bytes": 1 << 40}
FREE = {"step_seconds": 1e6, "memory": "1T"}


@pytest.fixture(scope="module")
def ct(tmp_path_factory) -> Dataset:
    folder = tmp_path_factory.mktemp("ct") / "Dataset001_Phantom"
    return find_cases(make_dataset(folder, cases=5, test_cases=0, shape=(24, 40, 40)))


@pytest.fixture(scope="module")
def mr(tmp_path_factory) -> Dataset:
    """Two channels, thick sagittal slices, zeros around the patient."""
    folder = make_dataset(tmp_path_factory.mktemp("mr") / "Dataset002_MR", cases=6, test_cases=0, shape=(12, 48, 48),
                          spacing=(9.0, 2.0, 2.0), modalities=("T1", "T2"), seed=3)  # fmt: skip
    for path in folder.glob("*Tr/*.nii.gz"):
        scan = volume.read(path)
        d, h, w = scan.grid_shape
        array = np.zeros((d + 4, h * 3 // 2, w * 3 // 2), scan.dtype)
        array[2 : 2 + d, 5 : 5 + h, 7 : 7 + w] = scan.array + ("images" in str(path))
        affine = np.diag([*scan.spacing[::-1], 1.0])[[2, 0, 1, 3]]
        volume.write(volume.Volume(array, None, affine), path)
    return find_cases(folder)


def dataset(cases=10, channels=("CT",), labels=None, ignore=None, order=()) -> Dataset:
    """Not on the disk."""
    found = tuple(Case(f"case_{i}", (), Path()) for i in range(cases))
    labels = {"background": 0, "liver": 1, "tumour": 2} if labels is None else labels
    return Dataset(Path("Dataset009"), "made", channels, labels, ignore, order, found)


def facts(shape, spacing, cases=10, channels=1, kept=1.0, counts=None) -> Fingerprint:
    return Fingerprint(
        tuple(f"case_{i}" for i in range(cases)), (spacing,) * cases, (shape,) * cases, (kept,) * cases,
        (Intensities(100.0, 50.0, -50.0, 300.0),) * channels, {0: 9, 1: 9, 2: 9, 3: 9} if counts is None else counts,
    )  # fmt: skip


def planned(shape=(100, 200, 200), voxel=(3.0, 1.0, 1.0), made=None, machine=None, **settings) -> Plan:
    made = made or dataset()
    found = facts(shape, voxel, len(made.cases), len(made.channels))
    return make_plan(made, found, Settings(**settings), **(machine or {"cores": 2, "memory_bytes": 24 << 30}))


def reason(plan: Plan, begins: str) -> str:
    return next(line for line in plan.reasons if line.startswith(begins))


# the fingerprint


def test_the_fingerprint_is_nnunets(ct, mr):
    """nnunetv2 2.8.1, DatasetFingerprintExtractor, of the same files (it draws voxels at random, we do not)."""
    found = fingerprint(ct)
    assert found.names == tuple(ct.names)
    assert found.shapes == ((19, 37, 37), (23, 39, 39), (22, 42, 42), (20, 43, 43), (20, 40, 40))
    assert found.spacings[0] == pytest.approx((11.399999618530273, 9.083100318908691, 9.083100318908691))
    assert found.kept == (1.0,) * 5
    assert found.intensities[0] == pytest.approx((101.637466, 45.541901, -110.0, 201.0), rel=1e-3)
    found = fingerprint(mr)
    assert found.shapes == (
        (49, 49, 14),
        (46, 46, 10),
        (50, 50, 10),
        (51, 51, 14),
        (49, 49, 12),
        (49, 49, 10),
    )
    assert found.spacings[1] == pytest.approx((2.0185000896453857, 2.0185000896453857, 9.93179988861084))
    assert np.median(found.kept) == pytest.approx(0.3298695815349972)
    assert found.intensities[0] == pytest.approx((536.966736, 214.112289, 176.0, 1139.0), rel=1e-3)
    assert found.intensities[1] == pytest.approx((254.175964, 149.355667, 21.0, 948.0), rel=1e-3)


def test_the_fingerprint_counts_voxels_and_depends_on_no_thread(ct):
    found = fingerprint(ct, workers=1)
    every = np.concatenate([volume.read(case.label).array.ravel() for case in ct.cases])
    assert found.counts == {value: int((every == value).sum()) for value in range(6)}
    assert (
        found == fingerprint(ct, workers=3) == Fingerprint.from_json(json.loads(json.dumps(found.to_json())))
    )


def write_case(folder: Path, name: str, image, labels, spacing=(1.0, 1.0, 1.0)) -> Case:
    paths = folder / f"{name}_0000.nii.gz", folder / f"{name}.nii.gz"
    for path, array in zip(paths, (image, labels), strict=True):
        volume.write(volume.Volume(array, spacing), path)
    return Case(name, (paths[0],), paths[1])


def test_intensities_are_exact_and_leave_out_what_nobody_labelled(tmp_path):
    """One case of values 0 to 999, one of 5000 alone: they count alike, however many voxels they have."""
    image = np.arange(1000, dtype=np.int16).reshape(10, 10, 10)
    one = write_case(tmp_path, "a", image, np.ones_like(image, np.uint8))
    labels = np.zeros((10, 10, 10), np.uint8)
    labels[0, 0, 0], labels[5] = 1, 2
    other = np.full_like(image, -1000)
    other[0, 0, 0] = 5000
    made = dataclasses.replace(dataset(labels={"background": 0, "liver": 1}, ignore=2),
                               cases=(one, write_case(tmp_path, "b", other, labels)))  # fmt: skip
    found = fingerprint(made)
    both = np.concatenate([np.repeat(np.arange(1000), 2), np.full(2000, 5000)])[1:]
    mean, std, low, high = found.intensities[0]
    assert mean == pytest.approx((499.5 + 5000) / 2)
    assert std == pytest.approx(np.concatenate([np.arange(1000), np.full(1000, 5000)]).std())
    assert (low, high) == pytest.approx(np.percentile(both, (0.5, 99.5)), abs=1)
    assert found.counts == {0: 1000 - 101, 1: 1001, 2: 100}


@pytest.mark.parametrize(
    "spoil,message",
    [
        (lambda image, labels: (image, labels + 7), r"case b: .*holds the value 7.*correct the label map"),
        (lambda image, labels: (image, labels[1:]), "case b: .*does not lie on the image's voxels"),
        (
            lambda image, labels: (np.where(labels > 0, np.nan, image), labels),
            "case b: .*1 of 1000 voxels are NaN",
        ),
    ],
)
def test_what_cannot_be_used_is_said_with_its_case(tmp_path, spoil, message):
    image, labels = np.ones((10, 10, 10), np.float32), np.zeros((10, 10, 10), np.uint8)
    labels[3, 4, 5] = 1
    good = write_case(tmp_path, "a", image, labels)
    made = dataclasses.replace(dataset(), cases=(good, write_case(tmp_path, "b", *spoil(image, labels))))
    with pytest.raises(ValueError, match=message):
        fingerprint(made)


def test_nothing_to_learn_is_said(tmp_path):
    empty = write_case(tmp_path, "a", np.ones((9, 9, 9), np.float32), np.zeros((9, 9, 9), np.uint8))
    with pytest.raises(ValueError, match="no label map has a structure"):
        fingerprint(dataclasses.replace(dataset(), cases=(empty,)))
    with pytest.raises(ValueError, match="no case with a label"):
        fingerprint(dataset(cases=0))


# the plan against nnU-Net's


def test_the_plan_of_a_dataset_is_nnunets(ct, mr):
    """nnunetv2 2.8.1, ExperimentPlanner, of the same files, 3d_fullres and 2d."""
    found = fingerprint(ct)
    plan = make_plan(ct, found, Settings(**FREE), **AMPLE)
    assert plan.recipe.spacing == pytest.approx((11.39999962, 8.65690041, 8.65690041))
    assert (plan.patch_size, plan.batch_size, plan.recipe.transpose) == ((24, 40, 40), 2, (0, 1, 2))
    config = plan.network["config"]
    assert config["strides"] == [[1, 1, 1], [2, 2, 2], [2, 2, 2], [1, 2, 2]] and config["convs"] == [2] * 4
    assert (config["features"], config["kernel_size"]) == ([32, 64, 128, 256], [[3, 3, 3]] * 4)
    assert (plan.recipe.schemes, plan.recipe.masked) == (("CTNormalization",), (False,))
    flat = make_plan(ct, found, Settings(rank=2, **FREE), **AMPLE)
    assert (flat.patch_size, flat.batch_size) == ((40, 40), 6)
    assert flat.recipe.spacing == pytest.approx((8.65690041, 8.65690041))

    found = fingerprint(mr)
    plan = make_plan(mr, found, Settings(**FREE), **AMPLE)
    assert plan.recipe.spacing == pytest.approx((7.91254997, 1.92995006, 1.92995))
    assert (plan.patch_size, plan.batch_size, plan.recipe.transpose) == ((14, 56, 56), 2, (2, 0, 1))
    config = plan.network["config"]
    assert config["strides"] == [[1, 1, 1], [1, 2, 2], [1, 2, 2], [2, 2, 2]]
    assert config["kernel_size"] == [[1, 3, 3], [1, 3, 3], [3, 3, 3], [3, 3, 3]]
    assert plan.recipe.schemes == ("ZScoreNormalization",) * 2 and plan.recipe.masked == (True, True)
    assert "33% of the median scan" in reason(plan, "Intensities of T2")
    assert (
        "order x, z, y" in reason(plan, "Axes") and "No label map has a voxel of spleen" in plan.reasons[-1]
    )
    flat = make_plan(mr, found, Settings(rank=2, **FREE), **AMPLE)
    assert (flat.patch_size, flat.batch_size) == ((56, 56), 3)


# nnunetv2 2.8.1: get_plans_for_configuration of ExperimentPlanner and ResEncUNetPlanner, for its GPU of 8 GB. Strides
# are written as what they double, level by level, of axes 0, 1, 2.
NNUNET = [
    ("plain", (1.0, 1.0, 1.0), (300, 300, 300), (128, 128, 128), "012 012 012 012 012", 0),
    ("plain", (3.0, 0.8, 0.8), (110, 512, 512), (48, 224, 192), "12 012 012 012 12", 1),
    ("plain", (5.0, 0.7, 0.7), (30, 320, 300), (28, 256, 256), "12 12 012 012 12 12", 2),
    ("plain", (10.0, 1.4, 1.4), (10, 216, 256), (10, 224, 256), "12 12 012 12 12", 2),
    ("plain", (1.0, 1.0, 1.0), (50, 40, 36), (56, 40, 40), "012 012 012", 0),
    ("plain", (2.5, 0.8, 0.8), (90, 90, 90), (96, 96, 96), "12 012 012 012 0", 1),
    ("plain", (1.0, 1.0), (300, 300), (320, 320), "01 01 01 01 01 01", 0),
    ("plain", (0.8, 0.8), (512, 512), (512, 512), "01 01 01 01 01 01 01", 0),
    ("plain", (1.4, 1.4), (216, 256), (224, 256), "01 01 01 01 01", 0),
    ("residual", (1.0, 1.0, 1.0), (300, 300, 300), (128, 128, 128), "012 012 012 012 012", 0),
    ("residual", (3.0, 0.8, 0.8), (110, 512, 512), (48, 192, 192), "12 012 012 012 12", 1),
    ("residual", (5.0, 0.7, 0.7), (30, 320, 300), (24, 256, 256), "12 12 012 012 12 12", 2),
    ("residual", (0.7, 0.7), (320, 300), (320, 320), "01 01 01 01 01 01", 0),
]
VALUES = {
    ("plain", 3): 560e6,
    ("plain", 2): 85e6,
    ("residual", 3): 680e6,
    ("residual", 2): 135e6,
}  # its budget


@pytest.mark.parametrize("network,spacing,median,patch,strides,flat", NNUNET)
def test_patch_and_network_are_nnunets_for_its_budget(network, spacing, median, patch, strides, flat):
    rank = len(spacing)
    budget = Budget(Settings(rank=rank, network=network), 1, 3, 2, None)
    found, _ = shrink(spacing, median, lambda t: budget.cost(t).values <= VALUES[network, rank])
    assert found.patch == patch
    halved = [tuple(1 + (str(axis) in level) for axis in range(rank)) for level in strides.split()]
    assert list(found.strides) == [(1,) * rank, *halved]
    assert found.kernels == ((1,) + (3,) * (rank - 1),) * flat + ((3,) * rank,) * (len(found.strides) - flat)
    config = budget.config(found)
    widest = 320 if rank == 3 else 512
    assert config["features"] == [min(32 * 2**s, widest) for s in range(len(found.strides))]
    blocks = [1, 3, 4, 6, 6, 6, 6] if network == "residual" else [2] * 8
    assert config["convs"] == blocks[: len(found.strides)]


def test_the_first_patch_is_a_cube_in_mm_and_no_larger_than_the_median_scan():
    assert first_patch((2.0, 1.0, 1.0), (400, 512, 300)) == (161, 323, 300)  # 256 * 2^(1/3) mm
    assert first_patch((0.5, 2.0), (9999, 9999)) == (4096, 1024)


def test_one_axis_alone_is_halved_only_with_twelve_voxels():
    assert topology((1.0, 1.0, 1.0), (11, 7, 7)).strides == ((1, 1, 1),)
    assert topology((1.0, 1.0, 1.0), (12, 7, 7)).strides == ((1, 1, 1), (2, 1, 1))
    assert topology((1.0, 1.0, 1.0), (11, 8, 7)).strides == ((1, 1, 1), (2, 2, 1))


def test_spacing_is_the_median_but_of_coarse_axes_the_finest_tenth():
    """nnU-Net's rule: three times as coarse as the others, and a third of their voxels."""
    spacings = tuple((float(z), 1.0, 0.8 + 0.01 * z) for z in range(1, 12))
    few, many = (30, 200, 200), (90, 200, 200)
    for shape, expected in ((few, 2.0), (many, 6.0)):
        found = dataclasses.replace(facts(shape, (1.0, 1.0, 1.0), 11), spacings=spacings)
        plan = make_plan(dataset(11), found, Settings(), cores=2)
        assert plan.recipe.spacing == pytest.approx((expected, 1.0, 0.86))
    # not finer than the others, though: nnU-Net adds 1e-5
    found = dataclasses.replace(
        found, shapes=(few,) * 11, spacings=((0.5, 1.0, 1.0),) * 2 + ((9.0, 1.0, 1.0),) * 9
    )
    assert make_plan(dataset(11), found, Settings(), cores=2).recipe.spacing == pytest.approx(
        (1.00001, 1, 1), abs=1e-9
    )


@pytest.mark.parametrize(
    "name,scheme",
    [("CT", "CTNormalization"), ("ct", "CTNormalization"), ("T1", "ZScoreNormalization"), ("noNorm", "NoNormalization"),
     ("rescale_to_0_1", "RescaleTo01Normalization"), ("rgb_to_0_1", "RGBTo01Normalization")],
)  # fmt: skip
def test_normalisation_goes_by_the_channels_name(name, scheme):
    plan = planned(made=dataset(channels=(name, "FLAIR")))
    assert plan.recipe.schemes == (scheme, "ZScoreNormalization") and plan.recipe.masked == (False, False)
    assert plan.network["config"]["in_channels"] == 2
    mask = make_plan(
        dataset(channels=(name,)), facts((40, 50, 50), (1.0, 1.0, 1.0), kept=0.74), Settings(), cores=2
    )
    assert mask.recipe.masked == (scheme == "ZScoreNormalization",)


@pytest.mark.parametrize("rank", [2, 3])
def test_cases_are_stored_and_fed_as_planned(mr, tmp_path, rank):
    """Sagittal slices come first; the box that is not zero, on the planned grid, normalised within its mask."""
    plan = make_plan(mr, fingerprint(mr), Settings(rank=rank))
    stored = store(mr, plan.recipe, tmp_path, names=mr.names[:2])
    assert [case.shape[0] for case in stored] == ([14, 10] if rank == 2 else [14, 13])
    assert all(abs(float(channel.mean())) < 0.05 for channel in stored[0].image)
    x, y = next(iter(Feed(stored, plan.patch_size, 2, steps=range(1), workers=0)))
    assert x.shape == (2, 2, *plan.patch_size) and y.shape == (2, *plan.patch_size)


# what it costs


@pytest.mark.parametrize("deep_supervision", [False, True])
@pytest.mark.parametrize("kind", [{}, {"residual": True}, {"residual": True, "decoder_convs": [2, 1]}])
def test_costs_are_those_of_the_networks_layers(kind, deep_supervision):
    config = {"rank": 3, "in_channels": 2, "out_channels": 3, "features": (4, 8, 12), "convs": [1, 2, 3],
              "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]], "kernel_size": [[1, 3, 3], [3, 3, 3], [3, 3, 3]],
              "deep_supervision": deep_supervision, **kind}  # fmt: skip
    network, patch = models.create("unet", **config), (4, 8, 12)
    values, adds = 0, 0

    def count(layer, inputs, output):
        nonlocal values, adds
        values += output.numel()
        where = inputs[0] if isinstance(layer, torch.nn.ConvTranspose3d) else output
        adds += layer.weight.numel() * math.prod(where.shape[2:])

    layers = [m for m in network.modules() if isinstance(m, torch.nn.Conv3d | torch.nn.ConvTranspose3d)]
    for layer in layers:
        layer.register_forward_hook(count)
    network.train()(torch.zeros(1, 2, *patch))
    assert network_cost(config, patch) == (sum(layer.weight.numel() for layer in layers), values, adds)


def test_the_forecast_of_time(isa):
    """Checked by hand for AVX2: 143e9 multiply-adds take a core a second in 3-D, 116e6 values another."""
    layer, cube = Layer(0, 116_000_000, 143_000_000_000), {"rank": 3}
    seconds = step_seconds(layer, cube, Settings(), 2, 4)
    assert 0 < seconds and (isa != "avx2" or seconds == pytest.approx((3 + 1) * 2 / 4))
    assert step_seconds(layer, {"rank": 2}, Settings(), 2, 4) > seconds
    assert step_seconds(layer, cube | {"residual": True}, Settings(), 2, 4) > seconds
    assert step_seconds(layer, cube, Settings(checkpointing=True), 2, 4) > seconds
    assert (step_seconds(layer, cube, Settings(precision="bfloat16"), 2, 4) < seconds) == (isa == "amx")


def test_the_forecast_of_memory_is_that_of_a_training_step():
    """Within 30 % of the peak of a fresh process."""
    plan = planned((100, 100, 100), (1.0, 1.0, 1.0), patch_size=(64, 64, 64))
    said = child.python(
        f"""
        import torch, convoxel
        from convoxel.inference.machine import peak_memory
        from convoxel import losses, models
        network = convoxel.accelerate(models.create("unet", **{plan.network["config"]}), inplace=True).train()
        optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.99)
        for _ in range(2):
            outputs = network(torch.randn({plan.batch_size}, 1, *{plan.patch_size}))
            loss = sum(torch.nn.functional.cross_entropy(y, y.detach().argmax(1)) for y in outputs)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(peak_memory())
        """
    )
    assert plan.memory_bytes == pytest.approx(int(said), rel=0.3)


# budgets


def test_the_patch_keeps_within_time_and_memory():
    sizes = []
    for seconds in (1.0, 4.0, 16.0):
        plan = planned(step_seconds=seconds)
        assert plan.step_seconds <= seconds
        assert f"more than {seconds:g} s" in reason(plan, "Patch")
        sizes.append(math.prod(plan.patch_size))
    assert sizes == sorted(set(sizes))
    small = planned(step_seconds=1e6, memory="2GB")
    assert small.memory_bytes <= 2 << 30 and "more than the 2GB of the settings" in reason(small, "Patch")
    half = planned(step_seconds=1e6, machine={"cores": 2, "memory_bytes": 4 << 30})
    assert half.patch_size == small.patch_size and "half of this machine's 4.3 GB" in reason(half, "Patch")
    assert math.prod(planned(machine={"cores": 16, "memory_bytes": 1 << 38}).patch_size) > sizes[1]
    assert math.prod(planned(precision="bfloat16").patch_size) >= sizes[1]
    for plan in (small, half):
        divisor = models.create("unet", **plan.network["config"]).divisor
        assert all(n % d == 0 for n, d in zip(plan.patch_size, divisor, strict=True))


def test_the_smallest_patch_is_kept_however_little_time_there_is():
    plan = planned(step_seconds=1e-6)
    assert plan.patch_size == (SMALLEST,) * 3 and "this is the smallest" in reason(plan, "Patch")
    few = planned(shape=(9, 200, 200), step_seconds=1e-6)
    assert few.patch_size == (10, 16, 16)
    with pytest.raises(ValueError, match=r"memory: .*smaller base_features \(it is 32\)"):
        planned(memory="300MB")


def test_batches_grow_only_where_the_patch_cannot():
    small = planned((40, 40, 40), (1.0, 1.0, 1.0), made=dataset(400), machine=AMPLE)
    assert (small.patch_size, small.batch_size) == ((40, 40, 40), 20)  # 5 % of 400 scans: nnU-Net's rule
    assert "5% of all voxels" in reason(small, "Batch")
    seconds = small.step_seconds / 2.5
    limited = planned((40, 40, 40), (1.0, 1.0, 1.0), made=dataset(400), step_seconds=seconds, machine=AMPLE)
    assert limited.batch_size == 8 and "would take" in reason(limited, "Batch")
    assert planned((40, 40, 40), (1.0, 1.0, 1.0), made=dataset(1)).batch_size == 2 == planned().batch_size
    assert planned(accumulate=3).batch_size == 3


# settings that are given


def test_given_sizes_are_kept():
    plan = planned(patch_size=(32, 96, 64), batch_size=3, spacing=(3.5, 1.1, 1.1))
    assert (plan.patch_size, plan.recipe.patch_size, plan.batch_size) == ((32, 96, 64), (32, 96, 64), 3)
    assert plan.recipe.spacing == (3.5, 1.1, 1.1)
    assert "as the settings say" in reason(plan, "Patch") and "as the settings say" in reason(plan, "Batch")
    once = planned(patch_size=(32, 96, 64), batch_size=4, accumulate=1)
    parts = planned(patch_size=(32, 96, 64), batch_size=4, accumulate=4)
    assert parts.memory_bytes < once.memory_bytes and parts.step_seconds == once.step_seconds
    adam = planned(patch_size=(32, 96, 64), batch_size=4, optimizer="adamw")
    weights = network_cost(adam.network["config"], adam.patch_size).weights
    assert adam.memory_bytes - once.memory_bytes == 4 * weights
    turned = planned((200, 200, 100), (1.0, 1.0, 3.0), patch_size=(96, 64, 32))  # (z, y, x) of the scan
    assert (turned.recipe.transpose, turned.patch_size) == ((2, 0, 1), (32, 96, 64))
    assert turned.network == planned(patch_size=(32, 96, 64)).network


@pytest.mark.parametrize(
    "settings,message",
    [
        (
            {"patch_size": (33, 96, 64)},
            "33 x 96 x 64 voxels;.*the nearest that fits is 32 x 96 x 64",
        ),
        ({"patch_size": (4, 4, 4)}, "too small for a network that pools"),
        ({"batch_size": 3, "accumulate": 2}, r"batch_size: 3 patches cannot be computed in 2 equal parts"),
        ({"spacing": (900.0, 1.0, 1.0)}, r"900 mm along z leaves 1 voxel of scans of 300 mm"),
        ({"spacing": (0.01, 0.01, 0.01)}, "would have 30000 x 20000 x 20000 voxels"),
        (
            {"patch_size": (96, 192, 192), "batch_size": 8, "memory": "4GB"},
            "memory: training on 8 patches of 96 x 192",
        ),
    ],
)
def test_sizes_that_cannot_be_are_refused_with_the_remedy(settings, message):
    with pytest.raises(ValueError, match=message):
        planned(**settings)


def test_the_nearest_patch_is_one_that_its_network_divides():
    for patch in ((130, 100, 64), (7, 33, 250), (20, 20, 20), (1, 500, 3)):
        near = nearest_patch((2.0, 1.0, 1.0), patch)
        assert topology((2.0, 1.0, 1.0), near).patch == near
    assert nearest_patch((1.0, 1.0, 1.0), (130, 100, 64)) == (128, 96, 64)


# datasets of other kinds


def test_slices():
    # Their spacing across may be the smallest: that axis comes first all the same.
    scans = ((1, 300, 300), (0.5, 1.0, 1.0))
    with pytest.raises(ValueError, match=r"single slices \(1 x 300 x 300 voxels\).*set rank: 2"):
        planned(*scans)
    plan = planned(*scans, rank=2, step_seconds=60.0)
    assert (plan.patch_size, plan.recipe.spacing, plan.recipe.mirror) == ((320, 320), (1.0, 1.0), (0, 1))
    assert plan.network["config"]["rank"] == 2 and plan.network["config"]["features"][-1] == 512
    given = planned((20, 64, 64), (5.0, 1.0, 1.0), rank=2, spacing=(2.0, 0.5), patch_size=(32, 128))
    assert (given.recipe.spacing, given.patch_size) == ((2.0, 0.5), (32, 128))


def test_labels_have_to_be_without_a_gap():
    for labels, ignore, message in (
        ({"background": 0, "liver": 2}, None, "values are 0, 2; they have to be 0 to 1 without a gap"),
        ({"background": 0, "liver": 2}, 1, "ignore is 1, it has to be the highest value, 2"),
        ({"background": 0}, None, "no structure"),
        ({"background": 0}, 1, "no structure"),
    ):
        with pytest.raises(ValueError, match=message):
            planned(made=dataset(labels=labels, ignore=ignore))


def test_the_fingerprint_of_other_cases_is_refused():
    with pytest.raises(ValueError, match="not those of the fingerprint"):
        make_plan(dataset(3), facts((40, 40, 40), (1.0, 1.0, 1.0), 4), Settings())


def test_regions_and_ignore():
    made = dataset(labels={"background": 0, "whole": (1, 2), "core": 2}, ignore=3, order=(1, 2))
    plan = planned(made=made, mirror=False)
    assert plan.network["config"]["out_channels"] == plan.recipe.heads == 2
    assert plan.recipe.regions == (1, 2) and plan.recipe.labels["ignore"] == 3 and plan.recipe.mirror == ()
    with pytest.raises(ValueError, match="dataset.json: 2 regions need as many regions_class_order"):
        planned(made=dataclasses.replace(made, region_order=()))


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("network", ["plain", "residual"])
def test_the_planned_network_can_be_made_and_takes_the_patch(rank, network):
    plan = planned((12, 40, 48), rank=rank, network=network, base_features=2)
    made = models.create(plan.network["name"], **plan.network["config"]).train()
    outputs = made(torch.zeros(1, 1, *plan.patch_size))
    assert outputs[0].shape == (1, 3, *plan.patch_size) and len(outputs) == len(made.config["features"]) - 1
    assert made.config["features"][:2] == [2, 4] and plan.reasons[2].startswith("Patch")


def test_a_plan_survives_json_and_says_what_it_is():
    plan = planned(
        made=dataset(labels={"background": 0, "whole": (1, 2), "core": 2}, order=(1, 2)), network="plain"
    )
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    for begins in (
        "Spacing 3 x 1 x 1 mm",
        "Intensities of CT: clipped to -50 to 300",
        f"Patch: {plan.patch_size[0]} x",
        "Network: a plain U-Net",
        "Batch: 2",
        f"Forecast: {plan.step_seconds:.1f} s a step on 2 cores",
    ):
        assert reason(plan, begins)
