"""Keras' verbs for torch networks: compile, fit, evaluate, predict, summary, save, load.

The loops only loop: what happens to a batch is in `train_step`, `test_step` and `predict_step`, and
those are what a subclass overrides.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from .. import checkpoint, losses, models
from ..callbacks import Callback, History
from ..metrics import Metric
from ..metrics import get as get_metrics
from ..modes import in_mode
from .batches import Array, Data, batches, inputs_only, pair
from .progress import Bar, Means, text
from .summary import summary

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": partial(torch.optim.SGD, lr=0.01),
}


@dataclass
class _Plan:
    """What compile was told. A plain object, so that a loss with weights is no part of the network."""

    loss: Callable[..., Tensor]
    metrics: list[Metric]
    make_optimizer: Callable[..., Optimizer] | None
    optimizer: Optimizer | None


class _Load:
    """`load` on a class builds a model, on an instance it fills one; see `Model` and `Sequential`."""

    def __get__(self, model: Trainer | None, owner: type[Trainer]) -> Callable[[str | PathLike], Any]:
        return owner._build if model is None else model._fill


class Trainer(nn.Module):
    """The verbs. Arrays are numpy or torch, x (N, C, ...); y as the loss wants it, usually (N, ...) labels.

    Batches go to the device of the network's parameters, floating-point ones in their dtype (so numpy's
    float64 becomes float32), integer labels as int64. Lazy layers take their sizes from the first batch.
    Training and evaluation mode of every layer are put back as they were found.
    """

    _plan: _Plan | None = None
    _sample_shape: tuple[int, ...] | None = None
    _place = ""
    stop_training = False
    history: History | None = None
    load = _Load()

    # -- what a subclass may override ------------------------------------------------------------------

    def train_step(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        """One step on one batch; returns the batch's values by name, which are then averaged over samples.

        x (N, C, ...) and y are on the network's device. An override decides everything in between:

            def train_step(self, x, y):
                output = self(x)
                loss = self.compute_loss(output, y) + 1e-4 * self[0].weight.abs().sum()
                self.apply_gradients(loss)
                self.update_metrics(output, y)
                return {"loss": loss}
        """
        output = self(x)
        loss = self.compute_loss(output, y)
        self.apply_gradients(loss)
        self.update_metrics(output, y)
        return {"loss": loss}

    def test_step(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        """As train_step, in evaluation mode, without gradients and without a step."""
        output = self(x)
        loss = self.compute_loss(output, y)
        self.update_metrics(output, y)
        return {"loss": loss}

    def predict_step(self, x: Tensor) -> Tensor:
        """The prediction (N, ...) for a batch x (N, C, ...), in evaluation mode, without gradients."""
        return self(x)

    # -- the pieces of a step --------------------------------------------------------------------------

    def compute_loss(self, output: Any, y: Tensor) -> Tensor:
        """The compiled loss; ValueError if it is not one number."""
        if isinstance(output, (list, tuple)) and type(self.loss).__module__.startswith("torch."):
            raise TypeError(
                f"the network returned {len(output)} outputs (deep supervision) but "
                f"{type(self.loss).__name__} takes one; wrap it: loss=convoxel.losses.DeepSupervision(...)"
            )
        loss = self.loss(output, y)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            found = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"the loss must be one number, the mean over the batch; received {found}")
        return loss

    def apply_gradients(self, loss: Tensor) -> None:
        """Backward and one optimizer step; a loss that is nan or infinite stops before touching a weight."""
        self._check_finite(loss.item(), "before this step changed a weight")
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    @torch.no_grad()
    def update_metrics(self, output: Any, y: Tensor) -> None:
        """Add a batch to every compiled metric."""
        for metric in self.metrics:
            metric.update(output, y)

    @property
    def loss(self) -> Any:
        """The compiled loss, None before compile."""
        return self._plan and self._plan.loss

    @property
    def optimizer(self) -> Any:
        """The optimizer; one given by name is made when fit starts (lazy layers: at its first batch)."""
        return self._plan and self._plan.optimizer

    @property
    def metrics(self) -> list[Metric]:
        """The compiled metrics, none before compile."""
        return self._plan.metrics if self._plan else []

    # -- the verbs -------------------------------------------------------------------------------------

    def compile(  # type: ignore[override]
        self,
        optimizer: str | Optimizer | Callable[..., Optimizer] | None = None,
        loss: str | Callable[..., Tensor] | None = None,
        metrics: Any = (),
        **torch_options: Any,
    ) -> None:
        """Say how to train: an optimizer, a loss, metrics.

        optimizer: "adam", "adamw" (torch's defaults), "sgd" (learning rate 0.01), a torch optimizer, or a
            function of the parameters, such as `lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.99)`. A new
            call to compile starts a new optimizer; a second fit goes on with the old one.
        loss: a name of `convoxel.losses.NAMES` or a function(output, y) -> mean over the batch.
        metrics: names of `convoxel.metrics.NAMES`, Metric objects or functions(output, y), one or several.
        Raises ValueError for unknown names and combinations that cannot train.

        This is not torch's compile: see the head of this file.
        """
        if optimizer is None or loss is None or torch_options:
            raise TypeError(
                "compile(optimizer, loss, metrics) needs an optimizer and a loss, as in "
                'compile("adam", "cross_entropy", ["accuracy"]); '
                "for torch's own compile wrap it: convoxel.Model(torch.compile(network))"
            )
        loss = losses.get(loss)
        logits = losses.takes_logits(loss)
        last = self[-1] if isinstance(self, nn.Sequential) and len(self) else None
        if logits and isinstance(last, (nn.Softmax, nn.Softmax2d, nn.Sigmoid)):
            raise ValueError(
                f"{type(loss).__name__} takes logits and applies {type(last).__name__} itself; remove the "
                'last layer, or use "categorical_crossentropy" or "binary_cross_entropy", for probabilities'
            )
        threshold = None if logits is None else 0.0 if logits else 0.5
        measured = get_metrics(metrics, threshold)
        if isinstance(optimizer, Optimizer):
            self._plan = _Plan(loss, measured, None, optimizer)
        else:
            self._plan = _Plan(loss, measured, _optimizer_maker(optimizer), None)

    def fit(
        self,
        x: Data,
        y: Array | None = None,
        *,
        batch_size: int | None = None,
        epochs: int = 1,
        verbose: int = 1,
        callbacks: Callback | Iterable[Callback] = (),
        validation_data: Any = None,
        shuffle: bool = True,
    ) -> History:
        """Train; returns the History (also `model.history`, from the first epoch on).

        x, y: arrays (N, C, ...) and (N, ...); or x alone: a Dataset, or a loader that yields (x, y).
        batch_size (default 32), shuffle: for arrays and datasets. Order and weights follow torch.manual_seed.
        verbose: 1 a progress bar with loss and metrics, 2 a line per epoch, 0 nothing.
        validation_data: (x, y), a Dataset or a loader; its values are named val_loss, val_...
        The values of an epoch: loss is the mean over its samples, metrics count all of them.
        Raises ValueError and TypeError for wrong input, FloatingPointError for a loss that is not finite.
        """
        self._require_plan("fit")
        if not isinstance(epochs, int) or epochs < 1:
            raise ValueError(f"epochs must be a whole number of at least 1, received {epochs!r}")
        data = batches(x, y, batch_size, shuffle)
        validation = None if validation_data is None else _validation(validation_data, batch_size)
        self.history, self.stop_training = History(), False
        given = [callbacks] if isinstance(callbacks, Callback) else list(callbacks)
        if wrong := [c for c in given if not isinstance(c, Callback)]:
            raise TypeError(
                f"callbacks must be convoxel.callbacks.Callback objects, received {type(wrong[0]).__name__}"
            )
        listeners = [self.history, *given]
        for listener in listeners:
            listener.set_model(self)
        if not self._lazy():
            self._require_optimizer()
        with in_mode(self, training=True):
            for listener in listeners:
                listener.on_train_begin()
            for epoch in range(epochs):
                self._epoch(epoch, epochs, data, validation, listeners, verbose)
                if self.stop_training:
                    break
            for listener in listeners:
                listener.on_train_end()
        return self.history

    def evaluate(
        self, x: Data, y: Array | None = None, *, batch_size: int | None = None, verbose: int = 1
    ) -> dict[str, float]:
        """Loss (mean over samples) and metrics (over the whole set) in evaluation mode, by name.

        Takes the data as fit does.
        """
        self._require_plan("evaluate")
        data = batches(x, y, batch_size)
        with Bar("evaluate", data, verbose) as bar:
            logs = self._test(data, bar)
        if verbose == 2:
            print(text(logs))
        return logs

    @torch.no_grad()
    def predict(self, x: Data, *, batch_size: int | None = None, verbose: int = 0) -> Any:
        """The outputs (N, ...) for x (N, C, ...) in evaluation mode: numpy for a numpy x, else a CPU tensor.

        A dataset or loader may yield x or (x, y). Outputs of different shapes come as a list, one per sample.
        """
        data = batches(x, None, batch_size, labelled=False)
        outputs: list[Tensor] = []
        with in_mode(self, training=False), Bar("predict", data, verbose) as bar:
            for number, batch in enumerate(data):
                inputs = self._input(inputs_only(batch), first=number == 0)
                output = self.predict_step(inputs)
                if not isinstance(output, Tensor):
                    raise TypeError(
                        f"predict_step must return a tensor (N, ...), received {type(output).__name__}; "
                        "override it to choose one output"
                    )
                outputs.append(output.cpu())
                bar.step(dict)
        if not outputs:
            raise ValueError("there is nothing to predict: the data gave no batch")
        as_given = Tensor.numpy if isinstance(x, np.ndarray) else lambda tensor: tensor
        if len({o.shape[1:] for o in outputs}) == 1:
            return as_given(torch.cat(outputs))
        return [as_given(sample) for output in outputs for sample in output]

    def count_params(self) -> int:
        """The number of parameters; ValueError while lazy layers do not know theirs."""
        if any(is_lazy(p) for p in self.parameters()):
            raise ValueError("lazy layers have no size yet; call summary(input_shape=(C, ...)) or fit first")
        return sum(p.numel() for p in self.parameters())

    def summary(
        self, input_shape: Sequence[int] | None = None, print_fn: Callable[[str], Any] = print
    ) -> None:
        """Print a table: layer, output shape, parameters, and the totals.

        input_shape: (C, ...) of one sample, by default that of the last data seen; lazy layers need one.
        """
        shape = tuple(input_shape) if input_shape is not None else self._sample_shape
        if shape is not None:
            like = self._like()
            self._materialise(torch.zeros(1, *shape, dtype=like.dtype, device=like.device))
        else:
            self.count_params()
        with in_mode(self, training=False):
            print_fn(summary(self, shape))

    def save(self, path: str | PathLike) -> None:
        """Write weights (safetensors) and, of a registered network, the architecture (JSON), in one file.

        Atomic: a kill or a full disk leaves the old file whole. The optimizer's state is not in it.
        """
        checkpoint.write(path, self.state_dict(), models.config_of(self._network()))

    # -- inside ----------------------------------------------------------------------------------------

    def _epoch(
        self,
        epoch: int,
        epochs: int,
        data: Iterable,
        validation: Iterable | None,
        listeners: list[Callback],
        verbose: int,
    ) -> None:
        title = f"epoch {epoch + 1}/{epochs}"
        for listener in listeners:
            listener.on_epoch_begin(epoch)
        with Bar(title, data, verbose) as bar:
            logs = self._train(data, bar, title, listeners)
            if validation is not None:
                with Bar(f"{title} validation", validation, verbose, leave=False) as inner:
                    tested = self._test(validation, inner)
                logs |= {f"val_{name}": value for name, value in tested.items()}
            bar.show(logs)
        if verbose == 2:
            print(f"{title}: {text(logs)}")
        for listener in listeners:
            listener.on_epoch_end(epoch, logs)

    def _train(self, data: Iterable, bar: Bar, title: str, listeners: list[Callback]) -> dict[str, float]:
        means = Means(self.metrics)
        for number, (x, y) in enumerate(self._pairs(data)):
            if number == 0:
                self._require_optimizer()
            self._place = f"{title}, batch {number + 1}"
            values = means.add(self.train_step(x, y), len(x))
            self._check_finite(values.get("loss", 0.0), "after this step")
            bar.step(means.values)
            for listener in listeners:
                listener.on_train_batch_end(number, values)
        return means.values()

    @torch.no_grad()
    def _test(self, data: Iterable, bar: Bar) -> dict[str, float]:
        means = Means(self.metrics)
        with in_mode(self, training=False):
            for x, y in self._pairs(data):
                means.add(self.test_step(x, y), len(x))
                bar.step(means.values)
        return means.values()

    def _pairs(self, data: Iterable) -> Iterator[tuple[Tensor, Tensor]]:
        for number, batch in enumerate(data):
            x, y = pair(batch)
            like = self._like()
            if number == 0 and isinstance(self.loss, nn.Module):
                self.loss.to(like.device)  # class weights and the like
            yield (
                self._input(x, first=number == 0),
                y.to(like.device, like.dtype if y.is_floating_point() else torch.int64),
            )

    def _input(self, x: Tensor, first: bool) -> Tensor:
        """A batch on the device and in the dtype of the network; at the first of a pass lazy layers learn."""
        like = self._like()
        if x.is_floating_point():
            x = x.to(like.device, like.dtype)
        elif any(isinstance(layer, (nn.Embedding, nn.EmbeddingBag)) for layer in self.modules()):
            x = x.to(like.device)
        else:
            raise TypeError(
                f"x must be floating point for this network, received {x.dtype}; convert it, for example "
                "x.astype('float32') / 255"
            )
        if first:
            self._check_input(x)
            self._materialise(x)
            self._sample_shape = tuple(x.shape[1:])
        return x

    def _check_input(self, x: Tensor) -> None:
        """ValueError for an x that cannot be meant; a subclass that knows its first layer says more."""

    def _like(self) -> Tensor:
        return next(self.parameters(), torch.zeros(()))

    def _materialise(self, x: Tensor) -> None:
        """Lazy layers take their sizes from one sample; in evaluation mode, so that nothing else moves."""
        if not self._lazy():
            return
        with in_mode(self, training=False), torch.no_grad():
            self(x[:1])
        if left := self._lazy():
            raise ValueError(
                f"{', '.join(left)} got no size from a forward in evaluation mode; call the network once on "
                "a batch in training mode before fit"
            )

    def _lazy(self) -> list[str]:
        return [n for n, p in chain(self.named_parameters(), self.named_buffers()) if is_lazy(p)]

    def _require_plan(self, verb: str) -> _Plan:
        if self._plan is None:
            raise ValueError(f'{verb} needs a compiled model; call compile("adam", "cross_entropy") first')
        return self._plan

    def _require_optimizer(self) -> None:
        plan = self._require_plan("fit")
        if plan.optimizer is None and plan.make_optimizer is not None:
            plan.optimizer = plan.make_optimizer(self.parameters())
        known = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        mine = {id(p) for p in self.parameters() if p.requires_grad}
        if not mine & known or (plan.make_optimizer is not None and mine - known):
            raise ValueError(
                "the optimizer does not hold this network's parameters (they were replaced or added after "
                "compile); call compile again"
            )

    def _check_finite(self, loss: float, when: str) -> None:
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss} at {self._place}; training stopped {when}. "
                "Look for nan or huge values in x and y, or lower the learning rate"
            )

    def _network(self) -> nn.Module:
        """What the registry may know; a wrapper names what it wraps."""
        return self

    @classmethod
    def _build(cls, path: str | PathLike) -> Any:
        """A new model from the file: architecture and weights."""
        raise ValueError(
            f"{cls.__name__}.load cannot know the layers; build the {cls.__name__} first "
            f"(Model.load builds registered networks), then fill it: model.load({str(path)!r})"
        )

    def _fill(self, path: str | PathLike) -> Trainer:
        """Load the file's weights into this model and return it; if they do not fit, nothing changes."""
        state, architecture = checkpoint.read(path)
        mine = json.loads(json.dumps(models.config_of(self._network())))  # tuples are lists in the file
        if architecture is not None and mine is not None and architecture != mine:
            raise ValueError(f"{path} holds another architecture: expected {mine}, received {architecture}")
        checkpoint.check_fits(path, state, self.state_dict())
        self.load_state_dict(state)
        return self


def _optimizer_maker(optimizer: str | Callable[..., Optimizer]) -> Callable[..., Optimizer]:
    if isinstance(optimizer, str):
        if optimizer not in OPTIMIZERS:
            raise ValueError(
                f"unknown optimizer {optimizer!r}; expected {', '.join(OPTIMIZERS)}, a torch optimizer "
                "or a function of the parameters"
            )
        return OPTIMIZERS[optimizer]
    if not callable(optimizer):
        raise TypeError(
            f"the optimizer must be a name ({', '.join(OPTIMIZERS)}), a torch optimizer or a function of the "
            f"parameters, received {type(optimizer).__name__}"
        )
    return optimizer


def _validation(data: Any, batch_size: int | None) -> Iterable:
    """validation_data of fit as batches: a pair of arrays, a dataset or a loader, in order."""
    if isinstance(data, tuple):
        if len(data) != 2:
            raise ValueError(
                f"validation_data must be (x, y), a Dataset or a loader, received {len(data)} values"
            )
        return batches(*data, batch_size=batch_size)
    is_loader = not isinstance(data, (np.ndarray, Tensor, torch.utils.data.Dataset))
    return batches(data, batch_size=None if is_loader else batch_size)
