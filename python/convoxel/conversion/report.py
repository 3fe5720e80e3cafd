"""What became of every module of a network, as a table."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import nn

from . import blocks
from .layers import LAYERS, MARK, check_module, kept, original


@dataclass(frozen=True)
class Entry:
    """A module: its name in the network, the class that it had, what became of it ("converted", "fused", "left", or
    "container" for those that only call others), and with what it is fused or why it was left."""

    name: str
    kind: str
    state: str
    why: str = ""


@dataclass(frozen=True)
class Report:
    """The modules of a network, in their order; printable.

    `fused` knows what has run: a network reports it after its first forward pass.
    """

    entries: tuple[Entry, ...]

    def of(self, state: str) -> list[Entry]:
        """The entries of one state."""
        return [e for e in self.entries if e.state == state]

    def __str__(self) -> str:
        counts = Counter(e.state for e in self.entries)
        head = ", ".join(f"{counts[state]} {state}" for state in ("converted", "fused", "left"))
        shown = [e for e in self.entries if e.state != "container"]
        width = max((len(e.name) for e in shown), default=0)
        lines = (f"{e.name:<{width}}  {e.kind:<18} {e.state:<9} {e.why}".rstrip() for e in shown)
        return "\n".join((head, *lines))


def report(model: nn.Module) -> Report:
    """What `convoxel.accelerate` made of a network, or would make of it.

    Args:
        model: converted or not.

    Raises:
        TypeError: if `model` is no torch module.

    Returns:
        A Report; `print` shows it. Layers are "converted" (they run on our kernels), "fused" (the same, as one with
        the layers named, in the last forward pass), or "left" with the reason.

    >>> net = convoxel.accelerate(nn.Sequential(nn.Conv2d(1, 8, 3), nn.InstanceNorm2d(8), nn.ReLU()))
    >>> y = net(torch.randn(1, 1, 16, 16))
    >>> print(convoxel.report(net))
    0 converted, 3 fused, 0 left
    0  Conv2d             fused     conv + norm + relu
    1  InstanceNorm2d     fused     conv + norm + relu
    2  ReLU               fused     conv + norm + relu
    """
    check_module("report", model)
    return Report(tuple(_entry(name or "(the network)", module) for name, module in model.named_modules()))


def _entry(name: str, module: nn.Module) -> Entry:
    kind = original(module).__name__
    if with_ := blocks.seen(module):
        return Entry(name, kind, "fused", with_)
    if MARK in module.__dict__ or type(module) in LAYERS.values():
        return Entry(name, kind, "converted")
    why = kept(module)
    return Entry(name, kind, "left", why) if why else Entry(name, kind, "container")
