"""What is set for the whole process: ISA, precision, algorithm, strict mode; and what was counted."""

from __future__ import annotations

import os
import platform
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch  # before _C: both then share torch's OpenMP threads

from . import _C

PRECISIONS = ("highest", "high", "medium")
ALGORITHMS = ("auto", "direct", "winograd", "columns", "amx", "voxels")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}  # as csrc/dtype.h numbers them

_FLAGS = {"": False, "0": False, "false": False, "no": False, "off": False,
          "1": True, "true": True, "yes": True, "on": True}  # fmt: skip


def _refuse(message: str) -> NoReturn:
    """A wrong setting stops the import; of the command, which is not running yet, in one line."""
    if Path(sys.argv[0]).name == "convoxel" or (sys.argv[0] == "-m" and "convoxel" in sys.orig_argv):
        sys.exit(f"convoxel: {message}")
    raise ValueError(message)


def _flag(name: str) -> bool:
    value = os.environ.get(name, "")
    if value.lower() not in _FLAGS:
        _refuse(f"{name}={value}: expected 1 or 0")
    return _FLAGS[value.lower()]


def _from_environment(name: str, default: str, allowed: tuple[str, ...]) -> str:
    value = os.environ.get(name, default) or default
    if value not in allowed:
        _refuse(f"{name}={value}: expected one of {', '.join(allowed)}")
    return value


class HandedToTorch(RuntimeError):
    """Strict mode: a call that convoxel's kernels do not serve. The message says which and why."""


@dataclass
class _State:
    strict: bool = _flag("CONVOXEL_STRICT")
    verbose: bool = _flag("CONVOXEL_VERBOSE")
    forked: bool = False
    precision: str = "high"
    algorithm: str = _from_environment("CONVOXEL_CONV_ALGORITHM", "auto", ALGORITHMS)
    served: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    handed: Counter[tuple[str, str]] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)


_state = _State()


def _after_fork_in_child() -> None:
    _state.forked = True
    _state.lock = threading.Lock()  # a thread that the child does not have may hold it


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_after_fork_in_child)


def threads() -> int:
    """How many threads a kernel uses: torch.get_num_threads(), and 1 in a forked process.

    A fork copies OpenMP's bookkeeping without its threads, and the next parallel region waits for them
    forever, in torch as here. DataLoader workers have one thread anyway; who wants more starts processes
    by "spawn".
    """
    return 1 if _state.forked else torch.get_num_threads()


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def set_strict(strict: bool) -> None:
    """With True a call that would be handed to torch raises `convoxel.HandedToTorch` instead."""
    _state.strict = bool(strict)


def is_strict() -> bool:
    return _state.strict


def set_float32_conv_precision(precision: str) -> None:
    """ "highest", "high" (default) or "medium", in the words of torch.set_float32_matmul_precision.

    `highest`: error against float64 at most twice torch's own. `high`: relative L2 error at most 1e-5.
    `medium`: bfloat16 arithmetic allowed. The direct convolution keeps `highest` at every setting; Winograd's
    keeps `high`.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r}: expected one of {', '.join(PRECISIONS)}")
    _state.precision = precision


def get_float32_conv_precision() -> str:
    return _state.precision


def set_conv_algorithm(algorithm: str) -> None:
    """Which convolution algorithm to use (also CONVOXEL_CONV_ALGORITHM): "auto", by shape, dtype and precision;
    "direct"; or "winograd", "columns", "amx" or "voxels" wherever it is possible, without regard to precision and
    speed."""
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm {algorithm!r}: expected one of {', '.join(ALGORITHMS)}")
    _state.algorithm = algorithm


def get_conv_algorithm() -> str:
    return _state.algorithm


def isas() -> list[str]:
    """The instruction sets that this build has and this CPU can run, weakest first."""
    return list(_C.isas())


def isa() -> str:
    """The instruction set in use: the last of `isas()`, or what CONVOXEL_ISA or `set_isa` says."""
    return str(_C.isa())


def set_isa(name: str) -> None:
    """Use this instruction set from the next call on; ValueError if it is not one of `isas()`."""
    _C.set_isa(name)


try:
    isa()  # a wrong CONVOXEL_ISA stops the import, not the first call
except ValueError as wrong:
    _refuse(str(wrong))


def handed(op: str, reason: str) -> None:
    """Counts a call that goes to torch; in strict mode raises instead."""
    if _state.strict:
        raise HandedToTorch(
            f"{op}: not served by convoxel: {reason}. Change the call, or allow torch to take it with "
            "convoxel.set_strict(False)"
        )
    with _state.lock:
        _state.handed[(op, reason)] += 1


_QUIET = nullcontext()


def serve(
    op: str, algorithm: str, describe: Callable[[], str], why: str = ""
) -> AbstractContextManager[None]:
    """Around a kernel: counts it, and prints one line of it when CONVOXEL_VERBOSE=1; why: this algorithm."""
    name = _C.isa()
    with _state.lock:
        _state.served[(op, algorithm, name)] += 1
    return _timed(op, describe, f"{algorithm} {name}", why) if _state.verbose else _QUIET


@contextmanager
def _timed(op: str, describe: Callable[[], str], by: str, why: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    ms = 1e3 * (time.perf_counter() - start)
    print(f"convoxel {op} {describe()} {by} {ms:.3f} ms{why and f' ({why})'}", file=sys.stderr)


def stats() -> dict[str, dict[str, Any]]:
    """Per operator, since the start or `reset_stats()`: calls served, by which algorithm and ISA; calls
    handed to torch, and why.

    >>> convoxel.stats()
    {'conv': {'served': 2, 'by': {'direct avx512': 2}, 'torch': 0, 'why': {}}}
    """
    table: dict[str, dict[str, Any]] = {}

    def row(op: str) -> dict[str, Any]:
        return table.setdefault(op, {"served": 0, "by": {}, "torch": 0, "why": {}})

    with _state.lock:
        for (op, algorithm, name), count in _state.served.items():
            row(op)["served"] += count
            row(op)["by"][f"{algorithm} {name}"] = count
        for (op, reason), count in _state.handed.items():
            row(op)["torch"] += count
            row(op)["why"][reason] = count
    return table


def reset_stats() -> None:
    with _state.lock:
        _state.served.clear()
        _state.handed.clear()


class Info(dict[str, Any]):
    """A dict that prints as a table."""

    def __str__(self) -> str:
        width = max(len(k) for k in self)
        return "\n".join(f"{k:<{width}}  {v}" for k, v in self.items())

    __repr__ = __str__


def info() -> Info:
    """Version, machine, instruction sets, threads, and why CUDA is absent."""
    from . import __version__

    return Info(
        {
            "convoxel": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": f"{platform.system()} {platform.machine()}",
            "ISA": f"{isa()} (available: {', '.join(isas())})",
            "threads": threads(),
            "precision": get_float32_conv_precision(),
            "strict": is_strict(),
            "CUDA": "absent: this version has CPU kernels only; CUDA tensors go to torch",
        }
    )
