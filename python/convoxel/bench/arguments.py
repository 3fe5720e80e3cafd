"""Arguments that several works of `convoxel bench` share, and the checks of their values."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from .. import memory, runtime
from . import plot, results
from .process import TORCH_CAPS, environment, in_process


def at_least_one(text: str) -> int:
    """A number from 1 on, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, received {text}")
    return number


def sizes(text: str) -> tuple[int, ...]:
    """ "96,96,96" as numbers, for argparse."""
    return tuple(at_least_one(n) for n in text.split(","))


def words(allowed: tuple[str, ...]) -> Callable[[str], tuple[str, ...]]:
    """Words of `allowed`, separated by commas, for argparse."""

    def several(text: str) -> tuple[str, ...]:
        found = tuple(text.split(","))
        if unknown := set(found) - set(allowed):
            raise argparse.ArgumentTypeError(
                f"{', '.join(sorted(unknown))} unknown, expected of {','.join(allowed)}"
            )
        return found

    return several


def file(text: str) -> Path:
    """A file that can be written, for argparse."""
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"the folder {path.parent} does not exist; create it first")
    return path


def add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=file, metavar="FILE", help="also write the results as JSON")
    parser.add_argument("--plot", type=file, metavar="FILE", help="also draw them (.png, .svg, .pdf)")


def finish(args: argparse.Namespace, found: results.Results) -> None:
    """Writes and draws what was asked for."""
    results.write(args.json, found)
    plot.draw(args.plot, found)


def add_machine(parser: argparse.ArgumentParser, repeats: int) -> None:
    parser.add_argument(
        "--repeats", type=at_least_one, default=repeats, help="timed calls of each (default: %(default)s)"
    )
    parser.add_argument("--threads", type=at_least_one, help="threads of all engines (default: torch's)")
    parser.add_argument(
        "--isa",
        choices=list(TORCH_CAPS),
        help="instruction set of ours, and the most that torch may use (default: the best)",
    )


def start(run: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """`run(args)`; at an --isa in a fresh process, since torch reads its cap when it is imported. Refuses now what
    could only fail after the measurements."""
    plot.check(args.plot)
    plot.check(getattr(args, "roofline", None), "--roofline")
    if getattr(args, "isa", None) is None:
        return run(args)
    if args.isa not in runtime.isas():
        raise ValueError(f"--isa: this machine has {', '.join(runtime.isas())}, received {args.isa}")
    return in_process(run, args, variables=environment(args.isa))


@contextmanager
def measuring(threads: int | None, precision: str | None = None) -> Iterator[None]:
    """Strict mode, freed memory kept, and these settings, while it measures."""
    before = runtime.is_strict(), torch.get_num_threads(), runtime.get_float32_conv_precision()
    runtime.set_strict(True)
    torch.set_num_threads(threads or before[1])
    runtime.set_float32_conv_precision(precision or before[2])
    memory.keep_freed(True)
    try:
        yield
    finally:
        runtime.set_strict(before[0])
        torch.set_num_threads(before[1])
        runtime.set_float32_conv_precision(before[2])
