"""Batch, instance, group and layer norm: values, gradients, statistics, layouts, and what is refused."""

import itertools
from dataclasses import dataclass
from types import ModuleType

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


def channels_last(t: Tensor) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return t.to(memory_format=formats[t.dim()]) if t.dim() in formats else t


@dataclass(frozen=True)
class Case:
    """One norm of an x of this shape (N, C, *); groups counts where kind is group."""

    kind: str
    shape: tuple[int, ...]
    groups: int = 1

    def __str__(self) -> str:
        return f"{self.kind} {'x'.join(map(str, self.shape))}" + f" g{self.groups}" * (self.kind == "group")

    @property
    def features(self) -> tuple[int, ...]:
        return self.shape[1:] if self.kind == "layer" else self.shape[1:2]

    def call(
        self, module: ModuleType, x: Tensor, w: Tensor | None, b: Tensor | None, eps: float = 1e-5
    ) -> Tensor:
        if self.kind == "batch":
            return module.batch_norm(x, None, None, w, b, True, eps=eps)
        if self.kind == "fixed":
            mean = torch.arange(self.shape[1]).to(x.dtype if w is None else w.dtype)
            return module.batch_norm(x, mean, mean + 1, w, b, False, eps=eps)
        if self.kind == "instance":
            return module.instance_norm(x, None, None, w, b, eps=eps)
        if self.kind == "group":
            return module.group_norm(x, self.groups, w, b, eps)
        return module.layer_norm(x, self.shape[1:], w, b, eps)

    def mean(self, t: Tensor) -> Tensor:
        """Over all that share a mean."""
        if self.kind == "fixed":
            return torch.zeros_like(t)
        groups = {"batch": self.shape[1], "instance": self.shape[1], "group": self.groups, "layer": 1}[
            self.kind
        ]
        parts = t.reshape(self.shape[0], groups, -1)
        return (
            parts.mean((0, 2) if self.kind == "batch" else 2, keepdim=True).expand_as(parts).reshape(t.shape)
        )

    def per_feature(self, t: Tensor) -> Tensor:
        """w or b, to multiply x with."""
        return t if self.kind == "layer" else t.view(-1, *[1] * (len(self.shape) - 2))

    def to_feature(self, t: Tensor) -> Tensor:
        return t.sum(0) if self.kind == "layer" else t.sum([0, *range(2, t.dim())])


CASES = [
    Case("batch", (2, 6, 5, 7, 3)),
    Case("batch", (3, 33, 5, 7)),
    Case("batch", (7, 5)),
    Case("batch", (1, 1, 4099)),
    Case("batch", (2, 3, 1, 1, 2)),
    Case("fixed", (2, 6, 5, 7, 3)),
    Case("fixed", (1, 17, 1)),
    Case("instance", (2, 6, 5, 7, 3)),
    Case("instance", (1, 100, 3, 5)),
    Case("instance", (2, 3, 9, 11, 13)),
    Case("instance", (1, 2, 70001)),
    Case("group", (2, 6, 5, 7, 3), 3),
    Case("group", (3, 32, 9, 11), 4),
    Case("group", (2, 12), 3),
    Case("group", (1, 7, 3, 3, 3), 1),
    Case("group", (1, 2100, 3, 1), 3),
    Case("layer", (6, 33)),
    Case("layer", (3, 5, 7)),
    Case("layer", (300, 70)),
    Case("layer", (2, 8701)),
]


def results(module: ModuleType, case: Case, inputs: list[Tensor], dy: Tensor) -> list[Tensor]:
    """y and the gradients of x, w, b."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    y = case.call(module, *leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def sizes(case: Case, x: Tensor, w: Tensor, b: Tensor, dy: Tensor) -> list[Tensor]:
    """The sums of absolute terms that make y, dx, dw, db."""
    if case.kind == "fixed":
        mean = torch.arange(case.shape[1]).double()
        centred, r = x - case.per_feature(mean), case.per_feature((mean + 1 + 1e-5).rsqrt())
    else:
        centred = x - case.mean(x)
        r = (case.mean(centred * centred) + 1e-5).rsqrt()
    h, g = (centred * r).abs(), (dy * case.per_feature(w)).abs()
    shift = (centred - x).abs() * r if case.kind == "fixed" else torch.ones_like(h)
    return [
        (h + shift) * case.per_feature(w.abs()) + case.per_feature(b.abs()),
        r * (g + case.mean(g) * (1 + h) + (1 + h) * case.mean(g * (1 + h))),
        case.to_feature(dy.abs() * (1 + h)),
        case.to_feature(dy.abs()),
    ]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case: Case, isa: str) -> None:
    convoxel.set_strict(True)
    length = max(torch.Size(case.shape[i:]).numel() * n for i, n in ((1, 1), (2, case.shape[0])))
    layouts = (False, True) if len(case.shape) in (4, 5) else (False,)
    for dtype, last, dy_last in itertools.product(DTYPES, layouts, layouts):
        x, dy = (torch.randn(case.shape).mul(2).add(s).to(dtype) for s in (3, 0))
        w, b = (torch.randn(case.features).to(dtype) for _ in range(2))
        exact = [t.double() for t in (x, w, b, dy)]
        expected, size = results(T, case, exact[:3], exact[3]), sizes(case, *exact)
        x, dy = channels_last(x) if last else x, channels_last(dy) if dy_last else dy
        for name, g, e, s in zip(
            ("y", "dx", "dw", "db"), results(F, case, [x, w, b], dy), expected, size, strict=True
        ):
            assert g.dtype == dtype and g.shape == e.shape
            error = ((g.double() - e).abs() / s.clamp(min=1e-30)).max().item()
            assert error <= bound(dtype, length), f"{name} {dtype} x_last={last} dy_last={dy_last}"


@pytest.mark.parametrize("kind", ["batch", "fixed", "instance", "group", "layer"])
@pytest.mark.parametrize("shape", [(2, 6, 3, 4, 6), (1, 40, 2, 2), (2, 2, 70000)])
def test_exact_on_integers(kind: str, shape: tuple[int, ...], isa: str) -> None:
    """Every channel has deviations of its own, +-d, so that mean, variance and y are exact: a wrong index shows."""
    case = Case(kind, shape, groups=2)
    c, n = torch.arange(shape[1]).view(-1, *[1] * (len(shape) - 2)), torch.Size(shape[2:]).numel()
    order = (
        torch.arange(n) if n > 1000 else torch.stack([torch.randperm(n) for _ in range(shape[0] * shape[1])])
    )
    sign = order.expand(shape[0] * shape[1], n).reshape(shape) % 2 * 2 - 1
    d = 2.0 ** (c % 3 if kind in ("batch", "instance", "fixed") else 1)
    mean = c % 7 if kind in ("batch", "instance", "fixed") else 5
    w, b = torch.randint(-4, 5, (2, shape[1])).double()
    expected = sign * w.view(c.shape) + b.view(c.shape)
    for dtype, last in itertools.product(DTYPES, (False, True)):
        x = (sign * d + mean).to(dtype)
        x = channels_last(x) if last else x
        if kind == "fixed":
            running = [t.flatten().to(dtype) for t in (mean, d * d)]
            y = F.batch_norm(x, *running, w.to(dtype), b.to(dtype), False, eps=0.0)
        elif kind == "layer":
            full = [t.view(c.shape).expand(shape[1:]) for t in (w, b)]
            y = F.layer_norm(x, shape[1:], *(t.to(dtype) for t in full), eps=0.0)
        elif kind == "batch":
            y = F.batch_norm(x, None, None, w.to(dtype), b.to(dtype), True, eps=1e-38)
        else:
            y = case.call(F, x, w.to(dtype), b.to(dtype), eps=0.0)
        assert torch.equal(y.double(), expected.double()), f"{dtype} last={last}"


@pytest.mark.parametrize("case", [c for c in CASES if c.kind != "fixed"], ids=str)
def test_large_mean(case: Case) -> None:
    """Raw Hounsfield units: mean 1e4, deviation 1. torch's own error is 4e-4."""
    x, dy = 1e4 + torch.randn(case.shape), torch.randn(case.shape)
    w, b = torch.rand(case.features), torch.rand(case.features)
    expected = results(T, case, [t.double() for t in (x, w, b)], dy.double())
    for last in (False, True):
        got = results(F, case, [channels_last(x) if last else x, w, b], dy)
        for g, e in zip(got, expected, strict=True):
            assert (g - e).abs().max() <= 1e-5 * e.abs().max().clamp(min=1)


@pytest.mark.parametrize("kind", ["batch", "instance", "group", "layer"])
@pytest.mark.parametrize("last", [False, True])
def test_large_numbers_stay_finite(kind: str, last: bool, isa: str) -> None:
    """Squares of 1e30 overflow a float; the small channel next to it keeps its digits."""
    case = Case(kind, (2, 4, 5, 6), groups=4)
    x, dy = torch.randn(case.shape), torch.randn(case.shape)
    x[:, 1] *= 1e30
    x = channels_last(x) if last else x
    w, b = torch.ones(case.features), torch.zeros(case.features)
    expected = results(T, case, [t.double() for t in (x, w, b)], dy.double())
    for g, e in zip(results(F, case, [x, w, b], dy), expected, strict=True):
        channels = ((g - e).abs().transpose(0, 1).flatten(1).amax(1) / e.abs().transpose(0, 1).flatten(1).amax(1)
                    if e.dim() == 4 else (g - e).abs() / e.abs().max())  # fmt: skip
        assert channels.max() <= 1e-5


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", ["batch", "fixed", "instance", "group", "layer"])
def test_nan_and_infinity_come_out_where_torchs_do(value: float, kind: str, isa: str) -> None:
    case = Case(kind, (2, 4, 5, 6), groups=2)
    for last in (False, True):
        x, dy = torch.randn(case.shape), torch.randn(case.shape)
        x[1, 2, 3, 4] = value
        w, b = torch.ones(case.features), torch.zeros(case.features)
        expected = results(T, case, [t.double() for t in (x, w, b)], dy.double())
        for g, e in zip(results(F, case, [channels_last(x) if last else x, w, b], dy), expected, strict=True):
            assert torch.equal(g.isnan(), e.isnan()) and torch.equal(g.isinf(), e.isinf())


SMALL = [
    Case("batch", (2, 3, 2, 2)),
    Case("fixed", (2, 3, 3)),
    Case("instance", (2, 2, 2, 1, 2)),
    Case("group", (2, 4, 3), 2),
    Case("layer", (2, 5)),
    Case("layer", (2, 2, 2)),
]


@pytest.mark.parametrize("case", SMALL, ids=str)
@pytest.mark.parametrize("affine", [False, True])
def test_gradcheck_and_gradgradcheck(case: Case, affine: bool) -> None:
    shapes = [case.shape] + [case.features] * 2 * affine
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    rest = [None] * (3 - len(inputs))
    assert torch.autograd.gradcheck(lambda *a: case.call(F, *a, *rest), inputs)
    assert torch.autograd.gradgradcheck(lambda *a: case.call(F, *a, *rest), inputs)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_third_derivative(case: Case) -> None:
    x, w, b = (torch.randn(s, dtype=torch.float64, requires_grad=True)
               for s in (case.shape, case.features, case.features))  # fmt: skip

    def plain(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        if case.kind == "fixed":
            mean = torch.arange(case.shape[1]).double()
            centred, var = x - case.per_feature(mean), case.per_feature(mean + 1)
        else:
            centred = x - case.mean(x)
            var = case.mean(centred * centred)
        return centred * (var + 1e-5).rsqrt() * case.per_feature(w) + case.per_feature(b)

    def third(f) -> list[Tensor]:
        (d,) = torch.autograd.grad((f(x, w, b) ** 3).sum(), x, create_graph=True)
        d = torch.autograd.grad((d**2).sum(), (x, w), create_graph=True)
        return list(torch.autograd.grad(sum((t**2).sum() for t in d), (x, w)))

    for g, e in zip(third(lambda *a: case.call(F, *a)), third(plain), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("need", list(itertools.product((False, True), repeat=3)))
@pytest.mark.parametrize("kind", ["batch", "fixed", "layer"])
def test_only_the_gradients_that_are_needed(need: tuple[bool, ...], kind: str) -> None:
    case = Case(kind, (4, 5))
    inputs = [torch.randn(s, dtype=torch.float64) for s in (case.shape, (5,), (5,))]
    expected = results(T, case, inputs, torch.ones(case.shape))[1:]
    leaves = [t.requires_grad_(n) for t, n in zip(inputs, need, strict=True)]
    y = case.call(F, *leaves)
    assert y.requires_grad == any(need)
    if any(need):
        y.sum().backward()
    for t, n, e in zip(leaves, need, expected, strict=True):
        assert (t.grad is not None) == n
        if n:
            torch.testing.assert_close(t.grad, e)


@pytest.mark.parametrize("last", [False, True])
def test_backward_keeps_the_input_and_little_else(last: bool) -> None:
    x = torch.randn(1, 8, 8, 8, 8)
    x = (channels_last(x) if last else x).requires_grad_()
    w, b = torch.ones(8, requires_grad=True), torch.ones(8, requires_grad=True)
    kept: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        kept[t.data_ptr()] = t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        F.instance_norm(x, None, None, w, b)
    assert x.data_ptr() in kept and sum(kept.values()) <= x.numel() * 4 + 8 * (4 + 8 + 8)


# Statistics ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("momentum", [0.1, 1.0, 0.0, 0.7])
@pytest.mark.parametrize("name", ["batch_norm", "instance_norm"])
def test_running_statistics(name: str, momentum: float, dtype: torch.dtype) -> None:
    x = torch.randn(3, 5, 4, 3).mul(2).add(1).to(dtype)
    mean, var = torch.randn(5).to(dtype), torch.rand(5).to(dtype)
    ours, theirs = [mean.clone(), var.clone()], [mean.double(), var.double()]
    getattr(F, name)(x, *ours, None, None, True, momentum)
    getattr(T, name)(x.double(), *theirs, None, None, True, momentum)
    for g, e in zip(ours, theirs, strict=True):
        assert g.dtype == dtype
        torch.testing.assert_close(g, e.to(dtype))


def test_instance_norm_with_given_statistics() -> None:
    x, mean, var = torch.randn(2, 3, 4), torch.randn(3), torch.rand(3)
    got, expected = (m.instance_norm(x, mean, var, use_input_stats=False) for m in (F, T))
    torch.testing.assert_close(got, expected)
    running = mean.bfloat16(), var.bfloat16()
    torch.testing.assert_close(
        F.instance_norm(x, *running, use_input_stats=False),
        T.instance_norm(x, *running, use_input_stats=False),
    )


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 4, 0), (2, 0, 3), (0, 4)])
def test_empty(shape: tuple[int, ...]) -> None:
    for kind in ("batch", "fixed", "group", "layer", *["instance"] * (len(shape) > 2)):
        case = Case(kind, shape, groups=max(shape[1] // 2, 1))
        inputs = [torch.randn(s) for s in (shape, case.features, case.features)]
        y, dx, dw, db = results(F, case, inputs, torch.ones(shape))
        assert y.shape == dx.shape == shape and not dw.any() and not db.any()
        assert case.call(F, *inputs).shape == case.call(T, inputs[0], None, None).shape
    mean = torch.ones(shape[1])
    F.batch_norm(torch.ones(shape), mean, mean.clone(), training=True)
    assert torch.equal(mean, torch.ones(shape[1]))


# Layouts, threads, dtypes -------------------------------------------------------------------------


def strided(shape: tuple[int, ...]) -> Tensor:
    return torch.randn([2 * s for s in shape])[tuple(slice(None, None, 2) for _ in shape)]


@pytest.mark.parametrize("make", [strided, lambda s: torch.randn(s[:1] + (1,) * (len(s) - 2) + s[-1:]).expand(s),
                                  lambda s: torch.randn(s[::-1]).permute(*range(len(s))[::-1])])  # fmt: skip
@pytest.mark.parametrize("kind", ["batch", "fixed", "instance", "group", "layer"])
def test_any_strides(make, kind: str) -> None:
    case = Case(kind, (2, 4, 5, 6), groups=2)
    inputs, dy = [make(case.shape), strided(case.features), strided(case.features)], make(case.shape)
    got, expected = (results(m, case, inputs, dy) for m in (F, T))
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", [2, 3])
def test_channels_last_stays_channels_last(rank: int) -> None:
    x = channels_last(torch.randn(2, 4, *[5] * rank)).requires_grad_()
    for kind in ("batch", "fixed", "instance", "group"):
        y = Case(kind, x.shape, 2).call(F, x, None, None)
        (dx,) = torch.autograd.grad(y, x, torch.randn(x.shape))
        assert y.stride() == dx.stride() == x.stride()
    assert F.layer_norm(x, x.shape[-1:]).stride() == T.layer_norm(x, x.shape[-1:]).stride()


@pytest.mark.parametrize("case", [Case("batch", (2, 20, 50, 60)), Case("instance", (1, 3, 45, 50, 40)),
                                  Case("group", (2, 24, 50, 60), 3), Case("layer", (500, 100))], ids=str)  # fmt: skip
def test_same_bits_for_every_run_and_thread_count(case: Case, isa: str) -> None:
    inputs, dy = [torch.randn(s) for s in (case.shape, case.features, case.features)], torch.randn(case.shape)
    for last in (False, True):
        inputs[0] = channels_last(inputs[0]) if last else inputs[0]
        runs = []
        for threads in (1, 2, 2, 3):
            torch.set_num_threads(threads)
            runs.append(results(F, case, inputs, dy))
        for other in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_float32_parameters_of_a_bfloat16_input() -> None:
    x = torch.randn(2, 4, 5, 6).bfloat16()
    for kind in ("batch", "fixed", "instance", "group"):
        case = Case(kind, (2, 4, 5, 6), groups=2)
        inputs = [x, torch.randn(4), torch.randn(4)]
        got, expected = (results(m, case, inputs, torch.ones_like(x)) for m in (F, T))
        assert [t.dtype for t in got] == [t.dtype for t in expected]
        for g, e in zip(got, expected, strict=True):
            torch.testing.assert_close(g, e, rtol=2e-2, atol=2e-2)


def test_autocast_is_torchs() -> None:
    x, w = torch.randn(2, 4, 5), torch.ones(4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for kind, dtype in itertools.product(("batch", "instance", "group"), (torch.float32, torch.bfloat16)):
            case = Case(kind, (2, 4, 5), groups=2)
            assert case.call(F, x.to(dtype), w, w).dtype == case.call(T, x.to(dtype), w, w).dtype == dtype


# torch's machinery --------------------------------------------------------------------------------


def op_samples() -> list[tuple[object, tuple[object, ...]]]:
    x, w, b = torch.randn(2, 6, 3, 4), torch.randn(6), torch.randn(6)
    leaf = lambda t: t.detach().clone().requires_grad_()  # noqa: E731
    mean, var = torch.randn(2, 3).double(), torch.rand(2, 3).double()
    m, v = torch.randn(6).double(), torch.rand(6).double()
    return [
        (OPS.norm.default, (leaf(x), leaf(w), leaf(b), 3, False, 1e-5)),
        (OPS.norm.default, (leaf(channels_last(x)), None, leaf(b), 6, True, 1e-5)),
        (OPS.norm.default, (leaf(x[:, :, 0, 0]), leaf(w), None, 1, False, 1e-5)),
        (OPS.norm_fixed.default, (leaf(x), leaf(w), leaf(b), m, v, 1e-5)),
        (OPS.norm_backward.default, (leaf(x), leaf(x), leaf(w), mean, var, 3, False, False, 1e-5, True, True)),
        (OPS.norm_backward.default, (leaf(x), leaf(channels_last(x)), None, m, v, 6, True, True, 1e-5, True, False)),
        (OPS.norm_backward.default, (leaf(x), leaf(x), leaf(w), m, v, 6, True, False, 1e-5, False, True)),
    ]  # fmt: skip


@pytest.mark.parametrize("index", range(7))
def test_opcheck(index: int) -> None:
    torch.library.opcheck(*op_samples()[index])


def test_every_operator_is_listed() -> None:
    assert {"norm", "norm_fixed", "norm_backward"} <= set(convoxel.ops.registered())


@pytest.mark.parametrize("kind", ["batch", "fixed", "instance", "group", "layer"])
@pytest.mark.parametrize("in_dims", [(0, None, None), (1, 0, None), (None, 0, 1), (2, 1, 0)])
def test_vmap(kind: str, in_dims: tuple[int | None, ...]) -> None:
    case = Case(kind, (2, 4, 3), groups=2)
    tensors = []
    for shape, dim in zip((case.shape, case.features, case.features), in_dims, strict=True):
        sizes = list(shape)
        if dim is not None:
            sizes.insert(min(dim, len(sizes)), 3)
        tensors.append(torch.randn(sizes, dtype=torch.float64))

    def step(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        grads = torch.func.grad(lambda *a: (case.call(F, *a) ** 3).sum(), (0, 1, 2))(x, w, b)
        return case.call(F, x, w, b), *grads

    got = torch.vmap(step, in_dims)(*tensors)
    for i in range(3):
        one = [t if d is None else t.select(d, i) for t, d in zip(tensors, in_dims, strict=True)]
        for g, e in zip(got, step(*one), strict=True):
            torch.testing.assert_close(g[i], e)


@pytest.mark.parametrize("in_dims", [(0, None), (None, 1), (2, 0)])
@pytest.mark.parametrize("over_batch", [False, True])
@pytest.mark.parametrize("need", [(True, True), (True, False), (False, True)])
def test_vmap_of_the_gradient(
    in_dims: tuple[int | None, ...], over_batch: bool, need: tuple[bool, bool]
) -> None:
    groups = 4 if over_batch else 2
    mean, var = (torch.rand((4,) if over_batch else (2, 2)).double() for _ in range(2))
    w = torch.randn(4).double()
    dy, x = (torch.randn([n for i, n in enumerate((3, 2, 4, 5)) if i or d is not None]).movedim(0, d or 0).double()
             for d in in_dims)  # fmt: skip
    f = lambda dy, x: OPS.norm_backward(dy, x, w, mean, var, groups, over_batch, False, 1e-5, *need)  # noqa: E731
    got = torch.vmap(f, in_dims)(dy, x)
    for i in range(3):
        one = [t if d is None else t.select(d, i) for t, d in zip((dy, x), in_dims, strict=True)]
        for g, e in zip(got, f(*one), strict=True):
            torch.testing.assert_close(g[i], e)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("layer", [nn.BatchNorm2d(4), nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
                                   nn.GroupNorm(2, 4), nn.LayerNorm(6), nn.BatchNorm2d(4).eval()])  # fmt: skip
def test_compile_without_graph_break(layer: torch.nn.Module, dynamic: bool) -> None:
    x = torch.randn(2, 4, 5, 6, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    y = compiled(x)
    torch.testing.assert_close(y, layer(x))
    y.sum().backward()
    assert x.grad is not None and layer.weight.grad is not None


def test_export() -> None:
    layer, x = nn.GroupNorm(2, 4), torch.randn(2, 4, 5)
    program = torch.export.export(layer, (x,))
    assert any("convoxel.norm" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), layer(x))


# Layers -------------------------------------------------------------------------------------------


def trained(layer: torch.nn.Module, batches: list[Tensor]) -> list[Tensor]:
    """Outputs and input gradients over three batches and one evaluation, then the state."""
    out = []
    for i, x in enumerate(batches):
        layer.train(i < len(batches) - 1)
        x = x.clone().requires_grad_()
        y = layer(x)
        out += [y.detach(), *torch.autograd.grad(y.sin().sum(), x)]
    return out + [t.float() for t in layer.state_dict().values()]


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("how", [{}, {"momentum": None, "affine": False}, {"track_running_stats": True},
                                 {"affine": True, "track_running_stats": False}], ids=str)  # fmt: skip
@pytest.mark.parametrize("kind", ["BatchNorm", "InstanceNorm"])
def test_layers_are_torchs_layers(kind: str, how: dict[str, object], lazy: bool, rank: int) -> None:
    name = f"{'Lazy' * lazy}{kind}{rank}d"
    sizes = [] if lazy else [4]
    ours, theirs = (getattr(m, name)(*sizes, **how) for m in (nn, torch.nn))
    assert isinstance(ours, getattr(torch.nn, name)) and repr(ours) == repr(theirs)
    batches = [torch.randn(3, 4, *[5] * rank) for _ in range(4)]
    for g, e in zip(trained(ours, batches), trained(theirs, batches), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-5)
    assert type(ours) is getattr(nn, f"{kind}{rank}d")
    assert list(ours.state_dict()) == list(theirs.state_dict())
    if kind == "InstanceNorm":
        torch.testing.assert_close(
            ours.eval()(batches[0][0]), theirs.eval()(batches[0][0]), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("make", [lambda m: m.GroupNorm(2, 4), lambda m: m.GroupNorm(4, 4, affine=False),
                                  lambda m: m.LayerNorm(6), lambda m: m.LayerNorm((5, 6), bias=False)])  # fmt: skip
def test_group_and_layer_norm_layers(make) -> None:
    ours, theirs = make(nn), make(torch.nn)
    assert isinstance(ours, type(theirs)) and repr(ours) == repr(theirs)
    x = torch.randn(2, 4, 5, 6)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


# What is refused ----------------------------------------------------------------------------------

X = (2, 4, 3, 3)


def ones(*shape: int) -> Tensor:
    return torch.ones(shape)


@pytest.mark.parametrize(
    "make",
    [
        lambda m: m.batch_norm(ones(1, 4), None, None, training=True),
        lambda m: m.batch_norm(ones(1, 4, 1, 1), None, None, training=True),
        lambda m: m.batch_norm(ones(*X), None, None),
        lambda m: m.batch_norm(ones(*X), ones(4), None),
        lambda m: m.batch_norm(ones(*X), ones(4), None, training=True),
        lambda m: m.batch_norm(ones(*X), ones(5), ones(5)),
        lambda m: m.batch_norm(ones(*X), ones(4), ones(4), ones(5)),
        lambda m: m.batch_norm(ones(*X), ones(4), ones(4), ones(4), ones(3)),
        lambda m: m.batch_norm(ones(4), ones(4), ones(4)),
        lambda m: m.batch_norm(ones(*X), None, None, training=True, eps=0.0),
        lambda m: m.batch_norm(ones(*X), ones(4), ones(4), eps=-1.0),
        lambda m: m.batch_norm(ones(*X), ones(4), ones(4), momentum=None),
        lambda m: m.batch_norm(ones(*X), ones(4).double(), ones(4).double()),
        lambda m: m.batch_norm(ones(*X), ones(4), ones(4), ones(4).bfloat16()),
        lambda m: m.batch_norm(ones(*X).bfloat16(), ones(4).bfloat16(), ones(4), ones(4)),
        lambda m: m.batch_norm(ones(*X), ones(4).requires_grad_(), ones(4), training=True),
        lambda m: m.instance_norm(ones(2, 4, 1)),
        lambda m: m.instance_norm(ones(2, 4)),
        lambda m: m.instance_norm(ones(2, 4, 3), use_input_stats=False),
        lambda m: m.instance_norm(ones(2, 4, 3), ones(4)),
        lambda m: m.instance_norm(ones(2, 4, 3), ones(5), ones(5)),
        lambda m: m.instance_norm(ones(2, 4, 3), weight=ones(5)),
        lambda m: m.group_norm(ones(*X), 3),
        lambda m: m.group_norm(ones(*X), 0),
        lambda m: m.group_norm(ones(*X), -1),
        lambda m: m.group_norm(ones(4), 2),
        lambda m: m.group_norm(ones(1, 2), 2),
        lambda m: m.group_norm(ones(*X), 2.0),
        lambda m: m.group_norm(ones(*X), 2, ones(5)),
        lambda m: m.group_norm(ones(*X), 2, ones(4), ones(4, 1)),
        lambda m: m.group_norm(ones(*X).double(), 2, ones(4)),
        lambda m: m.layer_norm(ones(*X), 3),
        lambda m: m.layer_norm(ones(*X), (4,)),
        lambda m: m.layer_norm(ones(*X), ()),
        lambda m: m.layer_norm(ones(*X), (3.0,)),
        lambda m: m.layer_norm(ones(*X), X[1:], eps=None),
        lambda m: m.group_norm(ones(*X), 1, eps="1e-5"),
        lambda m: m.batch_norm(ones(*X), None, None, training=1),
        lambda m: m.batch_norm(ones(*X), None, None, bias=[1.0], training=True),
        lambda m: m.instance_norm(ones(*X), use_input_stats=None),
        lambda m: m.instance_norm(ones(*X), weight=ones(X[1], 1)),
        lambda m: m.layer_norm(ones(*X), (3, 3), ones(9)),
        lambda m: m.layer_norm([1.0], (1,)),
    ],
)
def test_what_torch_rejects_is_rejected_alike(make) -> None:
    kinds = (RuntimeError, TypeError, ValueError, ZeroDivisionError)
    with pytest.raises(kinds) as theirs:
        make(T)
    with pytest.raises(theirs.type) as ours:
        make(F)
    assert "norm" in str(ours.value) and 40 < len(str(ours.value)) < 400


def test_operators_check_without_the_layers_in_front() -> None:
    x, m = ones(2, 4, 3), ones(4).double()
    for bad in (
        lambda: OPS.norm(ones(4), None, None, 1, False, 1e-5),
        lambda: OPS.norm(x, None, None, 0, False, 1e-5),
        lambda: OPS.norm(x, None, None, 3, False, 1e-5),
        lambda: OPS.norm(x, ones(5), None, 1, False, 1e-5),
        lambda: OPS.norm(x.int(), None, None, 1, False, 1e-5),
        lambda: OPS.norm_fixed(x, None, None, m.float(), m, 1e-5),
        lambda: OPS.norm_fixed(x, None, None, m, m[:3], 1e-5),
        lambda: OPS.norm_fixed(ones(4), None, None, m, m, 1e-5),
        lambda: OPS.norm_backward(x, x, None, m, m, 2, True, False, 1e-5, True, True),
        lambda: OPS.norm_backward(x[:1], x, None, m, m, 4, True, False, 1e-5, True, True),
        lambda: OPS.norm_backward(x.double(), x, None, m, m, 4, True, False, 1e-5, True, True),
        lambda: OPS.norm_backward(x, x, None, m.view(2, 2), m.view(2, 2), 2, False, True, 1e-5, True, True),
    ):  # fmt: skip
        with pytest.raises(RuntimeError):
            bad()


@pytest.mark.parametrize("name", ["batch_norm", "layer_norm"])
def test_what_is_outside_goes_to_torch_and_is_counted(name: str) -> None:
    x = ones(3, 4).half()
    args = (None, None, None, None, True) if name == "batch_norm" else ((4,),)
    assert torch.equal(getattr(F, name)(x, *args), getattr(T, name)(x, *args))
    assert convoxel.stats()[name]["why"] == {"dtype torch.float16 on cpu": 1}
    convoxel.set_strict(True)
    with pytest.raises(convoxel.HandedToTorch, match=name):
        getattr(F, name)(x, *args)
