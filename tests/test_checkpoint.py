"""Files of weights: what comes back, what is refused, and what a crash leaves behind."""

import copy
import errno
import json
import os
import pickle
import sys
from pathlib import Path

import pytest
import torch

import convoxel
from convoxel import checkpoint, models, nn

safetensors = pytest.importorskip("safetensors.torch")
CONFIG = dict(rank=2, in_channels=1, out_channels=2, features=(4, 8), norm="batch")
X = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def unet(**changes) -> convoxel.Model:
    torch.manual_seed(0)
    model = convoxel.Model(models.UNet(**{**CONFIG, **changes}))
    model(X)  # moves the running statistics off their start
    return model.eval()


@pytest.fixture(autouse=True)
def one_thread():
    """These networks are too small to share: two threads would mostly wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "model.safetensors"


def write_raw(path, tensors, architecture=None, **metadata):
    text = architecture if isinstance(architecture, str) else json.dumps(architecture)
    safetensors.save_file(tensors, path, metadata={"architecture": text, **metadata})


def test_a_registered_network_comes_back_from_its_file_alone(path):
    model = unet(deep_supervision=True, kernel_size=((1, 3), 3), strides=(1, (2, 1)))
    model.save(path)
    state = torch.random.get_rng_state()
    loaded = convoxel.Model.load(path)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert models.config_of(loaded.module) == models.config_of(model.module)
    assert loaded.training and all(p.requires_grad and p.device.type == "cpu" for p in loaded.parameters())
    assert torch.equal(loaded.eval()(X), model(X))
    loaded.compile("adam", "dice_ce")
    assert len(loaded.fit(X, X[:, 0].gt(0).long(), verbose=0).history["loss"]) == 1


def test_load_on_an_instance_fills_it(path):
    model = convoxel.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2))
    model(X)
    model.save(path)
    twin = convoxel.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(2))
    assert twin.load(path) is twin
    assert torch.equal(twin.eval()(X), model.eval()(X))
    optimizer_keeps = list(model.parameters())
    model.load(path)
    assert all(a is b for a, b in zip(optimizer_keeps, model.parameters(), strict=True))
    with pytest.raises(ValueError, match="Sequential.load cannot know the layers"):
        convoxel.Sequential.load(path)
    with pytest.raises(ValueError, match="holds weights only .*Model\\(network\\).load"):
        convoxel.Model.load(path)


def test_the_keys_of_a_model_are_its_modules_own(path):
    model = unet()
    assert list(model.state_dict()) == list(model.module.state_dict())
    model.save(path)
    assert set(safetensors.load_file(path)) == set(model.module.state_dict())
    bare = models.UNet(**CONFIG)
    bare.load_state_dict(model.state_dict())
    model.load_state_dict(bare.state_dict())
    bare.load_state_dict(safetensors.load_file(path))

    parent = nn.Sequential(unet(), nn.ReLU(), convoxel.Model(nn.Linear(2, 2)))
    assert "0.heads.0.weight" in parent.state_dict() and "2.weight" in parent.state_dict()
    other = nn.Sequential(convoxel.Model(models.UNet(**CONFIG)), nn.ReLU(), convoxel.Model(nn.Linear(2, 2)))
    other.load_state_dict(parent.state_dict())
    assert torch.equal(other[2].module.weight, parent[2].module.weight)
    inner = convoxel.Model(nn.ModuleDict({"module": nn.Linear(2, 2)}))
    assert set(inner.state_dict()) == {"module.weight", "module.bias"}
    inner.load_state_dict(inner.state_dict())


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_of_a_model_keep_the_keys_and_train_apart(clone):
    model = unet()
    model.compile("adam", "cross_entropy")
    y = X[:, 0].gt(0).long()
    model.fit(X, y, verbose=0)
    twin = clone(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert list(twin.state_dict()) == list(before)
    twin.load_state_dict(before)
    twin.fit(X, y, verbose=0)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not torch.equal(twin.module.heads[0].weight, model.module.heads[0].weight)


def test_a_wrapper_with_layers_of_its_own_keeps_torchs_keys(path):
    class WithHead(convoxel.Model):
        def __init__(self):
            super().__init__(nn.Linear(2, 2))
            self.head = nn.Linear(2, 1)

    model = WithHead()
    assert set(model.state_dict()) == {"module.weight", "module.bias", "head.weight", "head.bias"}
    model.save(path)
    assert torch.equal(WithHead().load(path).head.weight, model.head.weight)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.to(memory_format=torch.channels_last),
        lambda m: m.double(),
        lambda m: m.bfloat16(),
    ],
    ids=["channels-last", "float64", "bfloat16"],
)
def test_strides_and_dtypes(path, change):
    model = change(unet())
    model.save(path)
    loaded = convoxel.Model.load(path)
    for key, value in model.state_dict().items():
        assert loaded.state_dict()[key].dtype == value.dtype and torch.equal(loaded.state_dict()[key], value)


def test_tied_weights(path):
    def tied():
        model = convoxel.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        model[1].weight = model[0].weight
        return model

    model = tied()
    model.save(path)
    assert torch.equal(tied().load(path)[1].weight, model[0].weight)


def test_a_network_of_ones_own_once_registered(path, monkeypatch):
    class Pool(nn.Module):
        def __init__(self, size):
            super().__init__()
            self.config = {"size": tuple(size)}
            self.pool, self.layer = nn.AvgPool2d(tuple(size)), nn.Conv2d(1, 1, 1)

        def forward(self, x):
            return self.layer(self.pool(x))

    monkeypatch.setattr(models, "NETWORKS", dict(models.NETWORKS))
    models.register("pool", Pool)
    model = convoxel.Model(models.create("pool", size=(2, 4)))
    model.save(path)
    assert torch.equal(convoxel.Model.load(path)(X), model(X))
    model.load(path)  # a tuple here, a list in the file: the same architecture


# -- what is refused -----------------------------------------------------------------------------------------


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("it-exploded",)


def damaged(path, kind):
    unet().save(path)
    whole = path.read_bytes()
    if kind == "pickle":
        torch.save({"weights": Bomb()}, path)
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "header size":
        path.write_bytes((2**62).to_bytes(8, "little") + whole[8:])
    else:
        path.write_bytes(whole[: int(len(whole) * float(kind))])


@pytest.mark.parametrize("kind", ["pickle", "empty", "header size", "0.1", "0.5", "0.999"])
@pytest.mark.parametrize("load", [convoxel.Model.load, lambda path: unet().load(path)], ids=["build", "fill"])
def test_a_damaged_or_foreign_file_is_refused_and_nothing_runs(path, kind, load, monkeypatch):
    monkeypatch.chdir(path.parent)
    damaged(path, kind)
    with pytest.raises(ValueError, match="is no whole safetensors checkpoint"):
        load(path)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_missing_file(path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at .*model.safetensors"):
        convoxel.Model.load(path)


@pytest.mark.parametrize(
    "architecture, message",
    [
        ({"name": "os.system", "config": {}}, "unknown network 'os.system'"),
        ({"name": "unet", "config": {"rank": 2, "shell": "ls"}}, "unet: .*'shell'|unet: missing"),
        ({"name": "unet", "config": {**CONFIG, "rank": 9}}, "rank: expected 2"),
        (
            {"name": "unet", "config": {**CONFIG, "features": [4, 10**6]}},
            "does not fit this network; of another shape",
        ),
        ({"name": "unet", "config": {**CONFIG, "features": "many"}}, "features: "),
        ({"name": "unet", "config": [1]}, "must be a name and a config"),
        (["unet"], "must be a name and a config"),
        ("{", "is no whole safetensors checkpoint"),
    ],
)
def test_an_architecture_that_is_not_what_it_says(path, architecture, message):
    """The 10^6 features would take 4 GB if the header were believed before the weights were looked at."""
    write_raw(path, dict(unet().state_dict()), architecture)
    with pytest.raises(ValueError, match=message):
        convoxel.Model.load(path)


def test_a_file_of_the_future(path):
    write_raw(path, {"weight": torch.zeros(1)}, None, format="convoxel-9")
    with pytest.raises(ValueError, match="has the format convoxel-9, this convoxel reads convoxel-1"):
        convoxel.Sequential(nn.Linear(1, 1)).load(path)


def test_what_does_not_fit_changes_nothing(path):
    model = convoxel.Sequential(nn.Linear(2, 2), nn.Linear(2, 3))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    write_raw(path, {"0.weight": torch.ones(2, 2), "1.weight": torch.ones(2, 2), "2.bias": torch.ones(1)})
    with pytest.raises(
        ValueError, match=r"missing: 0.bias, 1.bias; not expected: 2.bias; of another shape: 1.weight"
    ):
        model.load(path)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_weights_of_another_architecture_of_the_same_shapes_are_refused(path):
    unet(activation="relu").save(path)
    with pytest.raises(ValueError, match="another architecture: expected .*leaky_relu.* received .*'relu'"):
        unet(activation="leaky_relu").load(path)


def test_what_cannot_be_saved(path):
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"a": 1}

    with pytest.raises(ValueError, match="_extra_state is a dict: a checkpoint holds tensors only"):
        convoxel.Sequential(Extra(1, 1)).save(path)
    with pytest.raises(ValueError, match="0.weight has no shape yet; run the network on one batch"):
        convoxel.Sequential(nn.LazyLinear(1)).save(path)
    assert not list(path.parent.iterdir())


def test_without_safetensors_the_message_says_what_to_install(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r'pip install "convoxel\[train\]"'):
        unet().save(path)


# -- a crash while writing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_whole(path, step, monkeypatch):
    old = unet()
    old.save(path)
    whole = path.read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    def half_then_full(file):
        file.write(whole[:100])
        full()

    with pytest.raises(OSError, match="No space left"):
        if step == "write":
            checkpoint.replace_atomically(path, half_then_full)
        else:
            monkeypatch.setattr(os, step, full)
            unet(features=(8, 16)).save(path)
    monkeypatch.undo()
    assert path.read_bytes() == whole and [p.name for p in path.parent.iterdir()] == [path.name]


def test_the_file_is_on_the_disk_before_it_gets_its_name(path, monkeypatch):
    done = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, _real=real, _name=name: (done.append(_name), _real(*a))[1])
    unet().save(path)
    assert done == ["fsync", "replace", "fsync"]  # the file, its name, the folder


def test_what_a_kill_left_beside_is_replaced(path):
    (path.parent / f".{path.name}.tmp").write_bytes(b"half a file")
    model = unet()
    model.save(path)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert torch.equal(convoxel.Model.load(path).eval()(X), model(X))


def test_permissions_are_those_of_any_new_file(path):
    unet().save(path)
    plain = path.with_name("plain")
    plain.write_text("x")
    assert path.stat().st_mode == plain.stat().st_mode
