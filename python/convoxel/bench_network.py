"""`convoxel bench network`: a whole network's forward pass and training step, ours and torch's, in time and memory.

Every variant runs in a process of its own, since what the allocator keeps is a setting of the process, and the
processes take turns, A B C A B C:

    convoxel            as it is after `import convoxel`: outputs from its pool; channels-last, as it runs best
    torch               as users run it: eager, contiguous, the default allocator
    torch, memory kept  the same with freed memory kept (`memory.keep_freed`), the better of both memory formats
"""

from __future__ import annotations

import copy
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from typing import Any, cast

import torch
from torch import Tensor, nn

from . import memory
from .models import UNet


@dataclass(frozen=True)
class Network:
    """nnU-Net's networks as `models.UNet` builds them: features of each stage, and a patch (D, H, W) or (H, W)."""

    rank: int
    features: tuple[int, ...]
    patch: tuple[int, ...]
    batch: int


NETWORKS = {
    "nnunet3d": Network(3, (32, 64, 128, 256, 320, 320), (128, 128, 128), 1),
    "nnunet2d": Network(2, (32, 64, 128, 256, 512, 512, 512), (512, 512), 2),
}
CLASSES = 3
CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}
# name: (torch's own layers, memory kept, memory formats of which the better one counts)
VARIANTS = {
    "convoxel": (False, False, (True,)),
    "torch": (True, False, (False,)),
    "torch, memory kept": (True, True, (False, True)),
}


def torch_twin(network: nn.Module) -> nn.Module:
    """A copy of the network, weights included, in which torch's own kernels do the work.

    Every layer of `convoxel.nn` is a subclass of the torch layer of the same name, so the copy's layers only
    change their class.
    """
    twin = copy.deepcopy(network)
    for layer in twin.modules():
        own = type(layer)
        if own.__module__.startswith("convoxel.nn"):
            layer.__class__ = next(base for base in own.__mro__ if base.__module__.startswith("torch.nn"))
    return twin


@dataclass
class Turn:
    """What one process measured: milliseconds of each call, peak memory in MB, logits of some voxels."""

    forward: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)
    peak_mb: float = 0.0
    logits: list[float] = field(default_factory=list)


def build(name: str, size: tuple[int, ...], batch: int) -> tuple[nn.Module, Tensor, Tensor]:
    """The network, images (N, 1, *size) and labels (N, *size), the same in every process."""
    torch.manual_seed(0)
    spec = NETWORKS[name]
    network = UNet(spec.rank, 1, CLASSES, spec.features)
    return network, torch.randn(batch, 1, *size), torch.randint(0, CLASSES, (batch, *size))


def timed(call: Callable[[], Any], repeats: int) -> list[float]:
    """Milliseconds of `repeats` calls after one to warm up."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return times


def measure(name: str, size: tuple[int, ...], batch: int, own: bool, last: bool, repeats: int) -> Turn:
    """One variant in one memory format; `own`: with torch's kernels."""
    network, x, labels = build(name, size, batch)
    network = torch_twin(network) if own else network
    if last:
        layout = CHANNELS_LAST[NETWORKS[name].rank]
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


def worker(pipe: Connection, variant: str, last: bool, threads: int, how: tuple[Any, ...]) -> None:
    own, kept, _ = VARIANTS[variant]
    torch.set_num_threads(threads)
    if kept:
        memory.keep_freed(True)
    name, size, batch, repeats = how
    try:
        pipe.send(measure(name, size, batch, own, last, repeats))
    except Exception as error:  # the parent's to tell
        pipe.send(error)


def in_process(*how: Any) -> Turn:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=worker, args=(theirs, *how))
    process.start()
    theirs.close()
    try:
        turn: Turn | Exception = ours.recv()
    except EOFError:
        raise RuntimeError(
            f"bench network: the process of {how[0]!r} ended early; is memory short?"
        ) from None
    finally:
        process.join()
    if isinstance(turn, Exception):
        raise turn
    return turn


@dataclass
class Row:
    network: str
    variant: str
    forward_ms: float
    step_ms: float
    peak_mb: float
    difference: float  # relative, of the logits, from torch's


def run(
    name: str, size: tuple[int, ...] | None, batch: int | None, rounds: int, repeats: int, threads: int
) -> list[dict[str, Any]]:
    """Measures and prints a network; returns the rows as they are printed."""
    spec = NETWORKS[name]
    size, batch = size or spec.patch, batch or spec.batch
    if len(size) != spec.rank:
        raise ValueError(f"--size: {name} takes {spec.rank} numbers, received {','.join(map(str, size))}")
    print(f"{name}: {spec.features}, images {(batch, 1, *size)}, float32; {rounds} x {repeats} calls each")
    turns: dict[tuple[str, bool], list[Turn]] = {}
    for _ in range(rounds):
        for variant, (_, _, layouts) in VARIANTS.items():
            for last in layouts:
                turn = in_process(variant, last, threads, (name, size, batch, repeats))
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
    return [asdict(row) for row in rows]
