"""Checkpoints: one safetensors file with the weights, and in its header the architecture as JSON.

One file, so that weights and architecture cannot part; nothing in it is ever executed. It is written aside,
flushed to the disk and renamed: a run killed at any instant leaves the old file or the new one, whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

FORMAT = "convoxel-1"
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def replace_atomically(path: str | os.PathLike, write: Callable[[BinaryIO], Any]) -> None:
    """Let `write` fill a file beside `path`, bring it to the disk, and give it that name.

    An exception on the way leaves the old file as it was and nothing beside it; a kill may leave
    `.NAME.tmp`, which the next call replaces. One writer at a time for each path.

    >>> replace_atomically("notes.txt", lambda file: file.write(b"whole"))
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.tmp")
    try:
        with open(aside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        if error.filename is None and error.strerror:  # of a write: the disk is full, but which?
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        aside.unlink(missing_ok=True)
    if os.name == "posix":  # the name itself is on the disk once its folder is
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def check_writable(path: str | os.PathLike) -> None:
    """FileNotFoundError or ImportError now rather than after the first hours of training."""
    folder = Path(path).parent
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder} to save {Path(path).name} in; create it first")
    _safetensors()


def write(
    path: str | os.PathLike,
    state: Mapping[str, Any],
    architecture: dict[str, Any] | None,
    recipe: dict[str, Any] | None = None,
) -> None:
    """Write a state_dict, and {"name", "config"} of the network or None, as one safetensors file.

    recipe: what is done with a scan before and after the network, plain data (convoxel.importers); None: not known.

    Raises ValueError for what safetensors cannot hold (entries that are not tensors, lazy parameters).
    """
    check_writable(path)
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{key} is a {type(value).__name__}: a checkpoint holds tensors only")
        if torch.nn.parameter.is_lazy(value):
            raise ValueError(f"{key} has no shape yet; run the network on one batch before saving it")
    metadata = {"format": FORMAT, "architecture": json.dumps(architecture)}
    if recipe is not None:
        metadata["recipe"] = json.dumps(recipe)
    replace_atomically(path, lambda file: _put(file, state, metadata))


def _put(file: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """The safetensors format: the header's length, the header as JSON, the tensors' bytes.

    Its own library wants two copies of everything in memory: a training with 16 million weights and AdamW peaked at
    1.59 GB by it, and peaks at 1.03 GB so.
    """
    tensors = dict(sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])))  # aligned
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _dtype(name, tensor),
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors.values():
        plain = tensor.detach().cpu().contiguous().flatten()
        file.write(plain.view(torch.uint8).numpy().data)


def _dtype(name: str, tensor: Tensor) -> str:
    """Its name in the format."""
    if tensor.dtype not in _DTYPES:
        raise ValueError(f"{name} is {tensor.dtype}: a checkpoint holds real numbers, integers and bool only")
    return _DTYPES[tensor.dtype]


def read(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The weights (on the CPU) and the architecture, or None if the network was not a registered one.

    A safetensors file of another program has weights only. Raises FileNotFoundError, and ValueError for a
    file that is damaged or of another kind.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint at {path}; check the path")
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            # Copies: the file may be replaced while its weights are in use.
            state = {key: file.get_tensor(key).clone() for key in file.keys()}
        architecture = json.loads(metadata.get("architecture", "null"))
    except (safetensors.SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is no whole safetensors checkpoint ({error}); was it cut short, or saved by torch.save?"
        ) from error
    if metadata.get("format", FORMAT) != FORMAT and "architecture" in metadata:
        raise ValueError(
            f"{path} has the format {metadata['format']}, this convoxel reads {FORMAT}; update it"
        )
    if architecture is not None and not (
        isinstance(architecture, dict)
        and isinstance(architecture.get("name"), str)
        and isinstance(architecture.get("config"), dict)
    ):
        raise ValueError(
            f"{path}: the architecture must be a name and a config, received {architecture!r:.200}"
        )
    return state, architecture


def read_recipe(path: str | os.PathLike) -> dict[str, Any] | None:
    """What `write` was given as `recipe`, or None; read after `read`, which says what is wrong with a file."""
    with _safetensors().safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get("recipe", "null")
    try:
        recipe = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: its recipe is not JSON ({error}); import the model again") from error
    if recipe is not None and not isinstance(recipe, dict):
        raise ValueError(f"{path}: its recipe must be an object, received {recipe!r:.200}")
    return recipe


def check_fits(path: str | os.PathLike, state: Mapping[str, Tensor], expected: Mapping[str, Any]) -> None:
    """ValueError unless `state` has the names and shapes of `expected`, so that nothing is loaded by half."""
    missing, extra = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    shapes = {
        key: f"{key} {tuple(value.shape)} instead of {tuple(expected[key].shape)}"
        for key, value in state.items()
        if key in expected
        and not torch.nn.parameter.is_lazy(expected[key])
        and value.shape != expected[key].shape
    }
    problems = {"missing": missing, "not expected": extra, "of another shape": sorted(shapes.values())}
    if found := [f"{what}: {_first(names)}" for what, names in problems.items() if names]:
        raise ValueError(f"{path} does not fit this network; {'; '.join(found)}")


def _first(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError('checkpoints need safetensors: pip install "convoxel[train]"') from error
    return safetensors
