"""Convolution of tensors side by side: the bits of the convolution of their concatenation, without making that."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import convoxel
import networks
from convoxel import memory
from convoxel.conversion import chain
from convoxel.ops import conv as conv_ops
from convoxel.ops.conv_block import conv_moments
from convoxel.ops.joined import conv_joined, conv_joined_input_grad, conv_joined_weight_grad, parts_of

OPS = torch.ops.convoxel
ONE, PAD = (1, 1, 1), (1, 1, 1)
# channels of the parts, output channels, extents, kernel, stride, padding
PROBLEMS = [
    ((32, 32), 32, (9, 13, 14), (3, 3, 3), ONE, PAD),
    ((64, 17), 40, (6, 9, 11), (3, 3, 3), (2, 1, 2), PAD),
    ((32, 64, 32, 3), 70, (5, 6, 7), (3, 3, 3), ONE, PAD),
    ((96, 32), 24, (1, 17, 19), (1, 3, 3), ONE, (0, 1, 1)),
    ((32, 48), 33, (4, 8, 16), (1, 1, 1), ONE, (0, 0, 0)),
    ((32, 32), 8, (5, 9, 40), (1, 5, 2), (1, 1, 3), (0, 2, 0)),
    ((16, 48, 5), 50, (6, 7, 12), (3, 3, 3), ONE, PAD),
]


def last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last_3d)


def data(problem: tuple, dtype: torch.dtype, in_last: bool) -> tuple[list[Tensor], Tensor, Tensor]:
    channels, k, size, kernel, *_ = problem
    xs = [torch.randn(2, c, *size).to(dtype) for c in channels]
    w = (torch.randn(k, sum(channels), *kernel) / 30).to(dtype)
    return [last(x) if in_last else x for x in xs], w, torch.randn(k).to(dtype)


@pytest.mark.parametrize("algorithm", ["direct", "winograd", "amx"])
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_bits_of_the_concatenation(problem: tuple, algorithm: str, isa: str) -> None:
    """y and its moments, both gradients, in both layouts; NaN around the parts stays there."""
    convoxel.set_conv_algorithm(algorithm)
    for dtype, in_last in itertools.product((torch.float32, torch.bfloat16), (False, True)):
        if algorithm == "amx" and dtype == torch.bfloat16 and any(c % 32 for c in problem[0][:-1]):
            continue  # goes another way than the concatenation
        xs, w, b = data(problem, dtype, in_last)
        how = (*problem[4:], ONE)
        x = torch.cat(xs, 1)
        expected = conv_moments(x, w, b, *how, 1, w.shape[0], False)
        got = conv_joined(xs, w, b, *how, w.shape[0], False)
        for g, e in zip(got, expected, strict=True):
            assert torch.equal(g, e) and g.stride() == e.stride()
        y, *none = conv_joined(xs, w, b, *how, 0, False)
        assert torch.equal(y, expected[0]) and all(t.shape == (0,) for t in none)
        dy = torch.randn_like(y)
        dw = conv_ops.conv_weight_grad(x, dy, *how, 1, w.shape[2:])
        assert torch.equal(conv_joined_weight_grad(xs, dy, *how, w.shape[2:]), dw)
        dx = conv_ops.conv_input_grad(dy, w, None, *how, 1, x.shape[2:])
        dxs = conv_joined_input_grad(dy, w, *how, x.shape[2:], problem[0])
        for part, e in zip(dxs, dx.split(problem[0], 1), strict=True):
            assert torch.equal(part, e) and part.is_contiguous(
                memory_format=torch.channels_last_3d if in_last else torch.contiguous_format
            )


def test_same_bits_for_every_thread_count(isa: str) -> None:
    for problem, dtype in itertools.product(PROBLEMS[:3], (torch.float32, torch.bfloat16)):
        xs, w, b = data(problem, dtype, True)
        how, results = (*problem[4:], ONE), []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            y, mean, var = conv_joined(xs, w, b, *how, w.shape[0], True)
            dxs = conv_joined_input_grad(y, w, *how, xs[0].shape[2:], problem[0])
            results.append([y, mean, var, *dxs, conv_joined_weight_grad(xs, y, *how, w.shape[2:])])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_layouts_that_differ_and_gaps() -> None:
    xs, w, b = data(PROBLEMS[0], torch.float32, True)
    other = torch.randn(2, 80, 9, 13, 14)[:, 5:37]
    for parts in (
        [xs[0], other],
        [other, other.flip(4)],
        [xs[0].expand_as(xs[0]), xs[1][:1].expand_as(xs[1])],
    ):
        got = conv_joined(parts, w, b, ONE, PAD, ONE, 0, False)[0]
        expected = conv_ops.conv(torch.cat(parts, 1).contiguous(), w, b, ONE, PAD, ONE, 1)
        assert torch.equal(got, expected)


def test_empty() -> None:
    xs = [torch.empty(0, 32, 3, 3, 3, requires_grad=True) for _ in range(2)]
    w = torch.ones(4, 64, 1, 1, 1, requires_grad=True)
    for groups in (0, 4):
        y, *_ = conv_joined(xs, w, None, ONE, (0, 0, 0), ONE, groups, True)
        assert y.shape == (0, 4, 3, 3, 3)
        y.sum().backward()
        assert not w.grad.any() and xs[1].grad.shape == xs[1].shape


def tiny(dtype: torch.dtype = torch.float64, grad: bool = True) -> list[Tensor]:
    shapes = ((1, 32, 2, 3, 2), (1, 2, 2, 3, 2), (2, 34, 1, 3, 1), (2,))
    return [torch.randn(s, dtype=dtype, requires_grad=grad) for s in shapes]


HOW = (ONE, (0, 1, 0), ONE)


def test_gradients() -> None:
    convoxel.set_strict(True)

    def run(a: Tensor, c: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return conv_joined([a, c], w, b, *HOW, 2, False)[0]

    leaves = tiny()
    torch.autograd.gradcheck(run, leaves)
    torch.autograd.gradgradcheck(run, leaves)
    for wanted in range(4):
        some = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(leaves)]
        (g,) = torch.autograd.grad(run(*some).square().sum(), some[wanted])
        (e,) = torch.autograd.grad(run(*leaves).square().sum(), leaves[wanted])
        assert torch.equal(g, e)


def test_operators() -> None:
    for groups, over_batch, grad in ((2, True, True), (0, False, False)):
        a, c, w, b = tiny(grad=grad)
        torch.library.opcheck(OPS.conv_joined.default, ([a, c], w, b, *HOW, groups, over_batch))
    a, c, w, b = tiny(grad=False)
    dy = torch.randn(1, 2, 2, 3, 2, dtype=torch.float64)
    torch.library.opcheck(OPS.conv_joined_weight_grad.default, ([a, c], dy, *HOW, (1, 3, 1)))
    torch.library.opcheck(OPS.conv_joined_input_grad.default, (dy, w, *HOW, (2, 3, 2), (32, 2)))
    compiled = torch.compile(
        lambda a, c, w, b: conv_joined([a, c], w, b, *HOW, 2, False), fullgraph=True, backend="aot_eager"
    )
    for got, e in zip(compiled(a, c, w, b), conv_joined([a, c], w, b, *HOW, 2, False), strict=True):
        assert torch.equal(got, e)


def test_vmap() -> None:
    a, c, w, b = (torch.stack([t, t + 1]) for t in tiny(grad=False))
    dy = torch.randn(2, 1, 2, 2, 3, 2, dtype=torch.float64)

    def every(a: Tensor, c: Tensor, w: Tensor, b: Tensor, dy: Tensor, groups: int) -> tuple[Tensor, ...]:
        y = conv_joined([a, c], w, b, *HOW, groups, False)
        dxs = conv_joined_input_grad(dy, w, *HOW, (2, 3, 2), (32, 2))
        return *y[: 3 if groups else 1], *dxs, conv_joined_weight_grad([a, c], dy, *HOW, (1, 3, 1))

    for groups, dims in itertools.product((0, 2), ((0, 0, 0, 0, 0), (0, None, 0, None, 0))):
        t = [v if d == 0 else v[0] for v, d in zip((a, c, w, b, dy), dims, strict=True)]
        got = torch.vmap(lambda *t: every(*t, groups), dims)(*t)  # noqa: B023
        for i in range(2):
            one = [v[i] if d == 0 else v for v, d in zip(t, dims, strict=True)]
            for g, e in zip(got, every(*one, groups), strict=True):
                torch.testing.assert_close(g[i], e)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda a, c, w: conv_joined([c, a], w, None, *HOW, 0, False), "a multiple of 16 channels"),
        (lambda a, c, w: conv_joined([a], w, None, *HOW, 0, False), "expected 2 to 4 tensors"),
        (lambda a, c, w: conv_joined([a, c[..., :1]], w, None, *HOW, 0, False), "expected 2 to 4 tensors"),
        (lambda a, c, w: conv_joined([a, c.float()], w, None, *HOW, 0, False), "same dtype"),
        (lambda a, c, w: conv_joined([a, c], w[:, 1:], None, *HOW, 0, False), "to have 33 channels"),
        (lambda a, c, w: conv_joined([a, c], w, None, *HOW, 3, False), "norm_groups to divide"),
        (lambda a, c, w: conv_joined_weight_grad([a, c], a, *HOW, (1, 1, 1)), "expected dy of shape"),
    ],
)
def test_mistakes(call: Callable[..., object], words: str) -> None:
    a, c, w, _ = tiny(grad=False)
    with pytest.raises(RuntimeError, match=words):
        call(a, c, w)


# In a network --------------------------------------------------------------------------------------


class Decoder(nn.Module):
    """As nnU-Net has it: the concatenation here, the convolution that reads it in another module."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose3d(32, 32, 2, stride=2)
        norm, act = nn.InstanceNorm3d(32, affine=True), nn.LeakyReLU()
        self.skip = nn.Sequential(nn.Conv3d(1, 32, 3, padding=1), nn.InstanceNorm3d(32), nn.LeakyReLU())
        self.stage = nn.Sequential(nn.Sequential(nn.Conv3d(64, 32, 3, padding=1), norm, act))
        self.low = nn.Conv3d(1, 32, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.skip(x)
        x = self.up(self.low(x))
        x = torch.cat((x, skip), 1)
        x = self.stage(x)
        return x


class Twice(Decoder):
    """Who else needs the concatenation gets it."""

    def forward(self, x: Tensor) -> Tensor:
        skip = self.skip(x)
        both = torch.cat([self.up(self.low(x)), skip], dim=1)
        skip += 1
        return self.stage(both) + both[:, :32]


def served() -> dict[str, int]:
    return {name: entry["served"] for name, entry in convoxel.stats().items()}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "LEAST", 1024)


@pytest.mark.parametrize("kind", [Decoder, Twice])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_a_network(kind: type[nn.Module], dtype: torch.dtype, small: None) -> None:
    plain = kind()
    net, x = convoxel.accelerate(plain), torch.randn(1, 1, 8, 16, 24)

    def run(net: nn.Module) -> list[Tensor]:
        net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = net(x)
        y.float().square().mean().backward()
        return [y.detach().float(), *(p.grad.clone() for p in net.parameters())]

    expected = run(plain)
    convoxel.reset_stats()
    got, joined = run(net), int(kind is Decoder)
    counts = served()
    assert counts.get("conv_joined", 0) == joined
    assert ("cat" in counts) == ("cat_backward" in counts) == (not joined)
    for g, e in zip(got, expected, strict=True):
        assert (g - e).norm() <= (2e-2 if dtype == torch.bfloat16 else 2e-5) * max(e.norm(), 1)
    assert ("concatenation + conv" in str(convoxel.report(net))) == bool(joined)


def test_who_looks_sees_a_tensor(small: None) -> None:
    """Hooks on the stage, an exported network; in evaluation a norm is folded into the weights."""
    net, x = convoxel.accelerate(Decoder()), torch.randn(1, 1, 8, 16, 24)
    seen = []
    expected = net(x)
    handle = net.stage.register_forward_pre_hook(lambda m, args: seen.append(args[0].shape))
    assert torch.equal(net(x), expected) and seen == [(1, 64, 8, 16, 24)]
    handle.remove()
    with torch.no_grad():
        torch.testing.assert_close(torch.export.export(net, (x,)).module()(x), expected, rtol=1e-4, atol=1e-5)
    net.stage[0][1] = nn.BatchNorm3d(32)
    convoxel.accelerate(net, inplace=True)
    net.eval()
    with torch.no_grad():
        convoxel.reset_stats()
        y = net(x)
        assert "cat" not in served() and "norm (folded)" in str(convoxel.report(net))
        torch.testing.assert_close(y, convoxel.restore(net)(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["PlainConvUNet", "BasicUNet", "DynUNet", "AttentionUnet"])
def test_in_networks_that_people_have(name: str, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a module gives what it was given another name; with what the concatenations themselves give."""
    x, results = networks.image(name, 1), []
    for joined in (True, False):
        if not joined:
            monkeypatch.setattr(chain, "parts_of", lambda *args, **kwargs: None)
        net = convoxel.accelerate(networks.build(name))
        convoxel.reset_stats()
        y = networks.outputs(net(x))[0]
        y.square().mean().backward()
        assert (served().get("conv_joined", 0) > 0) == joined
        results.append([y.detach(), *(p.grad for p in net.parameters() if p.grad is not None)])
    scale = max(g.abs().max() for g in results[1][1:])
    for got, expected in zip(*results, strict=True):
        assert (got - expected).abs().max() <= 1e-5 * max(expected.abs().max(), scale)


def test_parts_of() -> None:
    a = torch.randn(1, 32, 64, 64, 64)
    assert parts_of((a, a), 1) and parts_of([a, a], dim=-4)
    for tensors, dim in (((a, a), 0), ((a[:, :20], a), 1), ((a,), 1), ((a, a.double()), 1), ("aa", 1)):
        assert parts_of(tensors, dim) is None
    assert parts_of((a, a), 1, out=a) is None
    assert torch.equal(parts_of((a, a), 1).whole(), torch.cat((a, a), 1))
