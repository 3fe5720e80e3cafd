"""Convolution, transposed convolution and linear: values, gradients, layouts, and what is refused."""

import itertools

import pytest
import torch
import torch.nn.functional as T
from torch import Tensor

import convoxel
from cases import CONV, CONV_TRANSPOSE
from convoxel import functional as F
from convoxel import nn
from convoxel.geometry import Problem
from tolerance import bound, relative_l2

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


@pytest.fixture(autouse=True)
def _direct() -> None:
    """Exact on integers, and the error that `highest` promises; test_winograd.py has the other algorithm."""
    convoxel.set_conv_algorithm("direct")


@pytest.fixture(params=["direct", "columns", "voxels"])
def algorithm(request: pytest.FixtureRequest) -> str:
    """Runs the test with each algorithm that is exact on integers and takes everything."""
    convoxel.set_conv_algorithm(request.param)
    return str(request.param)


def channels_last(t: Tensor) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return t.to(memory_format=formats[t.dim()]) if t.dim() in formats else t


def call(module, p: Problem, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    function = getattr(module, f"{p.op}{p.rank}d")
    if p.transposed:
        return function(x, w, b, p.s, p.p, p.o, p.g, p.d)
    return function(x, w, b, p.s, p.p, p.d, p.g)


def integers(p: Problem, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Small integers: every product and sum is exact, so a wrong index cannot hide behind a tolerance."""
    x, w, dy = (torch.randint(-3, 4, s).to(dtype) for s in (p.x_shape, p.w_shape, p.y_shape))
    return x, w, torch.randint(-3, 4, (p.k,)).to(dtype) if p.bias else None, dy


def results(module, p: Problem, x: Tensor, w: Tensor, b: Tensor | None, dy: Tensor) -> list[Tensor]:
    """y and the gradients of everything."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, w, b) if t is not None]
    y = call(module, p, *leaves, *[None] * (3 - len(leaves)))
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


@pytest.mark.parametrize("p", CONV + CONV_TRANSPOSE, ids=str)
def test_exact_on_integers(p: Problem, isa: str, algorithm: str) -> None:
    convoxel.set_strict(True)
    for dtype, x_last, dy_last in itertools.product(DTYPES, (False, True), (False, True)):
        x, w, b, dy = integers(p, dtype)
        expected = results(T, p, x.double(), w.double(), None if b is None else b.double(), dy.double())
        if dtype == torch.bfloat16:
            expected = [e.float().bfloat16() for e in expected]
        got = results(F, p, channels_last(x) if x_last else x, w, b, channels_last(dy) if dy_last else dy)
        for name, g, e in zip(("y", "dx", "dw", "db"), got, expected, strict=False):
            assert g.dtype == dtype
            assert torch.equal(g.double(), e.double()), f"{name} {dtype} x_last={x_last} dy_last={dy_last}"


@pytest.mark.parametrize("p", CONV + CONV_TRANSPOSE, ids=str)
def test_values_and_gradients_in_float64(p: Problem) -> None:
    x, w, dy = (torch.randn(s, dtype=torch.float64) for s in (p.x_shape, p.w_shape, p.y_shape))
    b = torch.randn(p.k, dtype=torch.float64) if p.bias else None
    for g, e in zip(results(F, p, x, w, b, dy), results(T, p, x, w, b, dy), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    "text",
    [
        "conv n1 c32 k32 i20x20x20 f3x3x3 p1x1x1",
        "conv n1 c320 k64 i4x4x4 f3x3x3 p1x1x1",
        "conv n2 c64 k32 i33x31 f3x3 p1x1",
        "conv n1 c1 k32 i24x24x24 f3x3x3 p1x1x1",
        "conv_transpose n1 c64 k32 i8x8x8 f2x2x2 s2x2x2",
    ],
)
def test_error_against_float64_as_highest_promises(text: str, isa: str, algorithm: str) -> None:
    """At most twice torch's own error, or 4 eps (gradients 8 eps) where torch's is smaller."""
    p = Problem.parse(text)
    x, w, dy = (torch.randn(s) for s in (p.x_shape, p.w_shape, p.y_shape))
    w *= (2 / w[0].numel()) ** 0.5
    b = torch.randn(p.k)
    exact = results(T, p, x.double(), w.double(), b.double(), dy.double())
    eps = torch.finfo(torch.float32).eps
    for i, (g, t, e) in enumerate(
        zip(results(F, p, x, w, b, dy), results(T, p, x, w, b, dy), exact, strict=True)
    ):
        assert relative_l2(g, e) <= max(2 * relative_l2(t, e), (8 if i else 4) * eps)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_voxel_is_within_the_bound(dtype: torch.dtype, isa: str, algorithm: str) -> None:
    p = Problem.parse("conv n1 c40 k24 i9x10x11 f3x3x3 p1x1x1")
    x, w = torch.randn(p.x_shape).to(dtype), torch.randn(p.w_shape).to(dtype)
    y = call(F, p, x, w, None).double()
    exact, size = (
        call(T, p, x.double(), w.double(), None),
        call(T, p, x.double().abs(), w.double().abs(), None),
    )
    assert ((y - exact).abs() / size).max() <= bound(dtype, 40 * 27)


SMALL = [
    "conv n1 c2 k2 i4 f3 p1",
    "conv n2 c2 k4 i4x3 f2x3 s2x1 p1x1 g2",
    "conv n1 c2 k2 i3x2x3 f2x2x2 d2x1x1 p1x0x1",
    "conv_transpose n1 c2 k2 i2x2x3 f2x2x2 s2x2x1",
]


@pytest.mark.parametrize("text", SMALL)
def test_gradcheck_and_gradgradcheck(text: str) -> None:
    p = Problem.parse(text)
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in (p.x_shape, p.w_shape, (p.k,))]
    assert torch.autograd.gradcheck(lambda *a: call(F, p, *a), inputs)
    assert torch.autograd.gradgradcheck(lambda *a: call(F, p, *a), inputs)


@pytest.mark.parametrize("p", CONV, ids=str)
def test_adjoint_identity(p: Problem) -> None:
    """<F(x, w), dy> = <x, G(dy, w)> = <w, H(x, dy)>."""
    x, w, dy = (torch.randn(s, dtype=torch.float64) for s in (p.x_shape, p.w_shape, p.y_shape))
    y, dx, dw = results(F, p, x, w, None, dy)
    products = [torch.sum(a * b).item() for a, b in ((y, dy), (x, dx), (w, dw))]
    assert products == pytest.approx([products[0]] * 3, rel=1e-10, abs=1e-9)


@pytest.mark.parametrize("need", list(itertools.product((False, True), repeat=3)))
def test_only_the_gradients_that_are_needed(need: tuple[bool, ...]) -> None:
    leaves = [
        torch.randn(s).requires_grad_(n)
        for s, n in zip(((1, 2, 5, 5), (3, 2, 3, 3), (3,)), need, strict=True)
    ]
    y = F.conv2d(*leaves)
    assert y.requires_grad == any(need)
    if any(need):
        y.sum().backward()
    assert [t.grad is not None for t in leaves] == list(need)
    kernels = {
        "conv",
        *(
            n
            for n, k in zip(("conv_input_grad", "conv_weight_grad", "conv_bias_grad"), need, strict=True)
            if k
        ),
    }
    assert set(convoxel.stats()) == kernels


OPS = torch.ops.convoxel
HOW = ((1, 2, 1), (1, 0, 1), (1, 1, 1), 1)


def op_samples() -> list[tuple[object, tuple[object, ...]]]:
    x, w, b = torch.randn(2, 3, 4, 5, 6), torch.randn(4, 3, 3, 2, 3), torch.randn(4)
    y = OPS.conv(x, w, b, *HOW)
    leaf = lambda t: t.detach().clone().requires_grad_()  # noqa: E731
    return [
        (OPS.conv.default, (leaf(x), leaf(w), leaf(b), *HOW)),
        (OPS.conv.default, (leaf(channels_last(x)), leaf(w), None, *HOW)),
        (OPS.conv_input_grad.default, (leaf(y), leaf(w), torch.randn(3), *HOW, (4, 5, 6))),
        (OPS.conv_weight_grad.default, (leaf(x), leaf(channels_last(y)), *HOW, (3, 2, 3))),
        (OPS.channel_sum.default, (leaf(y),)),
    ]


@pytest.mark.parametrize("index", range(5))
def test_opcheck(index: int) -> None:
    torch.library.opcheck(*op_samples()[index])


def test_every_operator_is_listed() -> None:
    assert {"conv", "conv_input_grad", "conv_weight_grad", "channel_sum"} <= set(convoxel.ops.registered())


@pytest.mark.parametrize("in_dims", [(0, None), (None, 0), (1, 2), (0, 0)])
@pytest.mark.parametrize("name", ["conv2d", "conv_transpose2d"])
def test_vmap(in_dims: tuple[int | None, ...], name: str) -> None:
    shapes = [[4, 4, 7, 6], [4, 4, 3, 3]]
    tensors = []
    for shape, dim in zip(shapes, in_dims, strict=True):
        if dim is not None:
            shape.insert(dim, 3)
        tensors.append(torch.randn(shape, dtype=torch.float64))
    got, expected = (torch.vmap(getattr(m, name), in_dims)(*tensors) for m in (F, T))
    torch.testing.assert_close(got, expected)


def test_vmap_of_the_weight_gradient() -> None:
    x, dy = (
        torch.randn(3, 2, 4, 1, 5, 6, dtype=torch.float64),
        torch.randn(2, 6, 1, 3, 4, dtype=torch.float64),
    )
    how = ((1, 1, 1), (0, 0, 0), (1, 1, 1), 2, (1, 3, 3))
    got = torch.vmap(lambda x, dy: OPS.conv_weight_grad(x, dy, *how), (0, None))(x, dy)
    torch.testing.assert_close(got, torch.stack([OPS.conv_weight_grad(x[i], dy, *how) for i in range(3)]))
    y = torch.randn(2, 3, 4, 5, 6, 7, dtype=torch.float64)
    torch.testing.assert_close(torch.vmap(OPS.channel_sum, 1)(y), y.sum((0, 3, 4, 5)))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_without_graph_break(dynamic: bool) -> None:
    layer = nn.Conv3d(3, 4, 3, stride=2, padding=1)
    x = torch.randn(2, 3, 6, 7, 8, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    y = compiled(x)
    torch.testing.assert_close(y, layer(x))
    y.sum().backward()
    assert x.grad is not None and layer.weight.grad is not None


def test_export() -> None:
    layer, x = nn.Conv2d(3, 4, 3), torch.randn(2, 3, 8, 9)
    program = torch.export.export(layer, (x,))
    assert any("convoxel.conv" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), layer(x))


def strided(shape: tuple[int, ...]) -> Tensor:
    return torch.randn([2 * s for s in shape])[tuple(slice(None, None, 2) for _ in shape)]


@pytest.mark.parametrize("make", [strided, lambda s: torch.randn(s[:1] + (1,) * (len(s) - 1)).expand(s),
                                  lambda s: torch.randn(s[::-1]).permute(*range(len(s))[::-1])])  # fmt: skip
def test_any_strides(make) -> None:
    p = Problem.parse("conv n2 c3 k4 i5x6x7 f3x2x3 p1x0x1")
    x, w, dy = make(p.x_shape), make(p.w_shape), make(p.y_shape)
    for g, e in zip(results(F, p, x, w, None, dy), results(T, p, x, w, None, dy), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["conv2d", "conv_transpose2d"])
@pytest.mark.parametrize("x_last", [False, True])
@pytest.mark.parametrize("w_last", [False, True])
@pytest.mark.parametrize("c", [1, 4])
def test_layout_of_the_output_is_torchs(name: str, x_last: bool, w_last: bool, c: int) -> None:
    x, w = torch.randn(2, c, 6, 7), torch.randn(c, c, 3, 3)
    x, w = channels_last(x) if x_last else x, channels_last(w) if w_last else w
    with torch.no_grad():
        assert getattr(F, name)(x, w).stride() == getattr(T, name)(x, w).stride()


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
def test_unbatched_empty_batch_and_string_padding() -> None:
    w, b = torch.randn(4, 3, 3, 2), torch.randn(4)
    x = torch.randn(3, 7, 8)
    torch.testing.assert_close(F.conv2d(x, w, b), T.conv2d(x, w, b))
    for padding in ("same", "valid"):
        torch.testing.assert_close(F.conv2d(x, w, b, padding=padding), T.conv2d(x, w, b, padding=padding))
    empty = torch.randn(0, 3, 7, 8, requires_grad=True)
    y = F.conv2d(empty, w.requires_grad_(), b)
    assert y.shape == (0, 4, 5, 7)
    y.sum().backward()
    assert torch.equal(w.grad, torch.zeros_like(w)) and empty.grad.shape == empty.shape


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 4, 5), (0, 5)])
@pytest.mark.parametrize("bias", [False, True])
def test_linear(shape: tuple[int, ...], bias: bool, isa: str) -> None:
    convoxel.set_strict(True)
    x, w = torch.randn(shape, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    b = torch.randn(7, dtype=torch.float64) if bias else None
    leaves = [t.requires_grad_() for t in (x, w, b) if t is not None]
    got, expected = F.linear(*leaves), T.linear(*leaves)
    torch.testing.assert_close(got, expected)
    assert got.is_contiguous()
    dy = torch.randn_like(expected)
    for g, e in zip(
        torch.autograd.grad(got, leaves, dy), torch.autograd.grad(expected, leaves, dy), strict=True
    ):
        torch.testing.assert_close(g, e)


@pytest.mark.parametrize(
    ("shape", "k", "bias"),
    [
        ((4, 3), 4, (4, 1)),
        ((2, 4, 3), 5, (2, 4, 5)),
        ((4, 3), 5, (1,)),
        ((4, 0), 5, (5,)),
        ((4, 3), 0, (0,)),
        ((0,), 0, ()),
    ],
)
def test_linear_with_any_bias_and_without_features(
    shape: tuple[int, ...], k: int, bias: tuple[int, ...]
) -> None:
    leaves = [torch.randn(s).requires_grad_() for s in (shape, (k, shape[-1]), bias)]
    ys = [m.linear(*leaves) for m in (F, T)]
    torch.testing.assert_close(*ys)
    dy = torch.randn_like(ys[0])
    torch.testing.assert_close(*[torch.autograd.grad(y, leaves, dy) for y in ys])


def test_same_bits_for_every_run_and_thread_count(isa: str, algorithm: str) -> None:
    p = Problem.parse("conv n2 c20 k40 i12x13x14 f3x3x3 p1x1x1")
    x, w, b, dy = (torch.randn(s) for s in (p.x_shape, p.w_shape, (p.k,), p.y_shape))
    runs = []
    for threads in (1, 2, 2, 3):
        torch.set_num_threads(threads)
        runs.append(results(F, p, x, w, b, dy))
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_come_out_where_torchs_do(value: float, isa: str, algorithm: str) -> None:
    x, w = torch.randn(1, 3, 6, 7, 8), torch.randn(5, 3, 3, 3, 3)
    x[0, 1, 2, 3, 4] = value
    y, e = F.conv3d(x, w, padding=1), T.conv3d(x.double(), w.double(), padding=1)
    assert torch.equal(y.isnan(), e.isnan()) and torch.equal(y.isinf(), e.isinf())
    assert torch.equal(y[e.isinf()], e[e.isinf()].float())


def test_large_and_small_numbers_stay_finite(isa: str) -> None:
    x = torch.full((1, 2, 4, 4, 4), 1e30)
    assert torch.equal(F.conv3d(x, torch.ones(1, 2, 1, 1, 1)), torch.full((1, 1, 4, 4, 4), 2e30))
    x = torch.full((1, 8, 4), 3e38, dtype=torch.bfloat16)
    assert F.conv1d(x, torch.ones(2, 8, 1, dtype=torch.bfloat16)).isinf().all()


def test_autocast_is_torchs() -> None:
    x, layer = torch.randn(1, 3, 6, 6), nn.Conv2d(3, 4, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        assert y.dtype == F.linear(x, torch.randn(5, 6)).dtype == torch.bfloat16
        assert F.conv2d(x.double(), layer.weight.double()).dtype == torch.float64
    y.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.complex64])
def test_what_is_outside_goes_to_torch_and_is_counted(dtype: torch.dtype) -> None:
    x, w = torch.ones(1, 1, 4, 4, dtype=dtype), torch.ones(1, 1, 3, 3, dtype=dtype)
    assert torch.equal(F.conv2d(x, w), T.conv2d(x, w))
    assert convoxel.stats()["conv2d"]["why"] == {f"dtype {dtype} on cpu": 1}
    convoxel.set_strict(True)
    with pytest.raises(convoxel.HandedToTorch, match=f"conv2d: .*{dtype}.*set_strict"):
        F.conv2d(x, w)


def test_forward_mode_differentiation_goes_to_torch() -> None:
    x, w, t = torch.randn(1, 1, 5), torch.randn(1, 1, 3), torch.randn(1, 1, 5)
    got, expected = (torch.func.jvp(lambda x: m.conv1d(x, w), (x,), (t,)) for m in (F, T))  # noqa: B023
    torch.testing.assert_close(got, expected)


X, W = (2, 4, 8, 8), (6, 4, 3, 3)


@pytest.mark.parametrize(
    "make",
    [
        lambda m: m.conv2d(torch.ones(2, 3, 8, 8), torch.ones(W)),  # channels
        lambda m: m.conv2d(torch.ones(X), torch.ones(W), torch.ones(5)),  # bias
        lambda m: m.conv2d(torch.ones(8, 8), torch.ones(W)),  # axes of x
        lambda m: m.conv2d(torch.ones(X), torch.ones(6, 4, 3)),  # axes of w
        lambda m: m.conv2d(torch.ones(X), torch.ones(6, 4, 9, 3)),  # kernel beyond x
        lambda m: m.conv2d(torch.ones(X), torch.ones(W).double()),  # dtypes
        lambda m: m.conv2d(torch.ones(X), torch.ones(W), stride=0),
        lambda m: m.conv2d(torch.ones(X), torch.ones(W), padding=-1),
        lambda m: m.conv2d(torch.ones(X), torch.ones(W), dilation=(1, 2, 3)),
        lambda m: m.conv2d(torch.ones(X), torch.ones(W), groups=0),
        lambda m: m.conv2d(torch.ones(X), torch.ones(5, 2, 3, 3), groups=2),
        lambda m: m.conv2d(torch.ones(X), torch.ones(W), padding="some"),
        lambda m: m.conv2d(torch.ones(X), torch.ones(W), padding="same", stride=2),
        lambda m: m.conv2d([1.0], torch.ones(W)),
        lambda m: m.conv2d(torch.ones(X), torch.ones(W), stride="2"),
        lambda m: m.conv2d(torch.ones(X), torch.ones(W), stride=1.5),
        lambda m: m.conv_transpose2d(torch.ones(X), torch.ones(4, 6, 3, 3), output_padding=1),
        lambda m: m.conv_transpose2d(torch.ones(2, 3, 8, 8), torch.ones(4, 6, 3, 3)),
        lambda m: m.conv_transpose2d(torch.ones(1, 4, 1, 1), torch.ones(4, 6, 3, 3), padding=5),
        lambda m: m.linear(torch.ones(3, 4), torch.ones(5, 6)),
        lambda m: m.conv2d(torch.ones(2, 4, 0, 8), torch.ones(W)),
        lambda m: m.conv2d(torch.ones(X), torch.ones(W), dilation=2**62),
        lambda m: m.conv2d(torch.ones(2, 4, 0, 8), torch.ones(W), padding=3),
        lambda m: m.conv2d(torch.ones(X), torch.ones(W), 3),
        lambda m: m.conv_transpose2d(torch.ones(X), torch.ones(4, 6, 3, 3), stride=0),
        lambda m: m.linear(torch.ones(3, 4), torch.ones(5, 4), [1.0]),
        lambda m: m.linear(torch.ones(3, 4), torch.ones(5, 4), torch.ones(5, 1)),
        lambda m: m.linear(torch.ones(3, 4), torch.ones(4), torch.ones(3)),
    ],
)
def test_what_torch_rejects_is_rejected_alike(make) -> None:
    with pytest.raises((RuntimeError, TypeError, ValueError)) as theirs:
        make(T)
    with pytest.raises(theirs.type) as ours:
        make(F)
    assert str(ours.value).startswith(("conv", "linear")) and len(str(ours.value)) < 400


def test_operators_check_without_the_layers_in_front() -> None:
    x, w = torch.ones(1, 2, 3, 3, 3), torch.ones(2, 2, 3, 3, 3)
    one, zero = (1, 1, 1), (0, 0, 0)
    for bad in (
        lambda: OPS.conv(x, w[:, :1], None, one, zero, one, 1),
        lambda: OPS.conv(x, w, None, one, zero, (2**62, 1, 1), 1),
        lambda: OPS.conv(x, w, torch.ones(3), one, zero, one, 1),
        lambda: OPS.conv_input_grad(x, w, None, one, zero, one, 1, (9, 9, 9)),
        lambda: OPS.conv_weight_grad(x, x, one, zero, one, 1, (3, 3, 3)),
        lambda: OPS.conv_weight_grad(x, x, one, zero, one, 0, (1, 1, 1)),
        lambda: OPS.conv(x.int(), w.int(), None, one, zero, one, 1),
        lambda: OPS.channel_sum(torch.ones(3)),
    ):
        with pytest.raises(RuntimeError):
            bad()


@pytest.mark.parametrize("name", ["Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d",
                                  "ConvTranspose3d"])  # fmt: skip
@pytest.mark.parametrize("lazy", [False, True])
def test_layers_are_torchs_layers(name: str, lazy: bool) -> None:
    ours = getattr(nn, "Lazy" * lazy + name)(*[4] * (not lazy), 6, 3, stride=2, padding=1, groups=2)
    x = torch.randn(2, 4, *[7] * int(name[-2]))
    y = ours(x)
    theirs = getattr(torch.nn, name)(4, 6, 3, stride=2, padding=1, groups=2)
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(y, theirs(x), rtol=1e-4, atol=1e-5)
    assert isinstance(ours, type(theirs)) and repr(ours) == repr(theirs) and type(ours) is getattr(nn, name)
    if name.startswith("ConvT"):
        size = [n + 1 for n in y.shape[2:]]
        torch.testing.assert_close(ours(x, size), theirs(x, size), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [1, "same"])
def test_padding_modes(mode: str, padding: int | str) -> None:
    ours = nn.Conv3d(2, 3, (3, 2, 3), padding=padding, padding_mode=mode)
    theirs = torch.nn.Conv3d(2, 3, (3, 2, 3), padding=padding, padding_mode=mode)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(1, 2, 5, 6, 7)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_linear_layers() -> None:
    x = torch.randn(3, 5)
    ours = nn.LazyLinear(4)
    y = ours(x)
    theirs = torch.nn.Linear(5, 4)
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(y, theirs(x))
    assert type(ours) is nn.Linear
