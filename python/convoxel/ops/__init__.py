"""torch operators `torch.ops.convoxel.*`: one file a family, with schema, kernel call, fake and gradient."""

from . import activation, conv, norm, pool, resample
from .library import registered

__all__ = ["activation", "conv", "norm", "pool", "registered", "resample"]
