"""Saving less for backward: the same bits as with everything saved, less memory, and nothing unseen in between."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as T
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import convoxel
from convoxel import functional as F
from convoxel import memory, nn
from convoxel.ops import saved
from convoxel.ops.norm_act import Act, norm_act

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
LAST = {2: torch.channels_last, 3: torch.channels_last_3d}
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch1": nn.BatchNorm1d, "batch2": nn.BatchNorm2d, "batch3": nn.BatchNorm3d,
    "instance1": lambda c: nn.InstanceNorm1d(c, affine=True), "instance2": lambda c: nn.InstanceNorm2d(c, affine=True),
    "instance3": nn.InstanceNorm3d, "group": lambda c: nn.GroupNorm(2, c),
    "frozen": lambda c: nn.BatchNorm3d(c).eval(),
}  # fmt: skip


@contextmanager
def everything_saved() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saved, "possible", lambda y: False)
        yield


def gradients(net: torch.nn.Module, x: Tensor, call: Callable[..., Tensor] | None = None) -> list[Tensor]:
    """Of x and all parameters."""
    x = x.detach().requires_grad_()
    net.zero_grad()
    (call or net)(x).square().sum().backward()
    return [x.grad, *(p.grad for p in net.parameters())]  # type: ignore[list-item]


def chain(rank: int, norm: str, act: nn.Module) -> torch.nn.Sequential:
    conv, name = CONV[rank], norm if norm in NORMS else f"{norm}{rank}"
    return torch.nn.Sequential(
        conv(2, 4, 3, padding=1),
        NORMS[name](4),
        act,
        conv(4, 6, 3, padding=1),
        NORMS[name](6),
        act,
        conv(6, 2, 1),
    )


def made_again() -> int:
    return convoxel.stats().get("norm_act", {"served": 0})["served"]


@pytest.mark.parametrize(("rank", "norm"), [(1, "instance"), (1, "batch"), (2, "instance"), (2, "batch"), (2, "group"),
                                            (3, "instance"), (3, "batch"), (3, "group"), (3, "frozen")])  # fmt: skip
@pytest.mark.parametrize(
    "act", [nn.ReLU(), nn.ReLU(True), nn.LeakyReLU(0.1), nn.LeakyReLU(0.1, True)], ids=str
)
def test_same_bits_as_with_everything_saved(rank: int, norm: str, act: nn.Module, isa: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        net, x = chain(rank, norm, act).to(dtype), torch.randn(2, 2, *(7,) * rank).to(dtype)
        for images in (x, x.to(memory_format=LAST.get(rank, torch.contiguous_format))):
            convoxel.reset_stats()
            got = gradients(net, images)
            assert made_again() == 2
            with everything_saved():
                for g, e in zip(got, gradients(net, images), strict=True):
                    assert torch.equal(g, e)


class Blocks(torch.nn.Module):
    """Two blocks of norm_act, and their concatenation."""

    def __init__(self, kind: str = "leaky_relu", rank: int = 3) -> None:
        super().__init__()
        self.convs = torch.nn.ModuleList(CONV[rank](i, o, 3, padding=1) for i, o in ((2, 4), (4, 4), (8, 3)))
        self.w = torch.nn.ParameterList(torch.randn(4) for _ in range(2))
        self.act = Act(kind, 0.1)
        self.slopes = torch.nn.Parameter(torch.rand(4)) if kind == "prelu" else None

    def block(self, i: int, x: Tensor, residual: Tensor | None = None) -> Tensor:
        act = self.act._replace(slopes=self.slopes)
        return norm_act(self.convs[i](x), self.w[i], None, 2, False, 1e-5, act, residual)[0]

    def forward(self, x: Tensor) -> Tensor:
        first = self.block(0, x)
        return self.convs[2](F.cat([self.block(1, first, first), self.convs[1](first)], 1))


@pytest.mark.parametrize("kind", ["identity", "relu", "leaky_relu", "prelu"])
@pytest.mark.parametrize("rank", [2, 3])
def test_blocks_and_their_concatenation(kind: str, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("convoxel.memory.LEAST", 0)
    for dtype in (torch.float32, torch.bfloat16):
        net, x = Blocks(kind, rank).to(dtype), torch.randn(2, 2, *(5,) * rank).to(dtype)
        x = x.to(memory_format=LAST[rank])
        convoxel.reset_stats()
        got = gradients(net, x)
        # The second block's y, and `first` once that block, whose residual it is, has let it go.
        assert made_again() == 2 + 2 and convoxel.stats()["cat"]["served"] == 2
        with everything_saved():
            for g, e in zip(got, gradients(net, x), strict=True):
                assert torch.equal(g, e)


def in_use() -> int:
    return memory.statistics()["in_use"] or 0


@pytest.fixture
def exact_blocks() -> Iterator[None]:
    """Nothing is held, so that no tensor sits in a block of twice its size."""
    before = memory.limit()
    memory.set_limit(0)
    yield
    memory.set_limit(before)


def test_one_full_tensor_a_block(exact_blocks: None) -> None:
    x = torch.randn(1, 16, 64, 32, 32)
    one = x.nbytes
    for act in (nn.LeakyReLU(inplace=True), nn.ReLU()):
        layers = [m for _ in range(4) for m in (nn.Conv3d(16, 16, 3, padding=1), nn.InstanceNorm3d(16), act)]
        net, start = torch.nn.Sequential(*layers, nn.Conv3d(16, 1, 1)), in_use()
        y = net(x)
        assert in_use() - start < 4.5 * one
        y.sum().backward()
        del y
        assert in_use() == start
        with everything_saved():
            y = net(x)
        assert in_use() - start > 7.5 * one
        del y


def test_a_concatenation_is_not_kept_and_holds_nothing_longer_than_it_lives(exact_blocks: None) -> None:
    raw, up = (torch.randn(1, 16, 64, 32, 32, requires_grad=True) for _ in range(2))
    one, start, w = raw.nbytes, in_use(), torch.randn(1, 32, 1, 1, 1, requires_grad=True)

    def joined() -> Tensor:
        return F.cat([norm_act(raw, None, None, 16, False, 1e-5, Act("relu"))[0], up * 1], 1)

    y = joined()
    z = F.conv3d(y, w)
    node = y.grad_fn
    assert node.made.held
    del y
    assert in_use() - start < 0.5 * one and not node.made.held
    z.sum().backward()
    expected = torch.cat([T.relu(T.instance_norm(raw)), up], 1).sum([0, 2, 3, 4])
    torch.testing.assert_close(w.grad.flatten(), expected, rtol=1e-3, atol=1e-2)
    y = joined()
    with torch.no_grad():
        up.add_(0)  # the product with 1 is what was joined: this is none of its business
        assert saved.recipe(y) is not None
        y.grad_fn.made.held[-1][0].add_(1)
        assert saved.recipe(y) is None


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_what_was_upsampled_is_made_again(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("convoxel.memory.LEAST", 0)
    up = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}[rank]
    first, last = chain(rank, "instance", nn.ReLU(True))[:3], CONV[rank](8, 2, 3)
    for kernel, again in ((2, True), (3, False)):
        net = torch.nn.ModuleList([first, up(4, 4, kernel, 2), last])

        def call(x: Tensor) -> Tensor:
            y = net[1](net[0](x))  # noqa: B023
            return net[2](F.cat([y * 1, y], 1))  # noqa: B023

        x = torch.randn(2, 2, *(4,) * rank)
        convoxel.reset_stats()
        got = gradients(net, x, call)
        assert convoxel.stats()["cat"]["served"] == (2 if again else 1)
        with everything_saved():
            assert all(torch.equal(g, e) for g, e in zip(got, gradients(net, x, call), strict=True))


def block_and_conv(change: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """The convolution's output and its weights' gradient, where `change` does something to x before it."""
    torch.manual_seed(3)
    raw, w = (torch.randn(s, requires_grad=True) for s in ((1, 3, 4, 5), (2, 3, 3, 3)))
    x = norm_act(raw, None, None, 3, False, 1e-5, Act("relu"))[0]
    x = change(x)
    y = F.conv2d(x, w)
    del x
    return [y, *torch.autograd.grad(y.square().sum(), w)]


def behind_autograds_back(x: Tensor) -> Tensor:
    x.detach().mul_(2)
    return x


def with_other_data(x: Tensor) -> Tensor:
    x.data = torch.ones(1, 3, 4, 5)
    return x


def hooked(x: Tensor) -> Tensor:
    x.register_hook(lambda g: g * 3)
    return x


CHANGES = [
    behind_autograds_back, with_other_data, hooked, lambda x: x.mul_(2), lambda x: F.relu(x, True), lambda x: x * 2,
    lambda x: x[:, :, 1:], lambda x: x.transpose(2, 3), lambda x: x.detach(), lambda x: x,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=range(len(CHANGES)))
def test_whatever_happens_to_x_is_seen(change: Callable[[Tensor], Tensor]) -> None:
    got = block_and_conv(change)
    with everything_saved():
        expected = block_and_conv(change)
    assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))


def test_a_living_tensor_is_taken_as_it_is() -> None:
    raw, w = torch.randn(1, 3, 4, 5, requires_grad=True), torch.randn(2, 3, 1, 1, requires_grad=True)
    x = norm_act(raw, None, None, 3, False, 1e-5, Act("relu"))[0]
    F.conv2d(x, w).sum().backward()
    assert made_again() == 1  # forward only


def test_backward_twice() -> None:
    net, x = chain(2, "instance", nn.ReLU(True)), torch.randn(1, 2, 5, 5)
    loss = net(x).square().sum()
    first = torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(loss, list(net.parameters()))))
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_a_graph_already_freed_saves_x() -> None:
    raw, w = torch.randn(1, 3, 4, 5, requires_grad=True), torch.randn(2, 3, 1, 1, requires_grad=True)
    x = norm_act(raw, None, None, 3, False, 1e-5, Act("relu"))[0]
    x.sum().backward()
    y = F.conv2d(x, w)
    expected = torch.autograd.grad(F.conv2d(x.detach(), w).sum(), w)
    del x
    assert torch.equal(*torch.autograd.grad(y.sum(), w), *expected)


def test_parameters_changed_in_between_are_torchs_error() -> None:
    net, x = chain(2, "instance", nn.ReLU(True)), torch.randn(1, 2, 5, 5)
    y = net(x)
    with torch.no_grad():
        net[1].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("act", [nn.ReLU(True), nn.LeakyReLU(0.1)], ids=str)
def test_double_backward(act: nn.Module) -> None:
    net = torch.nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.InstanceNorm2d(2, affine=True), act, nn.Conv2d(2, 1, 2)
    ).double()
    x = torch.randn(1, 1, 5, 5, dtype=torch.float64, requires_grad=True)
    names = [n for n, _ in net.named_parameters()]

    def f(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(net, dict(zip(names, parameters, strict=True)), (x,))

    inputs = (x, *(p.detach().requires_grad_() for p in net.parameters()))
    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)


def test_double_backward_reaches_an_activated_tensor_that_lives() -> None:
    raw, w = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((1, 2, 4, 4), (3, 2, 1, 1)))
    second = []
    for everything in (False, True):
        with everything_saved() if everything else torch.enable_grad():
            x = norm_act(raw, None, None, 2, False, 1e-5, Act("relu"))[0]
            (dw,) = torch.autograd.grad(F.conv2d(x, w).pow(3).sum(), w, create_graph=True)
        second.append(torch.autograd.grad(dw.square().sum(), (x, raw, w)))
    torch.testing.assert_close(*second)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_and_offloading(reentrant: bool) -> None:
    net, x = chain(3, "instance", nn.LeakyReLU(0.1, True)), torch.randn(1, 2, 5, 5, 5)
    expected = gradients(net, x)
    for split in (0, 3, 4):
        first, second = net[:split], net[split:]
        for call in (
            lambda x: second(checkpoint(first, x, use_reentrant=reentrant)),  # noqa: B023
            lambda x: checkpoint(second, first(x * 1), use_reentrant=reentrant),  # noqa: B023
        ):
            for g, e in zip(gradients(net, x, call), expected, strict=True):
                assert torch.equal(g, e)
    with torch.autograd.graph.save_on_cpu():
        y = net(x)
    net.zero_grad()
    y.square().sum().backward()
    assert all(torch.equal(p.grad, e) for p, e in zip(net.parameters(), expected[1:], strict=True))


def test_autocast() -> None:
    net, x = chain(2, "batch", nn.ReLU(True)), torch.randn(2, 2, 6, 6)

    def call(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return net(x)

    convoxel.reset_stats()
    got = gradients(net, x, call)
    assert made_again() == 2
    with everything_saved():
        assert all(torch.equal(g, e) for g, e in zip(got, gradients(net, x, call), strict=True))


def test_transforms_and_compiling_save_as_before() -> None:
    net, x = chain(2, "instance", nn.ReLU()), torch.randn(1, 2, 5, 5)
    expected = gradients(net, x)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    for g, e in zip(gradients(net, x, compiled), expected, strict=True):
        torch.testing.assert_close(g, e)
    parameters = dict(net.named_parameters())
    got = torch.func.grad(lambda p: torch.func.functional_call(net, p, (x,)).square().sum())(parameters)
    for g, e in zip(got.values(), expected[1:], strict=True):
        torch.testing.assert_close(g, e)
