"""Training and evaluation mode, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def in_mode(network: nn.Module, training: bool) -> Iterator[None]:
    """Every module of the network in that mode, and afterwards in the one that each had."""
    found = [(module, module.training) for module in network.modules()]
    network.train(training)
    try:
        yield
    finally:
        for module, flag in found:
            module.training = flag
