"""`convoxel bench network`: a whole network's forward pass and training step, ours and torch's, in time and memory.

Every variant runs in a process of its own, since what the allocator keeps is a setting of the process, and the
processes take turns, A B C A B C:

    convoxel            as it is after `import convoxel`: outputs from its pool; channels-last, as it runs best
    torch               as users run it: eager, contiguous, the default allocator
    torch, memory kept  the same with freed memory kept (`memory.keep_freed`), the better of both memory formats
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import torch
from torch import nn

from .. import memory, runtime
from . import results
from .arguments import add_machine, add_output, at_isa, at_least_one, sizes
from .networks import NETWORKS, build
from .operators import CHANNELS_LAST
from .process import in_process

SUMMARY = "run whole networks beside torch's, in time and memory"

# name: (torch's own layers, memory kept, memory formats of which the better one counts)
VARIANTS = {
    "convoxel": (False, False, (True,)),
    "torch": (True, False, (False,)),
    "torch, memory kept": (True, True, (False, True)),
}


@dataclass
class Turn:
    """What one process measured: milliseconds of each call, peak memory in MB, logits of some voxels."""

    forward: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)
    peak_mb: float = 0.0
    logits: list[float] = field(default_factory=list)


def timed(call: Callable[[], Any], repeats: int) -> list[float]:
    """Milliseconds of `repeats` calls after one to warm up."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return times


def measure(
    variant: str, last: bool, threads: int, name: str, size: tuple[int, ...], batch: int, repeats: int
) -> Turn:
    """One variant in one memory format, in this process."""
    own, kept, _ = VARIANTS[variant]
    torch.set_num_threads(threads)
    runtime.set_strict(True)
    if kept:
        memory.keep_freed(True)
    network, x, labels = build(name, size, batch, own)
    if last:
        layout = CHANNELS_LAST[len(size)]
        cast(Any, network).to(memory_format=layout)
        x = torch.empty_like(x, memory_format=layout).copy_(x)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.99, nesterov=True)
    turn = Turn()

    def forward() -> None:
        with torch.no_grad():
            turn.logits = network(x).flatten()[:: max(1, labels.numel() // 4096)].tolist()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(network(x), labels).backward()
        optimizer.step()

    turn.forward = timed(forward, repeats)
    turn.step = timed(step, repeats)
    turn.peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return turn


@dataclass
class Row:
    network: str
    variant: str
    forward_ms: float
    step_ms: float
    peak_mb: float
    difference: float  # relative, of the logits, from torch's


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=list(NETWORKS), default="nnunet3d", help="(default: nnunet3d)")
    parser.add_argument("--size", type=sizes, metavar="D,H,W", help="voxels of a patch")
    parser.add_argument("--batch", type=at_least_one, help="images of a batch")
    parser.add_argument(
        "--rounds", type=at_least_one, default=2, help="processes of each variant (default: 2)"
    )
    add_machine(parser, 3)
    add_output(parser)


def run(args: argparse.Namespace) -> int:
    return at_isa(run_network, args)


def run_network(args: argparse.Namespace) -> int:
    """Measures and prints a network."""
    name, rounds, repeats = args.model, args.rounds, args.repeats
    spec, threads = NETWORKS[name], args.threads or torch.get_num_threads()
    size, batch = args.size or spec.patch, args.batch or spec.batch
    if len(size) != len(spec.patch):
        received = ",".join(map(str, size))
        raise ValueError(f"--size: {name} takes {len(spec.patch)} numbers, received {received}")
    machine = results.machine()
    print("\n".join(f"{k:<18} {v}" for k, v in machine.items()), "", sep="\n")
    print(f"{name}: images {(batch, 1, *size)}, float32; {rounds} x {repeats} calls each", flush=True)
    turns: dict[tuple[str, bool], list[Turn]] = {}
    for _ in range(rounds):
        for variant, (_, _, layouts) in VARIANTS.items():
            for last in layouts:
                turn = in_process(measure, variant, last, threads, name, size, batch, repeats)
                turns.setdefault((variant, last), []).append(turn)
    reference = torch.tensor(turns["torch", False][0].logits, dtype=torch.float64)
    print(f"{'':<20} {'forward ms':>11} {'step ms':>9} {'peak MB':>8} {'difference':>11}")
    rows = []
    for variant, (_, _, layouts) in VARIANTS.items():
        found = [turns[variant, last] for last in layouts]
        forward, step = (
            min(statistics.median(ms for t in ts for ms in getattr(t, what)) for ts in found)
            for what in ("forward", "step")
        )
        logits = torch.tensor(found[0][0].logits, dtype=torch.float64)
        difference = ((logits - reference).norm() / reference.norm()).item()
        row = Row(name, variant, forward, step, min(t.peak_mb for ts in found for t in ts), difference)
        rows.append(row)
        print(f"{variant:<20} {forward:11.0f} {step:9.0f} {row.peak_mb:8.0f} {difference:11.1e}")
    ours = rows[0]
    for row in rows[1:]:
        print(
            f"convoxel over {row.variant}: forward {row.forward_ms / ours.forward_ms:.2f}x, training step "
            f"{row.step_ms / ours.step_ms:.2f}x, {ours.peak_mb / row.peak_mb:.2f} of the memory"
        )
    results.write(args.json, results.Results("network", machine, [asdict(row) for row in rows]))
    return 0
