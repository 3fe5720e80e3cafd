"""The steps of training, from any step on, with the same bits as if there had been no interruption."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW, Optimizer

from ..modes import in_mode
from ..progress import bar
from .augment import Augmentation
from .cache import Stored
from .feed import Batch, Feed
from .loss import Counts, SegmentationLoss
from .pictures import Preview
from .processes import ALONE, Processes
from .settings import Settings
from .state import Epoch, Progress
from .structures import Structures

_POWER = 0.9  # of the learning rate's fall (nnU-Net's)
_SAVED_EVERY = 600.0  # seconds: what a kill loses at most
_PREVIEWS = 3  # patches in a picture


@dataclass(frozen=True)
class Data:
    """The cases of one fold, and what is drawn from them."""

    training: Sequence[Stored]
    validation: Sequence[Stored]  # the training cases themselves where none are held out
    structures: Structures
    patch_size: tuple[int, ...]
    batch_size: int


class Stopped(Exception):
    """Somebody asked to stop, and the state was saved."""


class Trainer:
    """One network learning from one fold.

    Args:
        network: the plain module, on convoxel's kernels or torch's.
        folder: where the batch goes that made the loss NaN.
        group: the processes that learn together, each with its share of every batch.

    >>> trainer = Trainer(network, data, settings, Path("run/fold_0"))
    >>> trainer.train(Progress(), save=lambda: None, epoch_done=print)
    """

    def __init__(
        self, network: nn.Module, data: Data, settings: Settings, folder: Path, group: Processes = ALONE
    ) -> None:
        share = data.batch_size // group.world_size
        if data.batch_size % group.world_size or share % settings.accumulate:
            raise ValueError(
                f"a batch of {data.batch_size} cannot be shared by {group.world_size} process(es) in "
                f"{settings.accumulate} part(s) each; set batch_size to a multiple of their product"
            )
        self.network, self.data, self.settings, self.folder, self.group = (
            network,
            data,
            settings,
            folder,
            group,
        )
        self.optimizer = _optimizer(network, settings)
        structures = data.structures
        self.loss = SegmentationLoss(
            structures.values if structures.overlap else None,
            classes=structures.classes,
            ignore=structures.ignore,
            batch_dice=settings.batch_dice,
            group=group.together,
        )
        self.model = DistributedDataParallel(network) if group.together else network

    def train(
        self,
        progress: Progress,
        *,
        save: Callable[[], None],
        epoch_done: Callable[[Epoch], None],
        stop: Callable[[], bool] = lambda: False,
        show: bool = False,
    ) -> None:
        """From where `progress` is to the last epoch, or to the one at which patience ends.

        save is called after every epoch and every ten minutes, in all processes; what it writes must be enough to
        go on from. Stopped is raised after a save, once `stop()` is true in any process.

        Raises FloatingPointError where the loss or the gradient is not finite; the batch is then in `folder`.
        """
        settings = self.settings
        augmentation = (
            Augmentation.for_patch(self.data.patch_size, None if settings.mirror else (), settings.elastic)
            if settings.augment
            else None
        )
        feed = self._feed(self.data.training, settings.seed, range(progress.step, settings.total_steps),
                          augmentation=augmentation)  # fmt: skip
        self.network.train()
        with contextlib.closing(iter(feed)) as batches:  # type: ignore[type-var]
            while not progress.finished:
                self._epoch(progress, feed, batches, save, stop, show)
                save()
                epoch_done(progress.epochs[-1])

    def _epoch(
        self,
        progress: Progress,
        feed: Feed,
        batches: Iterator[Batch],
        save: Callable[[], None],
        stop: Callable[[], bool],
        show: bool,
    ) -> None:
        number, per_epoch = len(progress.epochs) + 1, self.settings.steps_per_epoch
        clock = _Clock(progress, feed)
        steps = range(progress.step, number * per_epoch)
        shown = bar(steps, f"epoch {number}/{self.settings.epochs}", total=per_epoch, initial=steps.start % per_epoch,
                    leave=False) if show else steps  # fmt: skip
        for step in shown:
            loss, asked = self._step(*next(batches), step, feed, stop())
            progress.loss_sum += loss
            progress.step = step + 1
            if asked or clock.since_saved() > _SAVED_EVERY:
                clock.note()
                save()
            if asked:
                raise Stopped
        clock.note()
        self._finish(progress, number, clock)

    def _step(self, x: Tensor, y: Tensor, step: int, feed: Feed, stop: bool) -> tuple[float, bool]:
        """One step; the loss, and whether any process was asked to stop."""
        parts = self.settings.accumulate
        self.optimizer.zero_grad()
        total = 0.0
        for part, (a, b) in enumerate(zip(x.chunk(parts), y.chunk(parts), strict=True), 1):
            with self._exchanged(part == parts):
                with self._autocast():
                    output = self.model(a)
                loss = self.loss(output, b) / parts
                loss.backward()
            total += loss.item()
        limit = math.inf if self.settings.clip is None else self.settings.clip
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), limit).item()
        total, asked = self.group.sums([total / self.group.world_size, stop])
        if not (math.isfinite(total) and math.isfinite(norm)):
            self._not_finite(x, y, step, feed.names(step), total, norm)
        for settings in self.optimizer.param_groups:
            settings["lr"] = self.rate(step)
        self.optimizer.step()
        return total, bool(asked)

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        return self.settings.first_rate * (1 - step / self.settings.total_steps) ** _POWER

    def _exchanged(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Gradients go round with the last part of a batch."""
        wait = isinstance(self.model, DistributedDataParallel) and not last
        return self.model.no_sync() if wait else contextlib.nullcontext()  # type: ignore[operator]

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.settings.precision == "bfloat16")

    def _not_finite(
        self, x: Tensor, y: Tensor, step: int, names: Sequence[str], loss: float, norm: float
    ) -> None:
        suffix = f"_process_{self.group.rank}" if self.group.together else ""
        path = self.folder / f"not_finite_step_{step}{suffix}.npz"
        np.savez_compressed(path, x=x.numpy(), y=y.numpy(), cases=np.array(names))
        raise FloatingPointError(
            f"step {step}: the loss is {loss:g} and the gradient's norm {norm:g}; the patches were from "
            f"{', '.join(names)} and are in {path}. Look at them (convoxel doctor), or lower the learning_rate"
        )

    def _finish(self, progress: Progress, number: int, clock: _Clock) -> None:
        """Validates and adds the epoch's row."""
        dice = self.validate(number)
        known = [d for d in dice if d is not None]
        mean = sum(known) / len(known) if known else None
        running, per_epoch = progress.running(mean), self.settings.steps_per_epoch
        progress.epochs.append(
            Epoch(
                epoch=number,
                step=progress.step,
                loss=progress.loss_sum / per_epoch,
                dice=tuple(dice),
                mean_dice=mean,
                running_dice=running,
                rate=self.rate(progress.step - 1),
                seconds=progress.seconds + clock.elapsed(),
                step_seconds=progress.seconds / per_epoch,
                waited=progress.waited / max(progress.seconds, 1e-9),
            )
        )
        progress.loss_sum, progress.seconds, progress.waited = 0.0, 0.0, 0.0
        if running is not None and running > progress.best:
            progress.best, progress.best_epoch = running, number
        patience = self.settings.patience
        impatient = patience is not None and number - progress.best_epoch >= patience
        progress.finished = number == self.settings.epochs or impatient

    @torch.no_grad()
    def validate(self, epoch: int) -> list[float | None]:
        """Dice per structure over all voxels of `validation_patches` patches, other ones in every epoch."""
        batch, structures = self.data.batch_size, self.data.structures
        count = -(-self.settings.validation_patches // batch)
        feed = self._feed(
            self.data.validation, self.settings.seed + 1, range(epoch * count, (epoch + 1) * count)
        )
        counts = Counts(structures.values if structures.overlap else None, classes=structures.classes,
                        ignore=structures.ignore, group=self.group.together)  # fmt: skip
        with in_mode(self.network, training=False):
            for x, y in feed:
                with self._autocast():
                    counts.add(self.network(x), y)
        return [None if math.isnan(value) else value for value in counts.dice()]

    @torch.no_grad()
    def previews(self) -> list[Preview]:
        """Always the same patches of the validation cases, each with a structure in its middle."""
        structures = self.data.structures
        count = min(_PREVIEWS, len(self.data.validation))
        feed = self._feed(
            self.data.validation, self.settings.seed + 2, range(1), batch=count, foreground=1.0, alone=True
        )
        (x, y), *_ = feed
        with in_mode(self.network, training=False), self._autocast():
            logits = self.network(x)
        found = []
        for name, image, labels, scores in zip(feed.names(0), x[:, 0], y, logits.float(), strict=True):
            truth, said = structures.masks(labels), structures.predicted(scores)
            if labels.ndim == 2:
                image, truth, said = image[None], truth[:, None], said[:, None]
            found.append(Preview(name, image.numpy(), truth.numpy(), said.numpy()))
        return found

    def _feed(
        self,
        cases: Sequence[Stored],
        seed: int,
        steps: range,
        *,
        augmentation: Augmentation | None = None,
        batch: int | None = None,
        foreground: float | None = None,
        alone: bool = False,
    ) -> Feed:
        return Feed(
            cases,
            self.data.patch_size,
            self.data.batch_size if batch is None else batch,
            seed=seed,
            augmentation=augmentation,
            workers=self.settings.workers,
            steps=steps,
            foreground=self.settings.foreground if foreground is None else foreground,
            ignore=self.data.structures.ignore,
            rank=0 if alone else self.group.rank,
            world_size=1 if alone else self.group.world_size,
        )


class _Clock:
    """Seconds of this epoch in this process; `note` adds them to the progress, of which the state is made."""

    def __init__(self, progress: Progress, feed: Feed) -> None:
        self._progress, self._feed = progress, feed
        self._noted, self._waited = time.perf_counter(), feed.waited

    def since_saved(self) -> float:
        return time.perf_counter() - self._noted

    elapsed = since_saved

    def note(self) -> None:
        now, waited = time.perf_counter(), self._feed.waited
        self._progress.seconds += now - self._noted
        self._progress.waited += waited - self._waited
        self._noted, self._waited = now, waited


def _optimizer(network: nn.Module, settings: Settings) -> Optimizer:
    """fused: one pass over weights, gradients and momentum instead of four."""
    parameters, rate = list(network.parameters()), settings.first_rate
    if settings.optimizer == "adamw":
        return AdamW(parameters, rate, weight_decay=settings.weight_decay, fused=True)
    return SGD(parameters, rate, settings.momentum, weight_decay=settings.weight_decay, nesterov=settings.momentum > 0,
               fused=True)  # fmt: skip
