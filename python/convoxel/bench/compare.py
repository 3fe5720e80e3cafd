"""`convoxel bench compare A.json B.json`: what became slower from one file of results to another of the same kind.

On the same processor and threads, our times are compared; on different ones, our times over torch's in the same run,
since only ratios taken in one run can be. A row is flagged where it became slower by more than either file's spread.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from . import results
from .results import Results

SUMMARY = "compare two files of results, row by row"


@dataclass(frozen=True)
class Figure:
    """Something that should be small, and its spread relative to it."""

    value: float
    spread: float = 0.0


def figures(found: Results, by: str) -> dict[str, Figure]:
    """Our figures under the names of their rows; by "ms", or by "gain": our time over torch's."""
    named: dict[str, Figure] = {}
    for row in found.rows:
        if found.kind == "layers":
            name = f"{row['problem']} {row['direction']} {row['precision']}"
            named[name] = Figure(row["ms"] if by == "ms" else 1 / row["gain"], row["spread"])
        elif found.kind == "network" and row["variant"].split()[0] == ("convoxel" if by == "ms" else "torch"):
            size = "x".join(map(str, row["size"]))
            for what in ("forward", "step"):
                if by == "ms" or "kept" not in row["variant"]:
                    name = f"{row['network']} {row['batch']}x{size} {row['dtype']} {what}"
                    value = row[f"{what}_ms"] if by == "ms" else 1 / row[f"{what}_gain"]
                    named[name] = Figure(value, row[f"{what}_spread"])
            if by == "ms":
                named[f"{row['network']} {row['batch']}x{size} {row['dtype']} peak MB"] = Figure(
                    row["peak_mb"]
                )
        elif found.kind == "scaling" and by == "ms":
            named[f"{row['work']} {row['size']}^3 {row['threads']} threads"] = Figure(
                row["ms"], row["spread"]
            )
        elif found.kind == "accuracy":
            named[f"{row['problem']} {row['direction']} {row['algorithm']} error"] = Figure(row["error"])
    return named


@dataclass(frozen=True)
class Pair:
    name: str
    a: Figure
    b: Figure

    @property
    def ratio(self) -> float:
        """B over A: above 1 is slower."""
        return self.b.value / self.a.value

    @property
    def slower(self) -> bool:
        return self.ratio - 1 > max(self.a.spread, self.b.spread)


def pairs(a: Results, b: Results, by: str) -> list[Pair]:
    """The rows that both have; ValueError where there are none."""
    if a.kind != b.kind:
        raise ValueError(f"expected two files of one kind, received {a.kind} and {b.kind}")
    old, new = figures(a, by), figures(b, by)
    common = [Pair(name, old[name], new[name]) for name in old if name in new]
    if not common:
        raise ValueError(f"no row of {a.kind} that both files have can be compared by {by}")
    return common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", type=Path, metavar="A.json", help="results before")
    parser.add_argument("b", type=Path, metavar="B.json", help="results after")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.1,
        help="exit code 1 where a row lost more than this part (default: %(default)s)",
    )
    parser.add_argument(
        "--by", choices=("ms", "gain"), help="times, or times over torch's (default: ms on the same machine)"
    )


def run(args: argparse.Namespace) -> int:
    a, b = results.read(args.a), results.read(args.b)
    by = args.by or ("ms" if results.same_machine(a, b) else "gain")
    found = pairs(a, b, by)
    for name, one in (("A", a), ("B", b)):
        print(f"{name}: {results.line(one)}")
    print(f"compared by {'our figures' if by == 'ms' else 'our time over torch in the same run'}, "
          f"{len(found)} rows in both")  # fmt: skip
    print(f"{'row':<80} {'A':>9} {'B':>9} {'B/A':>6}")
    lost = 0
    for pair in found:
        word = " slower" if pair.slower else ""
        if pair.ratio > 1 + args.tolerance:
            lost += 1
            word += f" LOST more than {args.tolerance:.0%}"
        print(f"{pair.name:<80} {pair.a.value:9.4g} {pair.b.value:9.4g} {pair.ratio:6.2f}{word}")
    print(
        f"{sum(p.slower for p in found)} slower by more than the spread, {lost} by more than {args.tolerance:.0%}"
    )
    return 1 if lost else 0
