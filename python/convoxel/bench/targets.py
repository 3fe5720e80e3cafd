"""`convoxel bench targets`: what convoxel set out to reach on a CPU, beside what files of results say it reaches.

A list's gain is the geometric mean over its problems, for each pass, over torch in its better memory format with
freed memory kept; networks' are over torch as users run it unless said otherwise. At AVX2, with torch capped to it,
0.8 of each gain is asked for.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..geometry import Problem
from . import results
from .accuracy import BOUND
from .fit import lines
from .lists import LISTS, NETWORK_LEAST
from .networks import NETWORKS

SUMMARY = "print the table of targets, met or not, from files of results"
AVX2 = 0.8  # of each gain
TOUCH_MS, TOUCH = 1.0, 0.025  # calls of torch's shorter than this: ours may take so many ms more

Row = dict[str, Any]
Judge = Callable[["Found", float], "Outcome"]


@dataclass(frozen=True)
class Found:
    """The rows of files of results, of one instruction set."""

    layers: Sequence[Row]
    networks: Sequence[Row]
    scaling: Sequence[Row]
    accuracy: Sequence[Row]

    def list(self, name: str, dtype: str = "f32", precision: str = "high") -> Sequence[Row]:
        """The rows of a list's problems, in either memory format."""
        texts = LISTS[name].texts
        return [
            r for r in self.layers if (r["precision"], *plain(r)) in {(precision, t, dtype) for t in texts}
        ]

    def ratio(self, network: str, what: str, other: str, ours: str = "convoxel") -> float | None:
        """What `other` takes, over what ours takes; None where it was not measured."""
        rows = {r["variant"]: r[what] for r in self.networks if r["network"] == network}
        theirs, mine = rows.get(other), rows.get(ours)
        return theirs / mine if theirs and mine else None


def plain(row: Row) -> tuple[str, str]:
    """The problem without memory format and dtype, and the dtype."""
    words = row["problem"].split()
    dtype = next((w for w in words if w in Problem.DTYPES), "f32")
    return " ".join(w for w in words if w not in (dtype, "last")), dtype


@dataclass(frozen=True)
class Outcome:
    """What was measured, in words; met is None where there is nothing to meet or nothing was measured."""

    measured: str = "not measured"
    met: bool | None = None


@dataclass(frozen=True)
class Target:
    """`judge` looks at what was found; gains are multiplied by what it is given, as AVX2's are by 0.8."""

    work: str
    least: str
    want: str
    judge: Judge
    gain: bool = True


def times(value: float) -> str:
    return f"{value:.2f}x"


def by_pass(rows: Iterable[Row], key: str = "gain") -> dict[str, float]:
    """The geometric mean of each pass."""
    found: dict[str, list[float]] = {}
    for row in rows:
        found.setdefault(row["direction"], []).append(row[key])
    return {direction: statistics.geometric_mean(values) for direction, values in found.items()}


def incomplete(rows: Iterable[Row], name: str) -> str:
    """How much of the list was measured, where it was not all."""
    measured, asked = len({plain(r)[0] for r in rows}), len(LISTS[name].texts)
    return f"{measured} of {asked} problems: " if measured < asked else ""


def layers(name: str, least: float, passes: Sequence[str] = (), each: float | None = None, dtype: str = "f32",
           bandwidth: bool = False) -> Judge:  # fmt: skip
    """Judges a list: the mean of every pass at `least`, and each row at `each`."""

    def judge(found: Found, scale: float) -> Outcome:
        rows = [r for r in found.list(name, dtype) if not passes or r["direction"] in passes]
        if not rows:
            return Outcome()
        means, worst, some = by_pass(rows), min(rows, key=lambda r: r["gain"]), incomplete(rows, name)
        met = min(means.values()) >= least * scale and worst["gain"] >= (each or 0) * scale
        words = ", ".join(f"{direction} {times(mean)}" for direction, mean in means.items())
        words += f"; lowest {times(worst['gain'])} ({worst['problem']} {worst['direction']})"
        if bandwidth:
            copies = by_pass(rows, "copy_fraction").items()
            words += "; of a copy " + ", ".join(f"{direction} {mean:.2f}" for direction, mean in copies)
        return Outcome(some + words, None if some else met)

    return judge


def of_peak(found: Found, _: float) -> Outcome:
    rows = found.list("hot", precision="highest")
    if not rows:
        return Outcome()
    means, worst, some = by_pass(rows, "peak_fraction"), min(r["gain"] for r in rows), incomplete(rows, "hot")
    words = ", ".join(f"{direction} {mean:.2f}" for direction, mean in means.items())
    met = min(means.values()) >= 0.85 and worst >= 0.97
    return Outcome(f"{some}{words} of peak; lowest over torch {times(worst)}", None if some else met)


def network(name: str, what: str, dtype: str = "f32") -> Judge:
    """Judges a network's time over those of other variants."""
    least = NETWORK_LEAST[name, dtype, what]
    ours = "convoxel" if dtype == "f32" else f"convoxel {dtype}"

    def judge(found: Found, scale: float) -> Outcome:
        ratios = {other: found.ratio(name, f"{what}_ms", other, ours) for other in least}
        words = [f"{times(r)} {other}" if r else f"{other} not measured" for other, r in ratios.items()]
        known = [r >= least[other] * scale for other, r in ratios.items() if r]
        if not known:
            return Outcome()
        sizes = {tuple(r["size"]) for r in found.networks if r["network"] == name} - {NETWORKS[name].patch}
        patches = "".join(f" (patch {'x'.join(map(str, size))})" for size in sizes)
        met = all(known) if len(known) == len(least) or not all(known) else None
        return Outcome(", ".join(words) + patches, met)

    return judge


def memory(found: Found, _: float) -> Outcome:
    ratio = found.ratio("nnunet3d", "peak_mb", "torch")
    return Outcome() if ratio is None else Outcome(times(1 / ratio), 1 / ratio <= 0.6)


def replaced(found: Found, _: float) -> Outcome:
    """Every layer that was measured: not slower than torch, short ones within 25 us."""
    long = [r for r in found.layers if r["torch_ms"] >= TOUCH_MS]
    short = [r for r in found.layers if r["torch_ms"] < TOUCH_MS]
    slow = [r for r in long if r["gain"] < 0.97]
    late = [r for r in short if r["ms"] - r["torch_ms"] > TOUCH]
    words = f"{len(slow)} of {len(long)} rows under 0.97x, {len(late)} of {len(short)} short ones over 25 us"
    if slow:
        worst = min(slow, key=lambda r: r["gain"])
        words += f"; lowest {times(worst['gain'])} ({worst['problem']} {worst['direction']})"
    if late:
        latest = max(late, key=lambda r: r["ms"] - r["torch_ms"])
        more = 1e3 * (latest["ms"] - latest["torch_ms"])
        words += f"; most {more:.0f} us ({latest['problem']} {latest['direction']})"
    return Outcome(words, not slow and not late) if found.layers else Outcome()


def exactness(found: Found, _: float) -> Outcome:
    worst = max(
        (
            r["error"]
            for r in found.accuracy
            if r["algorithm"].split()[0] in ("high", "winograd") and "bf16" not in r["problem"].split()
        ),
        default=None,
    )
    return Outcome() if worst is None else Outcome(f"{worst:.1e}", worst <= BOUND)


def straightness(found: Found, _: float) -> Outcome:
    fitted = lines(found.scaling)
    words = "; ".join(f"{w}, {n} threads: {line.deviation:.0%}" for (w, n), line in fitted.items())
    return Outcome(f"largest deviation {words}") if fitted else Outcome()


def threads(found: Found, _: float) -> Outcome:
    """How much faster more threads are, at the largest cube."""
    words = []
    for work in dict.fromkeys(r["work"] for r in found.scaling):
        largest = max(r["size"] for r in found.scaling if r["work"] == work)
        ms = {r["threads"]: r["ms"] for r in found.scaling if (r["work"], r["size"]) == (work, largest)}
        words.append(f"{work} {times(ms[min(ms)] / ms[max(ms)])} from {min(ms)} to {max(ms)}")
    return Outcome(", ".join(words)) if words else Outcome()


BOTH = ("forward", "input_grad")
OVER = "over torch as users run it / memory kept"
TARGETS = (
    Target("k3 hot layers, fp32 high, forward and input gradient", "3x mean, none under 2x", "4x",
           layers("hot", 3, BOTH, each=2)),
    Target("the same, weight gradient", "2x", "3.5x", layers("hot", 2, ("weight_grad",))),
    Target("k3 hot layers, fp32 highest (direct)", "0.85 of FMA peak, never under 0.97x", "0.95", of_peak, gain=False),
    Target("k3 hot layers, bf16, over torch bf16", "1.5x", "2x", layers("hot", 1.5, dtype="bf16")),
    Target("conv2d k3, U-Net sizes, fp32 high", "2x mean", "3x", layers("conv2d", 2)),
    Target("first layer (1 to 4 channels), fp32", "4x", "bandwidth", layers("first", 4, bandwidth=True)),
    Target("stride 2 k3, forward and backward", "1.3x", "2x", layers("stride", 1.3)),
    Target("transposed k2 s2, forward and backward", "2x", "4x", layers("transposed", 2)),
    Target("8^3 and 4^3 layers at C = 320, N = 1", "1.5x", "2.5x", layers("deep", 1.5)),
    Target("depthwise k3, k5, forward and backward", "3x", "8x", layers("depthwise", 3)),
    Target("norm, activation, pooling, interpolation", "2x each", "bandwidth",
           layers("around", 2, each=2, bandwidth=True)),
    Target("1x1x1 convolution, linear", "0.97x", "1.1x", layers("pointwise", 0.97, each=0.97)),
    Target(f"nnU-Net 3D 128^3 forward, fp32, {OVER} / OpenVINO", "4x / 2.2x / 2x", "6x / 3.5x / 3x",
           network("nnunet3d", "forward")),
    Target("the same, bf16, over OpenVINO bf16", "1.3x", "2x",
           network("nnunet3d", "forward", "bf16")),
    Target(f"nnU-Net 3D 128^3 training step, fp32, {OVER} / torch bf16", "4x / 2.2x / 1.7x", "6x / 3x / 2.5x",
           network("nnunet3d", "step")),
    Target("peak memory of that step, over torch as users run it", "0.6x", "0.4x", memory, gain=False),
    *(
        Target(f"{title}, {word}, over torch", "2x", "4x", network(name, what))
        for name, title in (("nnunet2d", "nnU-Net 2D 512^2"), ("basicunet", "MONAI BasicUNet"),
                            ("dynunet", "MONAI DynUNet"), ("segresnet", "MONAI SegResNet"))
        for what, word in (("forward", "forward"), ("step", "training step"))
    ),
    Target("anything replaced by default", "0.97x from 1 ms on, below 25 us more", "", replaced, gain=False),
    Target("fp32 high, relative L2 error", "1e-5", "", exactness, gain=False),
    Target("time against volume, 32^3 to 192^3", "a straight line", "", straightness, gain=False),
    Target("threads", "", "", threads, gain=False),
)  # fmt: skip


def gather(files: Iterable[results.Results], avx2: bool) -> Found:
    """The rows of the files whose kernels ran at AVX2, or of the others."""
    rows: dict[str, list[Row]] = {"layers": [], "network": [], "scaling": [], "accuracy": []}
    for file in files:
        if (results.isa(file) == "avx2") == avx2:
            rows[file.kind] += file.rows
    return Found(*rows.values())


def table(files: Sequence[results.Results]) -> list[str]:
    """The targets as lines of Markdown."""
    out = ["| work | at least | we want | measured | met |", "|---|---|---|---|---|"]
    for avx2, scale in ((False, 1.0), (True, AVX2)):
        found = gather(files, avx2)
        for target in TARGETS if not avx2 else [t for t in TARGETS if t.gain]:
            outcome = target.judge(found, scale)
            if not avx2 or outcome.met is not None:
                met = {True: "yes", False: "**no**", None: ""}[outcome.met]
                name, least = (
                    (f"AVX2: {target.work}", f"0.8 of {target.least}")
                    if avx2
                    else (target.work, target.least)
                )
                out.append(f"| {name} | {least} | {target.want} | {outcome.measured} | {met} |")
    return out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "files", type=Path, nargs="+", metavar="FILE", help="results as JSON, or folders of them"
    )


def run(args: argparse.Namespace) -> int:
    paths = [p for f in args.files for p in (sorted(f.glob("*.json")) if f.is_dir() else [f])]
    if not paths:
        raise ValueError(
            f"no results in {', '.join(map(str, args.files))}; `convoxel bench … --json` writes them"
        )
    files = [results.read(path) for path in paths]
    print("# Targets and what was measured\n")
    print(*table(files), "", sep="\n")
    for path, file in zip(paths, files, strict=True):
        print(f"- {path.name}: {results.line(file)}; FMA peak {file.machine.get('FMA peak, GFLOP/s', '?')} GFLOP/s, "
              f"copy {file.machine.get('copy, GB/s', '?')} GB/s")  # fmt: skip
    return 0
