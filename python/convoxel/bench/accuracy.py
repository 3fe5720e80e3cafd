"""`convoxel bench accuracy`: the error of every convolution algorithm against float64, over the number of channels.

Normal data, weights as He scales them, C channels to C, three taps an axis. The exact results are sums of products of
matrices in float64, one a tap, which no convolution code has a part in. Each algorithm is forced, Winograd's with each
of its tiles; `high` and `highest` are what the precision settings choose by themselves. In bfloat16 the exact result
is that of the rounded data, and no bound is promised: rounding y alone costs 1.7e-3.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import product

import torch
import torch.nn.functional as T

from .. import functional as F
from .. import runtime
from ..geometry import Problem
from ..ops import conv, route
from . import results
from .arguments import add_output, at_least_one, finish, measuring, start, words
from .measure import served
from .operators import Results, Tensors, errors, passes, steps, tensors

SUMMARY = "print the error of every convolution algorithm against float64"
CHANNELS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 320, 512, 640)
SIZES = {2: "i19x20 f3x3 p1x1", 3: "i10x9x11 f3x3x3 p1x1x1"}
BOUND = 1e-5  # relative L2, of precision `high`
EPS = 2.0**-23


@dataclass
class Row:
    """Relative errors of one algorithm (`operators.errors`), and torch's own."""

    problem: str
    channels: int
    rank: int
    direction: str
    algorithm: str
    error: float
    max_error: float
    torch_error: float
    torch_max_error: float


def exact(p: Problem, t: Tensors) -> dict[str, Results]:
    """Every pass in float64: y = sum over taps of w[tap] (K, C) x[shifted by tap] (C, voxels); stride 1, one group
    or C of them."""
    if t.w is None:
        raise ValueError(f"{p} has no weight")
    x, w = t.x.double().requires_grad_(), t.w.double().requires_grad_()
    padded = T.pad(x, [p for size in reversed(p.p) for p in (size, size)])
    weights = w.flatten(2).permute(2, 0, 1)  # (taps, K, C)
    if p.g > 1:
        weights = torch.diag_embed(weights.squeeze(2))
    y = torch.zeros(p.n, p.k, math.prod(p.y_shape[2:]), dtype=torch.float64)
    if t.b is not None:
        y = y + t.b.double().view(1, -1, 1)
    for at, tap in enumerate(product(*map(range, p.f))):
        shifted = padded
        for axis, (first, size) in enumerate(zip(tap, p.y_shape[2:], strict=True), 2):
            shifted = shifted.narrow(axis, first, size)
        y = y + weights[at] @ shifted.flatten(2)
    y = y.view(p.y_shape)
    dx, dw = torch.autograd.grad(y, (x, w), t.dy.double())
    return {"forward": (y.detach(),), "input_grad": (dx,), "weight_grad": (dw,)}


@contextmanager
def forced(algorithm: str, tile: route.Tile | None = None, precision: str = "high") -> Iterator[None]:
    """This algorithm wherever it is possible, Winograd's with this tile alone."""
    before, tiles = runtime.get_conv_algorithm(), route.tiles
    chosen_precision = runtime.get_float32_conv_precision()
    runtime.set_conv_algorithm(algorithm)
    runtime.set_float32_conv_precision(precision)
    if tile:
        route.tiles = lambda taps: iter([tile])
    conv.planned.cache_clear()
    try:
        yield
    finally:
        route.tiles = tiles
        runtime.set_conv_algorithm(before)
        runtime.set_float32_conv_precision(chosen_precision)
        conv.planned.cache_clear()


def ways(p: Problem) -> Iterator[tuple[str, tuple[str, route.Tile | None, str]]]:
    """Names of what is compared, with the arguments of `forced`."""
    if p.g > 1:
        yield "depthwise", ("auto", None, "high")
        return
    for algorithm in runtime.ALGORITHMS[1:]:
        for tile in route.tiles(p.f if p.rank == 3 else (1, *p.f)) if algorithm == "winograd" else [None]:
            yield algorithm + (" " + "x".join(map(str, tile)) if tile else ""), (algorithm, tile, "high")
    yield "high", ("auto", None, "high")
    yield "highest", ("auto", None, "highest")


def measure(p: Problem, directions: tuple[str, ...]) -> Iterator[Row]:
    """A Row for each pass and each algorithm that serves it."""
    t = tensors(p)
    reference = exact(p, t)
    for direction in directions:
        by_torch = errors(steps(T, p, t)[direction](), reference[direction])
        for name, how in ways(p):
            with forced(*how):
                by, found = served(steps(F, p, t)[direction])
            if name in ("high", "highest") or by.split()[0] == name.split()[0]:
                mine = errors(found, reference[direction])
                yield Row(str(p), p.c, p.rank, direction, name, *mine, *by_torch)


def broken(row: Row) -> str:
    """Which promise of `set_float32_conv_precision` the row breaks, or nothing."""
    if row.problem.endswith("bf16"):
        return ""
    if row.algorithm == "highest":
        least = EPS * (4 if row.direction == "forward" else 8)
        most = max(2 * row.torch_error, least)
        return f"highest: expected at most {most:.1e}" if row.error > most else ""
    if row.algorithm == "high" or row.algorithm.startswith("winograd"):
        return f"high: expected at most {BOUND:.0e}" if row.error > BOUND else ""
    return ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--channels",
        type=lambda text: tuple(at_least_one(n) for n in text.split(",")),
        default=CHANNELS,
        metavar="C,C,…",
        help="numbers of channels (default: 1 to 640)",
    )
    parser.add_argument("--dtype", choices=["f32", "bf16"], default="f32", help="(default: f32)")
    every = passes(Problem())
    parser.add_argument("--passes", type=words(every), default=every, help="of " + ",".join(every))
    parser.add_argument("--threads", type=at_least_one, help="threads (default: torch's)")
    add_output(parser)


def run(args: argparse.Namespace) -> int:
    return start(print_errors, args)


def print_errors(args: argparse.Namespace) -> int:
    rows: list[Row] = []
    with measuring(args.threads):
        machine = results.machine()
        for rank, direction in product(SIZES, args.passes):
            table: list[list[Row]] = []
            for c in args.channels:
                dense = f"conv n1 c{c} k{c} {SIZES[rank]}"
                texts = [dense] + [f"{dense} g{c}"] * (c > 1)
                problems = [replace(Problem.parse(text), dtype=args.dtype) for text in texts]
                table.append([row for p in problems for row in measure(p, (direction,))])
            show(f"{rank}-D, {direction}: relative L2 error (largest error)", table)
            rows += [row for line in table for row in line]
    finish(args, results.Results("accuracy", machine, [asdict(row) for row in rows]))
    wrong = [
        f"{r.problem} {r.direction} {r.algorithm}: {r.error:.1e}, {why}" for r in rows if (why := broken(r))
    ]
    worst = max(r.error for r in rows if r.algorithm == "high")
    bound = f" (bound {BOUND:.0e})" if args.dtype == "f32" else ""
    print(*wrong, f"largest relative L2 error at precision high: {worst:.1e}{bound}", sep="\n")
    return 1 if wrong else 0


def show(title: str, table: list[list[Row]]) -> None:
    """A line for each number of channels, a column for each algorithm."""
    names = list(dict.fromkeys(r.algorithm for line in table for r in line))
    print(title, f"{'C':>4} {'torch':>17} " + " ".join(f"{name:>17}" for name in names), sep="\n")
    for line in table:
        found = {r.algorithm: f"{r.error:.1e} ({r.max_error:.1e})" for r in line}
        torch_s = f"{line[0].torch_error:.1e} ({line[0].torch_max_error:.1e})"
        columns = " ".join(f"{found.get(name, '-'):>17}" for name in names)
        print(f"{line[0].channels:>4} {torch_s:>17} {columns}", flush=True)
    print()
