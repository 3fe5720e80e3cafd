"""What holds of every call, on calls that hypothesis draws: any rank, kernel, stride, padding, dilation, groups,
output padding, layout, dtype and ISA. Data are small integers where results are to be exact.

The draws are the same on every run; `CONVOXEL_PROPERTIES=search` draws others, and many more.
"""

import os
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as T
from hypothesis import given, note, settings
from hypothesis import strategies as st
from torch import Tensor

import convoxel
from convoxel import functional as F
from convoxel.geometry import Problem, conv_transpose_out_size, pool_out_size
from tolerance import bound

settings.register_profile("fixed", max_examples=200, deadline=None, derandomize=True, database=None)
settings.register_profile("search", max_examples=3000, deadline=None, database=None, print_blob=True)
settings.load_profile(os.environ.get("CONVOXEL_PROPERTIES", "fixed"))

FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}
Draw = st.DrawFn

# What is drawn ------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _direct() -> None:
    """What is exact on integers; Winograd's algorithm rounds."""
    convoxel.set_conv_algorithm("direct")


@st.composite
def problems(draw: Draw, dtypes: tuple[str, ...] = ("f32", "f64", "bf16")) -> Problem:
    """A convolution or transposed convolution whose output is not empty, with up to 700 voxels a plane."""
    op, rank = draw(st.sampled_from(("conv", "conv_transpose"))), draw(st.integers(1, 3))
    groups = draw(st.sampled_from((1, 1, 2, 3)))
    channels = st.one_of(st.integers(1, 5), st.sampled_from((8, 16, 17, 31, 33)))
    axes: dict[str, list[int]] = {name: [] for name in "ifspdo"}
    for _ in range(rank):
        f, s, p, d = (draw(st.integers(low, high)) for low, high in ((1, 4), (1, 4), (0, 4), (1, 3)))
        o = 0
        if op == "conv":
            i = max(1, d * (f - 1) + 1 - 2 * p) + draw(st.integers(0, 40 if rank == 1 else 7))
        else:
            i, o = draw(st.integers(1, 24 if rank == 1 else 5)), draw(st.integers(0, max(s, d) - 1))
            p = min(p, (conv_transpose_out_size(i, f, s, 0, o, d) - 1) // 2)
        for name, value in zip("ifspdo", (i, f, s, p, d, o), strict=True):
            axes[name].append(value)
    return Problem(
        op,
        draw(st.integers(1, 2)),
        groups * draw(channels),
        groups * draw(channels),
        **{name: tuple(values) for name, values in axes.items()},
        g=groups,
        bias=draw(st.booleans()),
        last=rank > 1 and draw(st.booleans()),
        dtype=draw(st.sampled_from(dtypes)),
    )


@dataclass(frozen=True)
class Image:
    shape: tuple[int, ...]  # (N, C, *spatial)
    last: bool

    @property
    def rank(self) -> int:
        return len(self.shape) - 2

    def integers(self, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return laid_out(*integers(seed, dtype, self.shape), self.last)


@st.composite
def images(draw: Draw) -> Image:
    rank = draw(st.integers(1, 3))
    n, c = draw(st.integers(1, 3)), draw(st.sampled_from((1, 2, 3, 4, 7, 16, 17)))
    size = [draw(st.integers(1, 40 if rank == 1 else 9)) for _ in range(rank)]
    return Image((n, c, *size), rank > 1 and draw(st.booleans()))


ISAS = st.sampled_from(convoxel.isas())
SEEDS = st.integers(0, 2**32)


def laid_out(t: Tensor, last: bool) -> Tensor:
    return t.to(memory_format=FORMATS[t.dim()]) if last else t


def integers(seed: int, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    dice = torch.Generator().manual_seed(seed)
    return [torch.randint(-3, 4, shape, generator=dice).to(dtype) for shape in shapes]


def like(t: Tensor, seed: int) -> Tensor:
    return integers(seed, t.dtype, tuple(t.shape))[0]


def start(isa: str, *about: object) -> None:
    convoxel.set_strict(True)
    convoxel.set_isa(isa)
    note(f"convoxel.set_isa({isa!r}); " + ", ".join(map(str, about)))


def call(module, p: Problem, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    how = (p.s, p.p, p.o, p.g, p.d) if p.transposed else (p.s, p.p, p.d, p.g)
    return getattr(module, f"{p.op}{p.rank}d")(x, w, b, *how)


def inner(a: Tensor, b: Tensor) -> float:
    return torch.sum(a.double() * b.double()).item()


# Convolution --------------------------------------------------------------------------------------


@given(problems())
def test_a_problem_is_its_string(p: Problem) -> None:
    assert Problem.parse(str(p)) == p


@given(problems(), ISAS, SEEDS)
def test_convolution_and_its_gradients_are_exact(p: Problem, isa: str, seed: int) -> None:
    start(isa, p)
    x, w, b, dy = integers(seed, p.torch_dtype, p.x_shape, p.w_shape, (p.k,), p.y_shape)

    def results(module, dtype: torch.dtype, last: bool) -> list[Tensor]:
        leaves = [laid_out(x.to(dtype), last), w.to(dtype), *[b.to(dtype)] * p.bias]
        for leaf in leaves:
            leaf.requires_grad_()
        y = call(module, p, *leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, laid_out(dy.to(dtype), last))]

    for got, exact in zip(results(F, p.torch_dtype, p.last), results(T, torch.float64, False), strict=True):
        assert torch.equal(got, exact.float().to(p.torch_dtype))


@given(problems(("f32", "f64")), ISAS, SEEDS)
def test_the_three_convolutions_are_adjoint(p: Problem, isa: str, seed: int) -> None:
    """<F(x, w), dy> = <x, G(dy, w)> = <w, H(x, dy)>."""
    start(isa, p)
    x, w, dy = integers(seed, p.torch_dtype, p.x_shape, p.w_shape, p.y_shape)
    x, w = laid_out(x, p.last).requires_grad_(), w.requires_grad_()
    y = call(F, p, x, w)
    assert y.shape == p.y_shape
    dx, dw = torch.autograd.grad(y, (x, w), dy)
    assert inner(y, dy) == inner(x, dx) == inner(w, dw)


@given(problems(("f32", "f64")), ISAS, SEEDS, st.integers(-4, 4), st.integers(-4, 4))
def test_convolution_is_linear_in_each_argument(p: Problem, isa: str, seed: int, s: int, t: int) -> None:
    start(isa, p)
    x, x2, w, w2, b = integers(seed, p.torch_dtype, p.x_shape, p.x_shape, p.w_shape, p.w_shape, (p.k,))
    x, x2 = laid_out(x, p.last), laid_out(x2, p.last)
    y = call(F, p, x, w)
    assert torch.equal(call(F, p, s * x + t * x2, w), s * y + t * call(F, p, x2, w))
    assert torch.equal(call(F, p, x, s * w + t * w2), s * y + t * call(F, p, x, w2))
    assert torch.equal(call(F, p, x, w, b), y + b.reshape(-1, *[1] * p.rank))


# Linear, activations --------------------------------------------------------------------------------


@given(st.integers(0, 9), st.integers(1, 40), st.integers(1, 40), ISAS, SEEDS)
def test_linear_is_exact_and_adjoint(rows: int, c: int, k: int, isa: str, seed: int) -> None:
    start(isa, rows, c, k)
    x, w, b, dy = integers(seed, torch.float32, (rows, c), (k, c), (k,), (rows, k))
    y = F.linear(x.requires_grad_(), w.requires_grad_(), b)
    dx, dw = torch.autograd.grad(y, (x, w), dy)
    assert torch.equal(y, x @ w.T + b) and torch.equal(dx, dy @ w) and torch.equal(dw, dy.T @ x)


@given(images(), ISAS, SEEDS, st.sampled_from((0.0, 0.25, 1.0, 2.0)))
def test_activations_are_made_of_each_other(image: Image, isa: str, seed: int, slope: float) -> None:
    start(isa, image, slope)
    x, dy = image.integers(seed), image.integers(seed + 1)
    assert torch.equal(F.relu(x) - F.relu(-x), x)
    leaf = x.requires_grad_()
    y = F.leaky_relu(leaf, slope)
    assert torch.equal(y, F.relu(x) - slope * F.relu(-x)) and y.stride() == x.stride()
    (dx,) = torch.autograd.grad(y, leaf, dy)
    assert inner(dx, x) == inner(dy, y)  # homogeneous of degree 1


# Pooling ------------------------------------------------------------------------------------------


@st.composite
def windows(draw: Draw, kernels: tuple[int, ...] = (1, 2, 3, 4)) -> tuple[Image, list[tuple[int, ...]]]:
    """An image, and kernel, stride, padding, dilation of windows that fit in it. None lies in the padding alone, as
    only dilations beyond the extent make it: torch's layouts disagree about its index, and its gradient is lost."""
    image, axes = draw(images()), []
    for n in image.shape[2:]:
        f = draw(st.sampled_from([k for k in kernels if k <= n]))
        p = draw(st.integers(0, f // 2))
        reach = (n + 2 * p - 1) // (f - 1) if f > 1 else 3
        axes.append((f, draw(st.integers(1, 4)), p, draw(st.integers(1, min(3, reach, n)))))
    return image, list(zip(*axes, strict=True))


@given(windows(), ISAS, SEEDS, st.booleans())
def test_max_pooling_is_torchs_and_each_gradient_goes_to_one_voxel(
    drawn: tuple[Image, list[tuple[int, ...]]], isa: str, seed: int, ceil: bool
) -> None:
    (image, how), rank = drawn, drawn[0].rank
    start(isa, image, *how, ceil)
    x = image.integers(seed).requires_grad_()
    (y, indices), expected = (getattr(m, f"max_pool{rank}d")(x, *how, ceil, True) for m in (F, T))
    assert torch.equal(y, expected[0]) and torch.equal(indices, expected[1])
    out = [pool_out_size(*axis, ceil) for axis in zip(image.shape[2:], *how, strict=True)]
    assert list(y.shape[2:]) == out
    dy = like(y, seed + 1)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert dx.sum() == dy.sum() and inner(dx, x) == inner(dy, y)


@given(windows(kernels=(1, 2, 4)), ISAS, SEEDS, st.booleans())
def test_mean_pooling_is_exact_and_adjoint(
    drawn: tuple[Image, list[tuple[int, ...]]], isa: str, seed: int, ceil: bool
) -> None:
    """Windows of a power of two, so that dividing is exact."""
    (image, (kernel, stride, padding, _)), rank = drawn, drawn[0].rank
    start(isa, image, kernel, stride, padding)
    x = image.integers(seed).requires_grad_()
    y, expected = (getattr(m, f"avg_pool{rank}d")(x, kernel, stride, padding) for m in (F, T))
    assert torch.equal(y, expected)
    dy = like(y, seed + 1)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert inner(y, dy) == inner(x, dx)


# Interpolation ------------------------------------------------------------------------------------


@given(
    images(), st.data(), ISAS, SEEDS, st.sampled_from(("nearest", "nearest-exact", "linear")), st.booleans()
)
def test_interpolation_and_its_adjoint(
    image: Image, data: st.DataObject, isa: str, seed: int, mode: str, corners: bool
) -> None:
    """Rows of weights sum to one, and the gradient is the transposed matrix."""
    size = tuple(data.draw(st.integers(1, 3 * n)) for n in image.shape[2:])
    start(isa, image, size, mode, corners)
    how = {"size": size, "mode": mode}
    if mode == "linear":
        how |= {"mode": LINEAR[len(size)], "align_corners": corners}
    x = image.integers(seed, torch.float64).requires_grad_()
    y = F.interpolate(x, **how)
    dy = like(y, seed + 1)
    (dx,) = torch.autograd.grad(y, x, dy)
    allowed = bound(torch.float64, y.numel())
    terms = inner(F.interpolate(x.abs(), **how), dy.abs())
    assert inner(y, dy) == pytest.approx(inner(x, dx), rel=0, abs=allowed * terms)
    assert dx.sum().item() == pytest.approx(dy.sum().item(), rel=0, abs=allowed * dy.abs().sum().item())
    ones = F.interpolate(torch.ones_like(x), **how)
    torch.testing.assert_close(ones, torch.ones_like(y), rtol=0, atol=allowed)
    low, high = x.aminmax()
    assert ((y >= low - 3 * allowed) & (y <= high + 3 * allowed)).all()


# Norms --------------------------------------------------------------------------------------------


@given(images(), st.data(), ISAS, SEEDS, st.sampled_from((0.0, 3.0, 1e4)), st.sampled_from((0.5, 1.0, 100.0)))
def test_norms_give_mean_zero_and_variance_one(
    image: Image, data: st.DataObject, isa: str, seed: int, mean: float, scale: float
) -> None:
    kind = data.draw(st.sampled_from(("batch", "instance", "group", "layer")))
    n, c = image.shape[:2]
    groups = data.draw(st.sampled_from([g for g in range(1, c + 1) if c % g == 0]))
    start(isa, kind, image, mean, scale)
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(seed))
    x = laid_out(noise * scale + mean, image.last)
    functions = {
        "batch": lambda x, eps: (
            F.batch_norm(x, None, None, training=True, eps=eps).transpose(0, 1).reshape(c, -1)
        ),
        "instance": lambda x, eps: F.instance_norm(x, eps=eps).reshape(n * c, -1),
        "group": lambda x, eps: F.group_norm(x, groups, eps=eps).reshape(n * groups, -1),
        "layer": lambda x, eps: F.layer_norm(x, x.shape[1:], eps=eps).reshape(n, -1),
    }
    rows = {"batch": c, "instance": n * c, "group": n * groups, "layer": n}[kind]
    count = x.numel() // rows
    if count < 2:
        return
    y = functions[kind](x, 1e-5).double()
    raw = x.double().transpose(0, 1) if kind == "batch" else x.double()
    var = raw.reshape(rows, -1).var(1, unbiased=False)
    # One rounding of x / sqrt(var), times its largest: |h| <= sqrt(count).
    allowed = bound(torch.float32, count) * count**0.5
    assert y.mean(1).abs().max() <= allowed
    torch.testing.assert_close(y.var(1, unbiased=False), var / (var + 1e-5), rtol=0, atol=4 * allowed)
    # Units do not matter: a power of two changes exponents alone.
    assert torch.equal(functions[kind](x * 4, 16e-5).double(), functions[kind](x, 1e-5).double())
