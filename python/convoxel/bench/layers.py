"""`convoxel bench layers`: lists of layers, or pasted problems, as a table with a geometric mean for each pass."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace

from .. import runtime
from ..geometry import Problem
from . import results, roofline
from .arguments import add_machine, add_output, file, finish, measuring, start, words
from .lists import LISTS
from .measure import Row, Settings, measure
from .operators import PASSES, passes
from .peers import LAYER_PEERS, NO_BFLOAT16, PEERS, check

SUMMARY = "time lists of layers, or pasted problems, beside torch's"
LAYOUTS: dict[str, tuple[bool, ...]] = {"last": (True,), "contiguous": (False,), "both": (False, True)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("lists", nargs="*", type=known, default=["hot"], metavar="LIST",
        help=f"of {', '.join(LISTS)} (default: hot), or all")  # fmt: skip
    add("--problem", action="append", metavar="STRING", default=[],
        help="time this problem instead, e.g. 'conv n1 c32 k32 i64x64 f3x3 p1x1'; repeatable")  # fmt: skip
    add("--passes", type=words(PASSES), help="of " + ",".join(PASSES) + " (default: all)")
    add("--dtype", choices=["f32", "bf16"], help="override the problems' dtype")
    add("--precision", choices=runtime.PRECISIONS, help="of float32 convolutions (default: high)")
    add("--layout", choices=list(LAYOUTS),
        help="memory formats of ours (default: last, channels-last; both for the list around)")  # fmt: skip
    add("--peers", type=words(PEERS), default=("torch",),
        help="of " + ",".join(PEERS) + " (default: torch, which is always among them)")  # fmt: skip
    add_machine(parser, 5)
    add_output(parser)
    add("--roofline", type=file, metavar="FILE",
        help="also draw their GFLOP/s over operations a byte, under the machine's limits")  # fmt: skip


def known(name: str) -> str:
    """The name of a list, for argparse."""
    if name not in (*LISTS, "all"):
        raise argparse.ArgumentTypeError(f"no list {name}, expected of {', '.join(LISTS)}, all")
    return name


def run(args: argparse.Namespace) -> int:
    return start(time_layers, args)


def chosen(args: argparse.Namespace) -> list[tuple[Problem, tuple[bool, ...]]]:
    """The problems, each with the memory formats of ours."""
    found: dict[Problem, tuple[bool, ...]] = {Problem.parse(text): (True,) for text in args.problem}
    if not found:
        lists = LISTS.values() if "all" in args.lists else [LISTS[name] for name in args.lists]
        found = {p: (False, True) if some.both else (True,) for some in lists for p in some.problems}
    layouts = LAYOUTS.get(args.layout)
    return [(replace(p, dtype=args.dtype or p.dtype), layouts or own) for p, own in found.items()]


def time_layers(args: argparse.Namespace) -> int:
    wanted = args.passes or PASSES
    work = chosen(args)
    if not any(set(wanted) & set(passes(p)) for p, _ in work):
        raise ValueError(f"--passes: none of these problems has {', '.join(wanted)}")
    check(args.peers, args.isa)
    if "onnxruntime" in args.peers and any(p.dtype == "bf16" for p, _ in work):
        raise ValueError(NO_BFLOAT16)
    peers = {name: LAYER_PEERS[name] for name in args.peers if name != "torch"}
    with measuring(args.threads, args.precision):
        machine = results.machine()
        print("\n".join(f"{k:<18} {v}" for k, v in machine.items()), "", sep="\n", flush=True)
        print(header(peers))
        rows = []
        for p, layouts in work:
            settings = Settings(args.repeats, layouts, peers)
            for row in measure(p, [d for d in passes(p) if d in wanted], settings):
                rows.append(row)
                print(line(row, peers), flush=True)
        print(*summary(rows), sep="\n")
        found = results.Results("layers", machine, [asdict(r) for r in rows])
        finish(args, found)
        if args.roofline:
            roofline.draw(args.roofline, found)
    return 0


def header(peers: Iterable[str]) -> str:
    return (
        f"{'problem':<55} {'pass':<11} {'ms':>8} {'least':>8} {'spread':>6} {'torch':>8} {'gain':>6} {'same':>6} "
        f"{'GFLOP/s':>7} {'peak':>4} {'GB/s':>6} {'copy':>4} {'error':>8} {'max':>8} {'torch':>8} "
        + "".join(f"{name:>12} {'gain':>6} " for name in peers)
        + "algorithm"
    )


def line(r: Row, peers: Iterable[str]) -> str:
    found = "".join(
        f"{r.peers[name]:12.2f} {r.peers[name] / r.ms:5.2f}x " if name in r.peers else f"{'-':>12} {'-':>6} "
        for name in peers
    )
    return (
        f"{r.problem:<55} {r.direction:<11} {r.ms:8.2f} {r.ms_min:8.2f} {r.spread:6.1%} {r.torch_ms:8.2f} "
        f"{r.gain:5.2f}x {r.torch_same_ms / r.ms:5.2f}x {r.gflops:7.0f} {r.peak_fraction:4.2f} {r.gbs:6.1f} "
        f"{r.copy_fraction:4.2f} {r.error:8.1e} {r.max_error:8.1e} {r.torch_error:8.1e} {found}{r.algorithm}"
    )


def summary(rows: list[Row]) -> Iterator[str]:
    """The geometric mean of the gains, a line for each pass and peer."""
    mean = statistics.geometric_mean
    for direction in dict.fromkeys(r.direction for r in rows):
        some = [r for r in rows if r.direction == direction]
        yield (
            f"geometric mean of the gain over torch, {direction}: {mean(r.gain for r in some):.2f}x "
            f"({mean(r.torch_same_ms / r.ms for r in some):.2f}x over torch in the same memory format)"
        )
        for name in dict.fromkeys(name for r in some for name in r.peers):
            gains = [r.peers[name] / r.ms for r in some if name in r.peers]
            yield f"geometric mean of the gain over {name}, {direction}: {mean(gains):.2f}x"
