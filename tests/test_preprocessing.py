"""Crop, normalisation and splines against scipy, small numbers worked out by hand, and nnU-Net's definitions."""

import numpy as np
import pytest

from convoxel.preprocessing import (
    Intensities,
    filled,
    nearest,
    nonzero_box,
    normalise,
    padding,
    resize,
)

SIZES = [
    ((9, 20, 31), (14, 13, 40)),
    ((1, 20, 31), (1, 13, 40)),
    ((2, 5, 3), (4, 9, 1)),
    ((17, 8, 12), (5, 30, 12)),
]


def image(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def zoomed(x: np.ndarray, shape: tuple[int, ...], order: int) -> np.ndarray:
    """skimage.transform.resize(mode="edge", anti_aliasing=False), of scipy's parts."""
    ndimage = pytest.importorskip("scipy.ndimage")
    factors = [m / n for n, m in zip(x.shape, shape, strict=True)]
    y = ndimage.zoom(x.astype(float), factors, order=order, mode="nearest", grid_mode=True)
    return y.clip(x.min(), x.max())


@pytest.mark.parametrize("order", [0, 1, 3])
@pytest.mark.parametrize("old, new", SIZES)
def test_resize_is_scipys_zoom(old, new, order):
    x = image(2, *old)
    y = resize(x, new, order)
    assert y.shape == (2, *new) and y.dtype == np.float32
    for channel, got in zip(x, y, strict=True):
        np.testing.assert_allclose(got, zoomed(channel, new, order), rtol=0, atol=3e-7)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("order_z", [0, 1])
def test_a_separate_axis_is_planes_first_and_then_lines(axis, order_z):
    old, new = SIZES[0]
    x = image(1, *old)
    planes = np.moveaxis(x[0], axis, 0)
    plane, target = np.delete(new, axis), np.moveaxis(resize(x, new, 3, axis, order_z)[0], axis, 0)
    flat = np.stack([zoomed(p, tuple(plane), 3) for p in planes])
    u = np.clip((np.arange(new[axis]) + 0.5) * old[axis] / new[axis] - 0.5, 0, old[axis] - 1)
    low = nearest(old[axis], new[axis]) if order_z == 0 else np.floor(u).astype(int)
    t = (u - low)[:, None, None] * (order_z == 1)
    high = np.minimum(low + 1, old[axis] - 1)
    np.testing.assert_allclose(target, flat[low] * (1 - t) + flat[high] * t, rtol=0, atol=3e-7)


def test_a_cubic_spline_keeps_cubics_away_from_the_rim_and_never_leaves_the_range():
    u = np.arange(60.0)
    x = (0.001 * (u - 30) ** 3 - 0.02 * u**2 + u).astype(np.float32)[None, None, None]
    y = resize(x, (1, 1, 90))[0, 0, 0]
    v = (np.arange(90) + 0.5) * 60 / 90 - 0.5
    np.testing.assert_allclose(y[25:65], (0.001 * (v - 30) ** 3 - 0.02 * v**2 + v)[25:65], rtol=2e-6)
    assert y.min() >= x.min() and y.max() <= x.max()
    step = resize(np.array([0, 0, 0, 1, 1, 1], np.float32).reshape(1, 1, 1, 6), (1, 1, 25))
    assert step.min() == 0 and step.max() == 1


def test_slabs_do_not_show(monkeypatch):
    x = image(1, 40, 12, 9)
    whole = resize(x, (55, 10, 11)), resize(x, (55, 10, 11), 3, 0, 1)
    monkeypatch.setattr("convoxel.preprocessing.splines._SLAB", 4000)
    monkeypatch.setattr("convoxel.preprocessing.splines._ROWS", 3)
    slabs = resize(x, (55, 10, 11)), resize(x, (55, 10, 11), 3, 0, 1)
    for a, b in zip(whole, slabs, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1.2e-7)


def test_resize_leaves_an_image_of_that_shape_alone():
    x = image(1, 3, 4, 5)
    assert resize(x, (3, 4, 5)) is x


@pytest.mark.parametrize("option", [{"order": 2}, {"order_z": 5}])
def test_other_orders_are_refused(option):
    with pytest.raises(ValueError, match=r"must be one of \(0, 1, 3\), received"):
        resize(image(1, 3, 3, 3), (4, 4, 4), **option)


@pytest.mark.parametrize("old, new", [(3, 6), (7, 5), (1, 4), (5, 1), (100, 333), (398, 389)])
def test_nearest_is_scipys_order_0_in_ties_too(old, new):
    ndimage = pytest.importorskip("scipy.ndimage")
    u = (old / new) * (np.arange(new) + 0.5) - 0.5
    expected = ndimage.map_coordinates(np.arange(float(old)), u[None], order=0, mode="nearest")
    assert (nearest(old, new) == expected).all()


def test_the_box_holds_every_channel_and_a_mask_fills_holes():
    x = np.zeros((2, 6, 7, 8), np.float32)
    x[0, 1:4, 2:6, 3] = 5
    x[1, 3, 2:6, 2:7] = -1
    assert nonzero_box(x) == (slice(1, 4), slice(2, 6), slice(2, 7))
    assert nonzero_box(np.zeros((1, 2, 3, 4))) == (slice(0, 2), slice(0, 3), slice(0, 4))
    pytest.importorskip("scipy")
    ring = np.ones((1, 5, 5, 5), np.float32)
    ring[0, 2, 2, 2] = 0
    ring[0, 0, 2, 2] = 0
    mask = filled(ring)
    assert mask[2, 2, 2] and not mask[0, 2, 2]


def test_the_odd_voxel_of_a_rim_goes_behind():
    assert padding((7, 20, 9), (10, 16, 16)) == [(1, 2), (0, 0), (3, 4)]


def test_ct_is_clipped_and_standardised_by_the_training_set():
    x = np.array([[[-2000, -100, 100, 400, 3000]]], np.float32)
    normalise(x, "CTNormalization", Intensities(100, 50, -100, 400))
    np.testing.assert_array_equal(x, [[[-4, -4, 0, 6, 6]]])


@pytest.mark.parametrize("masked", [False, True])
def test_z_score(masked):
    x = image(4, 5, 6) * 3 + 10_000
    mask = image(4, 5, 6) > 0 if masked else None
    before = x.copy()
    normalise(x, "ZScoreNormalization", mask=mask)
    inside = slice(None) if mask is None else mask
    values = before[inside].astype(np.float64)
    np.testing.assert_allclose(x[inside], (values - values.mean()) / values.std(), rtol=0, atol=2e-4)
    if mask is not None:
        np.testing.assert_array_equal(x[~mask], before[~mask])


def test_ranges_and_constants():
    x = np.array([[[2, 4, 6]]], np.float32)
    normalise(x, "RescaleTo01Normalization")
    np.testing.assert_array_equal(x, [[[0, 0.5, 1]]])
    x = np.array([[[0, 51, 255]]], np.float32)
    normalise(x, "RGBTo01Normalization")
    np.testing.assert_array_equal(x, np.array([[[0, 0.2, 1]]], np.float32))
    x = np.full((1, 2, 2), 7, np.float32)
    normalise(x, "NoNormalization")
    assert (x == 7).all()
    for scheme in ("ZScoreNormalization", "RescaleTo01Normalization"):
        x = np.full((1, 2, 2), 7, np.float32)
        normalise(x, scheme)
        assert (x == 0).all()  # nothing divided by 0


@pytest.mark.parametrize(
    "scheme, words",
    [
        ("CTNormalization", "does not say the intensities"),
        ("RGBTo01Normalization", "expected values from 0 to 255, received -5 to 300"),
        ("Magic", "unknown normalisation 'Magic'; expected one of CTNormalization"),
    ],
)
def test_what_cannot_be_normalised_says_why(scheme, words):
    with pytest.raises(ValueError, match=words):
        normalise(np.array([[[-5, 300]]], np.float32), scheme)
