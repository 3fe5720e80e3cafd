"""torch operators `torch.ops.convoxel.*`: one file a family, with schema, kernel call, fake and gradient."""

from . import activation, cat, conv, conv_block, norm, norm_act, pool, resample
from .library import registered

__all__ = [
    "activation",
    "cat",
    "conv",
    "conv_block",
    "norm",
    "norm_act",
    "pool",
    "registered",
    "resample",
]
