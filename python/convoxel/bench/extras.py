"""What `pip install "convoxel[bench]"` brings; imported by what needs it and nowhere else."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def extra(name: str) -> Any:
    """The module; ImportError with the remedy where it is not installed."""
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(
            f"this needs {name.partition('.')[0]}, which is not installed ({error}); "
            'pip install "convoxel[bench]" brings it'
        ) from error
