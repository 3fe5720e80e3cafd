"""One problem: our layers against torch's on this machine, with the error against float64 beside the time.

Ours, torch's and the other peers' calls are timed in turn; torch runs in both memory formats and its better one
counts. All get freed memory kept (`memory.keep_freed`), so that none pays page faults. The fractions of the limits
are of the FMA rate and of a copy of as many bytes, both measured between these calls; GFLOP/s count the definition's
arithmetic, GB/s the bytes that the pass cannot avoid. Calls run in strict mode: none of ours is torch's.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch.nn.functional as T

from .. import functional as F
from .. import runtime
from ..geometry import Problem
from .limits import copy_rate, fma_peak
from .operators import (
    CHANNELS_LAST,
    Results,
    Step,
    Tensors,
    channels_last,
    errors,
    exact,
    least_bytes,
    steps,
    tensors,
)

LEAST_MS = 2.0  # a timing lasts at least that long: shorter calls are repeated within it
PAUSE = 0.02  # seconds before each call where peers are measured, whose threads spin for a while after theirs


@dataclass
class Row:
    """One pass of one problem. Times in ms are medians; errors are against float64, relative (`operators.errors`)."""

    problem: str
    direction: str
    precision: str
    ms: float
    ms_min: float
    spread: float  # between our quartiles, over the median
    torch_ms: float  # in its better memory format
    torch_same_ms: float  # in ours
    gain: float  # over torch_ms
    gflops: float
    peak_fraction: float  # of float32 multiply-adds, of bfloat16 problems too
    gbs: float
    copy_fraction: float
    error: float
    max_error: float
    torch_error: float
    torch_max_error: float
    algorithm: str  # as convoxel.stats() names what served the call
    peers: dict[str, float] = field(default_factory=dict)  # ms
    peer_errors: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Settings:
    """How to measure: repeats; the memory formats of ours, True for channels-last; peers beside torch by name, each
    a function of a problem and contiguous tensors that gives the passes it has."""

    repeats: int = 5
    layouts: tuple[bool, ...] = (True,)
    peers: dict[str, Callable[[Problem, Tensors], dict[str, Step]]] = field(default_factory=dict)


def timed(call: Step, count: int, pause: float = 0.0) -> float:
    """Milliseconds of a call, over `count` of them."""
    time.sleep(pause)
    start = time.perf_counter()
    for _ in range(count):
        call()
    return 1e3 * (time.perf_counter() - start) / count


def stopwatch(call: Step, pause: float = 0.0, first: float | None = None) -> Callable[[], float]:
    """Times so many calls that they last LEAST_MS. A first call warms up, and tells how many where it is long, or
    else a second does; `first`: its milliseconds, if it was made."""
    if first is None:
        first = timed(call, 1)
    ms = first if first > 50 * LEAST_MS else timed(call, 1)
    return partial(timed, call, max(1, min(1000, round(LEAST_MS / ms))), pause)


def in_turn(probes: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """What each probe says, all of them in every round, in an order of chance: whoever follows the copy finds cold
    caches, and whoever follows a call on the same tensors warm ones (up to 2x for a depthwise layer)."""
    found: dict[str, list[float]] = {name: [] for name in probes}
    order, names = random.Random(0), list(probes)
    for _ in range(repeats):
        order.shuffle(names)
        for name in names:
            found[name].append(probes[name]())
    return found


def spread(times: Sequence[float]) -> float:
    """Distance of the quartiles over the median: [1, 2, 3, 4, 5] -> 2 / 3."""
    if len(times) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return (high - low) / middle


def served(call: Step) -> tuple[str, Results]:
    """Which of our algorithms serve the call, and its results."""
    runtime.reset_stats()
    results = call()
    return ", ".join(sorted({by for row in runtime.stats().values() for by in row["by"]})), results


@dataclass(frozen=True)
class Call:
    """A call that was made once: who served it, its errors, and its stopwatch."""

    algorithm: str
    errors: tuple[float, float]
    probe: Callable[[], float]


def prepare(call: Step, reference: Results, pause: float) -> Call:
    start = time.perf_counter()
    algorithm, results = served(call)
    first = 1e3 * (time.perf_counter() - start)
    return Call(algorithm, errors(results, reference), stopwatch(call, pause, first))


def measure(p: Problem, directions: Iterable[str], settings: Settings) -> Iterator[Row]:
    """A Row for each pass and each of our memory formats."""
    t = tensors(p)
    formats = {False: t} | ({True: t.map(channels_last)} if p.rank in CHANNELS_LAST else {})
    layouts = [last for last in settings.layouts if last in formats] or [False]
    ours = {last: steps(F, p, formats[last]) for last in layouts}
    theirs = {last: steps(T, p, f) for last, f in formats.items()}
    peers = {name: peer(p, t) for name, peer in settings.peers.items()}
    for direction in directions:
        moved = least_bytes(p, direction)
        reference = exact(p, direction, t)
        every = {f"ours {last}": s for last, s in ours.items()} | {
            f"torch {last}": s for last, s in theirs.items()
        }
        calls = {
            name: prepare(s[direction], reference, PAUSE if peers else 0)
            for name, s in (every | peers).items()
            if direction in s
        }
        probes: dict[str, Callable[[], float]] = {"FMA": fma_peak, "copy": partial(copy_rate, moved)}
        found = in_turn(probes | {name: call.probe for name, call in calls.items()}, settings.repeats)
        middle = {name: statistics.median(values) for name, values in found.items()}
        torch_ms = min(middle[f"torch {last}"] for last in formats)
        for last in layouts:
            name = f"ours {last}"
            ms = middle[name]
            gflops, gbs = p.flops / ms / 1e6, moved / ms / 1e6
            yield Row(
                str(replace(p, last=last)),
                direction,
                runtime.get_float32_conv_precision(),
                ms,
                min(found[name]),
                spread(found[name]),
                torch_ms,
                middle[f"torch {last}"],
                torch_ms / ms,
                gflops,
                gflops / middle["FMA"],
                gbs,
                gbs / middle["copy"],
                *calls[name].errors,
                *calls["torch False"].errors,
                calls[name].algorithm,
                {peer: middle[peer] for peer in peers if peer in calls},
                {peer: calls[peer].errors[0] for peer in peers if peer in calls},
            )
