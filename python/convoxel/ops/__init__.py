"""torch operators `torch.ops.convoxel.*`: one file a family, with schema, kernel call, fake and gradient."""

from . import activation, conv, norm, norm_act, pool, resample
from .library import registered

__all__ = ["activation", "conv", "norm", "norm_act", "pool", "registered", "resample"]
