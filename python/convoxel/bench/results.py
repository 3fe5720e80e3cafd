"""Results as JSON: what was measured (`kind`, `rows`), and where and by what (`machine`)."""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from .. import _C, runtime
from .limits import copy_rate, fma_peak

TRIES = 5  # of each limit, the best of which counts


@dataclass(frozen=True)
class Results:
    """A file of results; rows as the commands that made them define them."""

    kind: str
    machine: dict[str, Any]
    rows: list[dict[str, Any]]


def processor() -> str:
    """The name of the CPU, as Linux tells it or else as Python does."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def build() -> str:
    """Eight digits that tell one build of the kernels from another, with or without a version control."""
    return hashlib.sha256(Path(_C.__file__).read_bytes()).hexdigest()[:8]


def machine() -> dict[str, Any]:
    """What `convoxel.info()` says, with the processor, the date, the build, and the two limits as measured now."""
    return {
        **runtime.info(),
        "processor": processor(),
        "build": build(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "FMA peak, GFLOP/s": round(max(fma_peak() for _ in range(TRIES))),
        "copy, GB/s": round(max(copy_rate() for _ in range(TRIES)), 1),
    }


def line(found: Results) -> str:
    """Machine, versions and date of results in one line."""
    machine = {**found.machine, "ISA": isa(found)}
    keys = ("processor", "threads", "ISA", "torch", "convoxel", "build", "date")
    return ", ".join(f"{key} {machine.get(key, '?')}" for key in keys)


def isa(found: Results) -> str:
    """The instruction set that ours ran at."""
    return str(found.machine.get("ISA", "?")).split()[0]


def same_machine(a: Results, b: Results) -> bool:
    """Whether milliseconds of the one may be compared with those of the other."""
    return all(a.machine.get(key) == b.machine.get(key) for key in ("processor", "threads"))


def write(path: Path | None, results: Results) -> None:
    """Writes the file; None writes nothing."""
    if path:
        path.write_text(json.dumps(vars(results), indent=1, default=str) + "\n")


def read(path: Path) -> Results:
    """The results of a file; ValueError where it has none."""
    try:
        found = json.loads(path.read_text())
        return Results(found["kind"], found["machine"], found["rows"])
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: expected results that `convoxel bench … --json` wrote ({type(error).__name__}: {error}); "
            "measure again with this version"
        ) from None
