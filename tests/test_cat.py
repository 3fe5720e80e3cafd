"""cat: torch.cat's results for whatever torch takes, its gradients without gaps, and what is served."""

import itertools

import pytest
import torch
from torch import Tensor

import convoxel
from convoxel import functional as F

OPS = torch.ops.convoxel
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


@pytest.fixture(autouse=True)
def _serve_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("convoxel.memory.LEAST", 0)


def make(shape: tuple[int, ...], last: bool = False, dtype: torch.dtype = torch.float32) -> Tensor:
    t = torch.randn(shape).to(dtype)
    return t.to(memory_format=LAST[t.dim()]) if last and t.dim() in LAST else t


CASES = [
    ((2, 3, 4, 5, 6), 1, (3, 5, 1)),
    ((2, 16, 4, 5), 1, (16, 32)),
    ((2, 3, 4, 5), 0, (2, 1)),
    ((2, 3, 4, 5), 3, (5, 2)),
    ((2, 3, 4, 5, 6), -2, (5, 1, 3)),
    ((7, 5), 1, (5, 9)),
    ((7,), 0, (7, 3)),
    ((1, 8, 300, 320), 1, (8, 16, 3)),
]


@pytest.mark.parametrize(("shape", "dim", "sizes"), CASES, ids=str)
def test_values_and_gradients(shape: tuple[int, ...], dim: int, sizes: tuple[int, ...], isa: str) -> None:
    for dtype, last, dy_last in itertools.product(
        (torch.float32, torch.bfloat16, torch.float64), (False, True), (False, True)
    ):
        axis = dim % len(shape)
        parts = [make((*shape[:axis], n, *shape[axis + 1 :]), last, dtype).requires_grad_() for n in sizes]
        expected = torch.cat(parts, dim)
        got = F.cat(parts, dim)
        assert torch.equal(got, expected) and got.stride() == expected.stride()
        dy = make(tuple(got.shape), dy_last, dtype)
        for piece, e in zip(torch.autograd.grad(got, parts, dy), dy.split(sizes, axis), strict=True):
            layout = LAST[len(shape)] if dy_last and len(shape) in LAST else torch.contiguous_format
            assert torch.equal(piece, e) and piece.is_contiguous(memory_format=layout)
    assert convoxel.stats()["cat"]["served"] == convoxel.stats()["cat_backward"]["served"] == 12


def test_large_tensors_stream() -> None:
    for channels, last in itertools.product((16, 5), (False, True)):
        a, b = make((1, channels, 96, 96, 64), last).requires_grad_(), make((1, 16, 96, 96, 64), last)
        y = F.cat((a, b), 1)
        assert torch.equal(y, torch.cat((a, b), 1))
        dy = torch.randn_like(y)
        assert torch.equal(torch.autograd.grad(y, a, dy)[0], dy[:, :channels])


@pytest.mark.parametrize("last", [False, True])
def test_gradcheck_gradgradcheck_and_opcheck(last: bool) -> None:
    a, b = (make((2, n, 2, 2), last, torch.float64).requires_grad_() for n in (1, 3))
    assert torch.autograd.gradcheck(lambda a, b: F.cat([a, b], 1), (a, b))
    assert torch.autograd.gradgradcheck(lambda a, b: F.cat([a * b[:, :1], b], 1), (a, b))
    other = b.detach()
    for order in (1, -1):  # a gradient for one of two
        assert torch.autograd.gradgradcheck(lambda a: F.cat([a, other][::order], 1) * a, a)  # noqa: B023
    torch.library.opcheck(OPS.cat.default, ([a, b], 1))
    torch.library.opcheck(
        OPS.cat_backward.default, (make((2, 4, 2, 2), last).requires_grad_(), [1, 3], 1, [True] * 2)
    )


def test_transforms() -> None:
    a, b = torch.randn(3, 2, 4), torch.randn(3, 1, 4)
    assert torch.equal(torch.vmap(lambda a, b: F.cat([a, b], 0))(a, b), torch.cat([a, b], 1))
    assert torch.equal(torch.vmap(lambda a: OPS.cat([a, b[0]], 0))(a)[1], torch.cat([a[1], b[0]], 0))
    got, expected = (torch.func.grad(lambda a: (f([a, b], 1) ** 2).sum())(a) for f in (F.cat, torch.cat))  # noqa: B023
    assert torch.equal(got, expected)
    leaf = torch.randn(2, 2, requires_grad=True)
    basis = torch.eye(6).reshape(6, 2, 3)
    rows = [
        torch.autograd.grad(f([leaf, leaf[:, :1].detach()], 1), leaf, basis, is_grads_batched=True)[0]
        for f in (F.cat, torch.cat)
    ]
    assert torch.equal(*rows)
    compiled = torch.compile(lambda a, b: F.cat([a, b], 1), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(a, b), torch.cat([a, b], 1))


def test_everything_else_is_torchs() -> None:
    a, last = torch.randn(2, 3, 4, 5), make((2, 3, 4, 5), True)
    convoxel.set_strict(True)
    for parts in (
        [a, last],
        [a, a.double()],
        [a[:, ::2], a],
        [a.half(), a.half()],
        [a.to(torch.int32)],
        [torch.empty(0), a],
        [a.to("meta"), a.to("meta")],
        [a.bool()],
    ):
        expected, got = torch.cat(parts, 1), F.cat(parts, 1)
        assert got.dtype == expected.dtype and got.stride() == expected.stride()
        assert got.is_meta or torch.equal(got, expected)
    assert convoxel.stats() == {}


def test_errors_are_torchs() -> None:
    a = torch.randn(2, 3)
    for parts, dim in (
        ([], 0),
        ([a, a[:1]], 1),
        ([a], 2),
        ([a], -3),
        (a, 0),
        ([a, 1], 0),
        ([a], 0.5),
        (None, 0),
    ):
        raised = []
        for f in (torch.cat, F.cat):
            try:
                f(parts, dim)
            except Exception as error:
                raised.append((type(error), str(error)))
        assert len(raised) in (0, 2) and raised[:1] == raised[1:]
    for bad in (
        lambda: OPS.cat([a, a.double()], 0),
        lambda: OPS.cat([a, a[:1]], 1),
        lambda: OPS.cat([a], -1),
        lambda: OPS.cat_backward(a, [1, 1], 1, [True, True]),
    ):
        with pytest.raises(RuntimeError, match="cat(_backward)?: .*(expected|match)"):
            bad()


def test_same_bits_for_every_thread_count_and_only_large_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [torch.randn(3, n, 500) for n in (7, 300)]
    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert torch.equal(F.cat(parts, 1), torch.cat(parts, 1))
    assert convoxel.stats()["cat"]["served"] == 2
    monkeypatch.setattr("convoxel.memory.LEAST", 2**22)
    F.cat(parts, 1)
    assert convoxel.stats()["cat"]["served"] == 2
