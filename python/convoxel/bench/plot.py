"""Pictures of results, by matplotlib: bars of gains with the gain that is asked for, and time against volume."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..geometry import Problem
from . import lists
from .extras import extra
from .fit import lines
from .results import Results, line

COLOURS = {
    "forward": "#1f5a99",
    "input_grad": "#5fa2dd",
    "weight_grad": "#e08b2d",
    "backward": "#7b6bb5",
    "step": "#e08b2d",
}
INCH = 0.2  # of a bar


def least(row: dict[str, Any]) -> float | None:
    """The gain that the row's list asks of the pass, of lists in their order the first that has the problem."""
    words = row["problem"].split()
    text = " ".join(w for w in words if w != "last" and w not in Problem.DTYPES)
    found = [some.least.get(row["direction"]) for some in lists.LISTS.values() if text in some.texts]
    return found[0] if found else None


def short(problem: str) -> str:
    """A problem as a label, i64x64x64 as 64³: "conv n1 c32 k32 i64x64x64 f3x3x3 p1x1x1" -> "conv 32→32 64³ f3³"."""
    p = Problem.parse(problem)

    def cube(sizes: Sequence[int]) -> str:
        return (
            f"{sizes[0]}{' ²³'[len(sizes) - 1].strip()}"
            if len(set(sizes)) == 1
            else "x".join(map(str, sizes))
        )

    words = [p.op.replace("_", " "), f"{p.c}→{p.k}" if p.convolves else str(p.c)]
    words += [cube(p.i)] if p.i else [f"{p.n} rows"]
    words += [f"k{cube(p.f)}"] if max(p.f, default=1) > 1 else []
    words += [f"{name}{cube(v)}" for name, v in (("s", p.s), ("d", p.d)) if max(v, default=1) > 1]
    words += [f"g{p.g}"] * (p.g > 1) + ["nearest"] * p.nearest
    words += [f"n{p.n}"] * (p.n > 1 and bool(p.i)) + ["last"] * p.last + [p.dtype] * (p.dtype != "f32")
    return " ".join(words)


def canvas(height: float, found: Results, title: str) -> tuple[Any, Any]:
    """A figure and its axes; no display is needed."""
    figure = extra("matplotlib.figure").Figure(figsize=(9, height), layout="constrained")
    axes = figure.subplots()
    first, _, rest = line(found).partition(", torch ")
    figure.suptitle(title, fontsize=12)
    axes.set_title(f"{first}\ntorch {rest}", fontsize=7, color="0.4")
    return figure, axes


def bars(
    path: Path, found: Results, title: str, groups: dict[str, list[tuple[str, float, float | None, str]]]
) -> None:
    """Horizontal bars, groups from top to bottom: of each bar its colour's name, length, mark and note."""
    count = sum(len(group) for group in groups.values()) + len(groups)
    figure, axes = canvas(2.0 + INCH * count, found, title)
    longest = max(max(length, mark or 0) for group in groups.values() for _, length, mark, _ in group)
    at, ticks = 0.0, {}
    named: set[str] = set()
    for name, group in groups.items():
        ticks[name] = at + (len(group) - 1) / 2
        for colour, length, mark, note in group:
            axes.barh(at, length, 0.85, color=COLOURS[colour], label=None if colour in named else colour)
            named.add(colour)
            if mark is not None:
                axes.plot([mark, mark], [at - 0.45, at + 0.45], color="black", linewidth=1.6,
                          label=None if "mark" in named else "at least")  # fmt: skip
                named.add("mark")
            axes.text(max(length, mark or 0) + longest / 100, at, note, va="center", fontsize=7)
            at += 1
        at += 1
    axes.axvline(1, color="0.5", linewidth=0.8, linestyle="--", label="as fast")
    axes.set(
        yticks=list(ticks.values()),
        ylim=(at - 1, -1),
        xlim=(0, longest * 1.35),
        xlabel="times as fast",
    )
    axes.set_yticklabels(list(ticks), fontsize=8)
    figure.legend(loc="outside lower center", ncols=6, fontsize=8)
    figure.savefig(path, dpi=150)


def layers(path: Path, found: Results) -> None:
    """A bar of the gain over torch for each row, with the "at least" of its list."""
    groups: dict[str, list[tuple[str, float, float | None, str]]] = {}
    for row in found.rows:
        note = f"{row['gain']:.2f}x  {row['ms']:.3g} ms"
        bar = (row["direction"], row["gain"], least(row), note)
        groups.setdefault(short(row["problem"]), []).append(bar)
    bars(path, found, "convoxel over torch, memory kept, better memory format", groups)


def network(path: Path, found: Results) -> None:
    """A bar of the gain over each other variant, forward and training step."""
    groups: dict[str, list[tuple[str, float, float | None, str]]] = {}
    for row in found.rows:
        if row["engine"] == "convoxel":
            continue
        group = groups.setdefault(f"{row['network']}, {row['variant']}", [])
        for what in ("forward", "step"):
            gain, ms = row[f"{what}_gain"], row[f"{what}_ms"]
            if ms is not None:
                asked = lists.NETWORK_LEAST.get((row["network"], row["dtype"], what), {}).get(row["variant"])
                group.append((what, gain, asked, f"{gain:.2f}x  {ms:.0f} ms, ours {ms / gain:.0f} ms"))
    bars(path, found, "convoxel over other engines, whole networks", groups)


def volumes(path: Path, found: Results) -> None:
    """ms a Mvoxel against volume, a curve for each work and number of threads; a straight line through the origin
    is level here."""
    figure, axes = canvas(4.5, found, "Time a voxel against volume")
    for key, fitted in lines(found.rows).items():
        some = [r for r in found.rows if (r["work"], r["threads"]) == key]
        voxels, ms = [r["size"] ** 3 / 1e6 for r in some], [r["ms_per_mvoxel"] for r in some]
        name = f"{key[0]}, {key[1]} threads: {fitted.fixed:.2f} ms + {fitted.slope:.1f} ms a Mvoxel"
        axes.plot(voxels, ms, "o-", markersize=4, label=name)
    sizes = sorted({r["size"] for r in found.rows})
    axes.set(xscale="log", ylim=(0, None), xlabel="voxels of the cube", ylabel="ms a Mvoxel")
    axes.set_xticks([size**3 / 1e6 for size in sizes], [f"{size}³" for size in sizes])
    axes.minorticks_off()
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def errors(path: Path, found: Results) -> None:
    """Relative error against channels, a curve for each algorithm: the worst of the passes, 2-D and 3-D."""
    figure, axes = canvas(6.0, found, "Relative L2 error against float64: the worst pass, 2-D and 3-D")
    by_torch = {
        (r["problem"], r["direction"]): {**r, "algorithm": "torch", "error": r["torch_error"]}
        for r in found.rows
    }
    rows = [*by_torch.values(), *found.rows]
    channels = sorted({r["channels"] for r in rows})
    for name in dict.fromkeys(r["algorithm"] for r in rows):
        worst: dict[int, float] = {}
        for r in rows:
            if r["algorithm"] == name:
                worst[r["channels"]] = max(r["error"], worst.get(r["channels"], 0))
        style = {"torch": "k--", "high": "k-", "highest": "k:"}.get(name, "o-")
        axes.plot(list(worst), list(worst.values()), style, label=name, markersize=4, linewidth=1.2)
    if not rows[0]["problem"].endswith("bf16"):
        axes.axhline(1e-5, color="red", linewidth=1, label="bound of high")
    axes.set(xscale="log", yscale="log", xlabel="channels", ylabel="relative L2 error")
    axes.set_xticks(channels, list(map(str, channels)), fontsize=8)
    axes.minorticks_off()
    figure.legend(loc="outside lower center", ncols=5, fontsize=8)
    figure.savefig(path, dpi=150)


PICTURES = {"layers": layers, "network": network, "scaling": volumes, "accuracy": errors}


def draw(path: Path | None, found: Results) -> None:
    """The picture of the results, in the format that the file's name ends with; None draws nothing. ImportError where
    matplotlib is not installed, ValueError for a format that it does not write."""
    if path:
        PICTURES[found.kind](path, found)


def check(path: Path | None, option: str = "--plot") -> None:
    """Before hours of measuring: whether the picture of this option can be drawn."""
    if path:
        formats = extra("matplotlib.backend_bases").FigureCanvasBase.get_supported_filetypes()
        if path.suffix[1:].lower() not in formats:
            raise ValueError(f"{option}: {path} must end with one of .{', .'.join(sorted(formats))}")
