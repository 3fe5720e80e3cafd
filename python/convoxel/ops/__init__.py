"""torch operators `torch.ops.convoxel.*`: one file a family, with schema, kernel call, fake and gradient."""

from . import conv, resample
from .library import registered

__all__ = ["conv", "registered", "resample"]
