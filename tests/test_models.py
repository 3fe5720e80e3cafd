"""U-Net: shapes, structure, errors; running stages twice; the registry."""

import doctest
import json

import pytest
import torch

import convoxel
from child import python
from convoxel import checkpoint, models, nn
from convoxel.bench.networks import torch_twin
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


def test_a_residual_stage_by_hand():
    """A stem and one block with and one without a shortcut of its own, written out with functional."""
    torch.manual_seed(0)
    net = filled(UNet(2, 1, 3, features=(2, 4), strides=(1, (1, 2)), norm="instance", convs=1, residual=True))
    w = dict(net.named_parameters())
    F = torch.nn.functional

    def conv(name, x, norm=None, **kw):
        y = F.conv2d(x, w[f"{name}.weight"], **kw)
        return y if norm is None else F.instance_norm(y, weight=w[f"{norm}.weight"], bias=w[f"{norm}.bias"])

    def residual(at, x, shortcut, **kw):
        y = F.leaky_relu(conv(f"{at}.conv1.0", x, f"{at}.conv1.1", padding=1, **kw), 0.01)
        return F.leaky_relu(conv(f"{at}.conv2.0", y, f"{at}.conv2.1", padding=1) + shortcut, 0.01)

    x = torch.randn(2, 1, 4, 6)
    stem = F.leaky_relu(conv("encoder.0.0.0", x, "encoder.0.0.1", padding=1), 0.01)
    high = residual("encoder.0.1", stem, stem)
    torch.testing.assert_close(net.encoder[0](x), high)
    shortcut = conv("encoder.1.0.shortcut.1", F.avg_pool2d(high, (1, 2)), "encoder.1.0.shortcut.2")
    low = residual("encoder.1.0", high, shortcut, stride=(1, 2))
    torch.testing.assert_close(net.encoder[1](high), low)
    up = F.conv_transpose2d(low, w["up.0.weight"], w["up.0.bias"], stride=(1, 2))
    joined = conv("decoder.0.0.0", torch.cat([high, up], 1), "decoder.0.0.1", padding=1)
    logits = conv("heads.0", F.leaky_relu(joined, 0.01)) + w["heads.0.bias"].view(-1, 1, 1)
    torch.testing.assert_close(net(x), logits)


def test_a_residual_network_is_nnunets():
    """ResidualEncoderUNet's numbers with its weights, where stages have as many channels as the last one too."""
    unet = pytest.importorskip("dynamic_network_architectures.architectures.unet")
    T = torch.nn
    strides, kernels, convs = (1, (1, 2, 2), 2, 2), ((1, 3, 3), 3, 3, 3), (1, 2, 1, 2)
    theirs = unet.ResidualEncoderUNet(
        2, 4, (4, 6, 8, 8), T.Conv3d, [list(k) if isinstance(k, tuple) else k for k in kernels], strides, convs, 3,
        (1, 2, 1), conv_bias=False, norm_op=T.InstanceNorm3d, norm_op_kwargs={"affine": True},
        nonlin=T.LeakyReLU, nonlin_kwargs={"inplace": True}, deep_supervision=True,
    )  # fmt: skip
    ours = UNet(3, 2, 3, (4, 6, 8, 8), strides, kernels, convs=convs, residual=True, decoder_convs=(1, 2, 1),
                deep_supervision=True)  # fmt: skip
    above = filled(theirs).decoder
    pairs = [(theirs.encoder, ours.encoder)]
    for s in range(3):  # theirs counts from below
        pairs += [(above.stages[2 - s], ours.decoder[s]), (above.seg_layers[2 - s], ours.heads[s])]
        ours.up[s].weight.data, ours.up[s].bias.data[:] = above.transpconvs[2 - s].weight.data, 0
    for a, b in pairs:
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            assert p.shape == q.shape
            q.data = p.data
    for s, width in enumerate((4, 6, 8)):  # theirs has the encoder's output behind what comes from below
        first = ours.decoder[s][0][0].weight
        first.data = first.data.roll(width, dims=1)
    x = torch.randn(2, 2, 4, 16, 16)
    for y, want in zip(ours(x), theirs(x), strict=True):
        torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)


def test_a_residual_block_starts_as_its_shortcut():
    net = UNet(2, 1, 2, features=(4, 4), residual=True, convs=(1, 2))
    x = torch.rand(1, 4, 8, 8)
    torch.testing.assert_close(net.encoder[0][1](x), x)
    torch.testing.assert_close(net.encoder[1](x), torch.nn.functional.avg_pool2d(x, 2))


def filled(net):
    """Norms and biases at random too: as they start they hide mistakes, and what residual blocks add."""
    for p in net.parameters():
        if p.ndim == 1:
            torch.nn.init.normal_(p, 1.0, 0.3)
    return net


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("norm", ["instance", "batch", "group"])
def test_accelerated_residual_networks_run_as_blocks_and_equal_torch(rank, norm):
    torch.manual_seed(0)
    net = filled(UNet(rank, 2, 3, features=(16, 32, 32), norm=norm, convs=(1, 2, 2), residual=True))
    fast, twin = convoxel.accelerate(net), torch_twin(net).double()
    x = torch.randn(2, 2, *[16] * rank)
    want, got = twin(x.double()), fast(x)
    torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-3)
    want.square().mean().backward()
    got.square().mean().backward()
    error = sum(
        (p.grad - q.grad).square().sum() for p, q in zip(fast.parameters(), twin.parameters(), strict=True)
    )
    assert error < 1e-8 * sum(q.grad.square().sum() for q in twin.parameters())
    entries = {e.name: e for e in convoxel.report(fast).entries}
    assert not [e for e in entries.values() if e.state == "left"]
    alone = {name.split(".")[0] for name, e in entries.items() if e.state == "converted"}
    assert alone == {"up", "heads", "encoder"}  # of the encoder the averages
    for name in ("encoder.0.1", "encoder.1.0", "encoder.1.1", "encoder.2.0"):
        assert entries[f"{name}.conv1.1"].why == "conv + norm + leaky_relu"
        assert entries[f"{name}.conv2.0"].why == entries[f"{name}.act"].why
        assert entries[f"{name}.act"].why == "conv + norm + residual + leaky_relu"
    assert entries["encoder.1.0.shortcut.1"].why == "conv + norm"


def trained(net, x, bf16=False):
    """Outputs, gradients and buffers after a step forwards and backwards."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        outputs = net(x)
    sum((y.float() * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum() for y in outputs).backward()
    return [*outputs, x.grad, *(p.grad for p in net.parameters()), *net.buffers()]


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "convert", [lambda n: n, convoxel.accelerate, torch_twin], ids=["as is", "fast", "torch"]
)
@pytest.mark.parametrize("norm, residual", [("instance", False), ("instance", True), ("batch", True)])
def test_checkpointing_changes_no_bit(norm, residual, convert, bf16):
    """Outputs, gradients, and the running statistics, which must not count a batch twice."""
    results = []
    for again in (False, True):
        torch.manual_seed(0)
        net = UNet(3, 1, 2, (16, 32, 32), norm=norm, residual=residual, convs=2, deep_supervision=True)
        net = convert(filled(net))
        net.checkpointing = again
        results.append(trained(net, torch.randn(2, 1, 16, 16, 16), bf16))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_checkpointing_is_for_training_alone_and_no_part_of_files(monkeypatch):
    net = UNet(2, **SMALL)
    config, names = net.config, list(net.state_dict())
    net.checkpointing = True
    assert net.config == config and list(net.state_dict()) == names and not UNet(2, **SMALL).checkpointing
    stages = []
    monkeypatch.setattr(models.unet, "twice", lambda stage, *inputs: stages.append(stage) or stage(*inputs))
    x = torch.zeros(1, 2, 8, 8)
    with torch.no_grad():
        net(x)
    net.eval()(x)
    assert not stages
    net.train()(x)
    assert len(stages) == 3 + 2  # every stage of the encoder and of the decoder


def test_a_graph_of_stages_that_run_twice_can_be_walked_again():
    torch.manual_seed(0)
    net = filled(UNet(2, **SMALL, norm="batch", residual=True))
    net.checkpointing = True
    loss = net(torch.randn(2, 2, 16, 16)).square().mean()
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in net.parameters()]
    loss.backward()
    for p, g in zip(net.parameters(), once, strict=True):
        torch.testing.assert_close(p.grad, 2 * g)
    assert {int(b) for n, b in net.named_buffers() if n.endswith("num_batches_tracked")} == {1}


def test_stages_that_run_twice_take_less_memory():
    """The pool's peak; at 128^3 nnU-Net's network has 0.73 of it. Recipes (ops/saved.py) count, or it were 0.97."""
    peaks = []
    for again in (False, True):
        torch.manual_seed(0)
        net = convoxel.accelerate(UNet(3, 1, 2, (16, 16, 16)))
        net.checkpointing = again
        convoxel.memory.release()
        before = convoxel.memory.stats()["in_use"]
        net(torch.randn(1, 1, 48, 48, 48)).square().mean().backward()
        peaks.append(convoxel.memory.stats()["peak"] - before)
    assert peaks[0] > 5 * 16 * 48**3 * 4
    assert peaks[1] < 0.82 * peaks[0]


class Inside(nn.Module):
    """Layers of which some are run by `how`."""

    def __init__(self, how):
        super().__init__()
        style = models.blocks.Style(2, "instance", "relu")
        self.layers = nn.ModuleList(models.blocks.block(style, 4, 4, [3, 3], [1, 1]) for _ in range(3))
        self.how = how

    def forward(self, x):
        return self.layers[2](self.how(self.layers[1], self.layers[0](x)))


def offloaded(layer, x):
    with torch.autograd.graph.save_on_cpu():
        return layer(x)


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize(
    "how",
    [
        models.blocks.twice,
        offloaded,
        lambda f, x: torch.utils.checkpoint.checkpoint(f, x, use_reentrant=False),
    ],
    ids=["twice", "offloaded", "checkpoint"],
)
def test_inside_a_stage_that_runs_twice_others_may_keep_tensors_their_way(how, accelerated):
    torch.manual_seed(0)
    net, found = Inside(how), []
    net = convoxel.accelerate(net) if accelerated else net
    x = torch.randn(2, 4, 9, 9, requires_grad=True)
    for again in (False, True):
        net.how = how if again else lambda f, x: f(x)
        y = net.layers[0](models.blocks.twice(net, x) if again else net(x))
        found.append(torch.autograd.grad(y.square().sum(), [x, *net.parameters()]))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_two_processes_train_a_checkpointed_network_as_one(tmp_path):
    """DistributedDataParallel over gloo, accelerated, deep supervision: one process's gradients of both patches."""
    code = """
        import torch, torch.distributed as dist, torch.multiprocessing as mp, convoxel
        def run(rank, file):
            torch.set_num_threads(1)
            dist.init_process_group("gloo", init_method="file://" + file, rank=rank, world_size=2)
            torch.manual_seed(0)
            net = convoxel.accelerate(
                convoxel.models.UNet(3, 1, 2, (16, 32), residual=True, deep_supervision=True, convs=1)
            )
            net.checkpointing = True
            x = torch.randn(2, 1, 16, 16, 16)
            net(x)[0].square().mean().backward()
            want = [p.grad.clone() for p in net.parameters()]
            net.zero_grad()
            ddp = torch.nn.parallel.DistributedDataParallel(net)
            ddp(x[rank:rank + 1])[0].square().mean().backward()
            for p, g in zip(net.parameters(), want, strict=True):
                torch.testing.assert_close(p.grad, g, rtol=1e-3, atol=1e-5)
            dist.destroy_process_group()
            open(file + str(rank), "w").write("equal")
        if __name__ == "__main__":
            mp.start_processes(run, ({file!r},), 2, start_method="fork")
    """
    python(code.format(file=str(tmp_path / "meet")))
    assert [(tmp_path / f"meet{rank}").read_text() for rank in (0, 1)] == ["equal"] * 2


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
        (dict(decoder_convs=(1, 0)), "decoder_convs: .*received 0"),
        (dict(decoder_convs=(1, 1, 1)), r"decoder_convs: expected .* \(2\), received \(1, 1, 1\)"),
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


@pytest.mark.parametrize(
    "options",
    [{}, dict(residual=True), dict(residual=True, decoder_convs=2), dict(decoder_convs=(3,), convs=(1, 2))],
)
def test_registry_builds_the_same_network_from_json(options):
    net = UNet(
        3,
        1,
        2,
        features=(4, 8),
        strides=(1, (1, 2, 2)),
        kernel_size=(3, (1, 3, 3)),
        deep_supervision=True,
        **options,
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


def test_files_of_before_are_files_of_today(tmp_path):
    """The architecture and the names of tensors as they were before networks could be residual."""
    architecture = {"name": "unet", "config": {
        "rank": 2, "in_channels": 1, "out_channels": 2, "features": [2, 4], "strides": [[1, 1], [2, 2]],
        "kernel_size": [[3, 3], [3, 3]], "norm": "instance", "activation": "leaky_relu", "convs": [1, 2],
        "deep_supervision": False,
    }}  # fmt: skip
    blocks = {"encoder.0.0": (2, 1), "encoder.1.0": (4, 2), "encoder.1.1": (4, 4), "decoder.0.0": (2, 4)}
    state = {f"{b}.0.weight": torch.randn(*shape, 3, 3) for b, shape in blocks.items()}
    state |= {f"{b}.1.{n}": torch.randn(shape[0]) for b, shape in blocks.items() for n in ("weight", "bias")}
    state |= {"up.0.weight": torch.randn(4, 2, 2, 2), "up.0.bias": torch.randn(2)}
    state |= {"heads.0.weight": torch.randn(2, 2, 1, 1), "heads.0.bias": torch.randn(2)}
    checkpoint.write(tmp_path / "old.safetensors", state, architecture)
    model = convoxel.Model.load(tmp_path / "old.safetensors")
    assert all(torch.equal(model.state_dict()[n], t) for n, t in state.items())
    assert models.config_of(model.module) == architecture
    usual = UNet(2, 1, 2, (2, 4), convs=(1, 2), decoder_convs=1)  # the default, spelled out
    assert usual.config == architecture["config"]


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
