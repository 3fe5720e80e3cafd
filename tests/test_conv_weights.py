"""Weights as convolutions find them: contiguous or channels-last, float32 beside bfloat16, and changed in every way
that there is between two calls."""

import copy
import io
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as T
from torch import Tensor, nn
from torch.nn.utils import prune

import convoxel
from convoxel import functional as F
from convoxel import runtime
from convoxel.ops.conv import conv, conv_input_grad
from convoxel.ops.joined import conv_joined, conv_joined_input_grad

LAST = torch.channels_last_3d
ISAS = runtime.isas()
# (C, K, groups, kernel, stride, size): more and fewer channels than vectors and tiles have, blocks with a rest
CASES = [
    (3, 5, 1, (3, 3, 3), 1, (5, 6, 7)),
    (33, 40, 1, (3, 3, 3), 1, (4, 4, 5)),
    (34, 66, 2, (1, 3, 3), 1, (2, 9, 8)),
    (20, 70, 1, (2, 2, 2), 2, (4, 6, 6)),
    (65, 17, 1, (1, 1, 1), 1, (3, 4, 5)),
    (300, 20, 1, (3, 1, 5), 1, (3, 3, 6)),
    (8, 8, 8, (3, 3, 3), 1, (4, 5, 6)),
]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = runtime.isa()
    runtime.set_isa(request.param)
    yield request.param
    runtime.set_isa(before)


@pytest.fixture
def algorithm() -> Iterator[Callable[[str], None]]:
    yield runtime.set_conv_algorithm
    runtime.set_conv_algorithm("auto")


def integers(*shape: int) -> Tensor:
    """-2 to 2: sums of their products are exact in every order."""
    return torch.randint(-2, 3, shape).float()


def both_ways(case: tuple[int, int, int, tuple[int, ...], int, tuple[int, ...]], dtype: torch.dtype, w_last: bool,
              w_dtype: torch.dtype | None = None, make: Callable[..., Tensor] = integers) -> list[Tensor]:  # fmt: skip
    """F and G of a case."""
    c, k, groups, kernel, stride, size = case
    torch.manual_seed(0)
    w = make(k, c // groups, *kernel).to(dtype).to(w_dtype or dtype)
    w = w.contiguous(memory_format=LAST) if w_last else w
    how = ([stride] * 3, [n // 2 if stride == 1 else 0 for n in kernel], [1] * 3, groups)
    x = make(2, c, *size).to(dtype).contiguous(memory_format=LAST)
    y = conv(x, w, None, *how)
    return [y, conv_input_grad(make(*y.shape).to(dtype).contiguous(memory_format=LAST), w, None, *how, size)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_channels_last_weights_are_the_same_weights(
    isa: str, algorithm: Callable[[str], None], case: tuple, dtype: torch.dtype
) -> None:
    for name in ("auto", "direct", "columns", "winograd", "voxels"):
        algorithm(name)
        for one, other in zip(both_ways(case, dtype, True), both_ways(case, dtype, False), strict=True):
            assert torch.equal(one, other), name
        if name == "winograd":  # which rounds the same in both
            results = (both_ways(case, dtype, last, make=torch.randn) for last in (True, False))
            assert all(map(torch.equal, *results)) or dtype == torch.float64


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("last", [False, True])
def test_float32_weights_are_rounded_where_they_are_read(
    isa: str, algorithm: Callable[[str], None], case: tuple, last: bool
) -> None:
    for name in ("auto", "direct", "columns", "winograd", "voxels"):
        algorithm(name)
        c, k, groups, kernel, stride, size = case
        torch.manual_seed(1)
        w = torch.randn(k, c // groups, *kernel)
        w = w.contiguous(memory_format=LAST) if last else w
        x = torch.randn(1, c, *size).bfloat16()
        how = ([stride] * 3, [n // 2 if stride == 1 else 0 for n in kernel], [1] * 3, groups)
        y = conv(x, w, None, *how)
        assert y.dtype == torch.bfloat16 and torch.equal(y, conv(x, w.bfloat16(), None, *how)), name
        dx = conv_input_grad(y, w, None, *how, size)
        assert torch.equal(dx, conv_input_grad(y, w.bfloat16(), None, *how, size)), name


def test_autocast_keeps_the_bits_and_the_gradients_dtype() -> None:
    torch.manual_seed(2)
    w, x, b = torch.randn(40, 33, 3, 3, requires_grad=True), torch.randn(2, 33, 9, 8), torch.randn(40)
    with torch.autocast("cpu", torch.bfloat16):
        y = F.conv2d(x, weight=w, bias=b, padding=1)
        again = F.conv2d(x, w.bfloat16(), b, padding=1)
        assert torch.equal(
            F.linear(x[..., 0, :1], w[:, :1, 0, 0]), F.linear(x[..., 0, :1], w[:, :1, 0, 0].bfloat16())
        )
    assert y.dtype == torch.bfloat16 and torch.equal(y, again)
    (dw,), (other,) = (torch.autograd.grad(t.float().square().sum(), [w]) for t in (y, again))
    assert dw.dtype == torch.float32 and torch.equal(dw, other)
    with pytest.raises(RuntimeError, match=r"same dtype, received torch.bfloat16, torch.float32"):
        F.conv2d(x.bfloat16(), w)
    with pytest.raises(RuntimeError, match=r"same dtype"):
        F.conv_transpose2d(y.detach(), w)
    with pytest.raises(RuntimeError, match=r"same dtype"):
        F.linear(x.bfloat16(), torch.randn(4, 8))


@pytest.mark.parametrize("change", [torch.Tensor.contiguous, lambda w: w.contiguous(memory_format=LAST)])
def test_parts_of_a_concatenation_meet_the_same_weights(change: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(4)
    xs, w = [torch.randn(1, c, 5, 6, 7).bfloat16() for c in (32, 9)], torch.randn(7, 41, 3, 3, 3)
    how = ([1] * 3, [1] * 3, [1] * 3)
    one, other = (conv_joined(xs, v, None, *how, 0, False)[0] for v in (change(w), w.bfloat16()))
    assert one.dtype == torch.bfloat16 and torch.equal(one, other)
    size, channels = [5, 6, 7], [32, 9]
    some = [conv_joined_input_grad(one, v, *how, size, channels) for v in (change(w), w.bfloat16())]
    assert all(map(torch.equal, *some))


def test_the_operator_with_mixed_dtypes_is_one_for_torch() -> None:
    x = torch.randn(1, 4, 3, 4, 5).bfloat16().requires_grad_()
    w = torch.randn(6, 4, 3, 3, 3, requires_grad=True)
    arguments = (x, w, None, [1] * 3, [1] * 3, [1] * 3, 1)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.convoxel.conv.default, arguments, test_utils=tests)
    y = F.conv3d(x.detach(), w.detach().bfloat16(), padding=1)
    torch.library.opcheck(
        torch.ops.convoxel.conv_input_grad.default,
        (y.requires_grad_(), w, None, [1] * 3, [1] * 3, [1] * 3, 1, [3, 4, 5]),
        test_utils=tests,
    )


# Nothing that a call makes of its weights is kept -------------------------------------------------


def step(net: nn.Module) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()


def average(net: nn.Module) -> None:
    ema = torch.optim.swa_utils.AveragedModel(
        net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
    )
    step(net)
    ema.update_parameters(net)
    net.load_state_dict(ema.module.state_dict())


def through_numpy(net: nn.Module) -> None:
    net[0].weight.detach().numpy()[...] *= -2  # no version counter sees this


def write_data(net: nn.Module) -> None:
    net[0].weight.data.mul_(-2)


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "optimiser": step,
    "load_state_dict": lambda net: net.load_state_dict({k: v + 1 for k, v in net.state_dict().items()}),
    "load_state_dict, assign": lambda net: net.load_state_dict(
        {k: v + 1 for k, v in net.state_dict().items()}, assign=True
    ),
    "copy_": lambda net: net[0].weight.data.copy_(torch.ones_like(net[0].weight)),
    ".data =": lambda net: setattr(net[0].weight, "data", net[0].weight.data * -2),
    ".data in place": write_data,
    "numpy": through_numpy,
    "to": lambda net: net.to(torch.float64).to(torch.float32).to(memory_format=LAST),
    "half of it": lambda net: net[0].weight.data[:3].zero_(),
    "EMA": average,
    "pruning": lambda net: prune.l1_unstructured(net[0], "weight", 0.5),
    "one element": lambda net: net[0].weight.data.view(-1)[-1:].add_(1),
}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_weight_is_seen_by_the_next_call(change: str, autocast: bool) -> None:
    torch.manual_seed(3)
    plain = nn.Sequential(
        nn.Conv3d(6, 8, 3, padding=1), nn.InstanceNorm3d(8), nn.ReLU(), nn.Conv3d(8, 4, 3)
    ).eval()
    net, x = convoxel.accelerate(plain), torch.randn(1, 6, 6, 7, 8)

    def check() -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = net(x)
            # the same layers over copies: nobody has seen these weights before
            fresh = copy.deepcopy(net)
            assert torch.equal(y, fresh(x)) and torch.equal(y, pickle.loads(pickle.dumps(fresh))(x))
        exact = T.conv3d(
            x.double(), net[0].weight.detach().double(), net[0].bias.detach().double(), padding=1
        )
        exact = T.conv3d(
            T.instance_norm(exact).relu(), net[3].weight.detach().double(), net[3].bias.detach().double()
        )
        assert (y - exact).norm() / exact.norm() < (2e-2 if autocast else 2e-5)
        return y

    with torch.no_grad():
        before = check()
        with torch.enable_grad():
            CHANGES[change](net)
        after = check()
    assert change == "to" or not torch.equal(before, after)


def test_a_saved_network_is_the_same(tmp_path: object) -> None:
    net, x = convoxel.nn.Conv2d(5, 7, 3), torch.randn(1, 5, 8, 9)
    y, file = net(x), io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), y)
