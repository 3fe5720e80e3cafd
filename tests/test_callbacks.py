"""Callbacks: what they watch, when they act, what is on the disk afterwards."""

import csv
import math

import numpy as np
import pytest
import torch

import convoxel
from convoxel import nn
from convoxel.callbacks import Callback, CSVLogger, EarlyStopping, ModelCheckpoint

X, Y = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32), np.arange(8) % 2


class Scripted(convoxel.Sequential):
    """Validation values come from a list; each epoch adds 1 to the one weight that counts epochs."""

    def __init__(self, values):
        super().__init__(nn.Linear(4, 2))
        self.values = list(values)
        self.compile("sgd", "cross_entropy")
        nn.init.zeros_(self[0].weight)

    def train_step(self, x, y):
        with torch.no_grad():
            self[0].weight += 1
        return {"loss": 1.0}

    def test_step(self, x, y):
        return {"loss": self.values.pop(0)}

    def run(self, *callbacks, epochs=None):
        epochs = epochs or len(self.values)
        return self.fit(X, Y, epochs=epochs, verbose=0, callbacks=callbacks, validation_data=(X, Y))

    @property
    def age(self):
        return self[0].weight[0, 0].item()


def saved_age(path):
    return Scripted([]).load(path).age


def test_hooks_come_in_order_and_can_stop():
    seen = []

    class Spy(Callback):
        def __getattribute__(self, name):
            if name.startswith("on_"):
                seen.append(name)
            return super().__getattribute__(name)

        def on_epoch_end(self, epoch, logs):
            assert logs == {"loss": 1.0, "val_loss": [4.0, 3.0][epoch]}
            self.model.stop_training = epoch == 1

    model = Scripted([4.0, 3.0, 2.0])
    model.run(Spy())
    epoch = ["on_epoch_begin", "on_train_batch_end", "on_epoch_end"]
    assert seen == ["on_train_begin", *epoch, *epoch, "on_train_end"] and model.age == 2


@pytest.mark.parametrize(
    "values, patience, options, epochs, best",
    [
        ([5, 4, 3, 2], 1, {}, 4, 4),
        ([5, 4, 6, 7, 1], 2, {}, 4, 2),
        ([5, 4, 6, 3, 4, 4, 1], 2, {}, 6, 4),
        ([5, 4, 4, 1], 0, {}, 3, 2),
        ([5, 4.9, 4.8, 4.7], 2, {"min_delta": 0.5}, 3, 1),
        ([1, 2, 1, 1], 2, {"mode": "max"}, 4, 2),
        ([5, math.nan, math.nan, 1], 2, {}, 3, 1),
        ([math.nan, 5, 4], 2, {}, 3, 3),
    ],
)
def test_early_stopping(values, patience, options, epochs, best):
    model, stopping = Scripted(values), EarlyStopping(patience=patience, **options)
    assert len(model.run(stopping).epoch) == epochs and model.age == epochs
    assert stopping.stopped_epoch == (
        epochs - 1 if epochs < len(values) or values[-1] == 1 and best == 2 else None
    )
    model = Scripted(values)
    model.run(EarlyStopping(patience=patience, restore_best_weights=True, **options))
    assert model.age == best


def test_nothing_to_restore_leaves_the_last_weights():
    model = Scripted([math.nan] * 3)
    model.run(EarlyStopping(patience=5, restore_best_weights=True))
    assert model.age == 3


def test_checkpoint_keeps_the_best_or_the_last(tmp_path):
    values = [5, 3, math.nan, 4, 3]
    best, last = tmp_path / "best.safetensors", tmp_path / "last.safetensors"
    Scripted(values).run(ModelCheckpoint(best, save_best_only=True), ModelCheckpoint(last))
    assert (saved_age(best), saved_age(last)) == (2, 5)
    highest = tmp_path / "highest.safetensors"
    Scripted(values).run(ModelCheckpoint(highest, save_best_only=True, mode="max"))
    assert saved_age(highest) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        f"{n}.safetensors" for n in ("best", "highest", "last")
    ]


@pytest.mark.parametrize("make", [lambda **k: ModelCheckpoint("x", save_best_only=True, **k), EarlyStopping])
def test_what_cannot_be_watched(make):
    with pytest.raises(
        ValueError, match="monitor 'val_dice' is not among loss, val_loss; pass validation_data"
    ):
        Scripted([1]).run(make(monitor="val_dice"))
    with pytest.raises(ValueError, match="monitor 'speed': say whether better is larger"):
        make(monitor="speed")
    with pytest.raises(ValueError, match="mode must be 'auto', 'min' or 'max', received 'best'"):
        make(mode="best")


@pytest.mark.parametrize("make", [ModelCheckpoint, CSVLogger])
def test_a_missing_folder_is_found_before_the_training(tmp_path, make):
    model = Scripted([1.0])
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere.*create it first"):
        model.run(make(tmp_path / "nowhere" / "file"))
    assert model.age == 0


@pytest.mark.parametrize(
    "name, larger", [("val_dice", True), ("accuracy", True), ("iou", True), ("val_loss", False)]
)
def test_auto_mode_knows_what_is_better(name, larger):
    stopping = EarlyStopping(monitor=name)
    assert stopping.watch.improved({name: 0.5})
    assert stopping.watch.improved({name: 0.6}) == larger


def test_csv_has_a_line_per_epoch_with_every_digit(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("old")
    Scripted([1 / 3, 2.0]).run(CSVLogger(path))
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert [list(row) for row in rows] == [["epoch", "loss", "val_loss"]] * 2
    assert [float(row["val_loss"]) for row in rows] == [1 / 3, 2.0] and rows[1]["epoch"] == "1"
    Scripted([3.0]).run(CSVLogger(path, append=True))
    assert [line.split(",")[-1] for line in path.read_text().split()][1:] == [str(1 / 3), "2.0", "3.0"]
    with pytest.raises(ValueError, match="has the columns .*val_loss.*this epoch has"):
        Scripted([]).fit(X, Y, verbose=0, callbacks=CSVLogger(path, append=True))
