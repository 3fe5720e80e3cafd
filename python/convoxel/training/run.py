"""A run in its folder: planned once, trained fold by fold, gone on with after a stop, and judged on whole scans.

OUT/settings.yaml                every setting that was used
    plan.json                    what was planned of the data, and why
    cache/                       scans made ready, for all folds
    fold_0/state.safetensors     to go on from: weights, momentum, the log
           model.safetensors     the network after the last epoch, for `convoxel predict`
           best.safetensors      the one with the best running Dice on validation patches
           log.csv  curve.png  previews/  events/ (TensorBoard)
           validation/           labels of the held-out scans, metrics.csv, evaluation.json, worst.png
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import checkpoint, models, volume
from ..conversion import accelerate
from ..evaluation import Result, evaluate, worst_cases
from ..importers import load, own
from ..importers.trained import TrainedModel
from ..progress import bar, duration
from . import logs, state
from .cache import Stored, store
from .cases import Case, Dataset, Fold, find_cases
from .fingerprint import Fingerprint, fingerprint
from .loop import Data, Trainer
from .pictures import draw_previews
from .plan import Plan, make_plan
from .processes import ALONE, Processes
from .settings import Settings, as_yaml, read_settings, settings_from
from .state import Epoch, Progress
from .structures import Structures

ALL = "all"  # the fold that trains on every case
_FREE = ("checkpointing", "preview_every", "tensorboard", "workers")  # may change between a stop and going on
Say = Callable[[str], None]


@dataclass(frozen=True)
class Run:
    """A dataset, the folder that belongs to a run on it, and what was decided for it."""

    dataset: Dataset
    folder: Path
    settings: Settings
    plan: Plan
    cache: Path

    @property
    def structures(self) -> Structures:
        return Structures.of(self.dataset)

    def cases(self, fold: str) -> Fold:
        """Names of the cases to train on, and of those that are held out: none in the fold "all"."""
        if fold == ALL:
            return self.dataset.names, []
        try:
            folds = self.dataset.folds(self.settings.cross_validation)
        except ValueError as error:
            raise ValueError(
                f"{error}; set cross_validation, or train on every case: --folds {ALL}"
            ) from error
        if not fold.isdigit() or int(fold) >= len(folds):
            raise ValueError(f"there is no fold {fold}; expected 0 to {len(folds) - 1}, or {ALL}")
        return folds[int(fold)]

    def fold_folder(self, fold: str) -> Path:
        return self.folder / f"fold_{fold}"


def open_run(
    dataset: str | os.PathLike[str],
    out: str | os.PathLike[str],
    given: Mapping[str, Any] | None = None,
    *,
    cache: Path | None = None,
    group: Processes = ALONE,
    progress: bool = False,
) -> Run:
    """The run in `out`. Until a fold is begun it is planned anew, and written down by the first process.

    Args:
        given: settings as plain data; what they do not name is as it was in a run that is begun, else as `Settings`
            has it.
        cache: the folder for scans made ready; None: out/cache.

    Raises:
        ValueError: `out` holds a run that was begun with other settings, or on another dataset; the dataset cannot be
            used.

    >>> open_run("Dataset001_Phantom", "run", {"epochs": 20}).plan.patch_size
    (64, 112, 112)
    """
    found, folder = find_cases(dataset), Path(out)
    made = folder / "settings.yaml"
    before = read_settings(made) if made.is_file() and any(folder.glob("fold_*")) else {}
    settings = settings_from({**before, **(given or {})}, str(made) if before else "settings")
    if before:
        _check_same(settings_from(before, str(made)), settings, folder)
    plan = group.from_first(
        _planned(found, settings, folder, bool(before), progress) if group.is_first else None
    )
    return Run(found, folder, settings, plan, cache or folder / "cache")


def _check_same(before: Settings, now: Settings, folder: Path) -> None:
    for field in dataclasses.fields(Settings):
        old, new = getattr(before, field.name), getattr(now, field.name)
        if old != new and field.name not in _FREE:
            raise ValueError(
                f"{folder} holds a run with {field.name} {old}, not {new}; go on with it as it was, or give another -o"
            )


def _planned(dataset: Dataset, settings: Settings, folder: Path, begun: bool, progress: bool) -> Plan:
    path = folder / "plan.json"
    if begun:
        found = json.loads(path.read_text())
        if tuple(found["cases"]) != tuple(dataset.names):
            raise ValueError(f"{folder} holds a run on other cases ({len(found['cases'])}, now {len(dataset.names)}); "
                             "give another -o")  # fmt: skip
        plan = Plan.from_json(found["plan"])
    else:
        seen = fingerprint(dataset, progress=progress)
        plan = make_plan(dataset, seen, settings)
        folder.mkdir(parents=True, exist_ok=True)
        _write(path, json.dumps(_facts(dataset, seen, plan), indent=1))
    _write(folder / "settings.yaml", as_yaml(settings.to_json()))
    return plan


def _facts(dataset: Dataset, seen: Fingerprint, plan: Plan) -> dict[str, Any]:
    return {
        "dataset": dataset.name,
        "cases": dataset.names,
        "plan": plan.to_json(),
        "fingerprint": seen.to_json(),
    }


def _write(path: Path, text: str) -> None:
    checkpoint.replace_atomically(path, lambda file: file.write(text.encode()))


def train(
    run: Run,
    fold: str,
    *,
    group: Processes = ALONE,
    stop: Callable[[], bool] = lambda: False,
    say: Say = lambda line: None,
    progress: bool = False,
) -> Path:
    """Trains one fold, from where it was left; returns the model's file.

    Args:
        group: the processes that train it together, each calling this.
        stop: asked after every step; once true the state is saved and `loop.Stopped` raised.
        say: takes a line of words per epoch.
        progress: show bars.

    Raises FloatingPointError where learning diverged, OSError where the disk is full; a later call goes on.
    """
    folder = run.fold_folder(fold)
    if group.is_first:
        folder.mkdir(parents=True, exist_ok=True)
        state.remove_leftovers(folder)
    names, held_out = run.cases(fold)
    training, validation = _stored(run, names, progress), _stored(run, held_out, progress)
    network = build(run.plan, run.settings)
    data = Data(training, validation or training, run.structures, run.plan.patch_size, run.plan.batch_size)
    trainer = Trainer(network, data, run.settings, folder, group)
    book = _Book(run, fold, trainer, writes=group.is_first)
    done = book.restore()
    if done.finished:
        say(f"fold {fold}: trained already, {len(done.epochs)} epochs")
    elif done.step:
        say(f"fold {fold}: goes on at step {done.step} of {run.settings.total_steps}")
    else:
        say(f"fold {fold}: {len(names)} cases to train on, {len(held_out)} held out")

    def epoch_done(row: Epoch) -> None:
        book.enter()
        say(line(row, run.settings, run.structures.names))

    with contextlib.closing(book):
        book.enter()  # a kill may have come between the state and the log
        trainer.train(
            done, save=book.save, epoch_done=epoch_done, stop=stop, show=progress and group.is_first
        )
    return book.model_file


def build(plan: Plan, settings: Settings) -> nn.Module:
    """The plan's network with the weights that the seed gives, on the engine that the settings name."""
    torch.manual_seed(settings.seed)
    network = models.create(plan.network["name"], **plan.network["config"])
    if settings.engine == "torch":
        from ..bench.networks import torch_twin

        network = torch_twin(network)
    network.checkpointing = settings.checkpointing  # type: ignore[assignment]
    return network if settings.engine == "torch" else accelerate(network, inplace=True)


def _stored(run: Run, names: Sequence[str], progress: bool) -> list[Stored]:
    return store(run.dataset, run.plan.recipe, run.cache, names=names, progress=progress) if names else []


class _Book:
    """The files of one fold; only the first process writes them."""

    def __init__(self, run: Run, fold: str, trainer: Trainer, writes: bool) -> None:
        self.run, self.fold, self.trainer, self.writes = run, fold, trainer, writes
        self.folder, self.progress = run.fold_folder(fold), Progress()
        self.state_file, self.model_file = (
            self.folder / "state.safetensors",
            self.folder / "model.safetensors",
        )
        training, held_out = run.cases(fold)
        self.identity = {"training": training, "held_out": held_out}
        self.board: logs.Board | None = None

    def restore(self) -> Progress:
        """What was saved, with network and optimiser as they were; a beginning where nothing was."""
        if self.state_file.is_file():
            self.progress, identity = state.load(
                self.state_file, self.trainer.network, self.trainer.optimizer
            )
            if identity != self.identity:
                raise ValueError(f"{self.folder} was trained on other cases; give another -o")
        if self.writes and self.run.settings.tensorboard:
            rows = self.progress.epochs
            self.board = logs.Board(self.folder / "events", rows[-1].step if rows else 0)
        return self.progress

    def save(self) -> None:
        """The state, and before it the models that it says are there."""
        if not self.writes:
            return
        if self.progress.finished:
            self._save_model(self.model_file)
        if self._at_an_epochs_end and self.progress.best_epoch == len(self.progress.epochs):
            self._save_model(self.folder / "best.safetensors")
        state.save(
            self.state_file, self.trainer.network, self.trainer.optimizer, self.progress, self.identity
        )

    def enter(self) -> None:
        """The last epoch in the log, the curve and the pictures, if the weights are those of its end."""
        if not (self.writes and self._at_an_epochs_end):
            return
        names, rows, settings = self.run.structures.names, self.progress.epochs, self.run.settings
        logs.write_csv(self.folder / "log.csv", rows, names)
        logs.draw_curve(self.folder / "curve.png", rows, names)
        if self.board is not None:
            self.board.add(rows[-1], names)
        if settings.preview_every and (len(rows) % settings.preview_every == 0 or self.progress.finished):
            self._draw_previews(self.folder / "previews" / f"epoch_{len(rows):04d}.png")

    def close(self) -> None:
        if self.board is not None:
            self.board.close()

    @property
    def _at_an_epochs_end(self) -> bool:
        return bool(self.progress.epochs) and self.progress.step == self.progress.epochs[-1].step

    def _save_model(self, path: Path) -> None:
        run, network = self.run, self.trainer.network
        name = f"{run.dataset.name} fold {self.fold}"
        own.save(TrainedModel([network], run.plan.network, run.plan.recipe, name), path)

    def _draw_previews(self, path: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        spacing = self.run.plan.recipe.spacing
        draw_previews(
            path, self.trainer.previews(), self.run.structures.names, aspect=spacing[-2] / spacing[-1]
        )


def line(row: Epoch, settings: Settings, names: Sequence[str]) -> str:
    """An epoch in words."""
    each = ", ".join(
        f"{name} {'n/a' if d is None else f'{d:.3f}'}" for name, d in zip(names, row.dice, strict=True)
    )
    left = (settings.epochs - row.epoch) * row.seconds
    return (
        f"epoch {row.epoch}/{settings.epochs}: loss {row.loss:.4f}, Dice {each}; {row.step_seconds:.2f} s a step, "
        f"{100 * row.waited:.0f} % of it waiting for patches, {duration(left)} left"
    )


def judge(run: Run, fold: str, *, progress: bool = False) -> Result | None:
    """Predicts the held-out scans of a trained fold and scores them against the truth; None where none are held out.

    Scans whose labels are in validation/ already are not predicted again.
    """
    _, held_out = run.cases(fold)
    if not held_out:
        return None
    folder = run.fold_folder(fold)
    target = folder / "validation"
    target.mkdir(exist_ok=True)
    by_name = {case.name: case for case in run.dataset.cases}
    todo = [by_name[name] for name in held_out if not (target / f"{name}.nii.gz").is_file()]
    if todo:
        model = load(folder / "model.safetensors")
        for case in bar(todo, "held-out scans") if progress else todo:
            volume.write(_predicted(model, case, run.settings), target / f"{case.name}.nii.gz")
    truth = by_name[held_out[0]].label.parent
    result = evaluate(target, truth, dataset=run.dataset.folder / "dataset.json", cases=held_out)
    _write(target / "metrics.csv", result.to_csv())
    _write(target / "evaluation.json", json.dumps(result.to_json(), indent=2))
    worst_cases(result, target / "worst.png")
    return result


def _predicted(model: TrainedModel, case: Case, settings: Settings) -> volume.Volume:
    return model.predict([volume.read(path) for path in case.images], mirror=settings.mirror)
