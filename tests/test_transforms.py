"""torch.func over our operators: gradients, per-sample gradients, gradients of gradients, Jacobians."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as T
from torch.func import functional_call, grad, jacrev, vmap

import convoxel
from convoxel import functional as F
from convoxel import nn


def inputs() -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(s, dtype=torch.float64) for s in ((4, 3, 6, 7), (5, 3, 3, 3), (5,)))


def loss(m: Any) -> Callable[..., torch.Tensor]:
    return lambda w, b, x: m.interpolate(m.conv2d(x, w, b, padding=1), scale_factor=2).square().sum()


TRANSFORMS: dict[str, Callable[..., Any]] = {
    "grad": lambda m, x, w, b: grad(loss(m), (0, 1, 2))(w, b, x),
    "per sample": lambda m, x, w, b: vmap(grad(loss(m), (0, 1)), (None, None, 0))(w, b, x[:, None]),
    "grad of grad": lambda m, x, w, b: grad(lambda w: grad(loss(m))(w, b, x).square().sum())(w),
    "jacrev": lambda m, x, w, b: jacrev(lambda w: m.conv_transpose2d(x[:1, :, :3, :3], w)[0, 0, 0])(
        w[:3, :2]
    ),
    "vmap of vmap": lambda m, x, w, b: vmap(vmap(m.conv2d, (0, None)), (None, 0))(
        x[:, None], torch.stack([w, 2 * w])
    ),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_are_torchs(name: str) -> None:
    convoxel.set_strict(True)
    x, w, b = inputs()
    got, expected = (TRANSFORMS[name](m, x, w, b) for m in (F, T))
    torch.testing.assert_close(got, expected)


def test_per_sample_gradients_of_a_layer() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(80, 2)).double()
    x, _, _ = inputs()
    parameters = dict(net.named_parameters())

    def one(parameters: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return functional_call(net, parameters, (x[None],)).square().sum()

    got = vmap(grad(one), (None, 0))(parameters, x)
    for i in range(len(x)):
        net.zero_grad()
        one(parameters, x[i]).backward()
        for name, p in net.named_parameters():
            torch.testing.assert_close(got[name][i], p.grad)
