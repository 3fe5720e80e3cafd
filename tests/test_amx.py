"""bfloat16 convolutions by tiles (AMX), where this machine has them: against torch's in float64."""

import itertools
from math import prod

import pytest
import torch
import torch.nn.functional as T
from torch import Tensor

import convoxel
from cases import CONV, CONV_TRANSPOSE, problems
from convoxel import functional as F
from convoxel.geometry import Problem
from convoxel.ops import route
from test_winograd import arguments, call, last
from tolerance import bound

pytestmark = pytest.mark.skipif("amx" not in convoxel.isas(), reason="this CPU has no AMX for bfloat16")

# Beside those that all algorithms share: rows shorter and longer than a tile, slabs that keep slices of the one before
# and a last one with fewer, tails of input and output channels, phases.
TILES = problems(
    "conv n1 c32 k32 i9x40x40 f3x3x3 p1x1x1",
    "conv n1 c40 k48 i9x17x33 f3x3x3 p1x1x1",
    "conv n2 c64 k80 i6x8x8 f3x3x3 p1x1x1",
    "conv n1 c96 k33 i40x21x20 f3x3x3 p1x1x1",
    "conv n1 c160 k32 i4x4x4 f3x3x3 p1x1x1",
    "conv n2 c32 k64 i7x30x31 f3x3x3 s2x2x2 p1x1x1",
    "conv n1 c320 k16 i6x6x6 f3x3x3 s2x2x2 p1x1x1",
    "conv n1 c33 k65 i30x72 f1x1",
    "conv n2 c64 k96 i3x5x32 f1x1x1",
    "conv n1 c32 k32 i300 f5 p2",
    "conv n2 c32 k32 i70x50 f3x3 p1x1",
    "conv_transpose n1 c64 k32 i5x9x10 f2x2x2 s2x2x2",
)


@pytest.fixture(autouse=True)
def _amx() -> None:
    convoxel.set_conv_algorithm("amx")
    convoxel.set_strict(True)


def data(p: Problem, whole: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Normal data, or small whole numbers: their sums of thousands are exact in float32."""

    def of(shape: tuple[int, ...]) -> Tensor:
        return (torch.randint(-1, 2, shape) if whole else torch.randn(shape)).bfloat16()

    return of(p.x_shape), of(p.w_shape), of((p.k,)) if p.bias else None, of(p.y_shape)


def results(module, p: Problem, x: Tensor, w: Tensor, b: Tensor | None, dy: Tensor) -> dict[str, Tensor]:
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    y = call(module, p, x, w, b)
    return dict(zip(("y", "dx", "dw"), (y.detach(), *torch.autograd.grad(y, (x, w), dy)), strict=True))


def exact(p: Problem, x: Tensor, w: Tensor, b: Tensor | None, dy: Tensor) -> dict[str, Tensor]:
    return results(T, p, x.double(), w.double(), None if b is None else b.double(), dy.double())


def served() -> dict[str, set[str]]:
    return {op: {by.split()[0] for by in row["by"]} for op, row in convoxel.stats().items()}


@pytest.mark.parametrize("p", [*CONV, *CONV_TRANSPOSE, *TILES], ids=str)
def test_whole_numbers_are_exact_in_both_layouts(p: Problem) -> None:
    x, w, b, dy = data(p, True)
    expected = exact(p, x, w, b, dy)
    for x_last, dy_last in itertools.product((False, True), repeat=2):
        xl, dyl = (last(t) if t.dim() > 3 and on else t for t, on in ((x, x_last), (dy, dy_last)))
        got = results(F, p, xl, w, b, dyl)
        for name in ("y", "dx", "dw"):
            assert torch.equal(got[name], expected[name].bfloat16()), f"{name} {x_last} {dy_last}"
    if p.g == 1:
        assert all("amx" in served()[op] for op in ("conv", "conv_input_grad", "conv_weight_grad"))


@pytest.mark.parametrize("p", TILES, ids=str)
def test_error_is_one_rounding_of_the_output(p: Problem) -> None:
    x, w, b, dy = data(p, False)
    got, expected = results(F, p, x, w, b, dy), exact(p, x, w, b, dy)
    sizes = exact(p, x.abs(), w.abs(), None if b is None else b.abs(), dy.abs())
    lengths = {"y": p.c * prod(p.f), "dx": p.k * prod(p.f), "dw": dy.numel() // p.k}
    for name in ("y", "dx", "dw"):
        error = (got[name].double() - expected[name]).abs()
        assert (error <= bound(torch.bfloat16, lengths[name]) * sizes[name]).all(), name


def test_not_finite_comes_out_where_torch_has_it() -> None:
    for text in ("conv n1 c40 k20 i5x7x9 f3x3x3 p1x1x1", "conv n1 c33 k16 i6x6x40 f3x3x3 s2x2x2 p1x1x1"):
        p = Problem.parse(text)
        for value in (float("nan"), float("inf")):
            x, w, b, dy = data(p, False)
            x[0, 2, 3, 4, 5] = dy[0, 1, 1, 2, 3] = value
            got, expected = results(F, p, x, w, b, dy), exact(p, x, w, b, dy)
            for name in ("y", "dx", "dw"):
                assert torch.equal(got[name].isnan(), expected[name].isnan()), name
                assert torch.equal(got[name].isinf(), expected[name].isinf()), name


def test_same_bits_for_every_number_of_threads() -> None:
    for text in ("conv n2 c40 k70 i18x19x20 f3x3x3 p1x1x1", "conv n1 c320 k320 i4x4x4 f3x3x3 p1x1x1"):
        p = Problem.parse(text)
        values = data(p, False)
        several = results(F, p, *values)
        torch.set_num_threads(1)
        alone = results(F, p, *values)
        torch.set_num_threads(2)
        for name in ("y", "dx", "dw"):
            assert torch.equal(several[name], alone[name]), name


def test_large_outputs_go_past_the_caches_unchanged() -> None:
    x = last(torch.randint(-1, 2, (1, 1, 64, 128, 128)).bfloat16().expand(1, 32, -1, -1, -1))
    w = torch.randint(-1, 2, (32, 32, 1, 1, 1)).bfloat16()
    y = F.conv3d(x, w)
    assert y.numel() * 2 > 2**25
    assert torch.equal(y, (w.float().sum(1) * x[:, :1].float()).bfloat16())


def test_torch_beside_it_keeps_its_tiles() -> None:
    """Both set and hand back the tiles' shapes; neither may find the other's."""
    x, w = torch.randn(1, 40, 20, 20).bfloat16(), torch.randn(24, 40, 3, 3).bfloat16()
    ours, theirs = F.conv2d(x, w), T.conv2d(x, w)
    for _ in range(3):
        assert torch.equal(T.conv2d(x, w), theirs)
        assert torch.equal(F.conv2d(x, w), ours)


@pytest.mark.parametrize(
    ("text", "algorithm"),
    [
        ("conv n1 c32 k32 i128x128x128 f3x3x3 p1x1x1 bf16", "amx"),
        ("conv n1 c32 k64 i128x128x128 f3x3x3 s2x2x2 p1x1x1 bf16", "amx"),
        ("conv n1 c320 k320 i4x4x4 f3x3x3 p1x1x1 bf16", "amx"),
        ("conv n1 c32 k32 i128x128x128 f3x3x3 p1x1x1", "winograd"),
        ("conv n1 c32 k32 i128x128x128 f3x3x3 p1x1x1 g2 bf16", "winograd"),
        ("conv n1 c32 k32 i128x128x128 f3x3x3 p1x1x1 g32 bf16", "depthwise"),
    ],
)
def test_route(text: str, algorithm: str) -> None:
    p = Problem.parse(text)

    def chosen(isa: str, wanted: str = "auto") -> route.Route:
        return route.choose(*arguments(p), "high", wanted, isa)

    assert chosen("amx").algorithm == algorithm
    assert chosen("avx512bf16").algorithm != "amx"
    assert chosen("amx", "direct").algorithm == "direct"
    if p.g == 2:
        assert "groups" in chosen("amx").why


def test_an_instruction_set_without_tiles_refuses_them_in_words() -> None:
    convoxel.set_isa("avx512")
    geometry = [*arguments(Problem.parse("conv n1 c1 k1 i1 f1"))[1][:22], 0, 0, 1, 0, 0, 0, 0, 0, 4, 0, 0, 0]
    with pytest.raises(ValueError, match="avx512 has no such algorithm"):
        convoxel._C.conv_forward_scratch(1, geometry, 1)
