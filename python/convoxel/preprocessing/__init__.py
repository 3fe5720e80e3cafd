"""What a scan goes through on its way to a network: cropped, normalised, resampled, as nnU-Net has it.

crop       to the box that is not zero
intensity  the normalisations of the field
splines    resized by splines of order 0, 1 and 3 as products of matrices
labelled   label maps resized
"""

from .crop import filled, nonzero_box, padding
from .intensity import SCHEMES, Intensities, normalise
from .labelled import resize_labels
from .splines import interpolate, nearest, resize

__all__ = [
    "SCHEMES",
    "Intensities",
    "filled",
    "interpolate",
    "nearest",
    "nonzero_box",
    "normalise",
    "padding",
    "resize",
    "resize_labels",
]
