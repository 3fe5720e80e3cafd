"""norm_act: values and gradients against the composition in float64, in every layout, dtype and transform."""

import itertools
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as T
from torch import Tensor

import convoxel
from convoxel.ops.norm_act import Act, norm_act
from tolerance import bound

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
OPS = torch.ops.convoxel
KINDS = ("identity", "relu", "leaky_relu", "prelu", "elu", "silu", "gelu", "gelu_tanh")
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def activate(z: Tensor, act: Act) -> Tensor:
    if act.kind == "prelu":
        return T.prelu(z, act.slopes)
    return {
        "identity": lambda: z,
        "relu": lambda: T.relu(z),
        "leaky_relu": lambda: T.leaky_relu(z, act.alpha),
        "elu": lambda: T.elu(z, act.alpha),
        "silu": lambda: T.silu(z),
        "gelu": lambda: T.gelu(z),
        "gelu_tanh": lambda: T.gelu(z, approximate="tanh"),
    }[act.kind]()  # fmt: skip


@dataclass(frozen=True)
class Case:
    """How the mean of an x of this shape is shared: batch, fixed, instance or groups of channels."""

    how: str | int
    shape: tuple[int, ...]
    residual: bool = False

    def __str__(self) -> str:
        return f"{self.how} {'x'.join(map(str, self.shape))}" + " residual" * self.residual

    @property
    def groups(self) -> int:
        return self.how if isinstance(self.how, int) else self.shape[1]

    @property
    def over_batch(self) -> bool:
        return self.how in ("batch", "fixed")

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The biased ones of x, or the running ones."""
        if self.how == "fixed":
            return torch.arange(self.shape[1]).double() / 4, torch.arange(self.shape[1]).double() + 0.5
        parts = x.double().reshape(self.shape[0], self.groups, -1)
        axes = (0, 2) if self.over_batch else 2
        return parts.mean(axes), parts.var(axes, correction=0)

    def ours(self, leaves: list[Tensor | None], act: Act, given: bool = False) -> Tensor:
        x, w, b, slopes, residual = leaves
        act = act._replace(slopes=slopes)
        fixed = self.how == "fixed"
        moments = self.moments(x.detach()) if given or fixed else None
        return norm_act(x, w, b, self.groups, self.over_batch, 1e-5, act, residual, moments, fixed)[0]

    def torchs(self, leaves: list[Tensor | None], act: Act) -> Tensor:
        x, w, b, slopes, residual = leaves
        if self.how == "fixed":
            z = T.batch_norm(x, *(m.to(x.dtype) for m in self.moments(x)), w, b, False, eps=1e-5)
        elif self.how == "batch":
            z = T.batch_norm(x, None, None, w, b, True, eps=1e-5)
        else:
            z = T.group_norm(x, self.groups, w, b, 1e-5)
        return activate(z if residual is None else z + residual, act._replace(slopes=slopes))

    def data(self, kind: str, dtype: torch.dtype = torch.float64, affine: bool = True) -> list[Tensor | None]:
        """x, w, b, slopes, residual."""
        channels = self.shape[1]
        x = torch.randn(self.shape).mul(2).add(1).to(dtype)
        w, b = (torch.randn(channels).to(dtype) if affine else None for _ in range(2))
        slopes = torch.rand(channels).sub(0.2).to(dtype) if kind == "prelu" else None
        return [x, w, b, slopes, torch.randn(self.shape).to(dtype) if self.residual else None]


CASES = [
    Case("batch", (2, 6, 5, 7, 3), True),
    Case("batch", (3, 33, 5, 7)),
    Case("batch", (7, 5)),
    Case("fixed", (2, 6, 5, 7, 3)),
    Case("fixed", (1, 17, 3), True),
    Case("instance", (2, 6, 5, 7, 3)),
    Case("instance", (1, 2, 70001), True),
    Case("instance", (1, 100, 3, 5), True),
    Case(3, (2, 6, 5, 7, 3), True),
    Case(4, (3, 32, 9, 11)),
    Case(3, (2, 12), True),
]


def results(call, leaves: list[Tensor | None], dy: Tensor) -> list[Tensor]:
    """y and the gradients of what is there."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in leaves]
    y = call(leaves)
    return [y.detach(), *torch.autograd.grad(y, [t for t in leaves if t is not None], dy)]


def in_layout(t: Tensor | None, last: bool) -> Tensor | None:
    return t.to(memory_format=LAST[t.dim()]) if t is not None and last else t


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients(case: Case, kind: str, isa: str) -> None:
    convoxel.set_strict(True)
    act = Act(kind, 0.1)
    length = torch.Size(case.shape).numel()
    layouts = (False, True) if len(case.shape) in LAST else (False,)
    for dtype, last, other_last in itertools.product(DTYPES, layouts, layouts):
        leaves, dy = case.data(kind, dtype), torch.randn(case.shape).to(dtype)
        exact = [None if t is None else t.double() for t in leaves]
        expected = results(lambda t: case.torchs(t, act), exact, dy.double())
        leaves[0], leaves[4] = in_layout(leaves[0], last), in_layout(leaves[4], other_last)
        got = results(lambda t: case.ours(t, act), leaves, in_layout(dy, other_last))
        assert got[0].stride() == torch.empty_like(leaves[0]).stride()
        for i, (g, e) in enumerate(zip(got, expected, strict=True)):
            assert g.dtype == dtype and g.shape == e.shape
            terms = length if g.dim() == 1 else 9 * length**0.5  # dw sums as many terms, each of about 1
            error, scale = (g.double() - e).abs().max().item(), max(1.0, e.abs().max().item())
            assert error <= bound(dtype, length) * (terms**0.5 + scale), f"{i} {dtype} last={last}"


@pytest.mark.parametrize("case", [c for c in CASES if c.how != "fixed"], ids=str)
def test_moments_from_elsewhere_give_the_same(case: Case) -> None:
    leaves, dy = case.data("prelu"), torch.randn(case.shape).double()
    x = leaves[0]
    y, mean, var = norm_act(x, *leaves[1:3], case.groups, case.over_batch, 1e-5, Act("relu"), leaves[4])
    for moment, expected in zip((mean, var), case.moments(x), strict=True):
        torch.testing.assert_close(moment, expected)
    again = norm_act(x, *leaves[1:3], case.groups, case.over_batch, 1e-5, Act("relu"), leaves[4], (mean, var))
    assert torch.equal(again[0], y) and again[1] is mean and again[2] is var
    own = results(lambda t: case.ours(t, Act("prelu")), leaves, dy)
    given = results(lambda t: case.ours(t, Act("prelu"), given=True), leaves, dy)
    for a, b in zip(own, given, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_at_zero_is_torchs(kind: str) -> None:
    case = Case("instance", (1, 2, 3))
    x = torch.tensor([[[-1.0, 0.0, 1.0]] * 2])
    act, slopes = Act(kind, 0.3), torch.tensor([0.5, 0.25]) if kind == "prelu" else None
    for w in (torch.ones(2), torch.zeros(2)):  # of zero weight: every z is 0
        leaves, dy = [x, w, torch.zeros(2), slopes, None], torch.tensor([[[1.0, 2.0, 5.0], [3.0, 1.0, 7.0]]])
        got = results(lambda t: case.ours(t, act), leaves, dy)
        for g, e in zip(got, results(lambda t: case.torchs(t, act), leaves, dy), strict=True):
            torch.testing.assert_close(g, e, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", KINDS)
def test_nan_and_infinity_come_out_where_torchs_do(value: float, kind: str, isa: str) -> None:
    """In a residual and under fixed moments, where no mean spreads them."""
    case, act = Case("fixed", (2, 4, 5, 6), residual=True), Act(kind, 0.1)
    for at, last in itertools.product((0, 4), (False, True)):
        leaves = case.data(kind, torch.float32)
        leaves[at][1, 2, 3, 4] = value
        leaves = [in_layout(t, last and t.dim() == 4) if t is not None else None for t in leaves]
        dy = torch.randn(case.shape)
        expected = results(lambda t: case.torchs(t, act), leaves, dy)
        for g, e in zip(results(lambda t: case.ours(t, act), leaves, dy), expected, strict=True):
            if kind in (
                "elu",
                "gelu",
            ):  # torch's vectors and scalars differ: NaN has a gradient, infinity is NaN
                assert not (g.isfinite() & ~e.isfinite()).any()
            else:
                assert torch.equal(g.isnan(), e.isnan()) and torch.equal(g.isinf(), e.isinf())


@pytest.mark.parametrize("kind", ["elu", "silu", "gelu", "gelu_tanh"])
def test_smooth_activations_are_right_to_a_few_units_in_the_last_place(kind: str, isa: str) -> None:
    """Over all of their range: z is x where mean is 0, and var and weight are 1; gradient where dy is 1."""
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    for dtype in (torch.float32, torch.float64):
        z = torch.cat([torch.linspace(-120, 120, 40001), torch.linspace(-3, 3, 40001), torch.logspace(-30, 30, 101),
                       -torch.logspace(-30, 1, 101)]).to(dtype)  # fmt: skip
        x, exact = z.view(1, 1, -1).requires_grad_(), z.double().requires_grad_()
        y = norm_act(x, None, None, 1, True, 0.0, Act(kind, 0.7), None, (zero, one), True)[0].flatten()
        expected = activate(exact, Act(kind, 0.7))
        slope, expected_slope = (
            torch.autograd.grad(t.sum(), s)[0].flatten() for t, s in ((y, x), (expected, exact))
        )
        eps = torch.finfo(dtype).eps
        error = (y.double() - expected).abs() / (expected.abs() + z.double().abs().clamp(max=1))
        assert error.max() <= 4 * eps
        # 1 - sigmoid and 1 - tanh^2 have errors of up to 44 eps in the reference.
        assert (slope.double() - expected_slope).abs().max() <= (4 if dtype == torch.float32 else 64) * eps


def test_large_mean() -> None:
    """Raw Hounsfield units: mean 1e4, deviation 1."""
    case, act = Case("instance", (2, 6, 9, 8, 7)), Act("leaky_relu", 0.9)
    x, w, b, *rest = case.data("leaky_relu", torch.float32)
    leaves, dy = [torch.randn(case.shape) + 1e4, w, b.abs() + 9, *rest], torch.randn(case.shape)
    exact = [None if t is None else t.double() for t in leaves]
    expected = results(lambda t: case.torchs(t, act), exact, dy.double())
    for last in (False, True):
        got = results(
            lambda t: case.ours(t, act), [in_layout(leaves[0], last), *leaves[1:]], in_layout(dy, last)
        )
        for g, e in zip(got, expected, strict=True):
            assert (g - e).abs().max() <= 1e-5 * e.abs().max().clamp(min=1)


SMALL = [Case("batch", (2, 3, 2, 2), True), Case("fixed", (2, 3, 3), True), Case("instance", (2, 2, 2, 1, 2)),
         Case(2, (2, 4, 3), True)]  # fmt: skip


@pytest.mark.parametrize("case", SMALL, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("affine", [False, True])
def test_gradcheck_and_gradgradcheck(case: Case, kind: str, affine: bool) -> None:
    leaves = case.data(kind, affine=affine)
    there = [t.requires_grad_() for t in leaves if t is not None]

    def f(*tensors: Tensor) -> Tensor:
        rest = iter(tensors)
        return case.ours([None if t is None else next(rest) for t in leaves], Act(kind, 0.1))

    assert torch.autograd.gradcheck(f, there)
    assert torch.autograd.gradgradcheck(f, there)


@pytest.mark.parametrize("needed", range(5))
def test_each_gradient_alone(needed: int) -> None:
    case, act = Case("batch", (2, 3, 4, 5), True), Act("prelu")
    leaves = case.data("prelu")
    dy = torch.randn(case.shape).double()
    for create_graph in (False, True):
        for i, t in enumerate(leaves):
            t.requires_grad_(i == needed)
        expected = torch.autograd.grad(case.torchs(leaves, act), leaves[needed], dy)
        got = torch.autograd.grad(case.ours(leaves, act), leaves[needed], dy, create_graph=create_graph)
        torch.testing.assert_close(got, expected)


def test_one_slope_for_all_channels() -> None:
    case = Case("instance", (2, 3, 4, 5))
    leaves = case.data("prelu")
    leaves[3] = leaves[3][:1]
    dy = torch.randn(case.shape).double()
    got, expected = (results(lambda t: f(t, Act("prelu")), leaves, dy) for f in (case.ours, case.torchs))  # noqa: B023
    for g, e in zip(got, expected, strict=True):
        assert g.shape == e.shape
        torch.testing.assert_close(g, e)


def test_bfloat16_with_float32_parameters() -> None:
    case, act = Case("batch", (2, 8, 5, 6), True), Act("prelu")
    leaves, dy = case.data("prelu", torch.bfloat16), torch.randn(case.shape).bfloat16()
    leaves[1:4] = [t.float() for t in leaves[1:4]]
    exact = [t.double() for t in leaves]
    expected = results(lambda t: case.torchs(t, act), exact, dy.double())
    for g, e, t in zip(
        results(lambda t: case.ours(t, act), leaves, dy), expected, [leaves[0], *leaves], strict=True
    ):
        assert g.dtype == t.dtype
        assert (g - e).abs().max() <= 8e-3 * e.abs().max()


def test_nothing_of_the_size_of_y_is_kept() -> None:
    case = Case("instance", (2, 4, 5, 6), True)
    leaves = [None if t is None else t.requires_grad_() for t in case.data("prelu")]
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        case.ours(leaves, Act("prelu"))
    large = {t.data_ptr() for t in saved if t.numel() == leaves[0].numel()}
    assert large == {leaves[0].data_ptr(), leaves[4].data_ptr()}


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind: str) -> None:
    for case, last in itertools.product(
        (Case("batch", (2, 4, 3, 5), True), Case("instance", (2, 4, 3, 5))), (0, 1)
    ):
        x, w, b, slopes, residual = (
            None if t is None else t.float().requires_grad_() for t in case.data(kind)
        )
        mean, var = case.moments(x.detach())
        how = (case.groups, case.over_batch, False, 1e-5, kind, 0.1)
        x = in_layout(x, bool(last)).detach().requires_grad_()
        torch.library.opcheck(OPS.norm_act.default, (x, w, b, slopes, residual, None, None, *how))
        torch.library.opcheck(OPS.norm_act.default, (x, w, b, slopes, residual, mean, var, *how))
        plain = [None if t is None else t.detach() for t in (x, x, w, b, slopes, residual)]
        wanted = (True, True, kind == "prelu", residual is not None)
        torch.library.opcheck(OPS.norm_act_backward.default, (*plain, mean, var, *how, *wanted))


@pytest.mark.parametrize("kind", KINDS)
def test_compile_without_graph_break(kind: str) -> None:
    case, act = Case("instance", (2, 3, 4, 5), True), Act(kind, 0.1)
    leaves, dy = case.data(kind), torch.randn(case.shape).double()
    compiled = torch.compile(lambda t: case.ours(t, act) * 2, fullgraph=True, backend="aot_eager")
    for g, e in zip(
        results(compiled, leaves, dy), results(lambda t: case.ours(t, act) * 2, leaves, dy), strict=True
    ):
        assert torch.equal(g, e)


@pytest.mark.parametrize(
    "case", [Case("batch", (3, 4, 5), True), Case("instance", (2, 4, 5)), Case("fixed", (2, 4, 5))], ids=str
)
def test_vmap_and_func_grad(case: Case) -> None:
    many = [
        torch.stack([a, b])
        for a, b in zip(*(t[:4] for t in (case.data("prelu"), case.data("prelu"))), strict=True)
    ]
    residual = case.data("prelu")[4]

    def loss(f, x: Tensor, w: Tensor, b: Tensor, slopes: Tensor) -> Tensor:
        return (f([x, w, b, slopes, residual], Act("prelu")) ** 3).sum()

    def of(f):
        return torch.func.grad(lambda *t: loss(f, *t), argnums=(0, 1, 2, 3))

    if case.how != "fixed":  # its moments are an argument of no batch here
        y = torch.vmap(lambda *t: case.ours([*t, residual], Act("prelu")))(*many)
        for i in range(2):
            torch.testing.assert_close(y[i], case.torchs([*(t[i] for t in many), residual], Act("prelu")))
        got = torch.vmap(of(case.ours))(*many)
        for i in range(2):
            torch.testing.assert_close([g[i] for g in got], list(of(case.torchs)(*(t[i] for t in many))))
    one = [t[0].requires_grad_() for t in many]
    rows = [torch.autograd.grad(f([*one, residual], Act("prelu")), one, torch.eye(7)[:, :1, None, None]
                                .expand(7, *case.shape).double(), is_grads_batched=True)
            for f in (case.ours, case.torchs)]  # fmt: skip
    torch.testing.assert_close(*rows)


def test_same_bits_for_every_thread_count(isa: str) -> None:
    for case in (Case("batch", (2, 40, 30, 41), True), Case("instance", (2, 40, 30, 41))):
        leaves, dy = case.data("prelu", torch.float32), torch.randn(case.shape)
        for last in (False, True):
            runs = []
            for threads in (1, 2):
                torch.set_num_threads(threads)
                x, *rest = leaves
                runs.append(results(lambda t: case.ours(t, Act("prelu")), [in_layout(x, last), *rest], dy))  # noqa: B023
            assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_large_tensors_stream() -> None:
    """32 MiB and more go past the caches."""
    case, act = Case("instance", (1, 8, 1050000), True), Act("leaky_relu", 0.1)
    leaves, dy = case.data("leaky_relu", torch.float32, affine=False), torch.randn(case.shape)
    got = results(lambda t: case.ours(t, act), leaves, dy)
    for g, e in zip(got, results(lambda t: case.torchs(t, act), leaves, dy), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 3, 0)])
def test_empty(shape: tuple[int, ...]) -> None:
    x, w = torch.empty(shape, requires_grad=True), torch.ones(3, requires_grad=True)
    y = norm_act(x, w, None, 3, False, 1e-5, Act("relu"))[0]
    y.sum().backward()
    assert y.shape == x.grad.shape == shape and torch.equal(w.grad, torch.zeros(3))


def test_what_is_refused() -> None:
    x, one, moments = torch.ones(2, 4, 3), torch.ones(4), [torch.ones(4).double()] * 2
    relu = Act("relu")
    for call, what in (
        (lambda: norm_act(x, None, None, 4, False, 0.1, Act("tanh")), "expected an activation of identity"),
        (lambda: norm_act(x, None, None, 4, False, 0.1, Act("prelu")), "slopes belong to prelu.*without"),
        (
            lambda: norm_act(x, None, None, 4, False, 0.1, Act("relu", 0.0, one)),
            "slopes belong to prelu.*with",
        ),
        (
            lambda: norm_act(x, None, None, 4, False, 0.1, Act("prelu", 0.0, one[:2])),
            "expected slopes of shape",
        ),
        (lambda: norm_act(x, one[:2], None, 4, False, 0.1, relu), "weight should be a vector of 4"),
        (lambda: norm_act(x, None, None, 3, False, 0.1, relu), "divisible by num_groups"),
        (lambda: norm_act(x, None, None, 4, False, 0.1, relu, x[:1]), "expected residual like x"),
        (lambda: norm_act(x, None, None, 4, False, 0.1, relu, x.double()), "expected residual like x"),
        (lambda: norm_act(x, None, None, 4, False, 0.1, relu, None, moments), r"mean of shape \(2, 4\)"),
        (lambda: norm_act(x, None, None, 4, True, 0.1, relu, fixed=True), "both where they are fixed"),
        (
            lambda: norm_act(x, None, None, 2, True, 0.1, relu, None, [m[:2] for m in moments], True),
            "belong to chan",
        ),
        (lambda: norm_act(x.half(), None, None, 4, True, 0.1, relu), "kernels take"),
        (lambda: norm_act(x, one.double(), None, 4, True, 0.1, relu), "mixed dtype"),
    ):
        with pytest.raises(RuntimeError, match=what):
            call()
    how = (4, True, False, 0.1, "relu", 0.0, True, True, False, False)
    y = OPS.norm_act_backward(x, x.clone().requires_grad_(), None, None, None, None, *moments, *how)[0]
    with pytest.raises(RuntimeError, match="create_graph=True"):
        y.sum().backward()


def test_it_is_listed_and_counted() -> None:
    assert {"norm_act", "norm_act_backward"} <= set(convoxel.ops.registered())
    x = torch.ones(1, 2, 3, requires_grad=True)
    norm_act(x, None, None, 2, False, 0.1, Act("relu"))[0].sum().backward()
    assert {k: v["served"] for k, v in convoxel.stats().items()} == {"norm_act": 1, "norm_act_backward": 1}
