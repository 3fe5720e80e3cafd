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
from .processes import processes
from .settings import ENGINES, NETWORKS, OPTIMIZERS, PRECISIONS, Settings, read_settings, settings_from

_HELP = {  # of the settings that need more than a name
    "rank": "3: volumes (default), 2: slices",
    "network": "U-Net of plain (default) or residual encoder",
    "base_features": "channels at full resolution",
    "patch_size": "voxels, z y x (2-D: y x); default: planned",
    "batch_size": "patches a step; default: planned",
    "spacing": "mm, of the network's grid, z y x (2-D: y x); default: planned",
    "memory": 'that training may take, "8GB"; default: half of this machine\'s',
    "step_seconds": "a patch is planned for steps of so many seconds",
    "learning_rate": "of the first step; default: sgd 0.01, adamw 0.0003",
    "patience": "stop after so many epochs without a better validation Dice",
    "checkpointing": "compute activations twice rather than keep them",
    "engine": "whose kernels, to compare",
    "workers": "threads that prepare patches; default: half of the cores",
}
_CHOICES = {
    "rank": (2, 3),
    "network": NETWORKS,
    "optimizer": tuple(OPTIMIZERS),
    "precision": PRECISIONS,
    "engine": ENGINES,
}


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
    for name, hint in typing.get_type_hints(Settings).items():
        group.add_argument(f"--{name.replace('_', '-')}", dest=name, default=None, **_flag(name, hint))


def _flag(name: str, hint: Any) -> dict[str, Any]:
    """How argparse takes a setting; what it may be is checked where all settings are."""
    kind = next(k for k in typing.get_args(hint) or (hint,) if k is not type(None))
    default = getattr(Settings, name)
    words = _HELP.get(name, "")
    if default is not None and "default" not in words:
        shown = (
            ("on" if default else "off") if kind is bool else f"{default:.4g}" if kind is float else default
        )
        words = f"{words} (default: {shown})".strip()
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction, "help": words}
    several = typing.get_args(kind)[0] if typing.get_origin(kind) is tuple else None
    return {"type": several or kind, "nargs": "+" if several else None, "choices": _CHOICES.get(name), "help": words,
            "metavar": None if name in _CHOICES else "N" if (several or kind) is int else "X"}  # fmt: skip


def run_command(args: argparse.Namespace) -> int:
    """`convoxel train`: 0 when every fold is trained and judged; 130 when it was stopped, and can go on."""
    given: dict[str, Any] = {}
    if args.settings is not None:
        given = read_settings(args.settings)
        settings_from(given, str(args.settings))
    given |= {name: getattr(args, name) for name in typing.get_type_hints(Settings)
              if getattr(args, name, None) is not None}  # fmt: skip
    stop = _Stop()
    with processes() as group, stop.listening():
        say = print_now if group.is_first else _silent
        show = not args.quiet and group.is_first and sys.stderr.isatty()
        run = running.open_run(args.dataset, args.out, given, cache=args.cache, group=group, progress=show)
        memory.keep_freed(run.settings.engine == "convoxel")  # torch as its users run it
        say("\n".join(run.plan.reasons))
        say(f"Everything used is in {run.folder / 'settings.yaml'}, this plan in plan.json.")
        if args.plan_only:
            return 0
        try:
            for fold in args.folds:
                model = running.train(run, fold, group=group, stop=stop, say=say, progress=show)
                stop.stepping = False
                if group.is_first:
                    _judge(run, fold, model, show)
        except Stopped:
            say(f"stopped; the same command goes on: convoxel train {args.dataset} -o {args.out}")
            return 130
    return 0


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


class _Stop:
    """Ctrl-C and SIGTERM: heard after a step where there are steps; at once where there are none, or when repeated."""

    def __init__(self) -> None:
        self.stepping = self.asked = False

    def __call__(self) -> bool:
        """Whether to stop after this step."""
        self.stepping = True
        return self.asked

    def ask(self, number: int, frame: Any) -> None:
        if self.asked or not self.stepping:
            raise KeyboardInterrupt
        self.asked = True
        print("\nstops after this step (again: at once)", file=sys.stderr, flush=True)

    @contextmanager
    def listening(self) -> Iterator[None]:
        signals = (signal.SIGINT, signal.SIGTERM)
        before = [signal.signal(number, self.ask) for number in signals]
        try:
            yield
        finally:
            for number, handler in zip(signals, before, strict=True):
                signal.signal(number, handler)
