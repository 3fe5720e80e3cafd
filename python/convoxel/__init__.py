"""convoxel: a C++/CUDA backend for PyTorch for 2D and 3D segmentation networks."""

from importlib.metadata import PackageNotFoundError, version

from . import functional, losses, metrics, models, nn

try:
    __version__ = version("convoxel")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+source"

__all__ = ["functional", "losses", "metrics", "models", "nn"]
