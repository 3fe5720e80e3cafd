"""The command `convoxel`: one subcommand per kind of work.

Exit code 0 only when the work is done; 1 when it failed, with one line of plain words on stderr; 2 for a
command line that cannot be understood; 130 when the user stopped it. A Python traceback is for faults of
convoxel, never for a user's mistake, unless --traceback or CONVOXEL_TRACEBACK=1 asks for it.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NamedTuple

from . import bench, demo, doctor, evaluation, phantom, runtime
from .importers import commands as importing
from .training import commands as training

USER_ERRORS = (ValueError, TypeError, OSError, ImportError, MemoryError, FloatingPointError)


class Command(NamedTuple):
    """A subcommand: `add_arguments` fills its parser, `run` does the work and returns the exit code."""

    name: str
    summary: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def _info_arguments(parser: argparse.ArgumentParser) -> None:
    """`info` needs nothing."""


def _info(_: argparse.Namespace) -> int:
    print(runtime.info())
    return 0


COMMANDS = (
    Command("info", "print versions, instruction sets, threads and CUDA", _info_arguments, _info),
    Command(
        "bench",
        "compare convoxel with torch and other engines on this machine",
        lambda parser: bench.add_arguments(parser, [_shared()]),
        bench.run,
    ),
    Command(
        "train",
        "train a network on a folder of scans and labels",
        training.add_arguments,
        training.run_command,
    ),
    Command(
        "predict",
        "segment scans with a trained nnU-Net or MONAI model",
        importing.add_predict_arguments,
        importing.run_predict,
    ),
    Command(
        "import",
        "make a trained model one safe file: weights and plain settings",
        importing.add_import_arguments,
        importing.run_import,
    ),
    Command(
        "evaluate",
        "score segmentations against the truth",
        evaluation.add_arguments,
        evaluation.run_command,
    ),
    Command("demo", "train a 3D U-Net on a real MRI and check it", demo.add_arguments, demo.run_command),
    Command("doctor", "say what is wrong with scans or a dataset", doctor.add_arguments, doctor.run_command),
    Command(
        "phantom", "make a dataset of scans whose truth is known", phantom.add_arguments, phantom.run_command
    ),
)


def _shared() -> argparse.ArgumentParser:
    """What every command takes."""
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--traceback",
        action="store_true",
        default=argparse.SUPPRESS,
        help="on an error show where in the program it happened (also CONVOXEL_TRACEBACK=1)",
    )
    return shared


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    from . import __version__

    shared = _shared()
    parser = argparse.ArgumentParser(
        prog="convoxel",
        description="Segmentation networks for medical images on this machine: see `convoxel COMMAND --help`.",
        parents=[shared],
    )
    parser.add_argument("--version", action="version", version=f"convoxel {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        summary = command.summary[0].upper() + command.summary[1:] + "."
        sub = commands.add_parser(command.name, help=command.summary, description=summary, parents=[shared])
        command.add_arguments(sub)
        sub.set_defaults(run=command.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (None: the process's own) and returns the exit code.

    >>> main(["info"])
    0
    """
    try:
        args = build_parser().parse_args(bench.complete(sys.argv[1:] if argv is None else argv))
    except SystemExit as stop:  # argparse has printed the help or the mistake
        return int(stop.code or 0)
    try:
        return int(args.run(args))
    except KeyboardInterrupt:
        print("convoxel: stopped", file=sys.stderr)
        return 130
    except USER_ERRORS as error:
        if getattr(args, "traceback", False) or os.environ.get("CONVOXEL_TRACEBACK") == "1":
            traceback.print_exc()
        else:
            print(f"convoxel {args.command}: {plain(error)}", file=sys.stderr)
        return 1


def plain(error: BaseException) -> str:
    """An error as one line of words.

    >>> plain(FileNotFoundError(2, "No such file or directory", "brain.nii"))
    'brain.nii: No such file or directory'
    """
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename is not None else ""
        return f"{where}{error.strerror}"
    if isinstance(error, MemoryError):
        return f"not enough memory ({error})" if str(error) else "not enough memory"
    return " ".join(str(error).split()) or type(error).__name__
