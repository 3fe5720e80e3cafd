"""`convoxel bench`: our layers against torch's on this machine, with the error against float64 beside the time;
whole networks are in `bench_network`.

Ours and torch's are timed in turn, one call each, and the median is printed; torch runs in both memory formats
and its better one counts. Both get freed memory kept (`memory.keep_freed`), so that neither pays page faults.
The fraction of peak is of the FMA rate measured between these calls, since clocks fall under load; GFLOP/s count
the definition's arithmetic.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as T
from torch import Tensor

from . import _C, bench_network, memory, runtime
from . import functional as F
from .geometry import Problem

# The convolutions that carry nnU-Net's 3-D network at a 128^3 patch: 73 % of its arithmetic.
HOT = (
    "conv n1 c32 k32 i128x128x128 f3x3x3 p1x1x1",
    "conv n1 c64 k32 i128x128x128 f3x3x3 p1x1x1",
    "conv n1 c64 k64 i64x64x64 f3x3x3 p1x1x1",
    "conv n1 c128 k64 i64x64x64 f3x3x3 p1x1x1",
    "conv n1 c128 k128 i32x32x32 f3x3x3 p1x1x1",
    "conv n1 c256 k256 i16x16x16 f3x3x3 p1x1x1",
)
# What else such networks have: first layer, stride 2, deep and small, up, head, depthwise, 2-D.
OTHERS = (
    "conv n1 c1 k32 i128x128x128 f3x3x3 p1x1x1",
    "conv n1 c32 k64 i128x128x128 f3x3x3 s2x2x2 p1x1x1",
    "conv n1 c320 k320 i8x8x8 f3x3x3 p1x1x1",
    "conv n1 c320 k320 i4x4x4 f3x3x3 p1x1x1",
    "conv_transpose n1 c64 k32 i64x64x64 f2x2x2 s2x2x2",
    "conv n1 c32 k3 i96x96x96 f1x1x1",
    "conv n1 c32 k32 i96x96x96 f3x3x3 p1x1x1 g32",
    "conv n4 c32 k32 i256x256 f3x3 p1x1",
    "conv n4 c128 k128 i64x64 f3x3 p1x1",
)
LISTS = {"hot": HOT, "layers": HOT + OTHERS}
PASSES = ("forward", "input_grad", "weight_grad")
CHECKED_CHANNELS = 4  # of the result are compared with float64, in CHECKED_PLANES planes and the edge
CHECKED_PLANES = 4


@dataclass
class Row:
    problem: str
    direction: str
    ms: float
    torch_ms: float
    gflops: float
    peak_fraction: float
    error: float  # relative L2 against float64
    torch_error: float

    @property
    def ratio(self) -> float:
        return self.torch_ms / self.ms


def fma_peak(seconds: float = 0.02) -> float:
    """GFLOP/s of independent fused multiply-adds on all threads, for about that long after a first estimate."""
    threads, rounds = torch.get_num_threads(), 100_000
    while True:
        start = time.perf_counter()
        flops = _C.fma_peak(rounds, threads)
        spent = time.perf_counter() - start
        if spent > seconds / 2:
            return flops / spent / 1e9
        rounds = round(rounds * min(10, seconds / spent))


def convolution(module: Any, p: Problem, x: Tensor, w: Tensor) -> Tensor:
    function = getattr(module, f"{p.op}{p.rank}d")
    if p.transposed:
        return function(x, w, None, p.s, p.p, p.o, p.g, p.d)
    return function(x, w, None, p.s, p.p, p.d, p.g)


def steps(module: Any, p: Problem, x: Tensor, w: Tensor, dy: Tensor) -> dict[str, Callable[[], Tensor]]:
    """A call for each direction; each gradient alone, by a graph that is kept."""

    def forward() -> Tensor:
        with torch.no_grad():
            return convolution(module, p, x, w)

    def gradient(at: int) -> Callable[[], Tensor]:
        leaves = [x.detach(), w.detach()]
        leaves[at].requires_grad_()
        y = convolution(module, p, *leaves)
        return lambda: torch.autograd.grad(y, leaves[at], dy, retain_graph=True)[0]

    return {"forward": forward, "input_grad": gradient(0), "weight_grad": gradient(1)}


def exact(p: Problem, direction: str, x: Tensor, w: Tensor, dy: Tensor) -> Tensor:
    """The first part of the result in float64, along every axis, by torch's convolution, which is slow there:
    of y and dx a few channels of a few planes, of dw a few channels by a few (they sum over all voxels)."""
    c, k = p.c // p.g, p.k // p.g  # the first group is a convolution of its own
    p = replace(p, g=1, c=c, k=k)
    x, dy, w = x[:, :c].double(), dy[:, :k].double(), (w[:c] if p.transposed else w[:k]).double()
    out_axis, in_axis = (1, 0) if p.transposed else (0, 1)
    c, k = min(c, CHECKED_CHANNELS), min(k, CHECKED_CHANNELS)
    if direction == "weight_grad":
        w = w.narrow(out_axis, 0, k).narrow(in_axis, 0, c).requires_grad_()
        return torch.autograd.grad(convolution(T, p, x[:, :c], w), w, dy[:, :k])[0]
    edge = p.d[0] * (p.f[0] - 1) + p.p[0] + p.o[0] + 1  # planes next to a cut may lack their neighbours
    planes = min(p.i[0], p.s[0] * (CHECKED_PLANES + 2 * edge))
    whole = planes == p.i[0]
    p = replace(p, i=(planes, *p.i[1:]))
    x, dy = x[:, :, :planes], dy[:, :, : p.y_shape[2]]
    if direction == "forward":
        part = convolution(T, p, x, w.narrow(out_axis, 0, k))
    else:
        x = x[:, :c].requires_grad_()
        part = torch.autograd.grad(convolution(T, p, x, w.narrow(in_axis, 0, c)), x, dy)[0]
    return part if whole else part[:, :, :-edge]


def relative_error(result: Tensor, reference: Tensor) -> float:
    part = result[tuple(slice(n) for n in reference.shape)].double()
    return ((part - reference).norm() / reference.norm()).item()


def timed(call: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def layouts(p: Problem, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Contiguous, then channels-last where torch has it."""
    yield tensors
    formats = {2: torch.channels_last, 3: torch.channels_last_3d}
    if p.rank in formats:
        # copied, since torch takes one channel for channels-last by its strides alone
        yield tuple(torch.empty_like(t, memory_format=formats[p.rank]).copy_(t) for t in tensors)


def measure(p: Problem, directions: tuple[str, ...], repeats: int) -> Iterator[Row]:
    """A Row for each direction; ours channels-last, the layout that networks run in inside convoxel."""
    generator = torch.Generator().manual_seed(0)
    x, w, dy = (torch.randn(s, generator=generator) for s in (p.x_shape, p.w_shape, p.y_shape))
    w *= (2 / (w[0].numel())) ** 0.5
    x, w, dy = (t.to(p.torch_dtype) for t in (x, w, dy))
    formats = list(layouts(p, x, w, dy))
    last = formats[-1]
    ours = steps(F, p, last[0], w, last[2])
    theirs = [steps(T, p, *f) for f in formats]
    for direction in directions:
        reference = exact(p, direction, x, w, dy)
        errors = [relative_error(s[direction](), reference) for s in (ours, theirs[-1])]
        for step in (ours, *theirs):
            step[direction]()
        turns = [(fma_peak(), *(timed(s[direction]) for s in (ours, *theirs))) for _ in range(repeats)]
        peak, ms, *others = (statistics.median(column) for column in zip(*turns, strict=True))
        gflops = p.flops / ms / 1e6
        yield Row(str(p), direction, ms, min(others), gflops, gflops / peak, *errors)


HEADER = (
    f"{'problem':<55} {'pass':<12} {'ms':>8} {'torch':>8} {'gain':>6} {'GFLOP/s':>8} {'peak':>5} "
    f"{'error':>8} {'torch':>8}"
)


def line(r: Row) -> str:
    return (
        f"{r.problem:<55} {r.direction:<12} {r.ms:8.2f} {r.torch_ms:8.2f} {r.ratio:5.2f}x {r.gflops:8.0f} "
        f"{r.peak_fraction:5.2f} {r.error:8.1e} {r.torch_error:8.1e}"
    )


def geometric_mean(values: list[float]) -> float:
    return statistics.geometric_mean(values) if values else float("nan")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what",
        nargs="?",
        choices=[*LISTS, "network"],
        default="hot",
        help="list of layers (default: hot), or a whole network",
    )
    parser.add_argument("--problem", action="append", metavar="STRING",
                        help="time this problem instead, e.g. 'conv n1 c32 k32 i64x64 f3x3'; repeatable")  # fmt: skip
    parser.add_argument("--passes", default=",".join(PASSES), help="of " + ", ".join(PASSES))
    parser.add_argument("--dtype", choices=list(Problem.DTYPES), help="override the problems' dtype")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of each (default: 5)")
    parser.add_argument("--threads", type=int, help="threads of both (default: torch's)")
    parser.add_argument("--model", choices=list(bench_network.NETWORKS), default="nnunet3d",
                        help="of bench network (default: nnunet3d)")  # fmt: skip
    parser.add_argument("--size", type=sizes, metavar="D,H,W", help="of bench network: voxels of a patch")
    parser.add_argument("--batch", type=int, help="of bench network: images of a batch")
    parser.add_argument("--rounds", type=int, default=2, help="of bench network: processes each (default: 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results as JSON")


def sizes(text: str) -> tuple[int, ...]:
    """ "96,96,96" as numbers; ValueError (argparse says so) for anything else."""
    found = tuple(int(n) for n in text.split(","))
    if min(found) < 1:
        raise ValueError(f"expected sizes of at least 1, received {text}")
    return found


def run(args: argparse.Namespace) -> int:
    directions = tuple(args.passes.split(","))
    if unknown := set(directions) - set(PASSES):
        raise ValueError(f"--passes: {', '.join(sorted(unknown))} unknown, expected {', '.join(PASSES)}")
    if args.repeats < 1:
        raise ValueError(f"--repeats: expected at least 1, received {args.repeats}")
    if args.threads is not None and args.threads < 1:
        raise ValueError(f"--threads: expected at least 1, received {args.threads}")
    if args.json and not args.json.parent.is_dir():
        raise ValueError(f"--json: the folder {args.json.parent} does not exist; create it first")
    if min(args.rounds, args.batch or 1) < 1:
        raise ValueError(f"--rounds, --batch: expected at least 1, received {args.rounds}, {args.batch}")
    problems = [Problem.parse(text) for text in args.problem or LISTS.get(args.what, ())]
    if args.dtype:
        problems = [replace(p, dtype=args.dtype) for p in problems]
    if args.threads:
        torch.set_num_threads(args.threads)
    kept = memory.keep_freed(True)
    machine = {**runtime.info(), "FMA peak, GFLOP/s": round(fma_peak()), "freed memory kept": kept}
    print("\n".join(f"{k:<18} {v}" for k, v in machine.items()), "", sep="\n", flush=True)
    rows = []
    if args.what == "network" and not args.problem:
        how = args.size, args.batch, args.rounds, args.repeats, torch.get_num_threads()
        write(args.json, machine, bench_network.run(args.model, *how))
        return 0
    print(HEADER)
    for p in problems:
        for row in measure(p, directions, args.repeats):
            rows.append(row)
            print(line(row), flush=True)
    for direction in directions:
        mean = geometric_mean([r.ratio for r in rows if r.direction == direction])
        print(f"geometric mean of the gain over torch, {direction}: {mean:.2f}x")
    print(f"FMA peak after the run: {fma_peak():.0f} GFLOP/s")
    write(args.json, machine, [{**asdict(r), "gain": r.ratio} for r in rows])
    return 0


def write(path: Path | None, machine: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    if path:
        path.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1, default=str) + "\n")
