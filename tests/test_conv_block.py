"""Convolutions with what a block around them does: moments gathered while y is written."""

import itertools

import pytest
import torch
from torch import Tensor

import convoxel
from cases import CONV
from convoxel.geometry import Problem, lift
from convoxel.ops.conv import conv
from convoxel.ops.conv_block import conv_moments
from convoxel.ops.library import to_3d
from convoxel.ops.norm import norm

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
ALGORITHMS = ("direct", "winograd", "columns")
# Several items of work, in space and in channels, in each of Winograd's orders; items of one chain of sums and more.
LARGE = [
    Problem.parse(line)
    for line in (
        "conv n2 c16 k20 i17x18x19 f3x3x3 p1x1x1",
        "conv n1 c40 k70 i12x13x8 f3x3x3 p1x1x1",
        "conv n2 c36 k34 i33x33 f3x3 p1x1",
        "conv n2 c4 k32 i9x40x150 f3x3x3 s2x2x2 p1x1x1",
        "conv n1 c16 k3 i30x20x10 f1x1x1",
    )
]


def last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last_3d)


def how(p: Problem) -> tuple[tuple[int, ...], ...]:
    return lift(p.s, 1), lift(p.p, 0), lift(p.d, 1), p.g


def data(p: Problem, dtype: torch.dtype, mean: float = 0.0) -> tuple[Tensor, Tensor, Tensor | None]:
    x, w = (to_3d(torch.randn(s)) for s in (p.x_shape, p.w_shape))
    b = torch.randn(p.k).add(mean).to(dtype) if p.bias else None
    return x.to(dtype), (w * (2 / w[0].numel()) ** 0.5).to(dtype), b


def moments(y: Tensor, groups: int, over_batch: bool) -> tuple[Tensor, Tensor]:
    """By definition, in float64."""
    parts = y.double().reshape(y.shape[0], groups, -1)
    axes = (0, 2) if over_batch else 2
    return parts.mean(axes), parts.var(axes, correction=0)


def check_moments(y: Tensor, mean: Tensor, var: Tensor, groups: int, over_batch: bool) -> None:
    expected_mean, expected_var = moments(y, groups, over_batch)
    assert mean.shape == expected_mean.shape and mean.dtype == var.dtype == torch.float64
    deviation = expected_var.sqrt() + 1e-30
    assert ((mean - expected_mean).abs() / deviation).max() <= 1e-6
    assert ((var - expected_var).abs() / (expected_var + 1e-30)).max() <= 1e-5 or expected_var.max() == 0


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("p", [*CONV, *LARGE], ids=str)
def test_moments_are_those_of_y(p: Problem, algorithm: str, isa: str) -> None:
    convoxel.set_conv_algorithm(algorithm)
    dtypes = DTYPES if p in CONV else DTYPES[:2]
    for dtype, in_last in itertools.product(dtypes, (False, True)):
        x, w, b = data(p, dtype)
        x = last(x) if in_last else x
        expected = conv(x, w, b, *how(p))
        for groups, over_batch in ((p.k, False), (1, True)):
            y, mean, var = conv_moments(x, w, b, *how(p), groups, over_batch)
            assert torch.equal(y, expected) and y.stride() == expected.stride()
            check_moments(y, mean, var, groups, over_batch)


@pytest.mark.parametrize("algorithm", ["direct", "winograd", "amx"])
def test_large_mean(algorithm: str, isa: str) -> None:
    """Mean 1e4, deviation 1: as a norm reads it from y."""
    convoxel.set_conv_algorithm(algorithm)
    for p in LARGE:
        x, w, b = data(p, torch.float32, 1e4)
        y, mean, var = conv_moments(last(x), w, b, *how(p), p.k, False)
        check_moments(y, mean, var, p.k, False)
        for a, e in zip((mean, var), norm(y, None, None, p.k, False, 1e-5)[1:], strict=True):
            assert ((a - e).abs() / e.abs()).max() <= 2e-6


def test_an_outlier_first() -> None:
    """What squares are taken from lies far from the mean, where only the first output does."""
    x = torch.randn(1, 1, 16, 24, 32)
    x[0, 0, 0, 0, 0] = 1e4
    w = torch.ones(20, 1, 1, 1, 1)
    one, zero = (1, 1, 1), (0, 0, 0)
    for t in (x, last(x)):
        y, mean, var = conv_moments(t, w, None, one, zero, one, 1, 20, False)
        check_moments(y, mean, var, 20, False)


@pytest.mark.parametrize("algorithm", ["direct", "winograd", "columns", "amx"])
def test_same_bits_for_every_thread_count(algorithm: str, isa: str) -> None:
    convoxel.set_conv_algorithm(algorithm)
    for p, dtype, in_last in itertools.product(LARGE, DTYPES[:2], (False, True)):
        x, w, b = data(p, dtype)
        x = last(x) if in_last else x
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(conv_moments(x, w, b, *how(p), p.k, True))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_what_is_not_finite_or_overflows() -> None:
    """As a norm of y: squares beyond a float's range are right, one infinite output makes its channel's NaN."""
    p = LARGE[0]
    x, w, b = data(p, torch.float32)
    for value in (1e25, float("inf"), float("nan")):
        z = x.clone()
        z[1, 3, 5, 7, 9] = value
        y, mean, var = conv_moments(last(z), w, b, *how(p), p.k, False)
        _, expected_mean, expected_var = norm(y, None, None, p.k, False, 1e-5)
        assert torch.equal(mean.isfinite(), expected_mean.isfinite())
        assert torch.equal(var.isfinite(), expected_var.isfinite())
        some = expected_var.isfinite()
        torch.testing.assert_close(var[some], expected_var[some], rtol=1e-5, atol=0)
        torch.testing.assert_close(mean[some], expected_mean[some], rtol=1e-5, atol=1e-6)


def test_gathered_while_y_is_written() -> None:
    """No pass over y where Winograd's or the direct algorithm serves; one, and counted, where no slots are."""
    for algorithm, passes in (("winograd", 0), ("direct", 0), ("columns", 1)):
        convoxel.reset_stats()
        convoxel.set_conv_algorithm(algorithm)
        x, w, b = data(LARGE[0], torch.float32)
        conv_moments(x, w, b, *how(LARGE[0]), 20, False)
        stats = convoxel.stats()
        assert stats.get("moments", {"served": 0})["served"] == passes
        assert set(stats.get("conv_moments", stats.get("conv"))["by"]) == {
            f"{algorithm} {convoxel.isas()[-1]}"
        }


def test_empty() -> None:
    one, zero = (1, 1, 1), (0, 0, 0)
    y, mean, var = conv_moments(
        torch.empty(0, 2, 3, 3, 3), torch.ones(4, 2, 1, 1, 1), None, one, zero, one, 1, 2, True
    )
    assert y.shape == (0, 4, 3, 3, 3) and mean.tolist() == var.tolist() == [0, 0]
    x, b = torch.empty(2, 0, 3, 3, 3), torch.arange(4.0)
    y, mean, var = conv_moments(x, torch.empty(4, 0, 1, 1, 1), b, one, zero, one, 1, 4, False)
    assert torch.equal(mean, b.double().expand(2, 4)) and not var.any()


def tiny(**options: object) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(s, **options) for s in ((2, 4, 3, 4, 3), (6, 2, 3, 3, 3), (6,)))


HOW = ((1, 2, 1), (1, 1, 1), (1, 1, 1), 2)


def test_gradients() -> None:
    leaves = tiny(dtype=torch.float64, requires_grad=True)
    convoxel.set_strict(True)
    torch.autograd.gradcheck(lambda x, w, b: conv_moments(x, w, b, *HOW, 3, False)[0], leaves)
    torch.autograd.gradgradcheck(lambda x, w, b: conv_moments(x, w, b, *HOW, 3, False)[0], leaves)
    _, mean, var = conv_moments(*leaves, *HOW, 3, False)
    assert not mean.requires_grad and not var.requires_grad


def test_operator() -> None:
    for over_batch, grad in ((True, True), (False, False)):
        torch.library.opcheck(
            torch.ops.convoxel.conv_moments.default, (*tiny(requires_grad=grad), *HOW, 3, over_batch)
        )


def test_vmap() -> None:
    x, w, b = (torch.stack([t, t + 1]) for t in tiny())
    for over_batch in (True, False):
        for dims in ((0, 0, 0), (0, None, None), (None, 0, None)):
            t = [a if d == 0 else a[0] for a, d in zip((x, w, b), dims, strict=True)]
            got = torch.vmap(lambda *t: conv_moments(*t, *HOW, 3, over_batch), dims)(*t)  # noqa: B023
            for i in range(2):
                one = [a[i] if d == 0 else a for a, d in zip(t, dims, strict=True)]
                for g, e in zip(got, conv_moments(*one, *HOW, 3, over_batch), strict=True):
                    torch.testing.assert_close(g[i], e)


def test_compiled() -> None:
    x, w, b = tiny(requires_grad=True)
    compiled = torch.compile(
        lambda x, w, b: conv_moments(x, w, b, *HOW, 3, False), fullgraph=True, backend="aot_eager"
    )
    for got, expected in zip(compiled(x, w, b), conv_moments(x, w, b, *HOW, 3, False), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("norm_groups", [0, -1, 4])
def test_wrong_groups(norm_groups: int) -> None:
    with pytest.raises(RuntimeError, match="norm_groups to divide the 6 output channels"):
        conv_moments(*tiny(), *HOW, norm_groups, False)
    with pytest.raises(RuntimeError, match="expected bias of shape"):
        conv_moments(*tiny()[:2], torch.ones(5), *HOW, 3, False)
