"""Work in a process of its own, where settings of the process differ: its allocator, its instruction set."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, TypeVar

Result = TypeVar("Result")

# What caps torch and its libraries at an instruction set; read when torch is imported.
TORCH_CAPS = {
    "baseline": ("default", "SSE41", "SSE4_2"),
    "avx2": ("avx2", "AVX2", "AVX2"),
    "avx512": ("avx512", "AVX512_CORE", "AVX512"),
    "avx512bf16": ("avx512", "AVX512_CORE_BF16", "AVX512"),
    "amx": ("avx512", "AVX512_CORE_AMX", "AVX512"),
}


def environment(isa: str) -> dict[str, str]:
    """The variables that make a new process run ours at `isa`, and torch at most at it."""
    aten, onednn, mkl = TORCH_CAPS[isa]
    return {
        "CONVOXEL_ISA": isa,
        "ATEN_CPU_CAPABILITY": aten,
        "ONEDNN_MAX_CPU_ISA": onednn,
        "MKL_ENABLE_INSTRUCTIONS": mkl,
    }


def _worker(pipe: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        try:
            result = function(*arguments)
        except Exception as error:  # the parent's to tell
            result = error
        pipe.send(result)
    except (KeyboardInterrupt, BrokenPipeError):  # the user stopped both, or the parent is gone
        pass


def in_process(
    function: Callable[..., Result], *arguments: Any, variables: dict[str, str] | None = None
) -> Result:
    """function(*arguments) in a fresh process; its exception is raised here. RuntimeError where it ends without a
    word, as one does that the system kills for its memory."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_worker, args=(theirs, function, arguments))
    before = dict(os.environ)
    os.environ.update(variables or {})
    try:
        process.start()
    finally:
        os.environ.clear()
        os.environ.update(before)
    theirs.close()
    try:
        result = ours.recv()
    except EOFError:
        process.join()
        raise RuntimeError(
            f"bench: the process of {function.__name__}{arguments[:1]} ended early with exit code "
            f"{process.exitcode}; is memory short?"
        ) from None
    except KeyboardInterrupt:
        process.terminate()
        raise
    finally:
        process.join()
    if isinstance(result, Exception):
        raise result
    return result
