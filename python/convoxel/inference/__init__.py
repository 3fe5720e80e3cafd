"""Networks on images larger than their patch: sliding windows, and whole scans to label maps."""

from .labels import predict_labels
from .sliding import sliding_window_inference

__all__ = ["predict_labels", "sliding_window_inference"]
