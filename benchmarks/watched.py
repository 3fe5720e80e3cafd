"""A process watched from outside: what it prints, and the most memory that it held."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

_EVERY = 0.005  # seconds between two looks


def watched(command: Sequence[str]) -> tuple[str, int]:
    """What a Python command prints, and its peak in bytes (Linux).

    The larger of VmHWM and VmRSS over many looks: the process may start its own count anew (convoxel's forecasts do, so
    the system's count at the end, `ru_maxrss`, misses what was before). SystemExit if the command fails.
    """
    with tempfile.TemporaryFile("w+") as printed:
        process = subprocess.Popen([sys.executable, *command], stdout=printed)
        peak = 0
        try:
            while process.poll() is None:
                peak = max(peak, resident(process.pid))
                time.sleep(_EVERY)
        finally:
            process.kill()
        if process.returncode:
            raise SystemExit(f"{' '.join(command)}: failed ({process.returncode})")
        printed.seek(0)
        return printed.read(), peak


def resident(pid: int) -> int:
    """The most bytes that a process has held, as far as it lets the system count; 0 of one that ended."""
    with suppress(OSError):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return 1024 * max(
            (int(line.split()[1]) for line in lines if line.startswith(("VmHWM", "VmRSS"))), default=0
        )
    return 0
