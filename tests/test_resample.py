"""Interpolation and its gradient: voxels, values, layouts, and what is refused or handed to torch."""

import itertools

import pytest
import torch
import torch.nn.functional as T
from torch import Tensor

import convoxel
from convoxel import functional as F
from convoxel import nn
from tolerance import bound

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
LINEAR = {3: "linear", 4: "bilinear", 5: "trilinear"}
OPS = torch.ops.convoxel


def laid_out(x: Tensor, last: bool) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.contiguous(memory_format=formats[x.dim()]) if last and x.dim() in formats else x


def value_and_gradient(module, x: Tensor, dy: Tensor, **how) -> tuple[Tensor, Tensor]:
    leaf = x.detach().requires_grad_()
    y = module.interpolate(leaf, **how)
    return y.detach(), torch.autograd.grad(y, leaf, dy)[0]


def ids(case) -> str:
    return str(case).replace(" ", "")


# Shapes and sizes that halve, double, shrink beyond a vector's reach and grow beyond eight outputs a voxel.
SIZES = [
    ((2, 3, 7), 14),
    ((1, 1, 1), 5),
    ((2, 2, 200), 3),
    ((1, 2, 3), 100),
    ((1, 1, 49), 47),
    ((1, 5, 6, 4), (9, 7)),
    ((2, 33, 3, 5), (6, 10)),
    ((1, 17, 4, 9), (1, 1)),
    ((1, 3, 70, 90), (80, 33)),
    ((1, 2, 3, 4, 5), (6, 8, 10)),
    ((1, 20, 2, 3, 4), (2, 6, 7)),
    ((2, 4, 5, 1, 6), (3, 4, 13)),
    ((1, 1, 2, 2, 2), (11, 1, 20)),
]
# The second entries have the extent of factor 1 or 2 by rounding, where torch's kernels disagree.
FACTORS = [
    ((1, 2, 9), 1.7),
    ((1, 2, 8), 2.1),
    ((1, 5, 8, 5), (2.1, 1.1)),
    ((1, 5, 70, 64), (2.01, 1.01)),
    ((2, 1, 6, 7), 0.51),
    ((1, 6, 8, 5, 4), (2.1, 1.1, 0.3)),
    ((1, 2, 8, 5, 4), (2.1, 1.1, 1 / 3)),
]


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact"])
@pytest.mark.parametrize("how", ["size", "scale_factor"])
def test_nearest_picks_torchs_voxels(mode: str, how: str, isa: str) -> None:
    convoxel.set_strict(True)
    for (shape, value), dtype, last in itertools.product(
        SIZES if how == "size" else FACTORS, DTYPES, (False, True)
    ):
        x = laid_out(torch.randn(shape).to(dtype), last)
        got, expected = (m.interpolate(x, mode=mode, **{how: value}) for m in (F, T))
        assert torch.equal(got, expected), f"{shape} {value} {dtype} last={last}"
        assert got.stride() == expected.stride()


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact"])
def test_nearest_rounds_as_each_of_torchs_kernels(mode: str) -> None:
    """To these extents a voxel hangs on the last bit, and torch's kernels round differently: the generic one in
    the dtype, the vectorized one (channels-last, or a small image) in float32."""
    for n, m, dtype in itertools.product((2, 3, 4, 7, 14), (41, 82, 94, 107, 110, 121, 123), DTYPES[::2]):
        x = torch.arange(n, dtype=dtype)
        for t, size in (
            (x[None, None], m),
            (x[None, None, None], (1, m)),
            (laid_out(x.expand(1, 4, 1, 1, n), True), (1, 1, m)),
        ):
            got, expected = (f.interpolate(t, size=size, mode=mode) for f in (F, T))
            assert torch.equal(got, expected), f"{n} -> {size} {dtype}"


# Doubling, quadrupling and halving have weights that are multiples of 1/8 for each axis: all sums are exact.
EXACT = [
    ((1, 3, 7), 14),
    ((2, 2, 9), 36),
    ((1, 2, 12), 3),
    ((1, 1, 5, 6), (10, 6)),
    ((2, 33, 3, 5), (6, 20)),
    ((1, 5, 8, 30), (4, 60)),
    ((1, 16, 2, 3, 4), (4, 6, 8)),
    ((2, 3, 3, 2, 20), (6, 2, 40)),
    ((1, 40, 4, 3, 2), (2, 6, 4)),
    ((1, 1, 2, 3, 17), (4, 12, 34)),
]


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact", "linear"])
@pytest.mark.parametrize("case", EXACT, ids=ids)
def test_exact_on_integers(case, mode: str, isa: str) -> None:
    convoxel.set_strict(True)
    shape, size = case
    how = {"size": size, "mode": LINEAR[len(shape)] if mode == "linear" else mode}
    for dtype, x_last, dy_last in itertools.product(DTYPES, (False, True), (False, True)):
        x = torch.randint(-3, 4, shape).to(dtype)
        dy = torch.randint(-3, 4, T.interpolate(x.float(), **how).shape).to(dtype)
        expected = value_and_gradient(T, x.double(), dy.double(), **how)
        got = value_and_gradient(F, laid_out(x, x_last), laid_out(dy, dy_last), **how)
        for name, g, e in zip(("y", "dx"), got, expected, strict=True):
            assert torch.equal(g, e.to(dtype)), f"{name} {dtype} x_last={x_last} dy_last={dy_last}"


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("case", SIZES + FACTORS, ids=ids)
def test_linear_is_within_rounding_of_torch(case, align_corners: bool, isa: str) -> None:
    """The positions are torch's, in float32 too; bfloat16 is compared with torch's float32."""
    shape, value = case
    key = "size" if case in SIZES else "scale_factor"
    how = {key: value, "mode": LINEAR[len(shape)], "align_corners": align_corners}
    for dtype, last in itertools.product(DTYPES, (False, True)):
        wide = torch.float32 if dtype == torch.bfloat16 else dtype
        x = torch.randn(shape).to(dtype)
        dy = torch.randn(T.interpolate(x.float(), **how).shape).to(dtype)
        expected = value_and_gradient(T, x.to(wide), dy.to(wide), **how)
        terms = value_and_gradient(T, x.to(wide).abs(), dy.to(wide).abs(), **how)
        got = value_and_gradient(F, laid_out(x, last), laid_out(dy, last), **how)
        lengths = (2 ** len(shape[2:]), max(1, dy[0, 0].numel() // x[0, 0].numel()) * 2 ** len(shape[2:]))
        for g, e, t, length in zip(got, expected, terms, lengths, strict=True):
            assert ((g.to(wide) - e).abs() <= 2 * bound(dtype, length) * t).all()


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact", "linear"])
@pytest.mark.parametrize("case", SIZES + FACTORS, ids=ids)
def test_adjoint_identity(case, mode: str) -> None:
    """<R(x), dy> = <x, R^T(dy)>, also where torch's own gradient is not that of its forward."""
    shape, value = case
    how = {"size" if case in SIZES else "scale_factor": value}
    x = torch.randn(shape, dtype=torch.float64)
    mode = LINEAR[len(shape)] if mode == "linear" else mode
    dy = torch.randn(F.interpolate(x, mode=mode, **how).shape, dtype=torch.float64)
    y, dx = value_and_gradient(F, x, dy, mode=mode, **how)
    assert torch.sum(y * dy).item() == pytest.approx(torch.sum(x * dx).item(), rel=1e-11, abs=1e-10)


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact", "linear"])
@pytest.mark.parametrize(
    "case", [((1, 2, 3), 5), ((2, 1, 3, 2), (2, 5)), ((1, 2, 2, 3, 2), (3, 2, 4))], ids=ids
)
def test_gradcheck_and_gradgradcheck(case, mode: str) -> None:
    shape, size = case
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    mode = LINEAR[len(shape)] if mode == "linear" else mode
    assert torch.autograd.gradcheck(lambda x: F.interpolate(x, size, mode=mode), x)
    assert torch.autograd.gradgradcheck(lambda x: F.interpolate(x, size, mode=mode), x)


@pytest.mark.parametrize("op", [OPS.interpolate.default, OPS.interpolate_grad.default])
@pytest.mark.parametrize("mode", range(5))
@pytest.mark.parametrize("last", [False, True])
def test_opcheck(op, mode: int, last: bool) -> None:
    x = laid_out(torch.randn(2, 3, 2, 3, 4), last).requires_grad_()
    torch.library.opcheck(op, (x, (3, 3, 5), mode, False, (0.0, 0.0, 1.3)))


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_nan_and_infinity_come_out_where_torchs_do(align_corners: bool, last: bool, isa: str) -> None:
    """A weight of zero turns infinity into NaN, in torch and here."""
    for shape, size in (((1, 4, 7), 7), ((1, 5, 6, 8), (6, 15)), ((1, 20, 3, 4, 5), (5, 4, 9))):
        how = {"size": size, "mode": LINEAR[len(shape)], "align_corners": align_corners}
        x = laid_out(torch.randn(shape), last)
        dy = laid_out(torch.randn(T.interpolate(x, **how).shape), last)
        for t in (x, dy):
            t[0, 0, -1] = torch.inf
            t[0, 1, 0] = -torch.inf
            t[0, 2, 1] = torch.nan
        got, expected = (value_and_gradient(m, x, dy, **how) for m in (F, T))
        for g, e in zip(got, expected, strict=True):
            assert torch.equal(g.isnan(), e.isnan()) and torch.equal(g.isinf(), e.isinf())


@pytest.mark.parametrize("last", [False, True])
def test_same_bits_for_every_thread_count(last: bool) -> None:
    x = laid_out(torch.randn(2, 20, 9, 11, 13), last)
    dy = laid_out(torch.randn(2, 20, 17, 23, 31), last)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(value_and_gradient(F, x, dy, size=(17, 23, 31), mode="trilinear"))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_strided_expanded_and_empty(mode: str) -> None:
    base = torch.randn(4, 6, 9, 11)
    for x in (
        base[::2, 1:5, ::3, 1:8],
        base[:1, :1].expand(3, 5, 9, 11),
        base.permute(0, 2, 3, 1),
        base.flip(3),
    ):
        for dy in (torch.randn(*x.shape[:2], 7, 8), torch.ones(1, 1, 1, 1).expand(*x.shape[:2], 7, 8)):
            got, expected = (value_and_gradient(m, x, dy, size=(7, 8), mode=mode) for m in (F, T))
            torch.testing.assert_close(got, expected)
    y, dx = value_and_gradient(F, torch.ones(0, 3, 4, 5), torch.ones(0, 3, 8, 10), scale_factor=2, mode=mode)
    assert y.shape == (0, 3, 8, 10) and dx.shape == (0, 3, 4, 5)


@pytest.mark.parametrize("mode", ["nearest", "trilinear"])
def test_vmap_and_compile(mode: str) -> None:
    x = torch.randn(3, 2, 2, 3, 4, 5)
    for axis in (0, 1):
        got = torch.func.vmap(lambda x: F.interpolate(x, scale_factor=2, mode=mode), axis)(x)
        expected = torch.stack([T.interpolate(t, scale_factor=2, mode=mode) for t in x.unbind(axis)])
        torch.testing.assert_close(got, expected)

    def loss(x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=(1.5, 2, 1), mode=mode).square().sum()

    gradients = torch.func.vmap(torch.func.grad(loss))(x)
    torch.testing.assert_close(gradients, torch.stack([torch.func.grad(loss)(t) for t in x]))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for t in (x[0], torch.randn(1, 4, 5, 6, 7)):
        results = []
        for function in (compiled, loss):
            leaf = t.clone().requires_grad_()
            value = function(leaf)
            results.append((value, *torch.autograd.grad(value, leaf)))
        torch.testing.assert_close(*results)


def test_autocast_leaves_the_dtype() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert F.interpolate(torch.ones(1, 1, 3), scale_factor=2).dtype == torch.float32


def test_recomputed_factors() -> None:
    x = torch.randn(1, 2, 5, 7)
    for recompute in (None, False, True):
        how = {"scale_factor": 1.5, "mode": "bilinear", "recompute_scale_factor": recompute}
        torch.testing.assert_close(F.interpolate(x, **how), T.interpolate(x, **how))


X = torch.ones(1, 2, 5, 5)


@pytest.mark.parametrize(
    "make",
    [
        lambda m: m.interpolate(X, size=(4, 4), scale_factor=2),
        lambda m: m.interpolate(X),
        lambda m: m.interpolate(X, size=(4,)),
        lambda m: m.interpolate(X, size=4.0),
        lambda m: m.interpolate(X, size=(4, 4.0)),
        lambda m: m.interpolate(X, size="4"),
        lambda m: m.interpolate(X, size=True),
        lambda m: m.interpolate(X, size=0),
        lambda m: m.interpolate(X, size=(2**40, 2**40)),
        lambda m: m.interpolate(X, size=2**70),
        lambda m: m.interpolate(X, scale_factor=0.1),
        lambda m: m.interpolate(X, scale_factor=-1.0),
        lambda m: m.interpolate(X, scale_factor=float("inf")),
        lambda m: m.interpolate(X, scale_factor=float("nan")),
        lambda m: m.interpolate(X, scale_factor=1e18),
        lambda m: m.interpolate(X, scale_factor=1e300),
        lambda m: m.interpolate(X, scale_factor=(2,)),
        lambda m: m.interpolate(X, scale_factor="2"),
        lambda m: m.interpolate(X, scale_factor=torch.tensor(2.0)),
        lambda m: m.interpolate(X, size=4, mode="linear"),
        lambda m: m.interpolate(X, size=4, mode="trilinear"),
        lambda m: m.interpolate(X, size=4, mode="cubic"),
        lambda m: m.interpolate(X, size=4, align_corners=False),
        lambda m: m.interpolate(X, size=4, recompute_scale_factor=True),
        lambda m: m.interpolate(X, size=4, antialias=True),
        lambda m: m.interpolate(X[0, 0], size=4),
        lambda m: m.interpolate(X[None, None], size=4),
        lambda m: m.interpolate(X[:, :0], size=4),
        lambda m: m.interpolate(X[:, :, :0], size=4),
        lambda m: m.interpolate(X[0], size=(4, 4, 4)),
        lambda m: m.interpolate(X, size=4, mode=LINEAR[X.dim()], align_corners="yes"),
    ],
)
def test_what_torch_rejects_is_rejected_alike(make) -> None:
    with pytest.raises((RuntimeError, TypeError, ValueError)) as theirs:
        make(T)
    with pytest.raises(theirs.type) as ours:
        make(F)
    assert len(str(ours.value)) < 400


def test_input_must_be_a_tensor() -> None:
    with pytest.raises(TypeError, match="must be Tensor, not list"):
        F.interpolate([1.0], scale_factor=2)


@pytest.mark.parametrize(
    "bad",
    [
        lambda: OPS.interpolate(torch.ones(1, 1, 3), (3, 3, 3), 0, False, (0.0, 0.0, 0.0)),
        lambda: OPS.interpolate(torch.ones(1, 1, 3, 3, 3), (3, 3, 0), 0, False, (0.0, 0.0, 0.0)),
        lambda: OPS.interpolate(torch.ones(1, 1, 3, 3, 3), (3, 3, 3), 5, False, (0.0, 0.0, 0.0)),
        lambda: OPS.interpolate(torch.ones(1, 1, 3, 3, 3), (3, 3, 3), 0, False, (0.0,)),
        lambda: OPS.interpolate(torch.ones(1, 1, 3, 3, 3).int(), (3, 3, 3), 0, False, (0.0, 0.0, 0.0)),
        lambda: OPS.interpolate(torch.ones(1, 1, 3, 3, 3), (2**40, 2**40, 1), 0, False, (0.0, 0.0, 0.0)),
        lambda: OPS.interpolate_grad(torch.ones(1, 0, 3, 3, 3), (3, 3, 3), 0, False, (0.0, 0.0, 0.0)),
    ],
)
def test_operators_check_without_the_functions_in_front(bad) -> None:
    with pytest.raises(RuntimeError):
        bad()


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -1.0, 1e-320, 1e300])
@pytest.mark.parametrize("mode", range(5))
def test_absurd_scales_stay_inside(scale: float, mode: int, isa: str) -> None:
    x, dy = torch.rand(1, 1, 1, 3, 4), torch.rand(1, 1, 1, 5, 8)
    y = OPS.interpolate(x, (1, 5, 8), mode, False, (scale,) * 3)
    assert x.min() <= y.min() and y.max() <= x.max()
    dx = OPS.interpolate_grad(dy, (1, 3, 4), mode, False, (scale,) * 3)
    torch.testing.assert_close(dx.sum(), dy.sum())


@pytest.mark.parametrize(
    "how,dtype",
    [
        ({"mode": "bicubic"}, torch.float32),
        ({"mode": "area"}, torch.float32),
        ({"mode": "bilinear", "antialias": True}, torch.float32),
        ({"mode": "nearest"}, torch.uint8),
        ({"mode": "bilinear"}, torch.uint8),
        ({"mode": "bilinear"}, torch.float16),
    ],
)
def test_handed_to_torch_and_counted(how, dtype: torch.dtype) -> None:
    x = (10 * torch.rand(1, 2, 5, 6)).to(dtype)
    assert torch.equal(F.interpolate(x, 7, **how), T.interpolate(x, 7, **how))
    assert convoxel.stats()["interpolate"]["torch"] == 1
    convoxel.set_strict(True)
    with pytest.raises(convoxel.HandedToTorch, match="interpolate"):
        F.interpolate(x, 7, **how)


def test_served_and_counted() -> None:
    convoxel.set_strict(True)
    value_and_gradient(F, torch.ones(1, 1, 2), torch.ones(1, 1, 4), size=4)
    assert {k: v["served"] for k, v in convoxel.stats().items()} == {"interpolate": 1, "interpolate_grad": 1}


def test_layers_are_torchs_layers() -> None:
    x = torch.randn(1, 2, 4, 5)
    for make in (
        lambda m: m.Upsample(scale_factor=2),
        lambda m: m.Upsample((7, 3), mode="bilinear", align_corners=True),
        lambda m: m.Upsample(scale_factor=1.3, mode="bilinear", recompute_scale_factor=True),
        lambda m: m.UpsamplingNearest2d(scale_factor=3),
        lambda m: m.UpsamplingBilinear2d(size=9),
    ):
        ours, theirs = make(nn), make(torch.nn)
        convoxel.reset_stats()
        torch.testing.assert_close(ours(x), theirs(x))
        assert isinstance(ours, type(theirs)) and repr(ours) == repr(theirs) and isinstance(ours, nn.Upsample)
        assert convoxel.stats()["interpolate"]["served"] == 1


@pytest.mark.parametrize("name", ["upsample", "upsample_nearest", "upsample_bilinear"])
def test_former_names(name: str) -> None:
    x = torch.randn(1, 2, 4, 5)
    with pytest.warns(UserWarning, match=f"nn.functional.{name}` is deprecated"):
        expected = getattr(T, name)(x, scale_factor=2)
    with pytest.warns(UserWarning, match=f"nn.functional.{name}` is deprecated"):
        torch.testing.assert_close(getattr(F, name)(x, scale_factor=2), expected)
    assert convoxel.stats()["interpolate"]["served"] == 1
