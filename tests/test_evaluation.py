"""Scores against scipy and brute force; what is missed; intervals; the command."""

import csv
import itertools
import json
import math

import numpy as np
import pytest
from scipy import ndimage, stats

from convoxel import cli, evaluation, phantom
from convoxel.evaluation import statistics, surfaces
from convoxel.evaluation.structures import read_structures
from convoxel.volume import Volume, VolumeError, read, write

SPACINGS = [(1.0, 1.0, 1.0), (3.0, 0.7, 0.7), (0.5, 2.0, 1.25)]
SUM_OF_AREAS = dict(
    zip(SPACINGS, (241.3431397055, 410.4579985335, 370.0838105386), strict=True)
)  # surface-distance 0.1
SHAPES = [(9, 10, 11), (1, 15, 17), (12, 1, 9), (2, 3, 2), (1, 1, 7)]


def blobs(rng, shape, level=0.5):
    """A random mask of a few pieces, of which some touch the border."""
    noise = ndimage.gaussian_filter(rng.normal(size=shape), [min(1.5, n / 4) for n in shape])
    return noise > np.quantile(noise, level)


def brute_surface(mask, spacing):
    """(corner, area) of every neighbourhood by looping over all of them."""
    table = surfaces.areas(spacing)
    thick = [n > 1 for n in mask.shape]
    found = []
    for corner in itertools.product(
        *(range(n + 1) if t else (0,) for n, t in zip(mask.shape, thick, strict=True))
    ):
        code = 0
        for bit, shift in enumerate(itertools.product((1, 0), repeat=3)):
            at = [c - s if t else 0 for c, s, t in zip(corner, shift, thick, strict=True)]
            inside = all(0 <= a < n for a, n in zip(at, mask.shape, strict=True))
            code |= (inside and bool(mask[tuple(at)])) << bit
        if 0 < code < 255:
            found.append((corner, table[code]))
    return found


def by_transform(a, b, spacing, tolerance, unknown=None):
    """HD95 and surface Dice with scipy's distance transform and sorting, from brute-force surfaces.

    Elements beside an unknown voxel have no say.
    """
    doubtful = np.zeros([n + 1 for n in a.shape], bool)
    for corner in itertools.product((0, 1), repeat=3) if unknown is not None else ():
        doubtful[tuple(slice(c, c + n) for c, n in zip(corner, a.shape, strict=True))] |= unknown
    sides = []
    for mine, other in ((a, b), (b, a)):
        outside = np.ones([n + 1 for n in a.shape], bool)
        for corner, _ in brute_surface(other, spacing):
            outside[corner] = False
        far = ndimage.distance_transform_edt(outside, sampling=spacing)
        elements = [(far[c], area) for c, area in brute_surface(mine, spacing) if not doubtful[c]]
        sides.append(sorted(elements))
    percentiles = []
    for side in sides:
        total, sum_ = sum(area for _, area in side), 0.0
        for far, area in side:
            sum_ += area
            if sum_ >= 0.95 * total - 1e-9:
                percentiles.append(far)
                break
    near = sum(area for side in sides for far, area in side if far <= tolerance + 1e-9)
    return max(percentiles), near / sum(area for side in sides for _, area in side)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_areas_of_neighbourhoods(spacing):
    z, y, x = spacing
    table = surfaces.areas(spacing)
    assert table[0] == table[255] == 0
    assert table[0b00001111] == pytest.approx(y * x)
    assert table[0b00110011] == pytest.approx(z * x)
    assert table[0b01010101] == pytest.approx(z * y)
    assert table[0b00000011] == pytest.approx(x * math.hypot(y, z) / 2)  # a row along x: a bevel
    corner = math.hypot(z * y, z * x, y * x) / 8
    assert table[[1 << bit for bit in range(8)]] == pytest.approx(corner)
    assert table[0b10000001] == pytest.approx(2 * corner)
    assert table == pytest.approx(table[::-1])
    assert table.sum() == pytest.approx(SUM_OF_AREAS[spacing])


def test_area_of_a_ball_and_of_a_disc():
    """Voxels' steps add to a smooth surface's area, a little."""
    z, y, x = np.ogrid[-20:21, -40:41, -40:41]
    ball = (z * 2) ** 2 + y**2 + x**2 < 35**2
    area = surfaces.surface(ball, (2.0, 1.0, 1.0)).areas.sum() / (4 * np.pi * 35**2)
    length = surfaces.surface(ball[20:21], (2.0, 1.0, 1.0)).areas.sum() / (2 * np.pi * 35 * 2)
    assert 1 < area < 1.13 and 1 < length < 1.06


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_elements_are_those_of_brute_force(shape, spacing):
    rng = np.random.default_rng(3)
    for _ in range(5):
        mask = rng.random(shape) < 0.4
        found = surfaces.surface(mask, spacing)
        expected = brute_surface(mask, spacing)
        assert found.points == pytest.approx(
            np.array([corner for corner, _ in expected]).reshape(-1, 3) * spacing
        )
        assert found.areas == pytest.approx([area for _, area in expected])


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_scores_are_those_of_brute_force(shape, spacing):
    rng = np.random.default_rng(5)
    for trial in range(6):
        t, p = blobs(rng, shape, 0.6), blobs(rng, shape, 0.7)
        if trial % 2:  # nearly right, as predictions are
            p = t ^ (rng.random(shape) < 0.1)
        if not t.any() or not p.any():
            continue
        truth = Volume(t.astype(np.uint8) * 3, spacing)
        found = evaluation.scores(truth.like(p.astype(np.int16) * 3), truth, 3, tolerance=1.0)
        both, ml = (t & p).sum(), math.prod(spacing) / 1000
        hd95, surface_dice = by_transform(t, p, spacing, 1.0)
        assert {type(value) for value in found.values()} == {float}
        assert found == pytest.approx({
            "dice": 2 * both / (t.sum() + p.sum()),
            "iou": both / (t | p).sum(),
            "hd95_mm": hd95,
            "surface_dice": surface_dice,
            "precision": both / p.sum(),
            "recall": both / t.sum(),
            "volume_error_ml": (p.sum() - t.sum()) * ml,
            "volume_error_percent": 100 * (p.sum() / t.sum() - 1),
            "truth_ml": t.sum() * ml,
            "predicted_ml": p.sum() * ml,
        })  # fmt: skip


@pytest.mark.parametrize("gap", [0, 1, 2, 7, 8, 9, 20])
def test_stray_pieces_have_the_surface_that_they_have_in_one(gap, monkeypatch):
    mask = np.zeros((30, 30, 30), bool)
    for axis in range(3):
        part = np.moveaxis(mask, axis, 0)
        part[1:4, 2:5, 2:4] = part[4 + gap :, 2:7, 3] = True
    found = surfaces.surface(mask, (2.0, 1.0, 1.0), start=(1, 2, 3), grid=(40, 40, 40))
    monkeypatch.setattr(surfaces, "_pieces", lambda mask: [(slice(0, 30),) * 3])
    whole = surfaces.surface(mask, (2.0, 1.0, 1.0), start=(1, 2, 3), grid=(40, 40, 40))
    assert all(np.array_equal(a, b) for a, b in zip(found, whole, strict=True))


@pytest.mark.parametrize("spacing", SPACINGS)
def test_tree_and_transform_find_the_same_distances(spacing, monkeypatch):
    rng = np.random.default_rng(4)
    shape = (30, 31, 33)
    z, y, x = np.ogrid[-15:15, -15:16, -16:17]
    ball = z**2 + y**2 + x**2
    masks = [ball < 14**2, ball < 3**2, blobs(rng, shape), blobs(rng, shape, 0.99)]
    for a, b in itertools.permutations(
        [surfaces.surface(m, spacing, start=(2, 0, 1), grid=(40, 40, 40)) for m in masks], 2
    ):
        outside = np.ones((41, 41, 41), bool)
        outside[tuple(b.corners.T)] = False
        expected = ndimage.distance_transform_edt(outside, sampling=spacing)[tuple(a.corners.T)]
        for pairs in (0, 1e9):
            monkeypatch.setattr(surfaces, "_PAIRS_PER_VOXEL", pairs)
            assert surfaces.distances(a, b) == pytest.approx(expected)


@pytest.mark.parametrize("axis", range(3))
def test_a_shift_is_as_long_as_it_is_in_mm(axis):
    spacing = (5.0, 0.8, 1.5)
    block = np.zeros((14, 14, 14), np.uint8)
    block[3:9, 3:9, 3:9] = 1
    truth = Volume(block, spacing)
    shifted = truth.like(np.roll(block, 2, axis))
    far = 2 * spacing[axis]
    found = evaluation.scores(shifted, truth, 1, tolerance=far)
    assert (found["hd95_mm"], found["surface_dice"]) == (pytest.approx(far), 1.0)
    assert evaluation.scores(shifted, truth, 1, tolerance=far * 0.99)["surface_dice"] < 1


def test_a_tolerance_of_one_voxel_holds_for_a_spacing_in_float32():
    block = np.zeros((8, 8, 8), np.uint8)
    block[2:5, 2:5, 2:5] = 1
    truth = Volume(block, (0.7 + 1e-8,) * 3)
    assert evaluation.scores(truth.like(np.roll(block, 1, 0)), truth, 1, tolerance=0.7)["surface_dice"] == 1


def test_scores_do_not_depend_on_where_and_how_large_the_scan_is():
    rng = np.random.default_rng(1)
    pair = [np.pad(blobs(rng, (8, 9, 10)), 1).astype(np.uint8) for _ in range(2)]
    wide = [np.pad(m, ((4, 9), (20, 3), (0, 5))) for m in pair]
    small, large = ([Volume(m, (2.0, 1.0, 1.0)) for m in several] for several in (pair, wide))
    assert evaluation.scores(*small, 1) == evaluation.scores(*large, 1)


@pytest.fixture
def truth():
    array = np.zeros((10, 20, 30), np.uint8)
    array[2:6, 4:12, 5:15] = 1
    return Volume(array, (3.0, 1.0, 1.0))


DIAGONAL = math.sqrt(30**2 + 20**2 + 30**2)
WORST = {"dice": 0, "iou": 0, "surface_dice": 0, "precision": 0, "recall": 0, "hd95_mm": DIAGONAL}


def test_missed_has_the_worst_score(truth):
    found = evaluation.scores(truth.like(np.zeros(truth.shape)), truth, 1)
    assert {name: found[name] for name in WORST} == pytest.approx(WORST)
    assert (found["volume_error_ml"], found["volume_error_percent"]) == (pytest.approx(-0.96), -100)


def test_false_has_the_worst_score(truth):
    found = evaluation.scores(truth, truth.like(np.zeros(truth.shape, np.int16)), 1)
    assert {name: found[name] for name in WORST} == pytest.approx(WORST)
    assert (found["volume_error_ml"], found["volume_error_percent"]) == (pytest.approx(0.96), None)


def test_absent_has_no_score(truth):
    found = evaluation.scores(truth, truth, 2, lesions=True)
    assert {name for name, value in found.items() if value is not None} == {"truth_ml", "predicted_ml"}
    assert set(found) == set(evaluation.scores(truth, truth, 1, lesions=True))


def test_no_score_is_worse_than_a_missed_structures(truth):
    """Of any prediction that hits at least a voxel."""
    missed = evaluation.scores(truth.like(np.zeros(truth.shape)), truth, 1)
    rng = np.random.default_rng(0)
    for share in (0.001, 0.1, 0.9):
        array = rng.random(truth.shape) < share
        array[2, 4, 5] = True
        found = evaluation.scores(truth.like(array.astype(np.uint8)), truth, 1)
        assert found["hd95_mm"] < missed["hd95_mm"]
        assert all(found[name] >= missed[name] for name in WORST if name != "hd95_mm")


def test_a_region_is_the_union_of_its_values(truth):
    parts = truth.array * (1 + (np.arange(30) % 2)).astype(np.uint8)
    merged = truth.like(np.roll(truth.array, 1, 2))
    region = evaluation.scores(merged, truth.like(parts), (1, 2))
    assert region == evaluation.scores(merged, truth, 1)


def test_what_is_ignored_counts_nowhere(truth):
    """Prediction and truth may be anything in the ignored half: the scores of the other half stay."""
    array = truth.array.copy()
    array[..., 15:] = 9
    marked = truth.like(array)
    prediction = np.roll(truth.array, 1, 1)
    wild = prediction.copy()
    wild[..., 15:] = np.random.default_rng(0).random(wild[..., 15:].shape) < 0.5
    found = evaluation.scores(truth.like(wild), marked, 1, ignore=9)
    assert found == evaluation.scores(truth.like(prediction), marked, 1, ignore=9)
    assert found["dice"] == evaluation.scores(truth.like(prediction), truth, 1)["dice"]


@pytest.mark.parametrize("seed", range(4))
def test_the_border_of_what_is_ignored_is_no_surface(seed):
    rng, shape, spacing = np.random.default_rng(seed), (9, 10, 11), (2.0, 1.0, 1.0)
    t, p, unknown = (blobs(rng, shape, level) for level in (0.5, 0.6, 0.8))
    truth = Volume(np.where(unknown, 9, t).astype(np.uint8), spacing)
    found = evaluation.scores(truth.like(p.astype(np.uint8)), truth, 1, tolerance=1.0, ignore=9)
    expected = by_transform(t & ~unknown, p & ~unknown, spacing, 1.0, unknown)
    assert (found["hd95_mm"], found["surface_dice"]) == pytest.approx(expected)
    assert expected != by_transform(t & ~unknown, p & ~unknown, spacing, 1.0)


def test_surfaces_that_lie_in_what_is_ignored_have_no_score():
    array = np.full((5, 5, 5), 9, np.uint8)
    array[2, 2, 2] = 1
    truth = Volume(array, (1.0, 1.0, 1.0))
    found = evaluation.scores(truth.like((array == 1).astype(np.uint8)), truth, 1, ignore=9)
    assert (found["dice"], found["hd95_mm"], found["surface_dice"]) == (1, None, None)


def test_lesions_are_connected_pieces():
    truth, prediction = np.zeros((2, 6, 20, 20), np.uint8)
    truth[1, 1, 1] = truth[2, 2, 2] = 1  # one piece: they touch at a corner
    truth[4, 10:13, 10] = 1
    truth[4, 2, 17] = 1
    prediction[2, 2, 2:4] = 1
    prediction[4, 10, 10] = prediction[4, 12, 10] = 1  # two pieces on one lesion: both are right
    prediction[0, 18, 18] = prediction[0, 18, 15] = 1
    grid = Volume(truth, (1.0, 1.0, 1.0))
    found = evaluation.scores(grid.like(prediction), grid, 1, lesions=True)
    assert [found[f"lesions_{name}"] for name in ("found", "missed", "false")] == [2, 1, 2]
    nothing = evaluation.scores(grid.like(prediction * 0), grid, 1, lesions=True)
    assert [nothing[f"lesions_{name}"] for name in ("found", "missed", "false")] == [0, 3, 0]


@pytest.mark.parametrize(
    "array, words",
    [
        (np.full((10, 20, 30), 0.5), "not whole numbers"),
        (np.full((10, 20, 30), np.nan), "not whole numbers"),
        (np.full((10, 20, 30), -1), "from 0 to 100000, received -1"),
        (np.zeros((2, 10, 20, 30)), "received shape"),
    ],
)
def test_what_is_no_label_map_is_refused(array, words, truth):
    with pytest.raises(VolumeError, match=words):
        evaluation.scores(truth.like(array), truth, 1)


def test_another_grid_and_a_negative_tolerance_are_refused(truth):
    with pytest.raises(VolumeError, match="different grids"):
        evaluation.scores(Volume(truth.array, (3.0, 1.0, 1.1)), truth, 1)
    with pytest.raises(ValueError, match="0 mm or more, received -1"):
        evaluation.scores(truth, truth, 1, tolerance=-1)


# Intervals and comparisons


def test_the_interval_of_many_normal_values_is_that_of_theory():
    values = np.random.default_rng(2).normal(5.0, 2.0, (400, 1))
    (found,), overall = statistics.summarize(values)
    half = 1.96 * values.std() / 20
    assert found.interval == pytest.approx((values.mean() - half, values.mean() + half), abs=0.05 * half)
    assert (found.n, found.mean, found.median) == (400, pytest.approx(values.mean()), np.median(values))
    assert overall == found


@pytest.mark.parametrize("draw, mean", [("normal", 0.0), ("exponential", 1.0)])
def test_intervals_hold_the_mean_as_often_as_they_say(draw, mean):
    values = getattr(np.random.default_rng(7), draw)(size=(40, 400))
    each, _ = statistics.summarize(values)
    assert 0.89 < np.mean([s.interval[0] <= mean <= s.interval[1] for s in each]) < 0.98


def test_the_interval_of_zeros_and_ones_is_binomial():
    values = np.repeat([0.0, 1.0], [30, 70])[:, None]
    (found,), _ = statistics.summarize(values)
    assert found.interval == pytest.approx(stats.binom.ppf([0.025, 0.975], 100, 0.7) / 100, abs=0.011)


def test_cases_without_a_score_are_left_out_and_few_have_no_interval():
    values = np.array([[0.5, np.nan, np.nan], [0.7, 0.9, np.nan], [np.nan, np.nan, np.nan]])
    each, overall = statistics.summarize(values)
    assert [(s.n, s.mean, s.median) for s in each] == [(2, pytest.approx(0.6), pytest.approx(0.6)), (1, 0.9, 0.9),
                                                       (0, None, None)]  # fmt: skip
    assert [s.interval is None for s in each] == [False, True, True]
    assert (overall.n, overall.mean, overall.median) == (2, pytest.approx(0.75), pytest.approx(0.65))
    assert statistics.summarize(values) == (each, overall)
    assert statistics.summarize(np.random.default_rng(0).random((9, 1)), seed=1)[0] != statistics.summarize(
        np.random.default_rng(0).random((9, 1)), seed=2
    )[0]  # fmt: skip


def test_a_comparison_is_wilcoxons_and_counts_wins():
    rng = np.random.default_rng(3)
    differences = np.stack([rng.normal(0.3, 1, 30), np.zeros(30), np.full(30, np.nan)], 1)
    differences[:4, 0] = [np.nan, 0, 0, np.nan]
    first, same, none = statistics.compare(differences)
    column = differences[4:, 0]
    assert first.p == pytest.approx(stats.wilcoxon(column).pvalue)
    assert (first.n, first.wins, first.losses) == (28, (column > 0).sum(), (column < 0).sum())
    assert first.difference == pytest.approx(column.sum() / 28)
    assert first.interval[0] < first.difference < first.interval[1]
    assert (same.p, same.difference, same.interval, same.wins) == (1, 0, (0, 0), 0)
    assert (none.n, none.p, none.difference, none.interval) == (0, None, None, None)
    less = statistics.compare(differences, more_is_better=False)[0]
    assert (less.wins, less.losses, less.p) == (first.losses, first.wins, first.p)


# Folders and the command


def folder(path, cases):
    path.mkdir(parents=True)
    for name, array in cases.items():
        write(Volume(np.asarray(array, np.uint8), (2.0, 1.0, 1.0)), path / f"{name}.nii.gz")
    return path


def block(label, start=2, size=6):
    array = np.zeros((10, 24, 24), np.uint8)
    array[2:6, start : start + size, 4:10] = label
    return array


def test_a_naive_hd95_gets_better_by_missing_and_ours_does_not(tmp_path):
    """Case two is hard: one model is 5 mm off, the other gives up."""
    truth = folder(tmp_path / "truth", {"one": block(1), "two": block(1)})
    tries = folder(tmp_path / "tries", {"one": block(1, 3), "two": block(1, 7)})
    gives_up = folder(tmp_path / "gives_up", {"one": block(1, 3), "two": block(0)})
    no_file = folder(tmp_path / "no_file", {"one": block(1, 3)})
    results = {p.name: evaluation.evaluate(p, truth) for p in (tries, gives_up, no_file)}

    def naive(result):
        """The mean over the cases in which there is a distance."""
        there = [f["1"] for f in result.scores.values() if f["1"]["predicted_ml"]]
        return np.mean([f["hd95_mm"] for f in there])

    ours = {name: result.summary["1"]["hd95_mm"].mean for name, result in results.items()}
    assert naive(results["gives_up"]) == 1 < naive(results["tries"]) == 3.0
    assert ours["tries"] == 3.0 < ours["gives_up"] == ours["no_file"] == (1 + math.hypot(20, 24, 24)) / 2
    for name in ("gives_up", "no_file"):
        assert (
            results[name].summary["1"]["surface_dice"].mean
            < results["tries"].summary["1"]["surface_dice"].mean
        )
        assert results[name].counts("1") == {"scored": 1, "missed": 1}
    assert results["no_file"].missing == ["two"] and not results["gives_up"].missing


def test_a_false_structure_loses_against_a_model_that_rightly_predicts_none(tmp_path):
    truth = folder(tmp_path / "truth", {"one": block(1), "two": block(0)})
    invents = folder(tmp_path / "invents", {"one": block(1), "two": block(1)})
    right = folder(tmp_path / "right", {"one": block(1), "two": block(0)})
    result = evaluation.evaluate(invents, truth, against=right)
    assert result.counts("1") == {"scored": 1, "false": 1}
    assert result.other.counts("1") == {"scored": 1, "absent": 1}
    dice, hd95 = result.comparison["1"]["dice"], result.comparison["1"]["hd95_mm"]
    assert (dice.n, dice.difference, dice.wins, dice.losses) == (2, -0.5, 0, 1)
    assert (hd95.n, hd95.losses, hd95.difference) == (2, 1, pytest.approx(math.hypot(20, 24, 24) / 2))
    volume = evaluation.evaluate(right, truth, against=invents).comparison["1"]["volume_error_ml"]
    assert (volume.wins, volume.losses) == (1, 0)


def test_a_model_whose_surface_cannot_be_judged_is_not_given_the_best_score(tmp_path):
    """The one predicts the structure within what is ignored, the other also something wrong elsewhere."""
    array = np.zeros((10, 24, 24))
    array[2:7, 2:7, 2:7] = 2
    array[4, 4, 4] = 1
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "a": 1, "ignore": 2}}))
    truth = folder(tmp_path / "labelsTs", {"case": array})
    inside = folder(tmp_path / "inside", {"case": array == 1})
    array[8, 20, 20] = 1
    outside = folder(tmp_path / "outside", {"case": array == 1})
    found = evaluation.evaluate(inside, truth, against=outside).comparison["a"]
    assert (found["dice"].n, found["dice"].wins, found["hd95_mm"].n) == (1, 1, 0)


def test_volume_errors_are_compared_by_their_size(tmp_path):
    truth = folder(tmp_path / "truth", {"one": block(1)})
    small = folder(tmp_path / "small", {"one": block(1, size=2)})
    large = folder(tmp_path / "large", {"one": block(1, size=7)})
    found = evaluation.evaluate(large, truth, against=small).comparison["1"]["volume_error_ml"]
    assert (found.wins, found.losses) == (1, 0)


def test_regions_and_the_ignore_label_come_from_dataset_json(tmp_path):
    labels = {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels}))
    one, two, three = block(1), block(2, 10, 4), block(3, 16, 4)
    truth = folder(tmp_path / "labelsTs", {"case": one + two + three})
    made = folder(tmp_path / "made", {"case": one + two + three // 3})
    result = evaluation.evaluate(made, truth)
    assert result.values == {"whole": (1, 2), "core": (2,)} and result.ignore == 3
    assert [result.scores["case"][name]["dice"] for name in ("whole", "core")] == [1, 1]
    made = folder(tmp_path / "more", {"case": one + two // 2})
    result = evaluation.evaluate(made, truth, tolerance={"": 2.0, "core": 0.5})
    assert [result.scores["case"][name]["dice"] for name in ("whole", "core")] == [1, 0]
    assert result.tolerances == {"whole": 2.0, "core": 0.5}


@pytest.mark.parametrize(
    "content, words",
    [
        ("{", "correct it"),
        ("{}", 'expected "labels"'),
        ('{"labels": {"background": 0}}', "no label besides the background"),
        ('{"labels": {"liver": "one"}}', "'liver': expected a number"),
        ('{"labels": {"liver": [0, 1]}}', "'liver': expected a number"),
        ('{"labels": {"liver": 1, "liver": 2}}', "there twice"),
        ('{"labels": {"liver": 1, "ignore": [2, 3]}}', "ignore must be one number"),
    ],
)
def test_a_wrong_dataset_json_is_refused(content, words, tmp_path):
    (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(ValueError, match=words):
        read_structures(tmp_path / "dataset.json")


def test_the_decathlons_dataset_json_has_numbers_first(tmp_path):
    (tmp_path / "dataset.json").write_text('{"labels": {"0": "background", "1": "liver", "2": "tumour"}}')
    assert read_structures(tmp_path / "dataset.json").values == {"liver": (1,), "tumour": (2,)}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Three tiny phantoms; a model that is a voxel off, and a worse one."""
    root = phantom.make_dataset(
        tmp_path_factory.mktemp("data") / "Dataset001_Phantom", cases=1, test_cases=3, shape=(20, 40, 40)
    )
    for name, shift in (("good", 1), ("bad", 3)):
        (root / name).mkdir()
        for path in (root / "labelsTs").iterdir():
            labels = read(path)
            write(labels.like(np.roll(labels.array, shift, 1)), root / name / path.name)
    return root


def test_the_command_end_to_end(dataset, tmp_path, capsys):
    argv = ["evaluate", f"{dataset}/good", f"{dataset}/labelsTs", "--against", f"{dataset}/bad", "--lesions",
            "--tolerance", "4", "lesion=9", "-o", f"{tmp_path}/out", "--images", f"{dataset}/imagesTs",
            "--json", f"{tmp_path}/all.json"]  # fmt: skip
    assert cli.main(argv) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert all(word in out for word in (*phantom.LABELS, "Dice", "wins", "dataset.json")[1:])
    with open(tmp_path / "out" / "metrics.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0]) == ["case", "label", "metric", "value"]
    assert len(rows) == 3 * 5 * 13
    content = json.loads((tmp_path / "all.json").read_text())
    assert content == json.loads((tmp_path / "out" / "evaluation.json").read_text())
    liver = [float(r["value"]) for r in rows if (r["label"], r["metric"]) == ("liver", "dice")]
    assert content["structures"]["liver"]["metrics"]["dice"]["mean"] == pytest.approx(np.mean(liver))
    truth = read(dataset / "labelsTs" / "phantom_001.nii.gz")
    good = read(dataset / "good" / "phantom_001.nii.gz")
    expected = evaluation.scores(good, truth, 5, tolerance=9, lesions=True)
    found = content["cases"]["phantom_001"]["lesion"]
    assert found.pop("status") == "scored"
    assert found == pytest.approx(expected)
    assert content["comparison"]["liver"]["dice"]["wins"] == 3
    assert content["structures"]["lesion"]["tolerance_mm"] == 9
    assert content["structures"]["liver"]["tolerance_mm"] == 4


def test_the_picture_shows_the_worst(dataset, tmp_path):
    from matplotlib import image

    result = evaluation.evaluate(dataset / "bad", dataset / "labelsTs")
    chosen = result.worst(4)
    dice = sorted(
        f["dice"] for found in result.scores.values() for f in found.values() if f["dice"] is not None
    )
    assert [result.scores[case.name][name]["dice"] for case, name in chosen] == dice[:4]
    drawn = {}
    for name, images in (("masks", None), ("scans", dataset / "imagesTs")):
        assert evaluation.worst_cases(result, tmp_path / f"{name}.png", 4, images) == 4
        drawn[name] = image.imread(tmp_path / f"{name}.png")[..., :3]
        for colour in ((0, 200, 255), (255, 140, 26)):  # both contours are there
            assert (np.abs(drawn[name] - np.divide(colour, 255)).max(-1) < 0.02).sum() > 200
    assert (drawn["masks"] != drawn["scans"]).any()


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda v: Volume(v.array, v.spacing, v.affine + 9 * np.eye(4, k=3)), "from the same voxel of"),
        (lambda v: Volume(v.array[:-1], None, v.affine), "voxels (z, y, x), the truth has"),
        (lambda v: v.like(v.array + np.uint8(40)), "it has the value 40, which dataset.json does not name"),
        (lambda v: v.like(v.array * 0.5), "not whole numbers"),
    ],
)  # fmt: skip
def test_a_prediction_that_cannot_be_scored_is_named(change, words, dataset, tmp_path, capsys):
    for path in (dataset / "good").iterdir():
        labels = read(path)
        write(change(labels) if path.name.startswith("phantom_002") else labels, tmp_path / path.name)
    argv = ["evaluate", str(tmp_path), f"{dataset}/labelsTs"]
    assert cli.main(argv) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith("convoxel evaluate: 1 of 3 predictions cannot be scored: phantom_002: ")
    assert words in err


def test_missing_and_unmatched_files_are_named(dataset, tmp_path, capsys):
    for path in (dataset / "good").iterdir():
        name = path.name.replace("phantom_002", "somebody")
        (tmp_path / name).write_bytes(path.read_bytes())
    assert cli.main(["evaluate", str(tmp_path), f"{dataset}/labelsTs"]) == 0
    err = capsys.readouterr().err
    assert "no prediction's file, counted as missed: phantom_002" in err
    assert "no truth, not scored: somebody" in err
    assert cli.main(["evaluate", str(tmp_path), f"{dataset}/labelsTs", "--cases", "phantom_001"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "argv, words",
    [
        (["{d}/none", "{d}/labelsTs"], "{d}/none: no such folder"),
        (["{d}/good", "{d}"], "no label maps here, expected .nii.gz, .nii, .nrrd, .nhdr, .mha, .mhd; give one of its "
                              "folders, {d}/labelsTs"),
        (["{d}/imagesTs", "{d}/labelsTs"], "no prediction has the name of a truth"),
        (["{d}/good", "{d}/labelsTs", "--cases", "x"], "no truth for x"),
        (["{d}/good", "{d}/labelsTs", "--tolerance", "heart=2"], "tolerance of heart: no such structure"),
        (["{d}/good", "{d}/labelsTs", "--tolerance", "liver=-2"], "tolerance of liver must be 0 mm or more"),
        (["{d}/good", "{d}/labelsTs", "--tolerance", "wide"], "--tolerance takes mm and name=mm, received 'wide'"),
        (["{d}/good", "{d}/labelsTs", "--images", "{d}"], "give a folder for it with -o"),
        (["{d}/good", "{d}/labelsTs", "--dataset", "{d}/x.json"], "{d}/x.json: there is no such file"),
    ],
)  # fmt: skip
def test_a_users_mistake_is_one_line(argv, words, dataset, capsys):
    assert cli.main(["evaluate", *(word.format(d=dataset) for word in argv)]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and words.format(d=dataset) in err


def test_two_files_are_one_case(dataset):
    pair = (dataset / name / "phantom_001.nii.gz" for name in ("good", "labelsTs"))
    assert list(evaluation.evaluate(*pair).scores) == ["phantom_001"]
