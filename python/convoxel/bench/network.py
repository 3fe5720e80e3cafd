"""`convoxel bench network`: a whole network's forward pass and training step, ours and others', in time and memory.

Every variant runs in a process of its own, since what the allocator keeps is a setting of the process, and the
processes take turns, A B C A B C:

    convoxel            after `convoxel.accelerate`, its input as it is
    torch               as users run it: eager, contiguous, the default allocator
    torch, memory kept  the same with freed memory kept (`memory.keep_freed`), the better of both memory formats
    compile             torch.compile, otherwise as `torch`
    onnxruntime, openvino   the forward pass, the network by way of ONNX

In bfloat16 torch and ours run under autocast, OpenVINO at its own inference precision.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from .. import memory, runtime
from . import peers, results
from .arguments import add_machine, add_output, at_least_one, finish, sizes, start, words
from .measure import spread
from .networks import CLASSES, NETWORKS, build, named
from .operators import CHANNELS_LAST
from .process import in_process

SUMMARY = "run whole networks beside torch's, in time and memory"


@dataclass(frozen=True)
class Variant:
    """An engine in one dtype; with freed memory kept or not; memory formats of which the better one counts."""

    engine: str
    dtype: str = "f32"
    kept: bool = False
    layouts: tuple[bool, ...] = (False,)

    def __str__(self) -> str:
        return self.engine + (f" {self.dtype}" if self.dtype != "f32" else "") + ", memory kept" * self.kept


def variants(engines: Sequence[str], dtypes: Sequence[str]) -> Iterator[Variant]:
    """Ours first; torch both as users run it and with freed memory kept. onnxruntime has float32 only."""
    for dtype in dtypes:
        yield Variant("convoxel", dtype)
        yield Variant("torch", dtype)
        yield Variant("torch", dtype, True, (False, True))
        others = (e for e in engines if e != "torch" and (e, dtype) != ("onnxruntime", "bf16"))
        yield from (Variant(engine, dtype) for engine in others)


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


@dataclass(frozen=True)
class Work:
    """What every variant does: a network (`networks.named`) on images (N, C, *size)."""

    name: str
    size: tuple[int, ...]
    batch: int
    repeats: int
    threads: int


def measure(variant: Variant, last: bool, work: Work) -> Turn:
    """One variant in one memory format, in this process."""
    torch.set_num_threads(work.threads)
    runtime.set_strict(True)
    if variant.kept:
        memory.keep_freed(True)
    network, x, labels = build(work.name, work.size, work.batch, variant.engine != "convoxel")
    turn, every = Turn(), max(1, labels.numel() // 4096)
    if variant.engine in peers.ENGINES:
        engine = peers.network_of(variant.engine, network, x, variant.dtype)
        turn.forward = timed(engine, work.repeats)
        turn.logits = engine().flatten()[::every].tolist()
    else:
        by_torch(turn, variant, last, network, x, labels, work.repeats, every)
    turn.peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return turn


def by_torch(
    turn: Turn,
    variant: Variant,
    last: bool,
    network: nn.Module,
    x: Tensor,
    labels: Tensor,
    repeats: int,
    every: int,
) -> None:
    """Forward pass and training step of a network that torch runs, with its own layers or ours."""
    if last:
        layout = CHANNELS_LAST[x.dim() - 2]
        cast(Any, network).to(memory_format=layout)
        x = torch.empty_like(x, memory_format=layout).copy_(x)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.99, nesterov=True)
    function = torch.compile(network) if variant.engine == "compile" else network

    def outputs() -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=variant.dtype == "bf16"):
            return [y for y in pytree.tree_leaves(function(x)) if isinstance(y, Tensor)]

    def forward() -> None:
        with torch.no_grad():
            turn.logits = outputs()[0].flatten()[::every].tolist()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss(outputs(), labels).backward()
        optimizer.step()

    network.eval()
    turn.forward = timed(forward, repeats)
    network.train()
    turn.step = timed(step, repeats)


def loss(outputs: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Cross-entropy where the one output (N, K, *size) can have it with labels (N, *size), else the mean square."""
    y = outputs[0].float()
    if len(outputs) == 1 and y.dim() > 2 and y.shape[1] >= CLASSES and y.shape[2:] == labels.shape[1:]:
        return nn.functional.cross_entropy(y, labels)
    return torch.stack([y.float().square().mean() for y in outputs]).sum()


def forward_flops(work: Work) -> int:
    """Multiplications and additions of a forward pass, as torch counts them."""
    network, x, _ = build(work.name, work.size, work.batch, True)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network.to("meta").eval()(x.to("meta"))
    return counter.get_total_flops()


@dataclass
class Row:
    """Times are medians in ms, spreads between quartiles over the median; step: None for engines that do not train.
    Gains say how many times faster ours is, in the same dtype; difference is that of the logits from torch's,
    relative, in L2."""

    network: str
    size: tuple[int, ...]
    batch: int
    variant: str
    engine: str
    dtype: str
    forward_ms: float
    forward_spread: float
    forward_gain: float
    peak_fraction: float
    step_ms: float | None
    step_spread: float | None
    step_gain: float | None
    peak_mb: float
    difference: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", nargs="?", default="nnunet3d", metavar="MODEL", help=(
        f"{', '.join(NETWORKS)} (default: nnunet3d), or any network that can be imported: "
        '"monai.networks.nets.BasicUNet(3, 1, 2)"'))  # fmt: skip
    add("--size", type=sizes, metavar="D,H,W", help="voxels of a patch")
    add("--batch", type=at_least_one, help="images of a batch")
    add("--rounds", type=at_least_one, default=2, help="processes of each variant (default: 2)")
    add("--dtype", type=words(("f32", "bf16")), default=("f32",), help="f32 (default), bf16, or f32,bf16")
    add("--peers", type=words(peers.PEERS), default=("torch",),
        help="of " + ",".join(peers.PEERS) + " (default: torch, which is always among them)")  # fmt: skip
    add_machine(parser, 3)
    add_output(parser)


def run(args: argparse.Namespace) -> int:
    return start(run_network, args)


def run_network(args: argparse.Namespace) -> int:
    """Measures and prints a network."""
    peers.check(args.peers, args.isa)
    if "onnxruntime" in args.peers and "f32" not in args.dtype:
        raise ValueError(peers.NO_BFLOAT16)
    spec = named(args.model)
    size, batch = args.size or spec.patch, args.batch or spec.batch
    if len(size) != len(spec.patch):
        received = ",".join(map(str, size))
        raise ValueError(f"--size: {args.model} takes {len(spec.patch)} numbers, received {received}")
    work = Work(args.model, size, batch, args.repeats, args.threads or torch.get_num_threads())
    flops, machine = forward_flops(work), results.machine()
    print("\n".join(f"{k:<18} {v}" for k, v in machine.items()), "", sep="\n")
    print(f"{work.name}: images {(batch, spec.channels, *size)}, {flops / 1e9:.1f} GFLOP forward; "
          f"{args.rounds} x {args.repeats} calls each", flush=True)  # fmt: skip
    turns: dict[tuple[Variant, bool], list[Turn]] = {}
    for _ in range(args.rounds):
        for variant in variants(args.peers, args.dtype):
            for last in variant.layouts:
                turn = in_process(measure, variant, last, work)
                turns.setdefault((variant, last), []).append(turn)
                step = f", step {middle(turn.step):.0f} ms" if turn.step else ""
                print(f"measured {variant}{', channels-last' * last}: forward {middle(turn.forward):.0f} ms{step}, "
                      f"{turn.peak_mb:.0f} MB", flush=True)  # fmt: skip
    rows = list(summarise(work, flops / 1e6 / machine["FMA peak, GFLOP/s"], turns))
    show(rows)
    finish(args, results.Results("network", machine, [asdict(row) for row in rows]))
    return 0


def summarise(work: Work, peak_ms: float, turns: dict[tuple[Variant, bool], list[Turn]]) -> Iterator[Row]:
    """A row for each variant, its memory formats' better one; peak_ms: the forward pass at the FMA peak."""
    reference = next(t for (variant, _), t in turns.items() if variant.engine == "torch")[0].logits
    exact = torch.tensor(reference, dtype=torch.float64)
    ours: dict[str, dict[str, float]] = {}
    for variant in dict.fromkeys(v for v, _ in turns):
        found = [turns[variant, last] for last in variant.layouts]
        times = {
            what: min(([ms for t in ts for ms in getattr(t, what)] for ts in found), key=middle)
            for what in ("forward", "step")
        }
        ms = {what: middle(values) for what, values in times.items()}
        mine = ours.setdefault(variant.dtype, ms)
        off = torch.tensor(found[0][0].logits, dtype=torch.float64) - exact
        trains = bool(times["step"])
        yield Row(
            work.name,
            work.size,
            work.batch,
            str(variant),
            variant.engine,
            variant.dtype,
            ms["forward"],
            spread(times["forward"]),
            ms["forward"] / mine["forward"],
            peak_ms / ms["forward"],
            ms["step"] if trains else None,
            spread(times["step"]) if trains else None,
            ms["step"] / mine["step"] if trains else None,
            min(t.peak_mb for ts in found for t in ts),
            (off.norm() / exact.norm()).item(),
        )


def middle(times: Sequence[float]) -> float:
    """The median; nan of none."""
    return statistics.median(times) if times else float("nan")


def show(rows: list[Row]) -> None:
    print(f"{'':<26} {'forward ms':>10} {'gain':>6} {'peak':>5} {'step ms':>9} {'gain':>6} {'peak MB':>8} "
          f"{'difference':>10}")  # fmt: skip
    for r in rows:
        step = f"{'-':>9} {'-':>6}" if r.step_ms is None else f"{r.step_ms:9.0f} {r.step_gain:5.2f}x"
        print(f"{r.variant:<26} {r.forward_ms:10.0f} {r.forward_gain:5.2f}x {r.peak_fraction:5.2f} {step} "
              f"{r.peak_mb:8.0f} {r.difference:10.1e}")  # fmt: skip
    for dtype in dict.fromkeys(r.dtype for r in rows):
        ours, *others = (r for r in rows if r.dtype == dtype)
        for r in others:
            step = "" if r.step_gain is None else f", training step {r.step_gain:.2f}x"
            print(f"{ours.variant} over {r.variant}: forward {r.forward_gain:.2f}x{step}, "
                  f"{ours.peak_mb / r.peak_mb:.2f} of the memory")  # fmt: skip
