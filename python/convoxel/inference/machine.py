"""How much memory this process holds, and held at most."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path


def restart_peak() -> int:
    """Lets Linux count this process's peak memory from now on (elsewhere it counts from the start).

    Returns the bytes resident now, or that peak.
    """
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return peak_memory()


def peak_memory() -> int:
    """Bytes resident at this process's peak."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    try:
        import resource
    except ImportError as error:
        raise ValueError("this system does not tell memory use; leave max_ram out") from error
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
