"""Files of other programs, read as data: nothing in them is ever executed.

Weights go through `torch.load(weights_only=True)`, whose restricted unpickler knows tensors, plain containers and the
names below, and refuses everything else before it is made.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

try:
    from numpy._core import multiarray
except ImportError:  # numpy 1
    from numpy.core import multiarray  # type: ignore[no-redef]

MAX_JSON = 64 << 20  # bytes; plans have kilobytes, a fingerprint of a large dataset a few megabytes

# Numbers of numpy, which nnU-Net's checkpoints keep beside the weights (its losses and best scores). The first
# two have one name up to numpy 1 and another from numpy 2 on.
NUMPY_NAMES: list[Any] = [
    (multiarray.scalar, "numpy.core.multiarray.scalar"),
    (multiarray.scalar, "numpy._core.multiarray.scalar"),
    (multiarray._reconstruct, "numpy.core.multiarray._reconstruct"),
    (multiarray._reconstruct, "numpy._core.multiarray._reconstruct"),
    np.ndarray,
    np.dtype,
    *(
        type(np.dtype(name))
        for name in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?")
    ),
]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. FileNotFoundError; ValueError for a file that holds no JSON object."""
    if not path.is_file():
        raise FileNotFoundError(2, "no such file", str(path))
    if path.stat().st_size > MAX_JSON:
        raise ValueError(f"{path}: {path.stat().st_size} bytes, expected at most {MAX_JSON} of JSON")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error}); copy the model folder again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a JSON object, received a {type(found).__name__}")
    return found


def read_checkpoint(path: Path) -> Any:
    """What `torch.save` put into a .pth or .pt file, its tensors on the CPU and backed by the file where they can be.

    Raises FileNotFoundError, and ValueError for a file that is damaged, a TorchScript program, or holds anything
    but tensors, plain containers and numpy's numbers; that is then named, and has not been made.
    """
    if not path.is_file():
        raise FileNotFoundError(2, "no such file", str(path))
    zipped = zipfile.is_zipfile(path)
    if zipped and _is_program(path):
        raise ValueError(
            f"{path}: this is a TorchScript program, which convoxel does not run; give the weights (model.pt)"
        )
    try:
        with torch.serialization.safe_globals(NUMPY_NAMES):
            # Mapped, so that the optimiser's state beside the weights costs no memory.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # the unpickler meets damage with any of KeyError, EOFError, RuntimeError ...
        if isinstance(error, MemoryError) or getattr(error, "filename", None) is not None:
            raise  # not the file's content
        foreign = re.search(
            r"(?:GLOBAL|Unsupported (?:global|class)[: ]+(?:GLOBAL )?)\s*([\w.]+)", str(error)
        )
        if foreign:
            raise ValueError(
                f"{path}: holds {foreign[1]}, which is not plain data; nothing of the file was used. Save the "
                "network's state_dict() alone and put it in its place"
            ) from error
        raise ValueError(
            f"{path}: no whole torch checkpoint ({_first_line(error)}); copy it again"
        ) from error


def state_dict(path: Path, found: Any) -> dict[str, Tensor]:
    """`found` as names and tensors, without the prefixes that torch.compile and data-parallel training add."""
    if not isinstance(found, Mapping) or not found:
        raise ValueError(f"{path}: expected a state_dict of tensors, received {_kind(found)}")
    state: dict[str, Tensor] = {}
    for key, value in found.items():
        if not isinstance(key, str) or not isinstance(value, Tensor) or value.layout != torch.strided:
            raise ValueError(f"{path}: {key!r} is {_kind(value)}, expected a state_dict of dense tensors")
        while key.startswith(("module.", "_orig_mod.")):
            key = key.split(".", 1)[1]
        state[key] = value
    return state


def _is_program(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any("/code/" in name or name.endswith("constants.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError):
        return False


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]
