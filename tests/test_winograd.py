"""Winograd's convolution: values, the error that `high` promises, layouts, what is not finite, and the route."""

import itertools

import pytest
import torch
import torch.nn.functional as T
from torch import Tensor

import convoxel
from convoxel import functional as F
from convoxel.geometry import Problem
from convoxel.ops import conv, route
from tolerance import relative_l2

# Whole and ragged tiles, one tile and less, one to several blocks of channels and their tails, planes, groups,
# padding from none to more than the kernel's; with many weights several regions and batches of them.
PROBLEMS = [
    "conv n2 c16 k16 i8x8x8 f3x3x3 p1x1x1",
    "conv n1 c5 k7 i7x9x11 f3x3x3 p1x1x1",
    "conv n2 c20 k33 i5x6x7 f1x3x3 p0x1x1",
    "conv n1 c40 k70 i4x4x4 f3x3x3 p1x1x1 nobias",
    "conv n1 c16 k32 i6x13x9 f3x3x3 p2x2x2 g2",
    "conv n1 c3 k4 i3x3x3 f3x3x3",
    "conv n1 c70 k20 i4x5x21 f3x3x3 p0x1x2",
    "conv n3 c17 k50 i40x17 f3x3 p1x1",
    "conv n1 c6 k6 i5x5 f3x3 p3x4 g3",
    "conv n1 c130 k16 i3x3x5 f3x3x3 p1x1x1",
    "conv n35 c3 k18 i5x4x3 f3x3x3 p1x1x1",
    "conv n9 c36 k34 i4x5x4 f3x3x3 p1x1x1",
    "conv n1 c36 k34 i1x33x33 f3x3x3 p1x1x1",
    "conv_transpose n1 c18 k9 i6x7x8 f3x3x3 p1x1x1",
    "conv_transpose n2 c4 k21 i9x5 f3x3",
]
TILES = [(d, hw, hw) for d in (4, 2) for hw in (4, 2)]


def call(module, p: Problem, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    function = getattr(module, f"{p.op}{p.rank}d")
    return function(x, w, b, p.s, p.p, *((p.o, p.g, p.d) if p.transposed else (p.d, p.g)))


def data(p: Problem, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    x, w, dy = (torch.randn(s).to(dtype) for s in (p.x_shape, p.w_shape, p.y_shape))
    return x, w * (2 / w[0].numel()) ** 0.5, torch.randn(p.k).to(dtype) if p.bias else None, dy


def results(module, p: Problem, x: Tensor, w: Tensor, b: Tensor | None, dy: Tensor) -> tuple[Tensor, ...]:
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    y = call(module, p, x, w, b)
    return y.detach(), *torch.autograd.grad(y, (x, w), dy)


def last(t: Tensor) -> Tensor:
    return t.to(memory_format={4: torch.channels_last, 5: torch.channels_last_3d}[t.dim()])


def served() -> set[str]:
    return {by.split()[0] for row in convoxel.stats().values() for by in row["by"]}


@pytest.fixture(autouse=True)
def _winograd() -> None:
    convoxel.set_conv_algorithm("winograd")
    convoxel.set_strict(True)


@pytest.fixture(params=TILES, ids=lambda t: "x".join(map(str, t)))
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[int, ...]:
    """Runs the test with one size of tiles instead of the fastest."""
    monkeypatch.setattr(
        route, "tiles", lambda taps: [request.param if taps[0] == 3 else (1, *request.param[1:])]
    )
    conv.planned.cache_clear()
    yield request.param
    conv.planned.cache_clear()


@pytest.mark.parametrize("text", PROBLEMS)
def test_values_in_both_layouts(text: str, isa: str, tile: tuple[int, ...]) -> None:
    p = Problem.parse(text)
    for dtype, x_last, dy_last in itertools.product(
        (torch.float32, torch.bfloat16), (False, True), (False, True)
    ):
        x, w, b, dy = data(p, dtype)
        exact = results(T, p, x.double(), w.double(), None if b is None else b.double(), dy.double())
        got = results(F, p, last(x) if x_last else x, w, b, last(dy) if dy_last else dy)
        for name, g, e in zip(("y", "dx", "dw"), got, exact, strict=True):
            assert relative_l2(g, e) < (1e-5 if dtype == torch.float32 else 4e-3), f"{name} {dtype}"
    assert served() == {"winograd"}


@pytest.mark.parametrize("channels", [1, 16, 64, 640])
def test_error_as_high_promises(channels: int, tile: tuple[int, ...]) -> None:
    """Relative L2 at most 1e-5 on normal data with He-scaled weights; for any data, of the convolution of the
    absolute values."""
    p = Problem.parse(f"conv n1 c{channels} k16 i8x9x7 f3x3x3 p1x1x1 nobias")
    x, w, _, dy = data(p)
    for g, e in zip(
        results(F, p, x, w, None, dy), results(T, p, x.double(), w.double(), None, dy.double()), strict=True
    ):
        assert relative_l2(g, e) <= 1e-5
    sparse = torch.where(torch.rand_like(x) < 0.01, x.sign() * 10 ** (8 * torch.rand_like(x)), x + 1e3)
    for hostile, weight in ((x + 1e4, w), (x.abs(), w.abs()), (sparse, w), (x * 1e-20, w), (x, w * 1e12)):
        exact = call(T, p, hostile.double(), weight.double(), None)
        size = call(T, p, hostile.double().abs(), weight.double().abs(), None)
        assert (call(F, p, hostile, weight, None) - exact).norm() <= 1e-5 * size.norm()


def test_not_finite_comes_out_wherever_torch_has_it(tile: tuple[int, ...]) -> None:
    p = Problem.parse("conv n1 c4 k8 i10x11x12 f3x3x3 p1x1x1")
    for value in (float("nan"), float("inf"), -float("inf")):
        x, w, b, _ = data(p)
        x[0, 2, 5, 6, 7] = value
        expected, got = call(T, p, x, w, b), call(F, p, x, w, b)
        assert not got[~expected.isfinite()].isfinite().any()
        near = torch.nn.functional.max_pool3d((~expected.isfinite()).float(), 7, 1, 3) > 0
        assert got[~near].isfinite().all()


def test_large_finite_data_stays_finite(tile: tuple[int, ...]) -> None:
    p = Problem.parse("conv n1 c64 k16 i9x9x9 f3x3x3 p1x1x1 nobias")
    x, w, _, _ = data(p)
    for big in (x.sign() * 1e30, torch.full_like(x, 1e30)):
        for weight in (w.sign(), torch.ones_like(w)):
            assert call(F, p, big, weight, None).isfinite().all()


def test_same_bits_for_every_number_of_threads_and_every_neighbourhood() -> None:
    p = Problem.parse("conv n2 c32 k48 i33x34x35 f3x3x3 p1x1x1")
    x, w, b, dy = data(p)
    several = results(F, p, x, w, b, dy)
    torch.set_num_threads(1)
    for a, c in zip(several, results(F, p, x, w, b, dy), strict=True):
        assert torch.equal(a, c)
    alone = call(F, p, x[1:], w, b)
    assert torch.equal(alone, several[0][1:])


@pytest.mark.parametrize(
    ("text", "algorithm"),
    [
        ("conv n1 c32 k32 i128x128x128 f3x3x3 p1x1x1", "winograd"),
        ("conv n1 c32 k32 i128x128x128 f3x3x3 p1x1x1 bf16", "winograd"),
        ("conv n4 c32 k32 i256x256 f3x3 p1x1", "winograd"),
        ("conv n1 c32 k32 i32x64x64 f1x3x3 p0x1x1", "winograd"),
        ("conv n1 c32 k32 i128x128x128 f3x3x3 p1x1x1 f64", "direct"),
        ("conv n1 c1 k32 i128x128x128 f3x3x3 p1x1x1", "direct"),
        ("conv n1 c32 k64 i128x128x128 f3x3x3 s2x2x2 p1x1x1", "direct"),
        ("conv n1 c32 k64 i64x64x64 f3x3x3 d2x2x2 p2x2x2", "direct"),
        ("conv n1 c32 k32 i64x64x64 f5x5x5 p2x2x2", "direct"),
        ("conv n1 c320 k320 i8x8x8 f3x3x3 p1x1x1", "winograd"),
        ("conv n1 c320 k320 i4x4x4 f3x3x3 p1x1x1", "columns"),
        ("conv n1 c320 k320 i8x8x8 f3x3x3 s2x2x2 p1x1x1", "columns"),
        ("conv n1 c4096 k1000 i8 f1", "columns"),
        ("conv n1 c32 k32 i96x96x96 f3x3x3 p1x1x1 g32", "depthwise"),
    ],
)
def test_route(text: str, algorithm: str) -> None:
    convoxel.set_conv_algorithm("auto")
    p = Problem.parse(text)

    def chosen() -> str:
        return route.choose(
            *arguments(p), convoxel.get_float32_conv_precision(), convoxel.get_conv_algorithm()
        ).algorithm

    assert chosen() == algorithm
    convoxel.set_conv_algorithm("direct")
    assert chosen() == "direct"
    convoxel.set_conv_algorithm("auto")
    convoxel.set_float32_conv_precision("highest")
    assert (chosen() == algorithm) == (p.dtype != "f32" or algorithm != "winograd")


def arguments(p: Problem) -> tuple[str, tuple[int, ...], torch.dtype]:
    axes = zip(p.i, p.y_shape[2:], p.f, p.s, p.p, p.d, strict=True)
    flat = [v for a in ([(1, 1, 1, 1, 0, 1)] * (3 - p.rank) + list(axes)) for v in a]
    return "conv_forward", (p.n, p.c, p.k, p.g, *flat, 0, 0, 0, 0, 0), p.torch_dtype
