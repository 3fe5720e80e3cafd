"""What a run leaves to look at: log.csv, curve.png, TensorBoard's events."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..checkpoint import replace_atomically
from .state import Epoch

_COLUMNS = ("epoch", "step", "loss", "mean_dice", "running_dice", "rate", "seconds", "step_seconds", "waited")


def write_csv(path: Path, epochs: Sequence[Epoch], names: Sequence[str]) -> None:
    """A line per epoch, with a column `dice NAME` per structure; empty where no patch had it."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*_COLUMNS, *(f"dice {name}" for name in names)])
    for row in epochs:
        writer.writerow([_cell(value) for value in (*(getattr(row, c) for c in _COLUMNS), *row.dice)])
    replace_atomically(path, lambda file: file.write(text.getvalue().encode()))


def _cell(value: float | None) -> str:
    return "" if value is None else str(value) if isinstance(value, int) else f"{value:.6g}"


def draw_curve(path: Path, epochs: Sequence[Epoch], names: Sequence[str]) -> None:
    """Loss and Dice over the epochs as a PNG."""
    figure = new_figure(figsize=(9, 7), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    x = [row.epoch for row in epochs]
    above.plot(x, [row.loss for row in epochs], color="black", linewidth=1.2)
    above.set_ylabel("training loss")
    rates = above.twinx()
    rates.plot(x, [row.rate for row in epochs], color="tab:gray", linewidth=0.8, linestyle="dotted")
    rates.set_ylabel("learning rate (dotted)")
    for index, name in enumerate(names):
        below.plot(x, [_number(row.dice[index]) for row in epochs], linewidth=1, alpha=0.7, label=name)
    below.plot(
        x, [_number(row.running_dice) for row in epochs], color="black", linewidth=2, label="running mean"
    )
    below.set_ylim(0, 1)
    below.set_ylabel("Dice of validation patches")
    below.set_xlabel("epoch")
    below.xaxis.get_major_locator().set_params(integer=True)
    below.legend(loc="lower right", fontsize=8, ncols=2)
    for ax in (above, below):
        ax.grid(alpha=0.3)
    save_figure(figure, path)


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def new_figure(**how: Any) -> Any:
    """A figure of matplotlib that needs no screen."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('pictures need matplotlib: pip install "convoxel[train]"') from error
    return Figure(**how)


def save_figure(figure: Any, path: Path) -> None:
    replace_atomically(path, lambda file: figure.savefig(file, format="png", dpi=100))


class Board:
    """TensorBoard's events. `first_step`: what an earlier process wrote of this step and later ones does not count."""

    def __init__(self, folder: Path, first_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                'TensorBoard\'s events need tensorboard: pip install "convoxel[train]", or set tensorboard: false'
            ) from error
        self._writer: Any = SummaryWriter(str(folder), purge_step=first_step)

    def add(self, row: Epoch, names: Sequence[str]) -> None:
        scalars = {"loss": row.loss, "learning rate": row.rate, "dice/mean": row.mean_dice,
                   "dice/running mean": row.running_dice, "time/step, s": row.step_seconds,
                   "time/waited, share": row.waited}  # fmt: skip
        scalars |= {f"dice/{name}": value for name, value in zip(names, row.dice, strict=True)}
        for name, value in scalars.items():
            if value is not None:
                self._writer.add_scalar(name, value, row.step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
