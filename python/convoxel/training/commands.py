"""`convoxel train`."""

from __future__ import annotations

import argparse
import signal
import sys
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .. import memory
from . import run as running
from .loop import Stopped
from .processes import Processes, processes
from .settings import ENGINES, NETWORKS, OPTIMIZERS, PRECISIONS, Settings, read_settings, settings_from

_FLAGS: dict[str, dict[str, Any]] = {  # the settings that have a flag; all can be set in YAML
    "rank": {"type": int, "choices": (2, 3), "help": "3: volumes (default), 2: slices"},
    "network": {"choices": NETWORKS, "help": "U-Net of plain (default) or residual encoder"},
    "patch_size": {"type": int, "nargs": "+", "metavar": "N", "help": "voxels, z y x (2-D: y x); default: planned"},
    "batch_size": {"type": int, "metavar": "N", "help": "patches a step; default: planned"},
    "spacing": {"type": float, "nargs": "+", "metavar": "MM", "help": "of the network's grid, z y x; default: planned"},
    "memory": {"metavar": "BYTES", "help": 'that training may take, "8GB"; default: half of this machine\'s'},
    "step_seconds": {"type": float, "metavar": "S", "help": "a planned patch takes so long a step (default 4)"},
    "epochs": {"type": int, "metavar": "N", "help": f"(default {Settings.epochs})"},
    "steps_per_epoch": {"type": int, "metavar": "N", "help": f"(default {Settings.steps_per_epoch})"},
    "optimizer": {"choices": tuple(OPTIMIZERS), "help": "(default sgd, with Nesterov's momentum)"},
    "learning_rate": {"type": float, "metavar": "R", "help": "of the first step (default: sgd 0.01, adamw 0.0003)"},
    "precision": {"choices": PRECISIONS, "help": "(default float32)"},
    "patience": {"type": int, "metavar": "N", "help": "stop after N epochs without a better validation Dice"},
    "seed": {"type": int, "metavar": "N", "help": "of weights, patches and augmentation (default 0)"},
    "engine": {"choices": ENGINES, "help": "whose kernels: to compare (default convoxel)"},
    "workers": {"type": int, "metavar": "N", "help": "threads that prepare patches (default: half of the cores)"},
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `convoxel train`."""
    parser.add_argument("dataset", type=Path, metavar="DATASET",
                        help="folder of nnU-Net or the Decathlon: dataset.json, imagesTr, labelsTr")  # fmt: skip
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="OUT",
                        help="folder of the run; a run that was stopped goes on")  # fmt: skip
    parser.add_argument("--folds", nargs="+", default=["0"], metavar="FOLD",
                        help="0 1 ... of the cross-validation, or all: every case (default: 0)")  # fmt: skip
    parser.add_argument("--settings", type=Path, metavar="FILE",
                        help="YAML, as OUT/settings.yaml; flags come on top")  # fmt: skip
    parser.add_argument(
        "--cache", type=Path, metavar="FOLDER", help="for scans made ready (default: OUT/cache)"
    )
    parser.add_argument(
        "--plan-only", action="store_true", help="say what would be trained, and why; then stop"
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress bars")
    group = parser.add_argument_group("settings (all of them: docs/train.md)")
    for name, how in _FLAGS.items():
        group.add_argument(f"--{name.replace('_', '-')}", dest=name, default=None, **how)
    for name, hint in typing.get_type_hints(Settings).items():
        if hint is bool:
            group.add_argument(f"--{name.replace('_', '-')}", dest=name, default=None,
                               action=argparse.BooleanOptionalAction,
                               help=f"(default: {'on' if getattr(Settings, name) else 'off'})")  # fmt: skip


def run_command(args: argparse.Namespace) -> int:
    """`convoxel train`: 0 when every fold is trained and judged; 130 when it was stopped, and can go on."""
    given: dict[str, Any] = {}
    if args.settings is not None:
        given = read_settings(args.settings)
        settings_from(given, str(args.settings))
    given |= {name: getattr(args, name) for name in typing.get_type_hints(Settings)
              if getattr(args, name, None) is not None}  # fmt: skip
    memory.keep_freed()
    with processes() as group, _asked_to_stop() as stop:
        say = print_now if group.is_first else _silent
        show = not args.quiet and group.is_first and sys.stderr.isatty()
        run = running.open_run(args.dataset, args.out, given, cache=args.cache, group=group, progress=show)
        say("\n".join(run.plan.reasons))
        say(_forecast(run))
        if args.plan_only:
            return 0
        try:
            for fold in args.folds:
                model = running.train(run, fold, group=group, stop=stop, say=say, progress=show)
                if group.is_first:
                    _judge(run, fold, model, show)
        except Stopped:
            say(f"stopped; the same command goes on: convoxel train {args.dataset} -o {args.out}")
            return 130
    return 0


def _forecast(run: running.Run) -> str:
    settings, plan = run.settings, run.plan
    whole = running.duration(settings.total_steps * plan.step_seconds)
    return (
        f"{settings.epochs} epochs of {settings.steps_per_epoch} steps, about {plan.step_seconds:.1f} s each: {whole} "
        f"a fold, {plan.memory_bytes / 1e9:.1f} GB of memory; everything used is in {run.folder / 'settings.yaml'}"
    )


def _judge(run: running.Run, fold: str, model: Path, show: bool) -> None:
    result = running.judge(run, fold, progress=show)
    if result is not None:
        print_now(f"\nfold {fold}, held-out scans:\n{result}\n")
    print_now(f"{model}: convoxel predict {model} SCAN -o OUT")


def print_now(line: str) -> None:
    """To stdout at once, also where that is a file."""
    print(line, flush=True)


def _silent(_: str) -> None:
    """The other processes say nothing."""


@contextmanager
def _asked_to_stop() -> Iterator[Any]:
    """A function that is true once the user (Ctrl-C) or the system (SIGTERM) wants an end; the second time it comes
    at once."""
    asked: list[int] = []

    def ask(number: int, _: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        print("\nstops after this step (again: at once)", file=sys.stderr, flush=True)

    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, ask) for number in signals]
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


__all__ = ["Processes", "add_arguments", "run_command"]
