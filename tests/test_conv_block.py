"""Convolutions with what a block around them does: moments gathered while y is written."""

import itertools

import pytest
import torch
from torch import Tensor

import convoxel
from cases import CONV
from convoxel.geometry import Problem, lift
from convoxel.ops.conv import conv, conv_weight_grad
from convoxel.ops.conv_block import conv_moments, norm_act_conv, norm_act_conv_weight_grad
from convoxel.ops.library import to_3d
from convoxel.ops.norm import norm
from convoxel.ops.norm_act import norm_act_op

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


# act(norm(x)) where the convolution reads x -------------------------------------------------------

ONE_TAP = Problem.parse("conv n2 c16 k3 i6x5x4 f1x1x1")
ACTS = (("identity", 0.0), ("relu", 0.0), ("leaky_relu", 0.01), ("prelu", 0.0))


def norm_data(
    p: Problem, dtype: torch.dtype, kind: str, groups: int, over_batch: bool
) -> tuple[Tensor | None, ...]:
    """mean, var, nw, nb, slopes: not those of x, so that padding shows."""
    shape = (groups,) if over_batch else (p.n, groups)
    mean, var = torch.randn(shape, dtype=torch.float64), torch.rand(shape, dtype=torch.float64) + 0.5
    nw, nb, slopes = (torch.randn(p.c).to(dtype) for _ in range(3))
    return mean, var, nw, nb, slopes if kind == "prelu" else None


@pytest.mark.parametrize("algorithm", [*ALGORITHMS, "amx"])
@pytest.mark.parametrize("p", [*CONV, *LARGE, ONE_TAP], ids=str)
def test_same_bits_as_norm_act_then_conv(p: Problem, algorithm: str, isa: str) -> None:
    """Forward and weight gradient, both layouts; the moments of y beside it."""
    convoxel.set_conv_algorithm(algorithm)
    for i, dtype in enumerate(DTYPES if p in CONV else DTYPES[:2]):
        for in_last, (kind, alpha) in itertools.product((False, True), ACTS[i : i + 2]):
            x, w, b = data(p, dtype)
            x = last(x) if in_last else x
            groups, over_batch = (p.g, False) if kind == "relu" else (p.c, True)
            norm_ = norm_data(p, dtype, kind, groups, over_batch)
            mean, var, nw, nb, slopes = norm_
            act = (groups, over_batch, False, 1e-5, kind, alpha)
            z = norm_act_op(x, nw, nb, slopes, None, mean, var, *act)[0]
            y, *moments_ = norm_act_conv(x, *norm_, *act, w, b, *how(p), p.k, False)
            expected = conv_moments(z, w, b, *how(p), p.k, False)
            for got, e in zip((y, *moments_), expected, strict=True):
                assert torch.equal(got, e) and got.stride() == e.stride()
            y, *nothing = norm_act_conv(x, *norm_, *act, w, b, *how(p), 0, False)
            assert torch.equal(y, expected[0]) and all(m.shape == (0,) for m in nothing)
            dy = torch.randn_like(y)
            kernel = w.shape[2:]
            assert torch.equal(
                norm_act_conv_weight_grad(x, *norm_, *act, dy, *how(p), kernel),
                conv_weight_grad(z, dy, *how(p), kernel),
            )


def test_read_through_the_norm() -> None:
    """z is made by itself only where the algorithm cannot read x that way."""
    for p, algorithm, passes in (
        (LARGE[0], "winograd", 0), (LARGE[3], "direct", 0), (LARGE[0], "columns", 1), (ONE_TAP, "direct", 1),
    ):  # fmt: skip
        convoxel.set_conv_algorithm(algorithm)
        x, w, b = data(p, torch.float32)
        norm_ = norm_data(p, torch.float32, "relu", p.c, False)
        convoxel.reset_stats()
        norm_act_conv(x, *norm_, p.c, False, False, 1e-5, "relu", 0.0, w, b, *how(p), 0, False)
        stats = convoxel.stats()
        assert stats.get("norm_act", {"served": 0})["served"] == passes
        assert ("norm_act_conv" in stats) == (not passes)


def test_padding_is_zero_after_the_norm() -> None:
    """By definition: z by torch, its padding zero whatever a zero of x would become; also where x is NaN."""
    p = LARGE[0]
    x, w, b = data(p, torch.float64)
    mean, var, nw, nb, _ = norm_data(p, torch.float64, "relu", p.c, False)
    per = (slice(None), slice(None), None, None, None)
    z = (x - mean[per]) * (var[per] + 1e-5).rsqrt() * nw.view(-1, 1, 1, 1) + nb.view(-1, 1, 1, 1)
    expected = torch.nn.functional.conv3d(z.relu(), w, b, padding=1)
    for dtype in (torch.float32, torch.float64):
        t = [v.to(dtype) for v in (x, nw, nb, w, b)]
        act = (p.c, False, False, 1e-5, "relu", 0.0)
        y = norm_act_conv(t[0], mean, var, t[1], t[2], None, *act, t[3], t[4], *how(p), 0, False)[0]
        assert ((y - expected).norm() / expected.norm()).item() <= (1e-5 if dtype == torch.float32 else 1e-14)


def test_loading_has_the_same_bits_for_every_thread_count(isa: str) -> None:
    for p, dtype in itertools.product(LARGE, DTYPES[:2]):
        x, w, b = data(p, dtype)
        norm_ = norm_data(p, dtype, "prelu", p.c, False)
        act = (p.c, False, False, 1e-5, "prelu", 0.0)
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            y, mean, var = norm_act_conv(last(x), *norm_, *act, w, b, *how(p), p.k, False)
            dy = y.detach() * 0.5
            results.append(
                (y, mean, var, norm_act_conv_weight_grad(last(x), *norm_, *act, dy, *how(p), w.shape[2:]))
            )
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def block(
    kind: str, slopes: Tensor | None, x: Tensor, nw: Tensor, nb: Tensor, w: Tensor, b: Tensor
) -> Tensor:
    """With x's own moments: their gradient is in the norm's."""
    mean, var = moments(x.detach(), 2, False)
    norm_ = (mean, var, nw, nb, slopes, 2, False, False, 1e-5, kind, 0.1)
    return norm_act_conv(x, *norm_, w, b, *HOW, 3, True)[0]


@pytest.mark.parametrize("kind", ["identity", "relu", "leaky_relu", "prelu", "silu"])
def test_gradients_through_the_norm(kind: str) -> None:
    x, w, b = tiny(dtype=torch.float64)
    nw, nb, slopes = (torch.randn(4, dtype=torch.float64) for _ in range(3))
    leaves = [t.requires_grad_() for t in (x, nw, nb, w, b)]
    if kind != "prelu":
        torch.autograd.gradcheck(lambda *t: block(kind, None, *t), leaves)
        torch.autograd.gradgradcheck(lambda *t: block(kind, None, *t), leaves)
    else:
        leaves.append(slopes.requires_grad_())
        torch.autograd.gradcheck(lambda *t: block(kind, t[5], *t[:5]), leaves)
        torch.autograd.gradgradcheck(lambda *t: block(kind, t[5], *t[:5]), leaves)


def test_operators_through_the_norm() -> None:
    x, w, b = tiny(requires_grad=True)
    mean, var = moments(x.detach(), 2, False)
    nw, nb = (torch.randn(4, requires_grad=True) for _ in range(2))
    act = (2, False, False, 1e-5, "leaky_relu", 0.1)
    torch.library.opcheck(
        torch.ops.convoxel.norm_act_conv.default, (x, mean, var, nw, nb, None, *act, w, b, *HOW, 3, True)
    )
    detached = [t.detach() for t in (x, mean, var, nw, nb)]
    dy = torch.randn(2, 6, 3, 2, 3)
    torch.library.opcheck(
        torch.ops.convoxel.norm_act_conv_weight_grad.default,
        (*detached, None, *act, dy, *HOW, (3, 3, 3)),
    )
    arguments = (x, mean, var, nw, nb, None, *act, w, b, *HOW, 3, True)
    compiled = torch.compile(lambda *t: norm_act_conv(*t), fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(*arguments), norm_act_conv(*arguments), strict=True):
        assert torch.equal(got, expected)


def test_vmap_through_the_norm() -> None:
    x, w, b = (torch.stack([t, t - 1]) for t in tiny())
    dy = torch.randn(2, 2, 6, 3, 2, 3)
    act = (2, False, False, 1e-5, "relu", 0.0)
    mean, var = (torch.stack(t) for t in zip(*(moments(t, 2, False) for t in x), strict=True))

    def both(x: Tensor, mean: Tensor, var: Tensor, w: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        norm_ = (x, mean, var, None, None, None, *act)
        return *norm_act_conv(*norm_, w, b[0], *HOW, 3, True), norm_act_conv_weight_grad(
            *norm_, dy, *HOW, (3, 3, 3)
        )

    got = torch.vmap(both, (0, 0, 0, None, 0))(x, mean, var, w[0], dy)
    for i in range(2):
        for g, e in zip(got, both(x[i], mean[i], var[i], w[0], dy[i]), strict=True):
            torch.testing.assert_close(g[i], e)


def test_wrong_norms() -> None:
    x, w, b = tiny()
    mean = torch.zeros(2, 4, dtype=torch.float64)
    act = (4, False, False, 1e-5)
    with pytest.raises(RuntimeError, match="expected an activation of identity"):
        norm_act_conv(x, mean, mean, None, None, None, *act, "tanh", 0.0, w, b, *HOW, 0, False)
    with pytest.raises(RuntimeError, match="expected mean of shape"):
        norm_act_conv(x, mean[:1], mean, None, None, None, *act, "relu", 0.0, w, b, *HOW, 0, False)
    with pytest.raises(RuntimeError, match="has no gradient of its own"):
        z = x.clone().requires_grad_()
        dy = torch.randn(2, 6, 3, 2, 3)
        norm_act_conv_weight_grad(
            z, mean, mean, None, None, None, *act, "relu", 0.0, dy, *HOW, (3, 3, 3)
        ).sum().backward()
