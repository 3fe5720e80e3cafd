"""torch operators `torch.ops.convoxel.*`: one file a family, with schema, kernel call, fake and gradient."""

from . import activation, conv, norm, resample
from .library import registered

__all__ = ["activation", "conv", "norm", "registered", "resample"]
