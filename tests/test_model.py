"""Keras' verbs: the numbers of a plain torch loop, every kind of input, files, callbacks, clear errors."""

import doctest
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import convoxel
from convoxel import callbacks, checkpoint, losses, models, nn
from convoxel.callbacks import Callback, ModelCheckpoint
from convoxel.model import batches, progress


@pytest.fixture(autouse=True)
def one_thread():
    """These networks are too small to share: two threads would mostly wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def data():
    """60 images (1, 6, 6) whose class 0..2 is the brightest third of their rows: easily learnt."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 60)
    x = rng.normal(size=(60, 1, 6, 6)).astype(np.float32)
    for i, label in enumerate(y):
        x[i, 0, 2 * label : 2 * label + 2] += 2
    return x, y


def small(lazy: bool = False, seed: int = 0) -> convoxel.Sequential:
    torch.manual_seed(seed)
    first, last = (nn.LazyConv2d(4, 3), nn.LazyLinear(3)) if lazy else (nn.Conv2d(1, 4, 3), nn.Linear(64, 3))
    return convoxel.Sequential(first, nn.ReLU(), nn.Flatten(), last)


def compiled(model=None, optimizer="adam", loss="cross_entropy", metrics=("accuracy",)):
    model = small() if model is None else model
    model.compile(optimizer, loss, metrics)
    return model


def weights(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    "module",
    [convoxel.model, batches, callbacks, checkpoint, progress, convoxel.model.summary],
    ids=lambda m: m.__name__,
)
def test_the_examples_in_the_docstrings(module, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(module)
    assert result.attempted and not result.failed


def test_the_page_in_the_docs_runs(tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[1] / "docs" / "training.md").read_text()
    code = "\n".join(part.split("```")[0] for part in page.split("```python\n")[1:])
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(code, "docs/training.md", "exec"), names)
    assert names["history"].history["val_dice"][-1] > 0.85 and names["labels"].shape == (16, 16, 16)
    sparse = names["Sparse"](names["network"])
    sparse.compile("adam", "dice_ce", "dice")
    assert set(sparse.fit(names["x"], names["y"], verbose=0).history) == {"loss", "penalty", "dice"}


# -- training ----------------------------------------------------------------------------------------------


def test_fit_is_the_plain_torch_loop_bit_for_bit(data):
    x, y = data
    model, twin = compiled(), small()
    history = model.fit(x, y, batch_size=25, epochs=3, shuffle=False, verbose=0)

    optimizer = torch.optim.Adam(twin.parameters())
    xs, ys, losses_seen, right = torch.from_numpy(x), torch.from_numpy(y), [], 0
    for _ in range(3):
        total, right = 0.0, 0
        for part in (slice(0, 25), slice(25, 50), slice(50, 60)):
            output = twin(xs[part])
            loss = torch.nn.functional.cross_entropy(output, ys[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(ys[part])
            right += (output.argmax(1) == ys[part]).sum().item()
        losses_seen.append(total / 60)
    assert same(model.state_dict(), twin.state_dict())
    assert history.history["loss"] == pytest.approx(losses_seen, rel=1e-12)
    assert history.history["accuracy"][-1] == right / 60
    assert history.epoch == [0, 1, 2] and history is model.history


@pytest.mark.parametrize(
    "optimizer", ["adam", "adamw", "sgd", lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)]
)
def test_it_learns(data, optimizer):
    model = compiled(optimizer=optimizer)
    history = model.fit(*data, epochs=40, batch_size=8, verbose=0).history
    assert history["loss"][-1] < 0.6 * history["loss"][0]
    assert history["accuracy"][-1] > 0.85


def test_names_of_optimizers_are_torchs_classes_and_defaults(data):
    rates = {}
    for name in ("adam", "adamw", "sgd"):
        model = compiled(optimizer=name)
        assert model.optimizer is None

        class Check(Callback):
            def on_train_begin(self):
                assert self.model.optimizer is not None  # for whoever schedules its learning rate

        model.fit(*data, verbose=0, callbacks=[Check()])
        rates[type(model.optimizer)] = model.optimizer.param_groups[0]["lr"]
    assert rates == {torch.optim.Adam: 1e-3, torch.optim.AdamW: 1e-3, torch.optim.SGD: 1e-2}


def test_the_seed_decides_and_nothing_that_only_looks_does(data, tmp_path, capsys):
    x, y = data

    def run(seed, **options):
        model = compiled(small(lazy=True, seed=0))
        torch.manual_seed(seed)
        model.fit(x, y, epochs=2, batch_size=7, **{"verbose": 0, **options})
        return weights(model)

    first = run(1)
    assert same(first, run(1)) and not same(first, run(2))
    assert same(first, run(1, verbose=1, callbacks=[ModelCheckpoint(tmp_path / "a.safetensors")]))
    dataset = TensorDataset(torch.from_numpy(x), torch.from_numpy(y))
    assert same(first, run(1, validation_data=(x, y)))
    assert same(first, run(1, validation_data=dataset))


def test_shuffle_sees_every_sample_once_per_epoch_in_a_new_order(data):
    torch.manual_seed(0)
    epochs = []

    class Spy(convoxel.Sequential):
        def train_step(self, x, y):
            epochs[-1] += x[:, 0, 0, 0].tolist()
            return super().train_step(x, y)

    class NewEpoch(Callback):
        def on_epoch_begin(self, epoch):
            epochs.append([])

    model = compiled(Spy(nn.Flatten(), nn.Linear(36, 3)))
    model.fit(*data, epochs=3, batch_size=7, verbose=0, callbacks=NewEpoch())
    order = data[0][:, 0, 0, 0].tolist()
    assert all(sorted(e) == sorted(order) and e != order for e in epochs) and epochs[0] != epochs[1]


def test_a_second_fit_goes_on_and_a_second_compile_starts_again(data):
    x, y = data
    twice, once = compiled(), compiled()
    twice.fit(x, y, epochs=2, shuffle=False, verbose=0)
    optimizer = twice.optimizer
    twice.fit(x, y, epochs=2, shuffle=False, verbose=0)
    once.fit(x, y, epochs=4, shuffle=False, verbose=0)
    assert same(twice.state_dict(), once.state_dict()) and twice.optimizer is optimizer
    compiled(twice).fit(x, y, verbose=0)
    assert twice.optimizer is not optimizer


def test_means_weigh_the_smaller_last_batch_rightly(data):
    x, y = data
    model = compiled(small().double(), metrics=["accuracy", torch.nn.functional.cross_entropy])
    whole = torch.nn.functional.cross_entropy(model(torch.from_numpy(x).double()), torch.from_numpy(y)).item()
    for size in (7, 25, 60, 100):
        result = model.evaluate(x, y, batch_size=size, verbose=0)
        assert list(result) == ["loss", "accuracy", "cross_entropy"]
        assert result["loss"] == pytest.approx(whole, rel=1e-12)
        assert result["cross_entropy"] == pytest.approx(whole, rel=1e-12)
    assert result["accuracy"] == np.mean(model.predict(x).argmax(1) == y)


def test_validation_is_evaluate(data):
    x, y = data
    model = compiled(metrics=["accuracy", "iou"])
    history = model.fit(x[:40], y[:40], epochs=2, verbose=0, validation_data=(x[40:], y[40:])).history
    assert list(history) == ["loss", "accuracy", "iou", "val_loss", "val_accuracy", "val_iou"]
    result = model.evaluate(x[40:], y[40:], verbose=0)
    assert {f"val_{k}": v for k, v in result.items()} == {k: history[k][-1] for k in list(history)[3:]}


def test_frozen_parameters_stay(data):
    model = small()
    model[0].weight.requires_grad_(False)
    before = weights(model)
    compiled(model).fit(*data, verbose=0)
    assert torch.equal(before["0.weight"], model[0].weight)
    assert not torch.equal(before["3.weight"], model[3].weight)


# -- inputs ------------------------------------------------------------------------------------------------


class Pairs:
    """A loader of one's own: yields batches, has no length."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __iter__(self):
        for i in range(0, 60, 16):
            yield self.x[i : i + 16], self.y[i : i + 16]


class Stream(IterableDataset):
    def __init__(self, x, y):
        self.x, self.y = x, y

    def __iter__(self):
        return iter(zip(self.x, self.y, strict=True))


INPUTS = {
    "tensors": lambda x, y: (torch.from_numpy(x), torch.from_numpy(y)),
    "float64 and int32": lambda x, y: (x.astype(np.float64), y.astype(np.int32)),
    "big-endian": lambda x, y: (x.astype(">f4"), y.astype(">i2")),
    "strided": lambda x, y: (np.asfortranarray(x), y[::-1].copy()[::-1]),
    "uint16 labels": lambda x, y: (x, y.astype(np.uint16)),
    "dataset": lambda x, y: (TensorDataset(torch.from_numpy(x), torch.from_numpy(y)),),
    "dataset of numpy and int": lambda x, y: (list_dataset([(x[i], int(y[i])) for i in range(60)]),),
    "iterable dataset": lambda x, y: (Stream(x, y),),
    "loader": lambda x, y: (DataLoader(TensorDataset(torch.from_numpy(x), torch.from_numpy(y)), 16),),
    "list of pairs": lambda x, y: ([(x[i : i + 16], y[i : i + 16]) for i in range(0, 60, 16)],),
    "own loader": lambda x, y: (Pairs(x, y),),
}


def list_dataset(samples):
    class Listed(Dataset):
        def __len__(self):
            return len(samples)

        def __getitem__(self, i):
            return samples[i]

    return Listed()


@pytest.mark.parametrize("kind", INPUTS)
def test_every_kind_of_input_gives_the_same_numbers(data, kind):
    reference, model = compiled(), compiled()
    reference.fit(*data, batch_size=16, epochs=2, shuffle=False, verbose=0)
    given = INPUTS[kind](*data)
    own_batches = len(given) == 1 and not isinstance(given[0], Dataset)
    size = {} if own_batches else {"batch_size": 16}
    model.fit(*given, **size, epochs=2, shuffle=False, verbose=0)
    assert same(reference.state_dict(), model.state_dict())
    assert model.history.history == reference.history.history
    assert model.evaluate(*given, **size, verbose=0) == reference.evaluate(*data, batch_size=16, verbose=0)
    predicted = model.predict(given[0], **size)
    np.testing.assert_array_equal(np.asarray(predicted), reference.predict(data[0], batch_size=16))


def test_a_read_only_memory_map_is_read_batch_by_batch(data, tmp_path):
    x, y = data
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    a, b = compiled(), compiled()
    a.fit(mapped, y, shuffle=False, verbose=0)
    b.fit(x, y, shuffle=False, verbose=0)
    assert same(a.state_dict(), b.state_dict())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_go_to_the_device_of_the_network(data, tmp_path):
    model = compiled(small(lazy=True).cuda(), metrics=["accuracy", "dice"])
    assert model.fit(*data, epochs=40, batch_size=8, verbose=0).history["accuracy"][-1] > 0.85
    assert model.evaluate(*data, verbose=0)["dice"] > 0.8 and isinstance(model.predict(data[0]), np.ndarray)
    model.save(tmp_path / "gpu.safetensors")
    on_cpu = small().load(tmp_path / "gpu.safetensors")
    np.testing.assert_allclose(on_cpu.predict(data[0]), model.predict(data[0]), atol=1e-2)


def test_predict_gives_what_it_was_given(data):
    x, _ = data
    model = small()  # predict needs no compile
    expected = model(torch.from_numpy(x)).detach().numpy()
    assert isinstance(model.predict(x, batch_size=9), np.ndarray)
    np.testing.assert_allclose(model.predict(x, batch_size=9), expected, atol=1e-6)
    tensor = model.predict(torch.from_numpy(x))
    assert isinstance(tensor, torch.Tensor) and not tensor.requires_grad
    only_x = DataLoader(torch.from_numpy(x), 16)
    np.testing.assert_allclose(model.predict(only_x).numpy(), expected, atol=1e-6)


def test_samples_of_different_sizes():
    """A batch may have another size than the one before; one batch of several sizes is refused in words."""
    torch.manual_seed(0)
    sizes = [(8, 8), (12, 8), (8, 16)]
    samples = [(torch.randn(1, *s), torch.randint(0, 2, s)) for s in sizes]
    model = convoxel.Model(models.UNet(2, 1, 2, features=(4, 8)))
    model.compile("adam", "dice_ce", ["dice", "accuracy"])
    for given in (list_dataset(samples), DataLoader(list_dataset(samples), 1)):
        size = {"batch_size": 1} if isinstance(given, Dataset) else {}
        assert math.isfinite(model.fit(given, **size, verbose=0).history["dice"][0])
        predicted = model.predict(given, **size)
        assert [tuple(p.shape) for p in predicted] == [(2, *s) for s in sizes]
    hits = sum((p.argmax(0) == y).sum().item() for p, (_, y) in zip(predicted, samples, strict=True))
    result = model.evaluate(given, verbose=0)
    assert result["accuracy"] == hits / sum(h * w for h, w in sizes)
    with pytest.raises(ValueError, match=r"one shape, received \[\(1, 8, 8\), \(1, 12, 8\)\].*batch_size=1"):
        model.fit(list_dataset(samples), batch_size=2, shuffle=False, verbose=0)


def test_deep_supervision_trains_by_name_and_predicts_one_output():
    torch.manual_seed(0)
    x = torch.randn(8, 1, 8, 8)
    y = (x[:, 0] > 0).long()
    model = convoxel.Model(models.UNet(2, 1, 2, features=(4, 8, 8), deep_supervision=True))
    model.compile(lambda p: torch.optim.Adam(p, lr=1e-2), "dice_ce", ["dice"])
    history = model.fit(x, y, epochs=15, batch_size=4, verbose=0).history
    assert history["dice"][-1] > 0.9 and model.predict(x).shape == (8, 2, 8, 8)

    model.compile("adam", nn.CrossEntropyLoss())
    with pytest.raises(TypeError, match="returned 2 outputs .*CrossEntropyLoss takes one; .*DeepSupervision"):
        model.fit(x, y, verbose=0)
    model.compile("adam", losses.DeepSupervision(nn.CrossEntropyLoss()))
    assert len(model.fit(x, y, verbose=0).history["loss"]) == 1


@pytest.mark.parametrize(
    "loss, last",
    [("binary_cross_entropy", [nn.Sigmoid()]), ("binary_cross_entropy_with_logits", []), ("dice", [])],
)
def test_one_channel_is_cut_where_the_loss_says(loss, last):
    """A probability at 0.5, a logit at 0: the metric knows it from the loss."""
    torch.manual_seed(0)
    x = torch.randn(16, 1, 6, 6)
    y = (x[:, 0] > 0).long()
    model = convoxel.Sequential(nn.Conv2d(1, 1, 1, bias=False), *last)
    nn.init.constant_(model[0].weight, 0.3)
    model.compile("sgd", loss, ["accuracy", "dice"])
    assert model.evaluate(x, y, verbose=0) == pytest.approx(
        {"loss": pytest.approx(0.6, abs=0.3), "accuracy": 1, "dice": 1}
    )


# -- lazy layers, modes, steps -------------------------------------------------------------------------------


@pytest.mark.parametrize("by_name", [True, False])
def test_lazy_layers_learn_their_sizes_and_the_optimizer_keeps_them(data, by_name):
    model = small(lazy=True)
    with pytest.raises(ValueError, match="lazy layers have no size yet"):
        model.summary()
    model.compile("adam" if by_name else torch.optim.Adam(model.parameters()), "cross_entropy")
    torch.manual_seed(5)
    model.fit(*data, epochs=2, shuffle=False, verbose=0)

    torch.manual_seed(5)
    twin = compiled(small(lazy=True))
    torch.manual_seed(5)
    twin(torch.zeros(1, 1, 6, 6))
    start = weights(twin)
    twin.fit(*data, epochs=2, shuffle=False, verbose=0)
    assert same(model.state_dict(), twin.state_dict())
    assert not any(torch.equal(start[k], v) for k, v in model.state_dict().items())
    assert model[0].in_channels == 1 and model.count_params() == 4 * 9 + 4 + 64 * 3 + 3


def test_lazy_batch_norm_is_not_moved_by_looking():
    model = convoxel.Sequential(nn.LazyConv2d(3, 1), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(2))
    model.summary((1, 4, 4), print_fn=lambda text: None)
    assert torch.equal(model[1].running_mean, torch.zeros(3)) and model[1].num_batches_tracked == 0


def test_a_lazy_layer_that_evaluation_never_reaches_is_named():
    class Branch(convoxel.Model):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.LazyLinear(2), nn.LazyLinear(2)

        def forward(self, x):
            return self.a(x) + (self.b(x) if self.training else 0)

    with pytest.raises(ValueError, match="b.weight, b.bias got no size .*call the network once"):
        compiled(Branch()).fit(np.zeros((4, 3), np.float32), np.zeros(4, int), verbose=0)


@pytest.mark.parametrize("flag", [True, False])
def test_every_layers_mode_is_put_back_even_after_an_error(data, flag):
    x, y = data
    model = compiled(
        convoxel.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 3))
    )
    model.train(flag)
    model[1].eval()
    seen = []
    model[1].register_forward_hook(lambda layer, *_: seen.append(layer.training))
    calls = {
        "fit": (lambda: model.fit(x, y, batch_size=60, validation_data=(x, y), verbose=0), [True, False]),
        "evaluate": (lambda: model.evaluate(x, y, batch_size=60, verbose=0), [False]),
        "predict": (lambda: model.predict(x, batch_size=60), [False]),
        "error": (lambda: pytest.raises(ValueError, model.fit, x, y + 1, batch_size=60, verbose=0), [True]),
    }
    for call, modes in calls.values():
        seen.clear()
        call()
        assert seen == modes
        assert model.training == model[0].training == flag and not model[1].training


def test_steps_can_be_overridden(data):
    class Regularised(convoxel.Sequential):
        def train_step(self, x, y):
            output = self(x)
            penalty = self[0].weight.square().sum()
            self.apply_gradients(self.compute_loss(output, y) + penalty)
            self.update_metrics(output, y)
            return {"loss": self.compute_loss(output, y), "penalty": penalty, "samples": len(x)}

        def test_step(self, x, y):
            return {"loss": torch.tensor(7.0)}

        def predict_step(self, x):
            return self(x).softmax(1)

    model = compiled(Regularised(*small()), optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    history = model.fit(*data, epochs=5, batch_size=25, verbose=0).history
    assert history["penalty"][-1] < 0.5 * history["penalty"][0] and history["accuracy"][-1] > 0
    assert history["samples"][0] == pytest.approx((25 * 25 * 2 + 10 * 10) / 60)
    assert model.evaluate(*data, verbose=0)["loss"] == 7
    np.testing.assert_allclose(model.predict(data[0]).sum(1), 1, rtol=1e-6)


def test_a_model_can_be_subclassed_as_in_keras(data):
    class Net(convoxel.Model):
        def __init__(self):
            super().__init__()
            self.flatten, self.layer = nn.Flatten(), nn.Linear(36, 3)

        def forward(self, x):
            return self.layer(self.flatten(x))

    model = compiled(Net())
    assert set(model.state_dict()) == {"layer.weight", "layer.bias"}
    assert model.fit(*data, epochs=20, verbose=0).history["accuracy"][-1] > 0.8


# -- compile -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_place", [True, False])
def test_torchs_own_compile_is_still_there_and_fit_uses_it(data, in_place):
    ran = []

    def backend(graph, inputs):
        ran.append(len(inputs))
        return graph.forward

    torch._dynamo.reset()
    network, twin = small(), small()
    model = convoxel.Model(network if in_place else torch.compile(network, backend=backend))
    if in_place:
        torch.nn.Module.compile(model, backend=backend)
    compiled(model).fit(*data, shuffle=False, verbose=0)
    compiled(twin).fit(*data, shuffle=False, verbose=0)
    assert ran and same(network.state_dict(), twin.state_dict())


def test_a_loss_with_weights_is_no_part_of_the_network(data):
    model = compiled(loss=nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0])))
    model.fit(*data, verbose=0)
    assert set(model.state_dict()) == {"0.weight", "0.bias", "3.weight", "3.bias"}
    assert isinstance(model.loss, nn.CrossEntropyLoss) and len(list(model.modules())) == 5


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (("adamm", "dice"), ValueError, "unknown optimizer 'adamm'; expected adam, adamw, sgd"),
        (("adam", "dyce"), ValueError, "unknown loss 'dyce'; expected one of cross_entropy"),
        (("adam", "dice", ["precision"]), ValueError, "unknown metric 'precision'"),
        ((3, "dice"), TypeError, "optimizer must be a name .*received int"),
        ((), TypeError, "needs an optimizer and a loss.*torch.compile"),
        (("adam",), TypeError, "needs an optimizer and a loss"),
    ],
)
def test_what_compile_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        small().compile(*arguments)


def test_torchs_arguments_to_compile_are_explained():
    with pytest.raises(TypeError, match="torch.compile"):
        small().compile(fullgraph=True)


@pytest.mark.parametrize(
    "last, loss",
    [(nn.Softmax(1), "cross_entropy"), (nn.Softmax(1), nn.CrossEntropyLoss()), (nn.Sigmoid(), "dice")],
)
def test_no_softmax_twice(last, loss):
    with pytest.raises(ValueError, match="takes logits .*remove the last layer"):
        convoxel.Sequential(nn.Linear(2, 2), last).compile("adam", loss)


# -- bad input -----------------------------------------------------------------------------------------------

X, Y = np.zeros((4, 1, 6, 6), np.float32), np.zeros(4, int)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda m: m.fit(X, Y[:3]), ValueError, r"x and y differ in length: x \(4, 1, 6, 6\) and y \(3,\)"),
        (lambda m: m.evaluate(X, Y[:3]), ValueError, "x and y differ in length"),
        (lambda m: m.fit(X), ValueError, "y is missing"),
        (lambda m: m.fit(X[:0], Y[:0]), ValueError, "x holds no samples"),
        (lambda m: m.fit(X[:, 0, 0, 0], Y), ValueError, r"x must be \(N, C, ...\), received shape \(4,\)"),
        (lambda m: m.fit(X[:, 0], Y), ValueError, r"Conv2d needs x of shape \(N, C, H, W\).*x\[:, None\]"),
        (lambda m: m.predict(X[:, 0]), ValueError, r"Conv2d needs x of shape \(N, C, H, W\)"),
        (lambda m: m.fit(X, list(Y)), TypeError, "y must be a numpy array or a torch tensor, received list"),
        (lambda m: m.fit(X, Y + 3), ValueError, "labels must be in 0..2 .*received values from 3 to 3"),
        (lambda m: m.fit(X, Y - 1), ValueError, "received values from -1 to -1"),
        (lambda m: m.fit(X, Y.astype(float)), TypeError, "labels must be integers"),
        (
            lambda m: m.fit(X, np.zeros((4, 6, 6), int)),
            ValueError,
            r"labels of shape \(4,\), received \(4, 6, 6\)",
        ),
        (
            lambda m: m.fit(X.astype(np.uint8), Y),
            TypeError,
            r"x must be floating point .*uint8.*astype\('float32'\)",
        ),
        (lambda m: m.predict(X.astype(int)), TypeError, "x must be floating point"),
        (lambda m: m.fit(X.astype(object), Y), TypeError, "array of numbers, received dtype object"),
        (lambda m: m.fit(X, Y, epochs=0), ValueError, "epochs must be .*received 0"),
        (lambda m: m.fit(X, Y, batch_size=0), ValueError, "batch_size must be .*received 0"),
        (lambda m: m.fit(X, Y, verbose=3), ValueError, "verbose must be 0 .*received 3"),
        (
            lambda m: m.fit([(X, Y)], batch_size=2),
            ValueError,
            "batch_size is for arrays and datasets; this list",
        ),
        (lambda m: m.fit([(X, Y)], Y), ValueError, "y goes with an array x; a list must yield"),
        (lambda m: m.fit(7), TypeError, "expected arrays .*received int"),
        (lambda m: m.fit({"x": X}), TypeError, "expected arrays .*received dict"),
        (
            lambda m: m.fit([{"x": X, "y": Y}]),
            TypeError,
            r"must be a pair \(x, y\), received a dict; .*collate_fn",
        ),
        (lambda m: m.fit([(X, Y, Y)]), TypeError, "received a tuple of 3"),
        (lambda m: m.fit([(X, Y[:2])]), ValueError, "x and y of a batch differ in length"),
        (lambda m: m.fit([([X], Y)]), TypeError, "expected a torch tensor or a numpy array, received list"),
        (lambda m: m.fit([]), ValueError, "the data gave no batch"),
        (lambda m: m.predict([]), ValueError, "nothing to predict"),
        (lambda m: m.fit(iter([(X, Y)]), epochs=2), ValueError, "the data gave no batch; a generator"),
        (lambda m: m.fit(X, Y, validation_data=(X, Y, Y)), ValueError, r"validation_data must be \(x, y\)"),
        (lambda m: m.fit(X, Y, validation_data=(X, Y[:1])), ValueError, "x and y differ in length"),
    ],
)
def test_bad_input_gets_one_clear_message(call, error, message):
    model = compiled()
    before = weights(model)
    with pytest.raises(error, match=message):
        call(model)
    if "generator" not in message:
        assert same(before, model.state_dict())


@pytest.mark.parametrize("verb", ["fit", "evaluate"])
def test_an_uncompiled_model_says_so(verb):
    with pytest.raises(ValueError, match=f"{verb} needs a compiled model; call compile"):
        getattr(small(), verb)(X, Y)


@pytest.mark.parametrize("bad", [None, 3, "unet", lambda x: x])
def test_model_wants_a_module(bad):
    with pytest.raises(TypeError, match="Model expects a torch module, received"):
        convoxel.Model(bad)


def test_a_layer_added_after_the_optimizer_was_made_is_not_forgotten(data):
    model = compiled()
    model.fit(*data, verbose=0)
    model.append(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="does not hold this network's parameters.*call compile again"):
        model.fit(*data, verbose=0)
    other = compiled(optimizer=torch.optim.Adam(small().parameters()))
    with pytest.raises(ValueError, match="does not hold this network's parameters"):
        other.fit(*data, verbose=0)


def test_a_loss_must_be_one_number(data):
    with pytest.raises(ValueError, match=r"the loss must be one number.*received \(32,\)"):
        compiled(loss=nn.CrossEntropyLoss(reduction="none")).fit(*data, verbose=0)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_before_it_changes_a_weight(data, poison):
    x, y = data
    model = compiled(loss=lambda output, y: output.sum() * (poison if (y == 9).any() else 1), metrics=())
    model.fit(x, y, batch_size=20, verbose=0)
    before = weights(model)
    bad = [(x[:20], y[:20] * 0 + 9)]
    with pytest.raises(
        FloatingPointError, match=r"the loss is .* at epoch 1/2, batch 1; .*before this step .*nan"
    ):
        model.fit(bad, epochs=2, verbose=0)
    assert same(before, model.state_dict())
    assert not math.isfinite(model.evaluate(bad, verbose=0)["loss"])  # evaluate reports what is


# -- what is shown -------------------------------------------------------------------------------------------


def test_summary_is_a_table_of_layers_shapes_and_parameters():
    text: list[str] = []
    model = convoxel.Model(models.UNet(2, 1, 3, features=(4, 8), norm="batch", convs=1))
    model.summary((1, 8, 8), print_fn=text.append)
    rows = {line.split()[0]: line.split() for line in text[0].splitlines() if not line.startswith("-")}
    assert rows["module.encoder.1.0.0"] == [
        "module.encoder.1.0.0",
        "(Conv2d)",
        "(N,",
        "8,",
        "4,",
        "4)",
        "288",
    ]
    assert rows["module.up.0"][-1] == str(8 * 4 * 4 + 4) and rows["module.heads.0"][2:5] == [
        "(N,",
        "3,",
        "8,",
    ]
    total = sum(p.numel() for p in model.parameters())
    assert rows["total"][-1] == rows["trainable"][-1] == f"{total:,}" == f"{model.count_params():,}"


def test_summary_counts_shared_parameters_once_and_frozen_ones_apart():
    layer = nn.Linear(4, 4, bias=False)
    other = nn.Linear(4, 4)
    other.weight = layer.weight
    other.bias.requires_grad_(False)
    text: list[str] = []
    convoxel.Sequential(layer, other).summary(print_fn=text.append)
    assert [line.split()[-1] for line in text[0].splitlines() if line[0] != "-"][1:] == [
        "16",
        "4",
        "20",
        "16",
    ]


def test_progress_and_lines(data, capsys):
    model = compiled()
    model.fit(*data, epochs=2, batch_size=20, validation_data=data)
    bar = capsys.readouterr()
    assert not bar.out and "epoch 2/2: 100%" in bar.err and "3/3" in bar.err
    final = bar.err.replace("\r", "\n").strip().splitlines()[-1]
    assert all(f"{name} " in final for name in ("loss", "accuracy", "val_loss", "val_accuracy"))
    model.fit(*data, epochs=2, verbose=2)
    lines = capsys.readouterr()
    history = model.history.history
    assert not lines.err
    assert lines.out.splitlines() == [
        f"epoch {i + 1}/2: loss {history['loss'][i]:.4g}, accuracy {history['accuracy'][i]:.4g}"
        for i in (0, 1)
    ]
    model.fit(*data, verbose=0)
    model.evaluate(*data, verbose=0)
    assert capsys.readouterr() == ("", "")


def test_without_tqdm_the_bar_says_what_to_install_and_silence_works(data, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    model = compiled()
    with pytest.raises(ImportError, match=r'pip install "convoxel\[train\]", or verbose=0'):
        model.fit(*data)
    assert len(model.fit(*data, verbose=0).history["loss"]) == 1
