"""convoxel.accelerate: same results, gradients and state on the networks that people have, and all around them."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import convoxel
import networks
from networks import NETWORKS, build, image, outputs


def gradients(network: nn.Module, x: torch.Tensor) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Outputs, and the gradients of a fixed sum of them, by name; "x" is the image's."""
    x = x.clone().requires_grad_()
    y = outputs(network(x))
    generator = torch.Generator().manual_seed(2)
    loss = sum((t * torch.randn(t.shape, generator=generator).to(t)).sum() / t.numel() ** 0.5 for t in y)
    loss.backward()
    grads = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    return [t.detach() for t in y], {**grads, "x": x.grad}


def error(a: torch.Tensor, exact: torch.Tensor) -> float:
    return ((a.double() - exact).norm() / exact.norm()).item()


def joined(grads: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    """The error of all gradients as one vector."""
    return error(*(torch.cat([g[n].double().flatten() for n in exact]) for g in (grads, exact)))


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_and_gradients_are_as_good_as_torchs(name):
    """`highest`: against float64 at most twice torch's own error, or some eps where that is smaller; `high`: 1e-4,
    or four times torch's own where that is larger: a weight whose gradient is what is left of large terms. Parameters
    that have no gradient but rounding (a bias in front of a norm) are compared with the largest."""
    theirs, x = build(name, smooth=True), image(name)
    exact_y, exact = gradients(copy.deepcopy(theirs).double(), x.double())
    torch_y, torch_g = gradients(theirs, x)
    largest = max(g.norm().item() / g.numel() ** 0.5 for g in exact.values())
    real = [n for n, g in exact.items() if g.norm().item() / g.numel() ** 0.5 > 1e-6 * largest]
    assert len(real) > len(exact) / 2
    for precision in ("highest", "high"):
        convoxel.set_float32_conv_precision(precision)
        theirs.zero_grad()
        with strict():
            y, grads = gradients(convoxel.accelerate(theirs), x)
        assert set(grads) == set(exact)
        for a, t, e in zip(y, torch_y, exact_y, strict=True):
            assert a.shape == t.shape and a.stride() == t.stride() and a.dtype == t.dtype
            assert error(a, e) <= (max(2 * error(t, e), 1e-6) if precision == "highest" else 1e-4)
        for n in real:
            own = error(torch_g[n], exact[n])
            bound = max(2 * own, 2e-6) if precision == "highest" else max(4 * own, 1e-4)
            assert error(grads[n], exact[n]) <= bound, (precision, n)
        assert joined(grads, exact) <= (2 * joined(torch_g, exact) if precision == "highest" else 2e-5)
        for n in set(exact) - set(real):
            assert grads[n].norm().item() / grads[n].numel() ** 0.5 <= 1e-4 * largest, (precision, n)


class strict:
    def __enter__(self):
        convoxel.set_strict(True)

    def __exit__(self, *_):
        convoxel.set_strict(False)


@pytest.mark.parametrize("name", NETWORKS)
def test_nearly_all_the_work_is_ours(name):
    """torch counts the operations of its own kernels: what is left of them in the converted network."""
    network, x = build(name), image(name, 1)
    counts = []
    for net in (network, convoxel.accelerate(network)):
        with FlopCounterMode(display=False) as counter, strict():
            sum(t.sum() for t in outputs(net(x))).backward()
        counts.append(counter.get_total_flops())
    assert counts[0] > 1e6 and counts[1] <= 0.05 * counts[0]


@pytest.mark.parametrize("name", NETWORKS)
def test_the_network_keeps_its_parameters_names_and_classes(name):
    network = build(name)
    before = [type(m) for m in network.modules()]
    net = convoxel.accelerate(network)
    assert [type(m) for m in network.modules()] == before
    assert all(isinstance(m, kind) for m, kind in zip(net.modules(), before, strict=True))
    assert [n for n, _ in net.named_modules()] == [n for n, _ in network.named_modules()]
    assert all(p is q for p, q in zip(net.parameters(), network.parameters(), strict=True))
    assert all(p is q for p, q in zip(net.buffers(), network.buffers(), strict=True))
    assert list(net.state_dict()) == list(network.state_dict())
    assert repr(net) == repr(network)
    net.load_state_dict(network.state_dict())
    assert convoxel.restore(net) is net
    assert [type(m) for m in net.modules()] == before and not any(
        "convoxel" in key for m in net.modules() for key in m.__dict__
    )


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_fused_and_left(name):
    """Every norm that an activation follows in the source runs as one with it; nothing that does arithmetic on
    images is left but what convoxel has no layer for."""
    net = convoxel.accelerate(build(name))
    net(image(name, 1))
    report = convoxel.report(net)
    assert {e.kind for e in report.of("left")} <= {
        "Dropout",
        "Dropout3d",
        "Identity",
        "Sigmoid",
        "ELU",
        "PReLU",
    }
    norms = [e for e in report.entries if e.kind.startswith(("Batch", "Group", "Instance"))]
    with_conv = sum(e.why.startswith("conv + norm") for e in norms)
    assert with_conv >= (0 if name == "SegResNet" else len(norms) // 2)
    alone = {"DynUNet, residual": 3}  # norms in front of a question that leads to other layers
    assert sum(e.state != "fused" for e in norms) == alone.get(name, 0)
    assert str(report).startswith(
        f"{len(report.of('converted'))} converted, {len(report.of('fused'))} fused, "
    )


@pytest.mark.parametrize("name", ["PlainConvUNet", "SegResNet", "own, 3-D"])
def test_training_goes_where_torchs_goes(name):
    """50 steps: our loss is no further from the float64 run's than twice torch's, or the spread of such runs."""
    x = torch.randn(2, 1, 16, 16, 16)
    labels = (torch.nn.functional.avg_pool3d(x, 5, 1, 2)[:, 0] > 0).long()
    first = build(name, smooth=True)

    def losses(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        optimizer, found = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9), []
        for _ in range(50):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(x), labels)
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return torch.tensor(found, dtype=torch.float64)

    exact = losses(copy.deepcopy(first).double(), x.double())
    theirs = losses(copy.deepcopy(first), x)
    ours = losses(convoxel.accelerate(copy.deepcopy(first)), x)
    assert exact[-1] < 0.8 * exact[0]
    # Ten steps' rounding of a float32 loss; a wrong gradient shows in the second step.
    assert (ours - exact).abs().max() <= max(2 * (theirs - exact).abs().max(), 1e-5 * exact[0])


# All around it ------------------------------------------------------------------------------------


@pytest.fixture
def pair():
    network = networks.Own(3)
    return network, convoxel.accelerate(network), image("own, 3-D")


def test_in_place_and_twice():
    network = networks.Own(3)
    same = convoxel.accelerate(network, inplace=True)
    kinds = [type(m) for m in network.modules()]
    assert same is network and convoxel.accelerate(network, inplace=True) is network
    assert [type(m) for m in network.modules()] == kinds
    again = convoxel.accelerate(network)
    x = image("own, 3-D")
    assert again is not network and torch.equal(again.eval()(x), network.eval()(x))
    assert type(convoxel.restore(again)) is networks.Own and type(network) is not networks.Own


def test_copies_are_networks_of_their_own(pair):
    network, net, x = pair
    net.eval()
    y = net(x)
    for made in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), saved(net)):
        assert type(made) is type(net) and torch.equal(made(x), y)
        assert not {id(p) for p in made.parameters()} & {id(p) for p in net.parameters()}
        with torch.no_grad():
            made.head.weight.zero_()
        assert not torch.equal(made(x), y) and torch.equal(net(x), y)
    shallow = copy.copy(net)
    shallow._modules = dict(net._modules, head=nn.Identity())
    assert shallow(x).shape != y.shape and torch.equal(net(x), y)


def saved(net: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_a_changed_weight_is_seen(pair):
    network, net, x = pair
    net.eval()
    with torch.inference_mode():
        before = net(x)
    changes = [
        lambda w: w.data.mul_(2), lambda w: setattr(w, "data", w.data * 2), lambda w: w.detach().copy_(w * 2),
        lambda w: w.detach().numpy().__imul__(2),
    ]  # fmt: skip
    for change in changes:
        with torch.no_grad():
            change(net.first.weight)
            change(net.block[0].bn1.weight)
        with torch.inference_mode():
            after = net(x)
        assert not torch.allclose(before, after)
        torch.testing.assert_close(after, network.eval()(x), rtol=1e-3, atol=1e-4)
        before = after
    net.load_state_dict(networks.Own(3).state_dict())
    torch.testing.assert_close(net(x), network(x), rtol=1e-3, atol=1e-4)


def test_hooks_see_what_they_saw(pair):
    network, net, x = pair
    seen: dict[str, list] = {"network": [], "net": []}
    for which, model in (("network", network), ("net", net)):
        model.eval()
        for layer in (model.norm, model.act, model.block[0].bn2, model.last, model.block[1].relu):
            layer.register_forward_hook(lambda m, i, o, w=which: seen[w].append(o.detach().clone()))
        model.block[0].conv1.register_full_backward_hook(
            lambda m, i, o, w=which: seen[w].append(o[0].clone())
        )
        model.first.register_forward_pre_hook(lambda m, i: (i[0] * 2,))
        model(x).square().mean().backward()
    assert len(seen["net"]) == len(seen["network"]) == 7
    for a, b in zip(seen["net"], seen["network"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert convoxel.report(net).entries[0].state == "container"
    assert {e.state for e in convoxel.report(net).entries if e.name in ("norm", "act")} <= {
        "converted",
        "left",
    }


def test_hooks_that_were_there_before_stay(pair):
    network, _, x = pair
    calls = []
    network.norm.register_forward_hook(lambda *a: calls.append(a[0]))
    net = convoxel.accelerate(network)
    net(x)
    assert calls == [net.norm]


def test_autocast_accumulation_clipping_and_checkpointing(pair):
    from torch.utils.checkpoint import checkpoint

    network, net, x = pair
    results = []
    for model in (network, net):
        for p in model.parameters():
            p.grad = None
        for part in x.split(1):
            with torch.autocast("cpu", torch.bfloat16):
                y = model(part)
            assert y.dtype == torch.bfloat16
            y.float().square().mean().backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        results.append((norm, model.first.weight.grad.clone()))
    torch.testing.assert_close(*(r[0] for r in results), rtol=0.05, atol=0)
    plain, again = net(x), checkpoint(net, x, use_reentrant=False)
    torch.testing.assert_close(again, plain)
    grads = [torch.autograd.grad(y.square().sum(), list(net.parameters())) for y in (plain, again)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_functional_call_ema_and_inference_mode(pair):
    network, net, x = pair
    net.eval(), network.eval()
    double = {name: 2 * p for name, p in net.named_parameters()}
    torch.testing.assert_close(torch.func.functional_call(net, double, x),
                               torch.func.functional_call(network, double, x), rtol=1e-3, atol=1e-3)  # fmt: skip
    average = torch.optim.swa_utils.AveragedModel(
        net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
    )
    average.update_parameters(net)
    y = net(x)
    torch.testing.assert_close(average(x), y)
    with torch.no_grad():
        net.head.weight.zero_()
    average.update_parameters(net)
    assert not torch.allclose(average(x), y) and not torch.allclose(average(x), net(x))
    with torch.inference_mode():
        assert net(x).is_inference()


def test_compile_and_export(pair):
    network, net, x = pair
    net.eval()
    y = net(x)
    torch.testing.assert_close(
        torch.compile(net, fullgraph=True, backend="aot_eager")(x), y, rtol=1e-4, atol=1e-5
    )
    net.train()
    compiled = torch.compile(net, backend="aot_eager")
    want = torch.autograd.grad(net(x).square().sum(), net.head.weight)[0]
    got = torch.autograd.grad(compiled(x).square().sum(), net.head.weight)[0]
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    net.eval()
    exported = torch.export.export(net, (x,))
    assert any("convoxel" in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(x), net(x), rtol=1e-4, atol=1e-5)


def test_memory_format_of_the_input_is_that_of_the_output(pair):
    _, net, x = pair
    last = torch.channels_last_3d
    assert net(x).is_contiguous() and not net(x).is_contiguous(memory_format=last)
    y = net(torch.empty_like(x, memory_format=last).copy_(x).as_strided(x.shape, (32**3, 1, 32**2, 32, 1)))
    assert y.is_contiguous(memory_format=last)


def test_what_is_left_works_and_is_named():
    class Standardised(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) * 0

    net = nn.Sequential(
        Standardised(1, 4, 3), nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3)), nn.BatchNorm2d(4),
        nn.ReLU(), nn.utils.spectral_norm(nn.Conv2d(4, 4, 1)), nn.Upsample(scale_factor=2), nn.Softmax(1),
    )  # fmt: skip
    x = torch.randn(2, 1, 12, 12)
    made = convoxel.accelerate(net).eval()
    torch.testing.assert_close(made(x), net.eval()(x))
    why = {e.name: e.why for e in convoxel.report(made).of("left")}
    assert "subclass of Conv2d" in why["0"] and "parametrised" in why["1"] and "no such layer" in why["6"]
    assert type(made[0]) is Standardised and type(made[4]) is convoxel.nn.Conv2d


def test_replaced_forwards_and_scripts_are_left():
    net = nn.Sequential(nn.Sequential(nn.ReLU()), torch.jit.script(nn.ReLU()))
    net[0].forward = lambda x: x - 1
    made = convoxel.accelerate(net)
    assert torch.equal(made(torch.ones(2)), torch.zeros(2))
    assert ["replaced" in e.why for e in convoxel.report(made).of("left")][0]
    assert "torch.jit" in convoxel.report(made).entries[-1].why


@pytest.mark.parametrize("wrong", [None, "UNet", networks.Own, torch.ones(3)])
def test_no_module_is_refused(wrong):
    for function in (convoxel.accelerate, convoxel.restore, convoxel.report):
        with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, received"):
            function(wrong)


def test_monais_tensors_pass():
    data = pytest.importorskip("monai.data")
    network = build("BasicUNet").eval()
    x = data.MetaTensor(image("BasicUNet", 1), affine=2 * torch.eye(4))
    y = convoxel.accelerate(network)(x)
    assert isinstance(y, data.MetaTensor) and torch.equal(y.affine, x.affine)
    torch.testing.assert_close(y.as_tensor(), network(x).as_tensor(), rtol=1e-3, atol=1e-4)


def test_shared_lists_and_modules_stay_shared():
    shared = nn.Conv2d(1, 1, 1)
    net = nn.Sequential(shared, nn.Sequential(shared))
    net.notes = net[1].notes = [shared, {"first": net}]
    made = convoxel.accelerate(net)
    assert made[0] is made[1][0] and made.notes is made[1].notes
    assert made.notes[0] is made[0] is not shared and made.notes[1]["first"] is made
    assert net.notes[0] is shared and net.notes[1]["first"] is net


def test_two_processes_train_as_one(tmp_path):
    """DistributedDataParallel over gloo: the gradients are those of one process with the joined batch."""
    from child import python

    code = """
        import sys, torch, torch.distributed as dist, torch.multiprocessing as mp
        sys.path.insert(0, {tests!r})
        import networks, convoxel
        def run(rank, file):
            torch.set_num_threads(1)
            dist.init_process_group("gloo", init_method="file://" + file, rank=rank, world_size=2)
            torch.manual_seed(0)
            net = convoxel.accelerate(networks.build("own, 3-D")).eval()
            x = networks.image("own, 3-D")
            net(x).square().mean().backward()
            want = [p.grad.clone() for p in net.parameters() if p.grad is not None]
            net.zero_grad()
            ddp = torch.nn.parallel.DistributedDataParallel(net)
            ddp(x[rank:rank + 1]).square().mean().backward()
            got = [p.grad for p in net.parameters() if p.grad is not None]
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
            dist.destroy_process_group()
            open(file + str(rank), "w").write("equal")
        if __name__ == "__main__":
            mp.start_processes(run, ({file!r},), 2, start_method="fork")
    """
    python(code.format(tests=str(networks.__file__).rsplit("/", 1)[0], file=str(tmp_path / "meet")))
    assert [(tmp_path / f"meet{rank}").read_text() for rank in (0, 1)] == ["equal"] * 2
