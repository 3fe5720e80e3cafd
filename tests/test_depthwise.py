"""Depthwise convolution, one input channel a group: exact, as precise as `highest` promises, and chosen."""

import itertools

import pytest
import torch
import torch.nn.functional as T
from torch import Tensor

import convoxel
from convoxel import functional as F
from convoxel.geometry import Problem
from tolerance import relative_l2

DTYPES = (torch.float32, torch.bfloat16, torch.float64)

# Whole and ragged vectors of channels and of voxels, kernels of 3, 5 and other taps, stride, dilation and both,
# padding from none to more than the kernel's, rows longer than a block, single voxels, every rank.
PROBLEMS = [
    "conv n2 c16 k16 i7x8x9 f3x3x3 p1x1x1 g16",
    "conv n1 c20 k20 i5x6x37 f3x3x3 p1x1x1 g20 nobias",
    "conv n1 c33 k33 i9x9x9 f5x5x5 p2x2x2 g33",
    "conv n1 c70 k70 i4x4x4 f3x3x3 p1x1x1 g70",
    "conv n2 c5 k5 i6x7x8 f3x3x3 g5",
    "conv n2 c19 k19 i12x13 f3x3 s2x2 p1x1 g19",
    "conv n1 c17 k17 i12x13 f5x5 s2x3 p2x1 d2x1 g17",
    "conv n1 c16 k16 i31 f3 p1 g16",
    "conv n1 c18 k18 i9x8x7 f7x7x7 p3x3x3 g18",
    "conv n1 c8 k8 i9x8x7 f2x1x4 s1x2x3 p1x0x2 d2x3x1 g8",
    "conv n1 c16 k16 i40x3x3 f3x1x1 p30x0x0 d29x1x1 g16",
    "conv n1 c16 k16 i6x7x8 f3x3x3 p2x3x4 s2x2x2 d3x2x1 g16",
    "conv n1 c2 k2 i3x3x1100 f3x3x3 p1x1x1 s1x1x2 d1x1x3 g2",
    "conv n3 c40 k40 i1x1x1 f3x3x3 p1x1x1 g40",
    "conv n2 c1 k1 i20x21x22 f9x9x9 p4x4x4",
    "conv n2 c6 k12 i9x10x11 f3x3x3 p1x1x1 g6",
    "conv n1 c4 k4 i11x12x34 f3x3x3 p1x1x1 s2x2x2 g4",
    "conv_transpose n2 c16 k16 i5x6x7 f3x3x3 s2x2x2 p1x1x1 o1x1x1 g16",
    "conv_transpose n1 c9 k9 i5x20 f4x4 s2x2 p1x1 g9",
]


def last(t: Tensor) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return t.to(memory_format=formats[t.dim()]) if t.dim() in formats else t


def call(module, p: Problem, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    function = getattr(module, f"{p.op}{p.rank}d")
    return function(x, w, b, p.s, p.p, *((p.o, p.g, p.d) if p.transposed else (p.d, p.g)))


def results(module, p: Problem, x: Tensor, w: Tensor, b: Tensor | None, dy: Tensor) -> list[Tensor]:
    """y and the gradients of x, w and b."""
    leaves = [t.detach().requires_grad_() for t in (x, w, b) if t is not None]
    y = call(module, p, *leaves, *[None] * (3 - len(leaves)))
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


@pytest.mark.parametrize("text", PROBLEMS)
def test_exact_on_integers(text: str, isa: str) -> None:
    p = Problem.parse(text)
    convoxel.set_strict(True)
    x, w, dy = (torch.randint(-3, 4, s).double() for s in (p.x_shape, p.w_shape, p.y_shape))
    b = torch.randint(-3, 4, (p.k,)).double() if p.bias else None
    exact = results(T, p, x, w, b, dy)
    for dtype, x_last, dy_last in itertools.product(DTYPES, (False, True), (False, True)):
        expected = [e.to(torch.float64 if dtype == torch.float64 else torch.float32).to(dtype) for e in exact]
        given = [last(x) if x_last else x, w, b, last(dy) if dy_last else dy]
        got = results(F, p, *[None if t is None else t.to(dtype) for t in given])
        for name, g, e in zip(("y", "dx", "dw", "db"), got, expected, strict=False):
            assert torch.equal(g, e), f"{name} {dtype} x_last={x_last} dy_last={dy_last}"


@pytest.mark.parametrize("x_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_outputs_that_are_stored_past_the_caches(dtype: torch.dtype, x_last: bool, isa: str) -> None:
    """32 MiB and more; with stride 1 the input gradient is the convolution with flipped weights."""
    x = torch.randint(-3, 4, (2, 32, 34, 80, 112) if dtype == torch.bfloat16 else (1, 32, 34, 80, 112)).to(
        dtype
    )
    w = torch.randint(-3, 4, (32, 1, 1, 3, 3)).to(dtype)
    x = last(x) if x_last else x
    expected = T.conv3d(x.float(), w.float(), None, 1, (0, 1, 1), 1, 32).to(dtype)
    assert expected.nbytes >= 32 << 20
    assert torch.equal(F.conv3d(x, w, None, 1, (0, 1, 1), 1, 32), expected)
    assert torch.equal(F.conv_transpose3d(x, w.flip((3, 4)), None, 1, (0, 1, 1), 0, 32), expected)


@pytest.mark.parametrize("x_last", [False, True])
@pytest.mark.parametrize("k", [3, 5])
def test_error_against_float64_as_highest_promises(k: int, x_last: bool, isa: str) -> None:
    """At most twice torch's own error, or 4 eps (gradients 8 eps) where torch's is smaller."""
    p = Problem.parse(f"conv n1 c24 k24 i20x20x40 f{k}x{k}x{k} p{k // 2}x{k // 2}x{k // 2} g24")
    x, w, dy = (torch.randn(s) for s in (p.x_shape, p.w_shape, p.y_shape))
    w, b = w * (2 / k**3) ** 0.5, torch.randn(p.k)
    given = [last(x), w, b, last(dy)] if x_last else [x, w, b, dy]
    exact = results(T, p, *[t.double() for t in given])
    eps = torch.finfo(torch.float32).eps
    for i, (g, t, e) in enumerate(zip(results(F, p, *given), results(T, p, *given), exact, strict=True)):
        assert relative_l2(g, e) <= max(2 * relative_l2(t, e), (8 if i else 4) * eps)


@pytest.mark.parametrize("x_last", [False, True])
def test_same_bits_for_every_run_and_thread_count(x_last: bool) -> None:
    p = Problem.parse("conv n2 c20 k20 i33x34x35 f3x3x3 p1x1x1 g20")
    x, w, b, dy = (torch.randn(s) for s in (p.x_shape, p.w_shape, (p.k,), p.y_shape))
    runs = []
    for threads in (1, 2, 2, 3):
        torch.set_num_threads(threads)
        runs.append(results(F, p, last(x) if x_last else x, w, b, last(dy) if x_last else dy))
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("x_last", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_comes_out_where_torchs_does(value: float, x_last: bool, isa: str) -> None:
    p = Problem.parse("conv n1 c18 k18 i6x7x21 f3x3x3 p1x0x0 g18")
    for place in ((2, 3, 4), (0, 0, 0), (5, 6, 20)):
        x, w, b, dy = (torch.randn(s) for s in (p.x_shape, p.w_shape, (p.k,), p.y_shape))
        x[(0, 17, *place)] = value
        given = [last(x), w, b, last(dy)] if x_last else [x, w, b, dy]
        for g, e in zip(results(F, p, *given), results(T, p, *[t.double() for t in given]), strict=True):
            assert torch.equal(g.isfinite(), e.isfinite())


def test_gradcheck_and_gradgradcheck() -> None:
    p = Problem.parse("conv n1 c2 k2 i2x3x3 f3x1x2 s1x2x1 p1x0x1 g2")
    for form in (torch.contiguous_format, torch.channels_last_3d):
        x = torch.randn(p.x_shape, dtype=torch.float64).to(memory_format=form).requires_grad_()
        w, b = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in (p.w_shape, (p.k,)))
        assert torch.autograd.gradcheck(lambda *a: call(F, p, *a), (x, w, b))
        assert torch.autograd.gradgradcheck(lambda *a: call(F, p, *a), (x, w, b))


@pytest.mark.parametrize(
    ("text", "algorithm"),
    [
        ("conv n1 c32 k32 i9x9x9 f3x3x3 p1x1x1 g32", "depthwise"),
        ("conv n1 c4 k16 i9x9 f3x3 p1x1 g4", "depthwise"),
        ("conv n1 c1 k1 i9x9 f11x11 p5x5", "depthwise"),
        ("conv n1 c1 k32 i9x9x9 f5x5x5 p2x2x2", "direct"),
        ("conv n1 c32 k32 i9x9x9 f3x3x3 p1x1x1 s2x2x2 g16", "direct"),
    ],
)
def test_route(text: str, algorithm: str) -> None:
    p = Problem.parse(text)
    x, w = torch.randn(p.x_shape), torch.randn(p.w_shape)
    for setting, expected in (("auto", algorithm), ("direct", "direct")):
        convoxel.set_conv_algorithm(setting)
        convoxel.reset_stats()
        call(F, p, x, w, None)
        assert convoxel.stats()["conv"]["by"] == {f"{expected} {convoxel.isa()}": 1}
