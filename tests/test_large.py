"""Outputs of 32 MiB and more, which are stored past the caches: the same values, in whole lines and around them."""

import pytest
import torch
import torch.nn.functional as T
from torch import Tensor

from convoxel import functional as F
from convoxel import memory

LEAST = 32 * 2**20
LAST = torch.channels_last_3d


def with_gradient(module, name: str, x: Tensor, dy: Tensor, *arguments) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    y = getattr(module, name)(x, *arguments)
    return y.detach(), torch.autograd.grad(y, x, dy)[0]


@pytest.mark.parametrize("name", ["relu", "leaky_relu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activation(name: str, dtype: torch.dtype, isa: str) -> None:
    n = LEAST // dtype.itemsize + 5
    x, dy = torch.randn(n).to(dtype), torch.randn(n).to(dtype)
    for got, expected in zip(with_gradient(F, name, x, dy), with_gradient(T, name, x, dy), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("channels", [32, 20])  # whole vectors of channels, and not
@pytest.mark.parametrize("last", [True, False])
def test_norm(channels: int, last: bool, isa: str) -> None:
    shape = (1, channels, 2, 400, LEAST // (4 * channels * 800) + 1)
    x, dy = torch.randn(shape), torch.randn(shape)
    # in float64 and contiguous: torch 2.13's gradient is wrong where one image's dy is channels-last
    expected = with_gradient(T, "instance_norm", x.double(), dy.double())
    layout = LAST if last else torch.contiguous_format
    got = with_gradient(F, "instance_norm", *(t.contiguous(memory_format=layout) for t in (x, dy)))
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g.double(), e, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("c", "k", "kernel"), [(1, 32, 3), (3, 48, 1), (2, 20, 1)], ids=lambda v: str(v))
def test_convolution(c: int, k: int, kernel: int, isa: str) -> None:
    """One pass of sums, straight to channels-last y: integers, so that every sum is exact."""
    x = torch.randint(-3, 4, (1, c, 8, 200, LEAST // (4 * k * 1600) + 1)).float()
    w, b = torch.randint(-3, 4, (k, c, kernel, kernel, kernel)).float(), torch.randint(-3, 4, (k,)).float()
    x = torch.empty_like(x, memory_format=LAST).copy_(x)  # one channel is both layouts until it is copied
    y = F.conv3d(x, w, b, padding=kernel // 2)
    assert y.is_contiguous(memory_format=LAST) and y.nbytes >= LEAST > memory.LEAST
    assert torch.equal(y, T.conv3d(x, w, b, padding=kernel // 2))


def test_transposed_convolution(isa: str) -> None:
    x = torch.randint(-3, 4, (1, 8, 10, 80, 84)).float().contiguous(memory_format=LAST)
    w = torch.randint(-3, 4, (8, 16, 2, 2, 2)).float()
    y = F.conv_transpose3d(x, w, stride=2)
    assert y.nbytes >= LEAST
    assert torch.equal(y, T.conv_transpose3d(x, w, stride=2))
