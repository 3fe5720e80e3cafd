"""Networks on images larger than their patch: sliding windows, and whole scans to label maps."""

from .axis import Axis
from .grid import predict_on_grid
from .labels import predict_labels
from .sliding import sliding_window_inference

__all__ = ["Axis", "predict_labels", "predict_on_grid", "sliding_window_inference"]
