"""Pooling and its gradients: windows, values, indices, layouts, and what is refused or handed to torch."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as T
from torch import Tensor

import convoxel
from convoxel import functional as F
from convoxel import nn
from tolerance import bound

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
OPS = torch.ops.convoxel
LAYOUTS = list(itertools.product(DTYPES, (False, True), (False, True)))


def laid_out(x: Tensor, last: bool) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.contiguous(memory_format=formats[x.dim()]) if last and x.dim() in formats else x


def pool(module, name: str, x: Tensor, *args, **how):
    return getattr(module, f"{name}{x.dim() - 2}d")(x, *args, **how)


def value_and_gradient(module, name: str, x: Tensor, dy: Tensor, *args, **how) -> tuple[Tensor, Tensor]:
    leaf = x.detach().requires_grad_()
    y = pool(module, name, leaf, *args, **how)
    return y.detach(), torch.autograd.grad(y, leaf, dy)[0]


def ids(case) -> str:
    return str(case).replace(" ", "")


# Windows that halve, overlap, leave gaps, hang over the edges, and hold more than 256 taps.
MAX = [
    ((2, 3, 17), {"kernel_size": 2}),
    ((1, 1, 1), {"kernel_size": 1}),
    ((2, 2, 50), {"kernel_size": 3, "stride": 1, "padding": 1}),
    ((1, 3, 41), {"kernel_size": 5, "stride": 3, "padding": 2, "dilation": 2, "ceil_mode": True}),
    ((1, 2, 700), {"kernel_size": 300, "stride": 7}),
    ((1, 1, 5), {"kernel_size": 3, "stride": 7, "padding": 1}),
    ((2, 5, 7, 9), {"kernel_size": 2}),
    ((1, 33, 6, 40), {"kernel_size": (2, 2), "stride": 2}),
    ((1, 18, 11, 13), {"kernel_size": 3, "stride": 2, "padding": 1}),
    ((1, 4, 9, 70), {"kernel_size": (3, 2), "stride": (1, 3), "padding": (1, 0), "ceil_mode": True}),
    ((1, 3, 8, 37), {"kernel_size": (1, 3), "stride": (2, 1), "dilation": (1, 3)}),
    ((1, 2, 20, 19), {"kernel_size": 17, "stride": 1, "padding": 8}),
    ((2, 3, 4, 5, 6), {"kernel_size": 2}),
    ((1, 40, 5, 6, 7), {"kernel_size": 3, "stride": 2, "padding": 1}),
    ((1, 2, 4, 5, 40), {"kernel_size": 3, "stride": 1, "padding": 1}),
    ((1, 17, 3, 7, 9), {"kernel_size": (1, 2, 3), "stride": (1, 2, 2), "padding": (0, 1, 1), "ceil_mode": True}),
    ((1, 2, 9, 9, 33), {"kernel_size": (3, 2, 2), "dilation": (2, 3, 1), "stride": (2, 1, 4)}),
    ((1, 3, 8, 8, 9), {"kernel_size": 7, "stride": 1, "padding": 3}),
]  # fmt: skip

AVG = [
    ((2, 3, 17), {"kernel_size": 2}),
    ((1, 1, 1), {"kernel_size": 1}),
    ((2, 2, 50), {"kernel_size": 3, "stride": 1, "padding": 1}),
    ((1, 3, 41), {"kernel_size": 6, "stride": 4, "padding": 3, "ceil_mode": True, "count_include_pad": False}),
    ((2, 5, 7, 9), {"kernel_size": 2}),
    ((1, 33, 6, 40), {"kernel_size": 2, "ceil_mode": True}),
    ((1, 18, 11, 13), {"kernel_size": 3, "stride": 2, "padding": 1, "divisor_override": -5}),
    ((1, 4, 9, 70), {"kernel_size": (3, 2), "stride": (1, 3), "padding": (1, 0), "ceil_mode": True}),
    ((1, 2, 20, 19), {"kernel_size": 17, "stride": 5, "padding": 8, "count_include_pad": False}),
    ((2, 3, 4, 5, 6), {"kernel_size": 2}),
    ((1, 40, 5, 6, 7), {"kernel_size": 3, "stride": 2, "padding": 1, "count_include_pad": False}),
    ((1, 2, 4, 5, 40), {"kernel_size": 3, "stride": 1, "padding": 1}),
    ((1, 17, 3, 7, 9), {"kernel_size": (1, 2, 3), "stride": (1, 2, 2), "padding": (0, 1, 1), "ceil_mode": True}),
    ((1, 2, 9, 9, 33), {"kernel_size": (3, 2, 2), "stride": (2, 4, 3), "divisor_override": 7}),
]  # fmt: skip

# The outputs are one, divide the input, do not, equal it, or are more.
ADAPTIVE = [
    ((2, 3, 17), 1),
    ((1, 2, 48), 16),
    ((1, 1, 5), 12),
    ((2, 2, 41), 40),
    ((1, 5, 7, 9), 1),
    ((1, 18, 8, 6), (4, 3)),
    ((1, 3, 11, 40), (5, None)),
    ((1, 33, 5, 4), (7, 3)),
    ((2, 3, 4, 5, 6), 1),
    ((1, 40, 6, 4, 8), (3, 2, 4)),
    ((1, 17, 5, 7, 9), (2, 3, 4)),
    ((1, 2, 3, 4, 33), (4, 4, 20)),
    ((1, 1, 1, 1, 1), 2),
]


# Values and gradients -----------------------------------------------------------------------------


def check_maximum(name: str, shape: tuple[int, ...], *args, **how) -> None:
    """Small integers: many ties, and every sum is exact. Torch's indices lie in the input for all of these."""
    convoxel.set_strict(True)
    x = torch.randint(-3, 4, shape)
    y, indices = pool(T, name, x.double(), *args, return_indices=True, **how)
    dy = torch.randint(-3, 4, y.shape)
    expected = value_and_gradient(T, name, x.double(), dy.double(), *args, **how)
    for dtype, x_last, dy_last in LAYOUTS:
        case = f"{dtype} x_last={x_last} dy_last={dy_last}"
        ours, g = laid_out(x.to(dtype), x_last), laid_out(dy.to(dtype), dy_last)
        for got, e in zip(value_and_gradient(F, name, ours, g, *args, **how), expected, strict=True):
            assert torch.equal(got, e.to(dtype)), case
        values, places = pool(F, name, ours, *args, return_indices=True, **how)
        assert torch.equal(values, y.to(dtype)) and torch.equal(places, indices), case
        assert torch.equal(pool(F, name, ours, *args, **how), values), case  # without codes
        assert places.dtype == torch.int64 and values.stride() == places.stride(), case


@pytest.mark.parametrize("case", MAX, ids=ids)
def test_maximum_picks_torchs_voxels(case, isa: str) -> None:
    check_maximum("max_pool", case[0], **case[1])


@pytest.mark.parametrize("case", ADAPTIVE, ids=ids)
def test_adaptive_maximum_picks_torchs_voxels(case, isa: str) -> None:
    check_maximum("adaptive_max_pool", *case)


def check_average(name: str, shape: tuple[int, ...], *args, **how) -> None:
    convoxel.set_strict(True)
    x = torch.randn(shape, dtype=torch.float64)
    dy = torch.randn(pool(T, name, x, *args, **how).shape, dtype=torch.float64)
    for dtype, x_last, dy_last in LAYOUTS:
        a, b = x.to(dtype), dy.to(dtype)
        got = value_and_gradient(F, name, laid_out(a, x_last), laid_out(b, dy_last), *args, **how)
        expected = value_and_gradient(T, name, a.double(), b.double(), *args, **how)
        terms = value_and_gradient(T, name, a.double().abs(), b.double().abs(), *args, **how)
        for g, e, t in zip(got, expected, terms, strict=True):
            assert g.dtype == dtype
            assert ((g.double() - e).abs() <= bound(dtype, x.numel()) * t.abs()).all(), (
                dtype,
                x_last,
                dy_last,
            )


@pytest.mark.parametrize("case", AVG, ids=ids)
def test_average_is_within_rounding_of_torch(case, isa: str) -> None:
    check_average("avg_pool", case[0], **case[1])


@pytest.mark.parametrize("case", ADAPTIVE, ids=ids)
def test_adaptive_average_is_within_rounding_of_torch(case, isa: str) -> None:
    check_average("adaptive_avg_pool", *case)


@pytest.mark.parametrize("case", [c for c in AVG if len(c[0]) > 3], ids=ids)
def test_sums_are_exact_on_integers(case, isa: str) -> None:
    shape, how = case[0], {**case[1], "divisor_override": 1}
    x = torch.randint(-2, 3, shape)
    dy = torch.randint(-2, 3, pool(T, "avg_pool", x.double(), **how).shape)
    expected = value_and_gradient(T, "avg_pool", x.double(), dy.double(), **how)
    for dtype, x_last, dy_last in LAYOUTS:
        tensors = laid_out(x.to(dtype), x_last), laid_out(dy.to(dtype), dy_last)
        got = value_and_gradient(F, "avg_pool", *tensors, **how)
        assert all(torch.equal(g, e.to(dtype)) for g, e in zip(got, expected, strict=True))


@pytest.mark.parametrize("last", [False, True])
def test_the_mean_of_a_scan_keeps_its_digits(last: bool, isa: str) -> None:
    """Raw Hounsfield units, mean 1e4: a plain running sum in float32 is off by 1e-4."""
    x = laid_out(1e4 + torch.randn(1, 3, 40, 50, 60), last)
    error = F.adaptive_avg_pool3d(x, 1).double() - x.double().mean((2, 3, 4), keepdim=True)
    assert error.abs().max() < 2e-7 * 1e4


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    "name,width,how",
    [
        ("max_pool", 1800, {"kernel_size": (1, 900), "stride": 1}),
        ("adaptive_max_pool", 7, {"output_size": (1, 3000)}),
        ("avg_pool", 1800, {"kernel_size": (1, 900), "stride": 1, "divisor_override": 1}),
    ],
)
def test_bfloat16_gradients_are_summed_in_float32(name: str, width: int, how, last: bool, isa: str) -> None:
    """A sum of ones in bfloat16 would stop at 256."""
    x = laid_out(torch.zeros(1, 3, 2, width).bfloat16(), last)
    x[..., width // 2] = 1
    dy = torch.ones(pool(T, name, x.float(), **how).shape)
    expected = value_and_gradient(T, name, x.float(), dy, **how)[1]
    assert expected.max() > 256
    got = value_and_gradient(F, name, x, dy.bfloat16(), **how)[1]
    assert torch.equal(got, expected.bfloat16())


@pytest.mark.parametrize("dy_last", [False, True])
@pytest.mark.parametrize("name,args", [("max_pool", (2,)), ("avg_pool", (2,)), ("adaptive_avg_pool", (3,))])
def test_layouts_are_torchs(name: str, args, dy_last: bool) -> None:
    """Results and gradients are in the input's layout, whatever the gradient came in (torch's 3-D means are
    always contiguous)."""
    for shape, last in itertools.product([(2, 3, 6, 7), (2, 3, 4, 6, 7)], (False, True)):
        x = laid_out(torch.randn(shape), last)
        y = torch.empty(pool(T, name, x, *args).shape)
        got, dx = value_and_gradient(F, name, x, laid_out(torch.randn(y.shape), dy_last), *args)
        assert got.stride() == laid_out(y, last).stride() and dx.stride() == x.stride()


def spaced(shape) -> Tensor:
    """Values that differ by more than gradcheck's step, so that no maximum changes hands."""
    return torch.randperm(torch.Size(shape).numel()).double().view(shape).requires_grad_()


TINY = [
    ("max_pool", (1, 2, 5), {"kernel_size": 3, "stride": 2, "padding": 1}),
    ("max_pool", (2, 1, 4, 3), {"kernel_size": 2, "stride": 1, "dilation": (2, 1)}),
    ("max_pool", (1, 2, 3, 4, 3), {"kernel_size": 2, "ceil_mode": True}),
    ("adaptive_max_pool", (1, 2, 5, 4), {"output_size": (3, 6)}),
    ("avg_pool", (1, 2, 5), {"kernel_size": 3, "stride": 2, "padding": 1}),
    ("avg_pool", (1, 2, 3, 4, 3), {"kernel_size": 2, "padding": 1, "count_include_pad": False}),
    ("adaptive_avg_pool", (1, 2, 5, 4), {"output_size": (3, 6)}),
]


@pytest.mark.parametrize("name,shape,how", TINY, ids=ids)
@pytest.mark.parametrize("last", [False, True])
def test_gradcheck_and_gradgradcheck(name: str, shape, how, last: bool) -> None:
    x = laid_out(spaced(shape), last).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: pool(F, name, x, **how), x)
    assert torch.autograd.gradgradcheck(lambda x: pool(F, name, x, **how), x)


@pytest.mark.parametrize("last", [False, True])
def test_nan_and_infinity_come_out_where_torchs_do(last: bool, isa: str) -> None:
    convoxel.set_strict(True)
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1.0])
    for case in MAX + AVG + ADAPTIVE:
        name = "max_pool" if case in MAX else "avg_pool" if case in AVG else "adaptive_max_pool"
        args, how = ((), case[1]) if isinstance(case[1], dict) else (case[1:], {})
        x = special[torch.randint(0, 6, case[0])]
        x[0, 0] = -torch.inf
        expected, got = (pool(m, name, laid_out(x, last and m is F), *args, **how) for m in (T, F))
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=0, equal_nan=True)
        if name != "avg_pool":
            indices = (
                pool(m, name, laid_out(x, last and m is F), *args, return_indices=True, **how)[1]
                for m in (T, F)
            )
            assert torch.equal(*indices), case
        dy = special[torch.randint(0, 6, got.shape)]
        expected, got = (
            value_and_gradient(m, name, laid_out(x, last and m is F), dy, *args, **how)[1] for m in (T, F)
        )
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_a_window_between_two_paddings_is_empty() -> None:
    """Its taps are at -1 and 3. (torch's gradient for it writes behind the end of x.)"""
    x = torch.arange(3.0).view(1, 1, 3)
    y, dx = value_and_gradient(F, "max_pool", x, torch.ones(1, 1, 1), 2, 1, 1, 4)
    assert y.item() == -torch.inf and not dx.any()
    assert T.max_pool1d(x, 2, 1, 1, 4).item() == -torch.inf


@pytest.mark.parametrize("last", [False, True])
def test_same_bits_for_every_thread_count(last: bool) -> None:
    x = laid_out(torch.randn(2, 20, 19, 21, 33), last)
    for name, how in (
        ("max_pool", {"kernel_size": 3, "stride": 2, "padding": 1}),
        ("avg_pool", {"kernel_size": 3, "stride": 2, "padding": 1}),
        ("adaptive_max_pool", {"output_size": 7}),
        ("adaptive_avg_pool", {"output_size": 1}),
        ("adaptive_avg_pool", {"output_size": 7}),
    ):
        dy = laid_out(torch.randn(pool(F, name, x, **how).shape), last)
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(value_and_gradient(F, name, x, dy, **how))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), name


# What torch accepts -------------------------------------------------------------------------------


@pytest.mark.parametrize("name,args", [("max_pool", (3, 2, 1)), ("avg_pool", (3, 2, 1)), ("adaptive_avg_pool", (4,)),
                                       ("adaptive_max_pool", (4,))])  # fmt: skip
def test_strided_expanded_unbatched_and_empty(name: str, args) -> None:
    base = torch.randn(4, 6, 9, 11)
    for x in (
        base[::2, 1:5, ::3, 1:8],
        base[:1, :1].expand(3, 5, 9, 11),
        base.permute(0, 2, 3, 1),
        base.flip(3),
    ):
        y = pool(T, name, x, *args)
        for dy in (
            torch.randn(y.shape),
            torch.ones(1, 1, 1, 1).expand(y.shape),
            torch.randn(y.shape[::-1]).permute(3, 2, 1, 0),
        ):
            got, expected = (value_and_gradient(m, name, x, dy, *args) for m in (F, T))
            torch.testing.assert_close(got, expected)
    for rank in (1, 2, 3):
        one = torch.randn(3, *(5, 6, 7)[:rank])
        got, expected = (getattr(m, f"{name}{rank}d")(one, *args) for m in (F, T))
        torch.testing.assert_close(got, expected)
        x = torch.randn(0, 3, *(5, 6, 7)[:rank])
        y, dx = value_and_gradient(F, name, x, pool(F, name, x, *args), *args)
        assert y.shape == pool(T, name, x, *args).shape and dx.shape == x.shape


@pytest.mark.parametrize(
    "call",
    [
        lambda m, x: m.max_pool2d(x, np.int64(2)),
        lambda m, x: m.max_pool2d(x, torch.tensor(3), (2,), [1]),
        lambda m, x: m.max_pool2d(x, kernel_size=(2, 3), stride=[]),
        lambda m, x: m.max_pool2d(x, 2, None, 1, 2, True, 1)[1],
        lambda m, x: m.avg_pool2d(x, 3, (), 1, True, False, 2),
        lambda m, x: m.avg_pool2d(x, (2,), divisor_override=-3),
        lambda m, x: m.adaptive_avg_pool2d(x, (None, 3)),
        lambda m, x: m.adaptive_avg_pool2d(x, 0),
        lambda m, x: m.adaptive_max_pool2d(x, [4, None], True)[1],
        lambda m, x: m.adaptive_max_pool2d(x, (0, 2)),
        lambda m, x: m.avg_pool1d(x[0], 9, 1, 4),
        lambda m, x: m.adaptive_max_pool1d(x[0], (3,)),
    ],
)
def test_arguments_in_every_form_that_torch_takes(call) -> None:
    convoxel.set_strict(True)
    x = torch.randn(2, 3, 8, 9)
    torch.testing.assert_close(call(F, x), call(T, x))


NAMES = [
    f"{n}{r}d" for n in ("max_pool", "avg_pool", "adaptive_max_pool", "adaptive_avg_pool") for r in (1, 2, 3)
]


@pytest.mark.parametrize("name", NAMES)
def test_autocast_is_torchs(name: str) -> None:
    x = torch.randn(1, 2, *(4,) * int(name[-2]))
    for dtype, indices in itertools.product(DTYPES, (False, True)):
        if "avg" in name and indices:
            continue
        how = {"return_indices": True} if indices else {}
        with torch.autocast("cpu", torch.bfloat16):
            got, expected = (getattr(m, name)(x.to(dtype), 2, **how) for m in (F, T))
        torch.testing.assert_close(got, expected)


# torch's machinery --------------------------------------------------------------------------------

STEPS = ((2, 2, 3), (2, 2, 2), (1, 2, 1), (0, 1, 0), (1, 1, 2))  # out, kernel, stride, padding, dilation
UNEVEN = ((2, 3, 4), (), (), (), ())


@pytest.mark.parametrize("how", [STEPS, UNEVEN], ids=["steps", "adaptive"])
@pytest.mark.parametrize("last", [False, True])
def test_opcheck(how, last: bool) -> None:
    x = laid_out(spaced((2, 3, 3, 3, 5)), last).detach().requires_grad_()
    size = x.shape[2:]
    y, codes = OPS.max_pool(x.detach(), *how, True)
    dy = torch.randn_like(y).requires_grad_()
    for op, *args in (
        (OPS.max_pool, x, *how, True),
        (OPS.max_pool, x, *how, False),
        (OPS.max_pool_input_grad, dy, codes, size, *how),
        (OPS.max_pool_pick, x, codes, *how),
        (OPS.max_pool_indices, codes, size, *how),
        (OPS.avg_pool, x, *how, True, 0),
        (OPS.avg_pool_input_grad, dy, size, *how, False, 0),
    ):
        torch.library.opcheck(op.default, args)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: m.max_pool3d(x, 2, 1),
        lambda m, x: m.max_pool3d(x, 2, return_indices=True)[0],
        lambda m, x: m.avg_pool3d(x, 3, 2, 1),
        lambda m, x: m.adaptive_max_pool3d(x, (2, 3, 2)),
        lambda m, x: m.adaptive_avg_pool3d(x, (1, 3, 2)),
    ],
)
def test_vmap_grad_and_compile(function) -> None:
    convoxel.set_strict(True)
    x = torch.randn(3, 2, 2, 3, 4, 5)
    for axis in (0, 1):
        got = torch.func.vmap(lambda x: function(F, x), axis)(x)
        torch.testing.assert_close(got, torch.stack([function(T, t) for t in x.unbind(axis)]))

    def loss(x: Tensor) -> Tensor:
        return function(F, x).square().sum()

    gradients = torch.func.vmap(torch.func.grad(loss))(x)
    expected = torch.func.vmap(torch.func.grad(lambda x: function(T, x).square().sum()))(x)
    torch.testing.assert_close(gradients, expected)
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for t in (x[0], torch.randn(1, 4, 5, 6, 7)):
        results = []
        for f in (compiled, loss):
            leaf = t.clone().requires_grad_()
            value = f(leaf)
            results.append((value, *torch.autograd.grad(value, leaf)))
        torch.testing.assert_close(*results)


def test_nothing_is_kept_where_nothing_is_differentiated() -> None:
    """Codes take memory and time; only those who need them get them, and a later gradient makes its own."""
    x = torch.randn(1, 2, 4, 4, 4)
    assert OPS.max_pool(x, (2, 2, 2), *[(2, 2, 2)] * 2, (0, 0, 0), (1, 1, 1), False)[1].numel() == 0
    leaf = x.clone().requires_grad_()
    y, codes = OPS.max_pool(leaf, (2, 2, 2), *[(2, 2, 2)] * 2, (0, 0, 0), (1, 1, 1), False)
    expected = value_and_gradient(T, "max_pool", x, torch.ones_like(y), 2)[1]
    assert torch.equal(torch.autograd.grad(y.sum(), leaf)[0], expected)


# Refused, or handed to torch ----------------------------------------------------------------------

X = torch.ones(1, 2, 5, 5)


@pytest.mark.parametrize(
    "make",
    [
        lambda m: m.max_pool2d(X, 0),
        lambda m: m.max_pool2d(X, -1),
        lambda m: m.max_pool2d(X, 2.0),
        lambda m: m.max_pool2d(X, True),
        lambda m: m.max_pool2d(X, "2"),
        lambda m: m.max_pool2d(X, None),
        lambda m: m.max_pool2d(X, (2, 2, 2)),
        lambda m: m.max_pool2d(X, ()),
        lambda m: m.max_pool2d(X, 6),
        lambda m: m.max_pool2d(X, 2, 0),
        lambda m: m.max_pool2d(X, 2, -1),
        lambda m: m.max_pool2d(X, 2, 1, -1),
        lambda m: m.max_pool2d(X, 2, 1, 2),
        lambda m: m.max_pool2d(X, 2, 1, 0, 0),
        lambda m: m.max_pool2d(X, 2, 1, 0, 2**40),
        lambda m: m.max_pool2d(X, 2, ceil_mode=1),
        lambda m: m.max_pool3d(X, (2, 2)),
        lambda m: m.avg_pool2d(X, 0),
        lambda m: m.avg_pool2d(X, 2, 0),
        lambda m: m.avg_pool2d(X, 2, 1, 2),
        lambda m: m.avg_pool2d(X, 6),
        lambda m: m.avg_pool2d(X, 2, divisor_override=0),
        lambda m: m.avg_pool2d(X, 2, divisor_override=2.0),
        lambda m: m.avg_pool2d(X, 2, count_include_pad=1),
        lambda m: m.avg_pool2d(X, 2.5),
        lambda m: m.avg_pool3d(X, 6, 1, 3),
        lambda m: m.adaptive_avg_pool2d(X, -1),
        lambda m: m.adaptive_avg_pool2d(X, (3,)),
        lambda m: m.adaptive_avg_pool2d(X, (3, 3, 3)),
        lambda m: m.adaptive_avg_pool2d(X, None),
        lambda m: m.adaptive_avg_pool2d(X, 2.0),
        lambda m: m.adaptive_avg_pool2d(X, (2.0, 2)),
        lambda m: m.adaptive_avg_pool1d(X[0], None),
        lambda m: m.adaptive_avg_pool1d(X[0], (None,)),
        lambda m: m.adaptive_avg_pool1d(X[0], 2**62),
        lambda m: m.adaptive_max_pool2d(X, (3,)),
        lambda m: m.adaptive_max_pool2d(X, -2),
        lambda m: m.avg_pool2d(X, 1, padding=1, ceil_mode="no"),
    ],
)
def test_what_torch_rejects_is_rejected_alike(make) -> None:
    with pytest.raises((RuntimeError, TypeError, ValueError)) as theirs:
        make(T)
    with pytest.raises(theirs.type) as ours:
        make(F)
    assert len(str(ours.value)) < 400


def outcome(call):
    try:
        return call().shape
    except Exception as error:
        return type(error)


@pytest.mark.parametrize("name", NAMES)
def test_axes_and_empty_axes_are_accepted_as_in_torch(name: str) -> None:
    rank = int(name[-2])
    shapes = [(3,) * n for n in range(7)]
    shapes += [s for n in (rank + 1, rank + 2) for s in itertools.product((0, 3), repeat=n)]
    for shape in shapes:
        ours, theirs = (outcome(lambda m=m: getattr(m, name)(torch.ones(shape), 2)) for m in (F, T))  # noqa: B023
        assert ours == theirs, shape


@pytest.mark.parametrize("name", NAMES)
def test_input_must_be_a_tensor(name: str) -> None:
    with pytest.raises(TypeError, match="must be Tensor, not list"):
        getattr(F, name)([[[1.0]]], 1)


V = torch.ones(1, 1, 4, 4, 4)
HALVES = ((2, 2, 2), (2, 2, 2), (2, 2, 2), (0, 0, 0), (1, 1, 1))
CODES = torch.zeros(1, 1, 2, 2, 2, dtype=torch.uint8)


@pytest.mark.parametrize(
    "bad",
    [
        lambda: OPS.max_pool(V[0], *HALVES, True),
        lambda: OPS.max_pool(V.int(), *HALVES, True),
        lambda: OPS.max_pool(V, (3, 2, 2), *HALVES[1:], True),
        lambda: OPS.max_pool(V, (2, 2), *HALVES[1:], True),
        lambda: OPS.max_pool(V, (2, 2, 2), (2, 2), *HALVES[2:], True),
        lambda: OPS.max_pool(V, (2, 2, 2), (0, 2, 2), *HALVES[2:], True),
        lambda: OPS.max_pool(V, (2, 2, 2), (2, 2, 2), (0, 0, 0), *HALVES[3:], True),
        lambda: OPS.max_pool(V, (3, 3, 3), (2, 2, 2), (2, 2, 2), (2, 2, 2), (1, 1, 1), True),
        lambda: OPS.max_pool(V, (-1, 2, 2), (), (), (), (), True),
        lambda: OPS.max_pool(V[..., :0], (2, 2, 2), (), (), (), (), True),
        lambda: OPS.max_pool_input_grad(CODES.float(), CODES, (7, 4, 4), *HALVES),
        lambda: OPS.max_pool_input_grad(CODES.float(), CODES.int(), (4, 4, 4), *HALVES),
        lambda: OPS.max_pool_input_grad(CODES.float(), CODES[..., :1], (4, 4, 4), *HALVES),
        lambda: OPS.max_pool_input_grad(CODES, CODES, (4, 4, 4), *HALVES),
        lambda: OPS.max_pool_pick(V, CODES[:0], *HALVES),
        lambda: OPS.max_pool_indices(CODES.float(), (4, 4, 4), *HALVES),
        lambda: OPS.avg_pool(V, *HALVES[:3], (0, 0, 0), (1, 1, 0), True, 0),
        lambda: OPS.avg_pool(V, (2, 2, 2), (), (), (), (), True, 3),
        lambda: OPS.avg_pool(V, (2**40, 2, 2), (), (), (), (), True, 0),
        lambda: OPS.avg_pool_input_grad(V, (4, 4, 4), *HALVES, True, 0),
    ],
)
def test_operators_check_without_the_functions_in_front(bad) -> None:
    with pytest.raises(RuntimeError, match=r"\w+_pool\w*: .*(received|got)"):
        bad()


@pytest.mark.parametrize("how", [HALVES, ((2, 2, 2), (), (), (), ()), ((3, 3, 3), (), (), (), ())], ids=ids)
@pytest.mark.parametrize("last", [False, True])
def test_codes_that_no_maximum_gave_stay_inside(how, last: bool, isa: str) -> None:
    codes = laid_out(torch.full((1, 3, *how[0]), 255, dtype=torch.uint8), last)
    dx = OPS.max_pool_input_grad(torch.ones(codes.shape), codes, (4, 4, 4), *how)
    assert dx.min() >= 0 and dx.sum() <= codes.numel()
    assert (OPS.max_pool_pick(torch.ones(1, 3, 4, 4, 4), codes, *how) <= 1).all()


@pytest.mark.parametrize("huge", [2**31, 2**62, 2**63 - 1])
def test_huge_numbers_overflow_nowhere(huge: int) -> None:
    x = torch.arange(5.0).view(1, 1, 5)
    assert F.max_pool1d(x, 1, huge, 0, huge).tolist() == [[[0.0]]]
    assert F.avg_pool1d(x, 2, huge).tolist() == [[[0.5]]]
    with pytest.raises(RuntimeError, match="too small|voxels are supported"):
        F.max_pool1d(x, huge, huge, huge // 2)
    with pytest.raises(RuntimeError):
        F.adaptive_max_pool1d(x, huge)


@pytest.mark.parametrize(
    "name,dtype",
    [
        ("max_pool2d", torch.int64),
        ("avg_pool2d", torch.int64),
        ("max_pool2d", torch.float16),
        ("adaptive_max_pool2d", torch.float16),
        ("adaptive_avg_pool2d", torch.float16),
    ],
)
def test_handed_to_torch_and_counted(name: str, dtype: torch.dtype) -> None:
    x = torch.arange(32).view(1, 2, 4, 4).to(dtype)
    assert torch.equal(getattr(F, name)(x, 2), getattr(T, name)(x, 2))
    row = convoxel.stats()[name]
    assert row["torch"] == 1 and row["why"] == {f"dtype {dtype} on cpu": 1}
    convoxel.set_strict(True)
    with pytest.raises(convoxel.HandedToTorch, match=name):
        getattr(F, name)(x, 2)


def test_served_and_counted() -> None:
    convoxel.set_strict(True)
    for name in ("max_pool", "avg_pool"):
        value_and_gradient(F, name, torch.ones(1, 1, 2), torch.ones(1, 1, 1), 2)
        value_and_gradient(F, "adaptive_" + name, torch.ones(1, 1, 2), torch.ones(1, 1, 1), 1)
    F.max_pool1d(torch.ones(1, 2), 2, return_indices=True)
    assert {k: v["served"] for k, v in convoxel.stats().items()} == {
        "max_pool": 3, "max_pool_input_grad": 2, "max_pool_indices": 1, "avg_pool": 2, "avg_pool_input_grad": 2,
    }  # fmt: skip


# Layers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_layers_are_torchs_layers(rank: int) -> None:
    convoxel.set_strict(True)
    x = torch.randn(2, 3, *(7, 8, 9)[:rank])
    divisor = {"divisor_override": 3} if rank > 1 else {}
    for name, args, how in (
        ("MaxPool", (2,), {}),
        ("MaxPool", (3, 2, 1, 1), {"return_indices": True, "ceil_mode": True}),
        ("AvgPool", (2,), {}),
        ("AvgPool", (3, 2, 1, True, False), divisor),
        ("AdaptiveMaxPool", (3,), {}),
        ("AdaptiveMaxPool", ((2,) * rank, True), {}),
        ("AdaptiveAvgPool", (1,), {}),
    ):
        ours, theirs = (getattr(m, f"{name}{rank}d")(*args, **how) for m in (nn, torch.nn))
        torch.testing.assert_close(ours(x), theirs(x))
        assert isinstance(ours, type(theirs)) and repr(ours) == repr(theirs)


def test_indices_serve_torchs_unpooling() -> None:
    x = torch.randn(1, 2, 4, 6)
    y, indices = nn.MaxPool2d(2, return_indices=True)(x)
    expected = T.max_unpool2d(*T.max_pool2d(x, 2, return_indices=True), 2)
    assert torch.equal(nn.MaxUnpool2d(2)(y, indices), expected)
