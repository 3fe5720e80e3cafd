"""The roofline of layers: arithmetic (operations a byte that a pass cannot avoid moving) against effective GFLOP/s,
under the machine's two limits. A pass left of the ridge is bounded by the copy, right of it by multiply-adds; whoever
needs fewer operations than the definition (Winograd's algorithm), or computes in bfloat16, may stand above the roof."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .plot import COLOURS, canvas, short
from .results import Results

LABELLED = 12  # problems: more names would hide each other


def intensity(row: dict[str, Any]) -> float:
    """Operations of the definition a byte: of the tensors that the pass reads and writes, each once.

    >>> intensity({"gflops": 500.0, "gbs": 2.0})
    250.0
    """
    return float(row["gflops"] / row["gbs"])


def roof(flops_a_byte: float, peak: float, rate: float) -> float:
    """GFLOP/s that the limits allow: `peak` GFLOP/s of multiply-adds, `rate` GB/s of a copy.

    >>> roof(10.0, 490.0, 26.0), roof(100.0, 490.0, 26.0)
    (260.0, 490.0)
    """
    return min(peak, rate * flops_a_byte)


def draw(path: Path, found: Results) -> None:
    """The picture, in the format that the file's name ends with: filled marks are ours, hollow ones torch's, joined."""
    figure, axes = canvas(6.5, found, "Roofline: convoxel (filled) and torch (hollow), effective GFLOP/s")
    peak, rate = (float(found.machine[key]) for key in ("FMA peak, GFLOP/s", "copy, GB/s"))
    rows = [row for row in found.rows if row["gflops"] > 0]
    at = [intensity(row) for row in rows]
    ends = min([*at, peak / rate]) / 2, max([*at, peak / rate]) * 2
    axes.plot([ends[0], peak / rate, ends[1]], [roof(ends[0], peak, rate), peak, peak], color="black", linewidth=1.4,
              label=f"limits: {peak:.0f} GFLOP/s of float32 multiply-adds, copy {rate:.0f} GB/s")  # fmt: skip
    named: set[str] = set()
    for x, row in zip(at, rows, strict=True):
        what, theirs = row["direction"], row["gflops"] * row["ms"] / row["torch_ms"]
        axes.plot([x, x], [theirs, row["gflops"]], color=COLOURS[what], linewidth=0.8, alpha=0.6)
        axes.plot(x, theirs, "o", color=COLOURS[what], markerfacecolor="white", markersize=4)
        axes.plot(x, row["gflops"], "o", color=COLOURS[what], markersize=6,
                  label=None if what in named else what.replace("_", " "))  # fmt: skip
        named.add(what)
    axes.set(
        xscale="log", yscale="log", xlim=ends, xlabel="operations a byte moved", ylabel="effective GFLOP/s"
    )
    label(axes, rows, at)
    axes.grid(True, which="major", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=150)


def label(axes: Any, rows: list[dict[str, Any]], at: list[float]) -> None:
    """The problem's name over its highest mark, upright, where there are few."""
    highest: dict[str, tuple[float, float]] = {}
    for x, row in zip(at, rows, strict=True):
        top = max(row["gflops"], highest.get(row["problem"], (x, 0.0))[1])
        highest[row["problem"]] = x, top
    if len(highest) > LABELLED:
        return
    low, high = axes.get_ylim()
    axes.set_ylim(low / 1.5, high * (high / low) ** 0.5)  # room for the names
    for problem, (x, top) in highest.items():
        axes.annotate(short(problem), (x, top), xytext=(0, 8), textcoords="offset points", rotation=90, fontsize=6,
                      ha="center", va="bottom")  # fmt: skip
