"""`convoxel bench scaling`: time against volume, and against threads.

A convolution of 32 channels to 32 and a small U-Net (three stages of 8, 16 and 32 channels), forward, on cubes of
growing size. ms = fixed + slope * Mvoxel is fitted to the relative errors, so that the small cubes count as much as
the large; the largest deviation from it says whether cost grows as the work grows. --json keeps every time.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor

from .. import functional as F
from ..geometry import Problem
from . import results
from .arguments import add_output, at_least_one, finish, measuring, start
from .fit import lines
from .measure import in_turn, spread, stopwatch
from .networks import build
from .operators import Results, channels_last, steps, tensors

SUMMARY = "time against volume and threads"
SIZES = (32, 48, 64, 96, 128, 160, 192)
CONV, NETWORK = "conv 32 to 32", "small U-Net"


@dataclass
class Row:
    work: str
    size: int  # voxels along an edge of the cube
    threads: int
    ms: float
    spread: float
    ms_per_mvoxel: float


def convolution(size: int) -> Callable[[], Results]:
    p = Problem.parse(f"conv n1 c32 k32 i{size}x{size}x{size} f3x3x3 p1x1x1")
    return steps(F, p, tensors(p).map(channels_last))["forward"]


def network(size: int) -> Callable[[], Results]:
    model, x, _ = build("small", (size,) * 3, 1, False)
    cast(Any, model).to(memory_format=torch.channels_last_3d)
    x = channels_last(x)

    def forward() -> tuple[Tensor]:
        with torch.no_grad():
            return (model(x),)

    return forward


WORKS = {CONV: convolution, NETWORK: network}


def measure(sizes: Sequence[int], threads: Sequence[int], repeats: int) -> Iterator[Row]:
    """A Row for each work, size and number of threads."""
    for work, make in WORKS.items():
        for size in sizes:
            call = make(size)
            for count in threads:
                torch.set_num_threads(count)
                times = in_turn({"": stopwatch(call)}, repeats)[""]
                ms = statistics.median(times)
                yield Row(work, size, count, ms, spread(times), ms / (size**3 / 1e6))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    def numbers(text: str) -> tuple[int, ...]:
        return tuple(at_least_one(n) for n in text.split(","))

    parser.add_argument("--sizes", type=numbers, default=SIZES, metavar="N,N,…",
                        help="edges of the cubes in voxels, multiples of 4 (default: 32 to 192)")  # fmt: skip
    parser.add_argument("--threads", type=numbers, default=(1, 2), metavar="N,N", help="(default: 1,2)")
    parser.add_argument("--repeats", type=at_least_one, default=3, help="timed calls of each (default: 3)")
    add_output(parser)


def run(args: argparse.Namespace) -> int:
    return start(time_cubes, args)


def time_cubes(args: argparse.Namespace) -> int:
    if len(set(args.sizes)) < 2 or any(size % 4 for size in args.sizes):
        raise ValueError(
            f"--sizes: expected two or more multiples of 4, received {','.join(map(str, args.sizes))}"
        )
    with measuring(max(args.threads)):
        machine = results.machine()
        print(f"{'work':<14} {'size':>5} {'threads':>7} {'ms':>10} {'spread':>6} {'ms/Mvoxel':>9}")
        rows = []
        for row in measure(sorted(set(args.sizes)), args.threads, args.repeats):
            rows.append(row)
            print(f"{row.work:<14} {row.size:>3}^3 {row.threads:>7} {row.ms:10.2f} {row.spread:6.1%} "
                  f"{row.ms_per_mvoxel:9.2f}", flush=True)  # fmt: skip
    for (work, count), line in lines([asdict(r) for r in rows]).items():
        print(f"{work}, {count} threads: {line.fixed:.2f} ms + {line.slope:.2f} ms a Mvoxel, "
              f"at most {line.deviation:.0%} from the line")  # fmt: skip
    finish(args, results.Results("scaling", machine, [asdict(r) for r in rows]))
    return 0
