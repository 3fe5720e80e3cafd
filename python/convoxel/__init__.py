"""convoxel: a C++/CUDA backend for PyTorch for 2D and 3D segmentation networks."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

import torch  # noqa: F401  (first: the kernels then share torch's OpenMP threads)

from . import functional, losses, metrics, models, nn, ops
from .conversion import Report, accelerate, report, restore
from .model import Model, Sequential
from .runtime import (
    HandedToTorch,
    get_conv_algorithm,
    get_float32_conv_precision,
    info,
    is_strict,
    isa,
    isas,
    reset_stats,
    set_conv_algorithm,
    set_float32_conv_precision,
    set_isa,
    set_strict,
    stats,
)

try:
    __version__ = version("convoxel")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+source"

__all__ = [
    "HandedToTorch",
    "Model",
    "Report",
    "Sequential",
    "accelerate",
    "doctor",
    "functional",
    "get_conv_algorithm",
    "get_float32_conv_precision",
    "inference",
    "info",
    "is_strict",
    "isa",
    "isas",
    "losses",
    "metrics",
    "models",
    "nn",
    "ops",
    "phantom",
    "report",
    "reset_stats",
    "restore",
    "set_conv_algorithm",
    "set_float32_conv_precision",
    "set_isa",
    "set_strict",
    "stats",
    "volume",
]

if TYPE_CHECKING:
    from . import doctor, inference, phantom, volume
else:

    def __getattr__(name: str) -> object:
        """Imports what training does not need on first use."""
        if name in ("doctor", "inference", "phantom", "volume"):
            return import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
