"""Prediction that never holds all logits against the same computation done whole, in float64."""

import itertools
import re

import numpy as np
import pytest
import torch

from convoxel.inference import Axis, predict_on_grid, walk
from convoxel.inference.maps import entropy_of, probabilities_of, remove_small
from convoxel.inference.plan import Plan
from convoxel.inference.rows import Rows
from convoxel.inference.windows import spread, weight_map


class Ramp:
    """Logits that depend on the image and on where in the window a voxel lies: misplaced windows show."""

    def __init__(self, classes, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.mix = torch.randn(classes, 4, generator=generator, dtype=torch.float64)

    def __call__(self, x):
        mix = self.mix.to(x.dtype)
        y = torch.einsum("kc,bc...->bk...", mix[:, : x.shape[1]], x)
        for axis, n in enumerate(x.shape[2:]):
            ramp = torch.linspace(-0.5, 0.7, n, dtype=x.dtype) ** 2
            y = y + torch.einsum("k,n->kn", mix[:, 3 - axis], ramp).reshape(
                [1, -1] + [n if a == axis else 1 for a in range(x.ndim - 2)]
            )
        return y


def image(size, channels=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((channels, *size), generator=generator)


def dense(models, x, patch, starts, axes, mirror=(), weights=None):
    """(D, H, W, K) float64: the definition, everything held at once."""
    g = (weight_map(patch, "gaussian", (0.125,) * 3, None)[0, 0] if weights is None else weights).double()
    total, count = 0.0, torch.zeros(x.shape[1:], dtype=torch.float64)
    for model in models:
        for n in range(len(mirror) + 1):
            for flips in itertools.combinations(mirror, n):
                for start in itertools.product(*starts):
                    at = tuple(slice(s, s + p) for s, p in zip(start, patch, strict=True))
                    window = x[(slice(None), *at)][None].double()
                    y = model(window.flip([2 + a for a in flips])).flip([2 + a for a in flips])[0]
                    if isinstance(total, float):
                        total = torch.zeros((len(y), *x.shape[1:]), dtype=torch.float64)
                    total[(slice(None), *at)] += y * g
                    count[at] += g
    y = (total / count).numpy()
    for a, axis in enumerate(axes):
        t = axis.t.astype(np.float64).reshape([-1 if b == a + 1 else 1 for b in range(4)])
        y = np.take(y, axis.low, a + 1) * (1 - t) + np.take(y, axis.high, a + 1) * t
    return np.moveaxis(y, 0, -1)


def assert_labels(labels, scores):
    """Equal wherever the best class is best by more than rounding; ties are few."""
    best = np.sort(scores, -1)
    clear = best[..., -1] - best[..., -2] > 1e-5
    assert clear.mean() > 0.99
    assert np.array_equal(labels[clear], scores.argmax(-1)[clear])


CASES = [  # image, patch, output, overlap, classes, batch
    ((9, 7, 11), (4, 3, 5), (9, 7, 11), 0.5, 3, 1),
    ((9, 7, 11), (4, 7, 5), (13, 5, 11), 0.25, 2, 2),
    ((13, 10, 6), (5, 4, 6), (26, 23, 7), 0.6, 17, 3),
    ((6, 6, 6), (6, 6, 6), (11, 3, 1), 0.5, 118, 1),
    ((17, 3, 5), (2, 3, 2), (8, 6, 10), 0.5, 4, 4),
    ((5, 19, 4), (1, 8, 4), (5, 38, 4), (0.0, 0.7, 0.0), 33, 7),
]


def settings(case):
    size, patch, out, overlap, classes, batch = case
    overlaps = overlap if isinstance(overlap, tuple) else (overlap,) * 3
    placed = [spread(n, p, o) for n, p, o in zip(size, patch, overlaps, strict=True)]
    axes = [Axis.linear(n, m) for n, m in zip(size, out, strict=True)]
    return image(size), placed, axes


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=lambda o: "".join(map(str, o)))
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}-{c[1]}-{c[4]}")
def test_labels_of_every_schedule_are_those_of_the_dense_computation(case, order, monkeypatch):
    x, placed, axes = settings(case)
    _, patch, _, overlap, classes, batch = case
    monkeypatch.setattr(Plan, "smallest", lambda *args: Plan.of(order, *args))
    labels = predict_on_grid(Ramp(classes), x, patch_size=patch, overlap=overlap, axes=axes, batch_size=batch)
    assert labels.dtype == np.uint8 and labels.flags.c_contiguous
    assert_labels(labels, dense([Ramp(classes)], x, patch, placed, axes))


@pytest.mark.parametrize("classes", [2, 3, 8, 15, 16, 17, 33, 64])
def test_scores(classes, isa):
    """The resampled logits themselves, of several models and mirror images, to float32's rounding."""
    x, placed, axes = settings(CASES[2])
    models, patch = [Ramp(classes, 1), Ramp(classes, 2)], CASES[2][1]
    got = np.full((*map(len, axes), classes), np.nan, np.float32)

    def take(where, block):
        assert np.isnan(got[where]).all()
        got[where] = block

    how = dict(patch_size=patch, overlap=0.6, axes=axes, mirror_axes=(0, 2))
    labels = predict_on_grid(models, x, **how, scores=take)
    wanted = dense(models, x, patch, placed, axes, mirror=(0, 2))
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
    assert np.array_equal(labels, got.argmax(-1))
    assert np.array_equal(labels, predict_on_grid(models, x, **how))


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=lambda o: "".join(map(str, o)))
@pytest.mark.parametrize("rows", [0, 1, 3, 7, 10**6])
def test_every_voxel_is_handed_out_once_in_blocks_of_any_size(order, rows, monkeypatch):
    """Long along the later of the two axes that blocks are cut in."""
    x, _, axes = settings(CASES[2])
    line = 4 * 3 * len(axes[order[2]])
    monkeypatch.setattr(walk, "_BLOCK", rows * line)
    monkeypatch.setattr(Plan, "smallest", lambda *args: Plan.of(order, *args))
    got = np.full((*map(len, axes), 3), np.nan, np.float32)

    def take(where, block):
        assert np.isnan(got[where]).all() and block.nbytes <= max(1, rows) * line
        later, earlier = (block.shape[at(order[:2])] for at in (max, min))
        assert earlier == 1 or later > 1
        got[where] = block

    labels = predict_on_grid(Ramp(3), x, patch_size=CASES[2][1], overlap=0.6, axes=axes, scores=take)
    assert np.array_equal(labels, got.argmax(-1))


def test_memory_is_what_the_plan_says_and_the_scratch_file_changes_nothing(tmp_path, monkeypatch):
    case = ((40, 30, 20), (8, 6, 5), (55, 41, 20), 0.5, 5, 1)
    x, placed, axes = settings(case)
    plan = Plan.smallest(case[0], case[1], placed, axes)
    assert plan.rows < 0.45 * plan.size[0] * plan.size[1] and plan.order[0] == 0
    capacities = []
    make = Rows.__init__

    def record(self, plan, classes, capacity, folder=None):
        capacities.append((capacity, folder))
        make(self, plan, classes, capacity, folder)

    monkeypatch.setattr(Rows, "__init__", record)
    free = predict_on_grid(Ramp(5), x, patch_size=case[1], axes=axes)
    monkeypatch.setattr(Rows, "__init__", lambda self, plan, classes, _, __=None: record(
        self, plan, classes, plan.least_rows, tmp_path))  # fmt: skip
    assert np.array_equal(predict_on_grid(Ramp(5), x, patch_size=case[1], axes=axes), free)
    assert capacities == [(plan.rows, None), (plan.least_rows, tmp_path)]
    assert plan.least_rows < plan.rows and not list(tmp_path.iterdir())


def test_a_ceiling_is_kept_or_refused_with_the_least_that_would_do(tmp_path):
    x = image((64, 48, 48))
    how = dict(patch_size=(16, 16, 16), axes=[Axis.linear(n, n) for n in x.shape[1:]])
    with pytest.raises(ValueError, match=r"max_ram=(\d+) would do, \d+ with a scratch file") as caught:
        predict_on_grid(Ramp(60), x, **how, max_ram="1MB")
    enough = int(re.search(r"max_ram=(\d+)", str(caught.value))[1])
    free = predict_on_grid(Ramp(60), x, **how)
    assert np.array_equal(predict_on_grid(Ramp(60), x, **how, max_ram=enough + (64 << 20)), free)


@pytest.mark.parametrize(
    "classes, regions, size", [(256, None, 1), (257, None, 2), (2, (1, 255), 1), (2, (1, 256), 2)]
)
def test_the_forecast_knows_how_large_a_label_is(classes, regions, size):
    with pytest.raises(ValueError, match=rf", {6 * 7 * 8 * size} for the result,"):
        predict_on_grid(Ramp(classes), image((6, 7, 8)), patch_size=(4, 4, 4), regions=regions, max_ram=0)


def test_the_last_axis_is_visited_last_unless_that_keeps_a_third_more():
    def order(size):
        placed = [spread(n, 96, 0.5) for n in size]
        return Plan.smallest(size, (96, 96, 96), placed, [Axis.linear(n, n) for n in size]).order

    assert order((400, 256, 256)) == (0, 1, 2) and order((200, 256, 256)) == (1, 0, 2)
    assert order((128, 128, 400))[0] == 2


def test_custom_windows_weights_and_nearest_axes():
    x = image((10, 9, 8))
    starts, patch = [[0, 3, 6], [0, 4, 5], [0, 1, 4]], (4, 4, 4)
    weights = torch.rand(patch) + 0.1
    axes = [Axis.nearest(10, 23), Axis.linear(5, 9).shifted(2), Axis.linear(8, 8)]
    labels = predict_on_grid(Ramp(4), x, patch_size=patch, starts=starts, weights=weights, axes=axes)
    assert_labels(labels, dense([Ramp(4)], x, patch, starts, axes, weights=weights))


def test_regions_overlap():
    """The last region that is positive; values beyond uint8."""
    x, placed, axes = settings(CASES[0])
    how = dict(patch_size=CASES[0][1], axes=axes)
    scores = dense([Ramp(3)], x, CASES[0][1], placed, axes)
    wanted = np.select([scores[..., 2] > 0, scores[..., 1] > 0, scores[..., 0] > 0], [7, 300, 2], 0)
    labels = predict_on_grid(Ramp(3), x, **how, regions=(2, 300, 7))
    assert labels.dtype == np.uint16
    clear = (abs(scores) > 1e-5).all(-1)
    assert np.array_equal(labels[clear], wanted[clear]) and clear.mean() > 0.99
    alone = predict_on_grid(Ramp(1), x, **how, regions=(4,))
    assert np.array_equal(np.unique(alone), [0, 4])
    with pytest.raises(ValueError, match="2 regions .* 3 channels"):
        predict_on_grid(Ramp(3), x, **how, regions=(1, 2))


def test_a_flat_network_runs_slice_by_slice():
    x = image((7, 12, 10))
    flat, shapes = Ramp(3), []

    def network(w):
        shapes.append(tuple(w.shape))
        return flat(w)

    labels = predict_on_grid(network, x, patch_size=(8, 6), batch_size=4)
    per_slice = [predict_on_grid(lambda w: flat(w[:, :, 0])[:, :, None], x[:, z : z + 1], patch_size=(1, 8, 6))
                 for z in range(7)]  # fmt: skip
    assert np.array_equal(labels, np.concatenate(per_slice)) and set(s[1:] for s in shapes) == {(2, 8, 6)}


def test_infinite_logits_win_and_lose_where_they_should_and_nan_is_refused():
    def network(x):
        y = torch.zeros(1, 3, *x.shape[2:])
        y[:, 1], y[:, 2] = -torch.inf, x[:, 0]
        return y

    x = image((6, 6, 6), 1)
    assert np.array_equal(predict_on_grid(network, x, patch_size=(4, 4, 4)), np.where(x[0] > 0, 2, 0))
    axes = [Axis.linear(6, 9)] * 3
    assert set(np.unique(predict_on_grid(network, x, patch_size=(4, 4, 4), axes=axes))) == {0, 2}
    with pytest.raises(ValueError, match="logits are NaN"):
        predict_on_grid(lambda w: network(w) * float("nan"), x, patch_size=(4, 4, 4))


@pytest.mark.parametrize(
    "wrong, words",
    [
        (dict(patch_size=(5, 4, 9)), "within the image"),
        (dict(patch_size=(4,)), "expected a patch"),
        (dict(patch_size=(4, 4, 4), starts=[[0, 2], [0, 2], [0]]), "from 0 to 2"),
        (dict(patch_size=(1, 4, 4), starts=[[0, 2, 5], [0, 2], [0, 2]]), "without gaps"),
        (dict(patch_size=(4, 4, 4), weights=torch.zeros(4, 4, 4)), "positive"),
        (dict(patch_size=(4, 4, 4), mirror_axes=(0, 0)), "mirror_axes"),
        (dict(patch_size=(4, 4, 4), mirror_axes=(3,)), "mirror_axes"),
        (dict(patch_size=(4, 4, 4), axes=[Axis.linear(7, 7)] * 3), "indices into 6 voxels"),
        (dict(patch_size=(4, 4, 4), axes=[Axis(*[np.arange(6)[::-1]] * 2, np.zeros(6))] * 3), "rising"),
        (dict(patch_size=(4, 4, 4), max_ram="lots"), "max_ram='lots'"),
        (dict(patch_size=(4, 4, 4), max_ram=-1), "max_ram=-1: expected bytes"),
        (dict(patch_size=(4, 4, 4), batch_size=0), "batch_size"),
    ],
)
def test_mistakes_are_named(wrong, words):
    with pytest.raises(ValueError, match=words):
        predict_on_grid(Ramp(3), image((6, 6, 6)), **wrong)


def test_the_same_bits_with_any_number_of_threads():
    x, _, axes = settings(CASES[2])
    results, threads = [], torch.get_num_threads()
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        predict_on_grid(
            Ramp(17), x, patch_size=CASES[2][1], axes=axes, scores=lambda _, s: results.append(s.copy())
        )
    torch.set_num_threads(threads)
    n = len(results) // 3
    assert n and all(np.array_equal(results[i], results[i + k * n]) for i in range(n) for k in (1, 2))


def test_probabilities_and_entropy():
    logits = torch.randn(2, 3, 4, 5).numpy()
    p = probabilities_of(logits, False)
    np.testing.assert_allclose(p.sum(-1), 1, rtol=1e-6)
    np.testing.assert_allclose(entropy_of(p, False), -(p * np.log(p)).sum(-1), rtol=1e-5)
    q = probabilities_of(logits, True)
    np.testing.assert_allclose(q, 1 / (1 + np.exp(-logits)), rtol=1e-5)
    wanted = -(q * np.log(q) + (1 - q) * np.log(1 - q)).sum(-1)
    np.testing.assert_allclose(entropy_of(q, True), wanted, rtol=1e-4)


def test_small_components_go():
    labels = np.zeros((6, 6, 6), np.uint8)
    labels[0, 0, :3], labels[1, 1, 3], labels[4, 4, 4], labels[5, 5, 5] = 1, 1, 1, 2
    wanted = labels.copy()
    wanted[4, 4, 4] = wanted[5, 5, 5] = 0  # a corner joins: the 4 voxels of label 1 are one part
    assert remove_small(labels, 4) == 2 and np.array_equal(labels, wanted)
