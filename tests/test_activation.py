"""relu and leaky relu: values, gradients, in place, layouts, and what is refused."""

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as T
from torch import Tensor

import convoxel
from convoxel import functional as F
from convoxel import nn

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
OPS = torch.ops.convoxel
INF, NAN = float("inf"), float("nan")

CALLS: dict[str, Callable] = {
    "relu": lambda m, x, **k: m.relu(x, **k),
    "leaky": lambda m, x, **k: m.leaky_relu(x, **k),
    "leaky 0": lambda m, x, **k: m.leaky_relu(x, 0.0, **k),
    "leaky 1.5": lambda m, x, **k: m.leaky_relu(x, 1.5, **k),
    "leaky -0.5": lambda m, x, **k: m.leaky_relu(x, -0.5, **k),
}
IN_PLACE = [n for n in CALLS if "-" not in n]


def samples(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    x = torch.randn(shape).to(dtype)
    special = torch.tensor([NAN, INF, -INF, -0.0, 0.0, 1e-45, -1e-45, 3e38, -3e38], dtype=dtype)
    if x.numel() > 20:
        x.view(-1)[: len(special)] = special
    return x


def results(call: Callable, module, x: Tensor, dy: Tensor, **how: bool) -> list[Tensor]:
    leaf = x.detach().requires_grad_()
    y = call(module, leaf + 0 if how else leaf, **how)
    return [y.detach(), torch.autograd.grad(y, leaf, dy)[0]]


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a.nan_to_num(7), b.nan_to_num(7)) and (
        torch.equal(a.isnan(), b.isnan())
    )  # fmt: skip


def torchs(call: Callable, x: Tensor, dy: Tensor, **how: bool) -> list[Tensor]:
    """torch's own, bfloat16 by way of float32: its slope, too, is a float32 there."""
    if x.dtype != torch.bfloat16:
        return results(call, T, x, dy, **how)
    return [t.bfloat16() for t in results(call, T, x.float(), dy.float(), **how)]


SHAPES = [(), (0,), (1,), (257,), (3, 0, 2), (5, 7, 11), (2, 5, 7, 3), (2, 3, 40, 41, 9)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_values_and_gradients_are_torchs(name: str, shape: tuple[int, ...], isa: str) -> None:
    convoxel.set_strict(True)
    for dtype in DTYPES:
        x, dy = samples(shape, dtype), torch.randn(shape).to(dtype)
        for how in ({}, {"inplace": True}) if name in IN_PLACE else ({},):
            for g, e in zip(
                results(CALLS[name], F, x, dy, **how), torchs(CALLS[name], x, dy, **how), strict=True
            ):
                assert same(g, e), f"{dtype} {how}"


def strides(shape: tuple[int, ...]) -> list[Tensor]:
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(len(shape), torch.contiguous_format)
    return [
        torch.randn(shape).to(memory_format=last),
        torch.randn([2 * s for s in shape])[tuple(slice(None, None, 2) for _ in shape)],
        torch.randn(shape[:1] + (1,) * (len(shape) - 1)).expand(shape),
        torch.randn(shape[::-1]).permute(*range(len(shape))[::-1]),
        torch.randn(shape).transpose(0, 1).contiguous().transpose(0, 1),
    ]


@pytest.mark.parametrize("name", ["relu", "leaky", "leaky -0.5"])
@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 3, 4, 5), (2, 3, 4, 1, 6)], ids=str)
def test_any_strides(name: str, shape: tuple[int, ...]) -> None:
    for x, dy in itertools.product(strides(shape), repeat=2):
        got, expected = (results(CALLS[name], m, x, dy) for m in (F, T))
        assert got[0].stride() == expected[0].stride()
        for g, e in zip(got, expected, strict=True):
            assert torch.equal(g, e)


@pytest.mark.parametrize("name", CALLS)
def test_gradcheck_and_gradgradcheck(name: str) -> None:
    x = (torch.randn(3, 5, dtype=torch.float64).abs() + 0.1) * torch.tensor([1, -1, 1, -1, -1])
    f = lambda x: CALLS[name](F, x) * x  # noqa: E731
    assert torch.autograd.gradcheck(f, x.requires_grad_())
    assert torch.autograd.gradgradcheck(f, x)


@pytest.mark.parametrize("name", IN_PLACE)
@pytest.mark.parametrize("grad", [False, True])
def test_in_place_writes_to_the_input(name: str, grad: bool) -> None:
    x = torch.randn(4, 5).requires_grad_(grad)
    h = x * 1
    version, pointer, expected = h._version, h.data_ptr(), CALLS[name](T, h.detach())
    y = CALLS[name](F, h, inplace=True)
    assert y is h and h.data_ptr() == pointer and h._version > version and torch.equal(h, expected)
    view = torch.zeros(4, 10)
    view += torch.arange(-20, 20).view(4, 10)
    whole = view.clone()
    CALLS[name](F, view[:, ::3], inplace=True)
    CALLS[name](T, whole[:, ::3], inplace=True)
    assert torch.equal(view, whole)


def test_in_place_errors_are_torchs() -> None:
    leaf = torch.randn(3, requires_grad=True)
    for module in (F, T):
        with pytest.raises(RuntimeError, match="in-place operation"):
            module.relu(leaf, inplace=True)
        with pytest.raises(RuntimeError, match="single memory location"):
            module.relu(torch.randn(1).expand(3), inplace=True)
        h = leaf * 1
        y = module.leaky_relu(h, -0.5, inplace=True)
        with pytest.raises(RuntimeError, match="negative slope"):
            y.sum().backward()
        h = leaf * 1
        s = h.sin()
        module.relu(h, inplace=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            s.sum().backward()
    with pytest.raises(RuntimeError, match="no gradient of its own"):
        OPS.activation_(leaf * 1, True, 0.0)


@pytest.mark.parametrize(("name", "kept"), [("relu", "y"), ("leaky", "y"), ("leaky -0.5", "x")])
def test_backward_keeps_one_tensor(name: str, kept: str) -> None:
    x = torch.randn(64, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        y = CALLS[name](F, x)
    assert saved == [{"x": x, "y": y}[kept].data_ptr()]


@pytest.mark.parametrize("index", range(6))
def test_opcheck(index: int) -> None:
    x = torch.randn(2, 3, 4, 5)
    leaf = lambda t: t.detach().clone().requires_grad_()  # noqa: E731
    last = x.to(memory_format=torch.channels_last)
    samples = [
        (OPS.relu.default, (leaf(x),)),
        (OPS.relu_backward.default, (leaf(last), leaf(x))),
        (OPS.leaky_relu.default, (leaf(last), 0.01)),
        (OPS.leaky_relu.default, (leaf(x[:, ::2]), -0.01)),
        (OPS.leaky_relu_backward.default, (leaf(x), leaf(last), 0.01)),
        (OPS.activation_.default, (x.clone(), False, 0.01)),
    ]
    torch.library.opcheck(*samples[index])


def test_every_operator_is_listed() -> None:
    names = {"relu", "relu_backward", "leaky_relu", "leaky_relu_backward", "activation_"}
    assert names <= set(convoxel.ops.registered())


@pytest.mark.parametrize("name", CALLS)
def test_vmap(name: str) -> None:
    x, dy = torch.randn(4, 3, 5), torch.randn(3, 5)
    got, expected = (torch.vmap(lambda x: CALLS[name](m, x), 1)(x) for m in (F, T))  # noqa: B023
    assert torch.equal(got, expected)
    got, expected = (torch.func.grad(lambda x: (CALLS[name](m, x) ** 2).sum())(x) for m in (F, T))  # noqa: B023
    assert torch.equal(got, expected)
    got = torch.vmap(lambda x: OPS.leaky_relu_backward(dy, x, 0.5))(x)
    assert torch.equal(got, torch.where(x > 0, dy, dy * 0.5))
    got = torch.vmap(lambda x: OPS.relu_backward(x, dy))(x)
    assert torch.equal(got, torch.where(dy > 0, x, 0))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("layer", [nn.ReLU, lambda inplace: nn.LeakyReLU(0.2, inplace)])
def test_compile_without_graph_break(layer, inplace: bool) -> None:
    f = layer(inplace=inplace)
    x = torch.randn(2, 3, 4)
    compiled = torch.compile(lambda x: f(x * 2) + 1, fullgraph=True, backend="aot_eager")
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    y, e = compiled(leaves[0]), f(leaves[1] * 2) + 1
    assert torch.equal(y, e)
    y.sum().backward()
    e.sum().backward()
    assert torch.equal(leaves[0].grad, leaves[1].grad)


def test_export() -> None:
    program = torch.export.export(nn.LeakyReLU(), (torch.randn(2, 3),))
    assert any("convoxel.leaky_relu" in str(node.target) for node in program.graph.nodes)


def test_same_bits_for_every_thread_count(isa: str) -> None:
    x, dy = torch.randn(70001), torch.randn(70001)
    runs = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        runs.append(results(CALLS["leaky"], F, x, dy))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_layers_are_torchs_layers() -> None:
    x = torch.randn(3, 4)
    for make in (lambda m: m.ReLU(True), lambda m: m.LeakyReLU(0.3), lambda m: m.LeakyReLU(inplace=True)):
        ours, theirs = make(nn), make(torch.nn)
        assert isinstance(ours, type(theirs)) and repr(ours) == repr(theirs)
        assert torch.equal(ours(x.clone()), theirs(x.clone()))


def test_what_is_refused_and_what_goes_to_torch() -> None:
    for call in (
        lambda m: m.relu([1.0]),
        lambda m: m.leaky_relu(None),
        lambda m: m.leaky_relu(torch.ones(3), None),
        lambda m: m.leaky_relu(torch.ones(3), (), inplace=True),
    ):
        for module in (F, T):
            with pytest.raises(TypeError):
                call(module)
    assert torch.equal(F.relu(torch.arange(-2, 3)), T.relu(torch.arange(-2, 3)))
    assert convoxel.stats()["relu"]["why"] == {"dtype torch.int64 on cpu": 1}
    convoxel.set_strict(True)
    with pytest.raises(convoxel.HandedToTorch, match="relu"):
        F.relu(torch.ones(2).half())
    for bad in (
        lambda: OPS.relu(torch.ones(2).int()),
        lambda: OPS.relu_backward(torch.ones(2), torch.ones(3)),
        lambda: OPS.leaky_relu_backward(torch.ones(2), torch.ones(2).double(), 0.1),
        lambda: OPS.activation_(torch.ones(2).int(), True, 0.0),
    ):
        with pytest.raises(RuntimeError, match="kernels take|expected dy"):
            bad()
