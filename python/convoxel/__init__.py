"""convoxel: a C++/CUDA backend for PyTorch for 2D and 3D segmentation networks."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from . import functional, losses, metrics, models, nn
from .model import Model, Sequential

try:
    __version__ = version("convoxel")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+source"

__all__ = ["Model", "Sequential", "functional", "losses", "metrics", "models", "nn", "volume"]

if TYPE_CHECKING:
    from . import volume
else:

    def __getattr__(name: str) -> object:
        """Imports what training does not need on first use."""
        if name in ("volume",):
            return import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
