"""Callbacks: what happens around the epochs of `fit`.

`logs` is a dict of floats: loss and metrics, and the same with `val_` in front where there is validation.
A watched value that is nan never counts as an improvement.
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from . import checkpoint

if TYPE_CHECKING:
    from .model import Trainer

Logs = Mapping[str, float]


class Callback:
    """Base: override what you need; `self.model` is the model in training.

    Set `self.model.stop_training = True` to end the training after the current epoch.
    """

    model: Trainer

    def set_model(self, model: Trainer) -> None:
        self.model = model

    def on_train_begin(self) -> None:
        """Before the first epoch."""

    def on_train_end(self) -> None:
        """After the last epoch; not after an exception."""

    def on_epoch_begin(self, epoch: int) -> None:
        """Before each epoch, counted from 0."""

    def on_epoch_end(self, epoch: int, logs: Logs) -> None:
        """After each epoch and its validation."""

    def on_train_batch_end(self, batch: int, logs: Logs) -> None:
        """After each training step, with the values of this batch."""


class History(Callback):
    """The values of every epoch: `history` is a dict of lists, `epoch` the epochs' numbers from 0."""

    def __init__(self) -> None:
        self.history: dict[str, list[float]] = {}
        self.epoch: list[int] = []

    def on_epoch_end(self, epoch: int, logs: Logs) -> None:
        self.epoch.append(epoch)
        for key, value in logs.items():
            self.history.setdefault(key, []).append(value)


class _Watch:
    """Is a value of the logs better than every one before?"""

    def __init__(self, monitor: str, mode: str, min_delta: float = 0.0):
        if mode not in ("auto", "min", "max"):
            raise ValueError(f"mode must be 'auto', 'min' or 'max', received {mode!r}")
        if mode == "auto":
            mode = "max" if monitor.removeprefix("val_") in ("accuracy", "dice", "iou") else "min"
            if mode == "min" and not monitor.endswith("loss"):
                raise ValueError(
                    f"monitor {monitor!r}: say whether better is larger or smaller, mode='max' or 'min'"
                )
        self.monitor, self.sign, self.min_delta = monitor, 1.0 if mode == "max" else -1.0, abs(min_delta)
        self.reset()

    def reset(self) -> None:
        self.best = -math.inf

    def improved(self, logs: Logs) -> bool:
        if self.monitor not in logs:
            raise ValueError(
                f"monitor {self.monitor!r} is not among {', '.join(logs)}; "
                "pass validation_data to fit for values that start with val_"
            )
        value = self.sign * logs[self.monitor]
        if not value > self.best + self.min_delta:
            return False
        self.best = value
        return True


class ModelCheckpoint(Callback):
    """Save the model after each epoch, or after each that is the best so far, always to the same file.

    The file is replaced atomically: a run killed at any instant leaves the last good one (see `Model.save`).
    mode "auto" takes larger as better for accuracy, dice and iou, smaller for losses. Raises ValueError if
    the logs lack `monitor`.

    >>> best = ModelCheckpoint("best.safetensors", monitor="val_dice", save_best_only=True)
    """

    def __init__(
        self,
        path: str | os.PathLike,
        monitor: str = "val_loss",
        save_best_only: bool = False,
        mode: str = "auto",
    ):
        self.path, self.save_best_only = Path(path), save_best_only
        self.watch = _Watch(monitor, mode) if save_best_only else None

    def on_train_begin(self) -> None:
        checkpoint.check_writable(self.path)

    def on_epoch_end(self, epoch: int, logs: Logs) -> None:
        if self.watch is None or self.watch.improved(logs):
            self.model.save(self.path)


class EarlyStopping(Callback):
    """Stop when `monitor` has not improved by more than min_delta for `patience` epochs (0: the first such).

    restore_best_weights puts the weights of the best epoch back when the training ends, early or not; if no
    epoch had a number to compare, the last ones stay. `stopped_epoch` is the epoch (from 0) or None.

    >>> stopping = EarlyStopping(patience=10, restore_best_weights=True)
    """

    def __init__(
        self,
        monitor: str = "val_loss",
        min_delta: float = 0.0,
        patience: int = 0,
        mode: str = "auto",
        restore_best_weights: bool = False,
    ):
        self.watch = _Watch(monitor, mode, min_delta)
        self.patience, self.restore_best_weights = patience, restore_best_weights

    def on_train_begin(self) -> None:
        self.watch.reset()
        self.waited = 0
        self.stopped_epoch: int | None = None
        self.best_weights: dict[str, Tensor] | None = None

    def on_epoch_end(self, epoch: int, logs: Logs) -> None:
        self.waited += 1
        if self.watch.improved(logs):
            self.waited = 0
            if self.restore_best_weights:
                self.best_weights = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        elif self.waited >= self.patience:
            self.stopped_epoch = epoch
            self.model.stop_training = True

    def on_train_end(self) -> None:
        if self.best_weights is not None:
            self.model.load_state_dict(self.best_weights)
            self.best_weights = None


class CSVLogger(Callback):
    """One line per epoch in a CSV file: epoch (from 0), then the logs in alphabetical order.

    append=True continues a file with the same columns; otherwise the first epoch replaces it. Every line is
    on its way to the disk when its epoch ends.

    >>> log = CSVLogger("training.csv")
    """

    def __init__(self, path: str | os.PathLike, append: bool = False):
        self.path, self.append = Path(path), append

    def on_train_begin(self) -> None:
        if not self.path.parent.is_dir():
            raise FileNotFoundError(f"no folder {self.path.parent} for {self.path.name}; create it first")
        self.columns: list[str] | None = None

    def on_epoch_end(self, epoch: int, logs: Logs) -> None:
        columns = ["epoch", *sorted(logs)]
        if self.columns is None:
            self._start(columns)
        if columns != self.columns:
            raise ValueError(f"{self.path} has the columns {self.columns}, this epoch has {columns}")
        with self.path.open("a", newline="") as file:
            csv.writer(file).writerow([epoch, *(logs[key] for key in columns[1:])])

    def _start(self, columns: list[str]) -> None:
        self.columns = columns
        if self.append and self.path.exists() and self.path.stat().st_size:
            with self.path.open(newline="") as file:
                self.columns = next(csv.reader(file))
            return
        with self.path.open("w", newline="") as file:
            csv.writer(file).writerow(columns)
