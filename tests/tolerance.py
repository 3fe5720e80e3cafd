"""One rule for how far a result may be from float64; no test has a tolerance of its own."""

import torch

UNIT = {torch.float32: torch.float32, torch.bfloat16: torch.float32, torch.float64: torch.float64}


def bound(dtype: torch.dtype, length: int) -> float:
    """Error allowed relative to the sum of the absolute terms, for a sum of `length` products stored as `dtype`:
    one rounding of the storage type, and sqrt(length) / 2 (a random walk, at least 2) of the computing type's."""
    return torch.finfo(dtype).eps / 2 + torch.finfo(UNIT[dtype]).eps * max(2.0, 0.5 * length**0.5)


def relative_l2(a: torch.Tensor, reference: torch.Tensor) -> float:
    """||a - reference|| / ||reference||, in float64."""
    norm = reference.double().norm().item()
    return (a.double() - reference.double()).norm().item() / (norm or 1.0)
