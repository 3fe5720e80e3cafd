"""U-Net: shapes, structure, errors; the registry."""

import doctest
import json

import pytest
import torch

import convoxel
from convoxel import models, nn
from convoxel.models import UNet

SMALL = dict(in_channels=2, out_channels=3, features=(4, 6, 8))


@pytest.mark.parametrize("module", [models, models.unet], ids=lambda m: m.__name__)
def test_the_examples_in_the_docstrings(module):
    result = doctest.testmod(module)
    assert result.attempted and not result.failed


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("norm", ["instance", "batch", "group", None])
def test_output_has_the_size_of_the_input_and_gradients_reach_every_parameter(rank, norm):
    torch.manual_seed(0)
    net = UNet(rank, **SMALL, norm=norm, activation="relu")
    out = net(torch.randn(2, 2, *[8, 12, 4][:rank]))
    assert out.shape == (2, 3, *[8, 12, 4][:rank])
    out.square().sum().backward()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0 for n, p in net.named_parameters() if "weight" in n
    )


def test_layers_of_a_small_net_by_hand():
    """(1 -> 2 -> 4) in 2D, one convolution per stage, no norm: the definition written out with functional."""
    torch.manual_seed(0)
    net = UNet(2, 1, 3, features=(2, 4), norm=None, activation="leaky_relu", convs=1)
    for p in net.parameters():
        torch.nn.init.normal_(p)
    w = dict(net.named_parameters())
    x = torch.randn(1, 1, 4, 6)
    F = torch.nn.functional

    def conv(name, x, **kw):
        return F.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], **kw)

    high = F.leaky_relu(conv("encoder.0.0.0", x, padding=1), 0.01)
    low = F.leaky_relu(conv("encoder.1.0.0", high, padding=1, stride=2), 0.01)
    up = F.conv_transpose2d(low, w["up.0.weight"], w["up.0.bias"], stride=2)
    joined = F.leaky_relu(conv("decoder.0.0.0", torch.cat([high, up], 1), padding=1), 0.01)
    torch.testing.assert_close(net(x), conv("heads.0", joined))


def test_anisotropic_kernels_and_strides():
    net = UNet(
        3,
        1,
        2,
        features=(4, 4, 4),
        strides=(1, (1, 2, 2), 2),
        kernel_size=((1, 3, 3), (1, 3, 3), 3),
        convs=(1, 2, 3),
    )
    assert net.divisor == [2, 4, 4]
    kernels = [m.kernel_size for m in net.encoder.modules() if isinstance(m, nn.Conv3d)]
    assert kernels == [(1, 3, 3)] * 3 + [(3, 3, 3)] * 3
    assert [m.kernel_size for m in net.up] == [(1, 2, 2), (2, 2, 2)]
    assert net(torch.zeros(1, 1, 2, 4, 8)).shape == (1, 2, 2, 4, 8)
    with pytest.raises(ValueError, match=r"divisible by \(2, 4, 4\).*received \(3, 4, 9\).*to \(4, 4, 12\)"):
        net(torch.zeros(1, 1, 3, 4, 9))


def test_deep_supervision_only_while_training():
    torch.manual_seed(0)
    net = UNet(3, **SMALL, deep_supervision=True)
    x = torch.randn(1, 2, 8, 8, 8)
    outputs = net(x)
    assert [tuple(o.shape) for o in outputs] == [(1, 3, 8, 8, 8), (1, 3, 4, 4, 4)]
    net.eval()
    torch.testing.assert_close(net(x), outputs[0])  # instance norm: the same numbers in both modes
    loss = convoxel.losses.DiceCE()(outputs, torch.zeros(1, 8, 8, 8, dtype=torch.long))
    loss.backward()
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(rank=4), "rank: expected 2 .* received 4"),
        (dict(norm="layer"), "norm: expected one of .*received 'layer'"),
        (dict(activation="gelu"), "activation: expected one of .*received 'gelu'"),
        (dict(features=(4,)), "features: expected two stages or more"),
        (dict(features=(4, 0)), "features: .*received 0"),
        (dict(in_channels=1.5), "in_channels: .*received 1.5"),
        (dict(out_channels=True), "out_channels: .*received True"),
        (dict(strides=(2, 2, 2)), r"strides: the first stage .*received \[2, 2\]"),
        (dict(strides=(1, 2)), r"strides: expected an int or one entry per stage \(3\), received \(1, 2\)"),
        (dict(kernel_size=2), "kernel_size: expected odd"),
        (dict(kernel_size=((3, 3, 3), 3, 3)), "kernel_size: expected an int or 2 ints for each stage"),
        (dict(convs=0), "convs: .*received 0"),
    ],
    ids=lambda v: v if isinstance(v, str) else next(iter(v)),
)
def test_settings_that_fit_no_network(change, message):
    with pytest.raises(ValueError, match=message):
        UNet(**{"rank": 2, **SMALL, **change})


@pytest.mark.parametrize("shape", [(1, 2, 8), (1, 2, 8, 8, 8), (1, 1, 8, 8), (2, 8, 8)])
def test_inputs_that_do_not_fit(shape):
    with pytest.raises(ValueError, match=r"\(N, C, H, W\) with 2 input channels, received shape"):
        UNet(2, **SMALL)(torch.zeros(shape))


def test_group_norm_divides_any_number_of_channels():
    net = UNet(2, 1, 2, features=(12, 20), norm="group")
    assert [m.num_groups for m in net.encoder.modules() if isinstance(m, nn.GroupNorm)] == [4, 4, 4, 4]


def test_registry_builds_the_same_network_from_json():
    net = UNet(
        3, 1, 2, features=(4, 8), strides=(1, (1, 2, 2)), kernel_size=(3, (1, 3, 3)), deep_supervision=True
    )
    described = json.loads(json.dumps(models.config_of(net)))
    twin = models.create(described["name"], **described["config"])
    assert models.config_of(twin) == described
    assert {k: v.shape for k, v in twin.state_dict().items()} == {
        k: v.shape for k, v in net.state_dict().items()
    }
    twin.load_state_dict(net.state_dict())
    x = torch.randn(1, 1, 2, 4, 4)
    assert torch.equal(twin.eval()(x), net.eval()(x))


def test_registry_errors():
    with pytest.raises(ValueError, match="unknown network 'vnet'; expected one of unet"):
        models.create("vnet")
    with pytest.raises(TypeError, match="unet: .*depth"):
        models.create("unet", rank=2, in_channels=1, out_channels=1, depth=3)
    with pytest.raises(ValueError, match="'unet' is taken by UNet"):
        models.register("unet", nn.Sequential)
    assert models.config_of(nn.Sequential()) is None


def test_a_network_of_your_own_can_be_registered(monkeypatch):
    class Line(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.config = {"width": width}
            self.layer = nn.Linear(width, 1)

    monkeypatch.setattr(models, "NETWORKS", dict(models.NETWORKS))
    models.register("line", Line)
    assert models.config_of(models.create("line", width=3)) == {"name": "line", "config": {"width": 3}}
