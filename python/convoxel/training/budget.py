"""What training a network on a patch costs, and what it may: the memory and the time that the settings allow."""

from __future__ import annotations

from typing import Any

from .. import memory
from ..runtime import threads
from ..volume.files import machine_memory
from .cost import Layer, network_cost, step_seconds, training_memory
from .settings import Settings
from .topology import Topology

_WIDEST = {2: 512, 3: 320}  # channels (nnU-Net's, as all that follows)
_BLOCKS = (1, 3, 4)  # residual blocks of the first stages, 6 in those after
_CONVS = 2  # convolutions of a plain stage


class Budget:
    """What a network on a patch costs, and what it may."""

    def __init__(
        self, settings: Settings, channels: int, heads: int, cores: int | None, memory_bytes: int | None
    ) -> None:
        self.settings, self.channels, self.heads = settings, channels, heads
        self.cores = threads() if cores is None else cores
        self.machine = machine_memory() if memory_bytes is None else memory_bytes
        self.most = (
            self.machine // 2 if settings.memory is None else memory.as_bytes("memory", settings.memory)
        )
        self.most_said = (
            f"half of this machine's {self.machine / 1e9:.1f} GB" if settings.memory is None
            else f"the {settings.memory} of the settings"
        )  # fmt: skip

    def config(self, found: Topology) -> dict[str, Any]:
        """Of `models.UNet`."""
        rank, stages = len(found.patch), len(found.strides)
        base = self.settings.base_features
        residual = self.settings.network == "residual"
        blocks = [*_BLOCKS, *(6,) * stages][:stages]
        return {
            "rank": rank,
            "in_channels": self.channels,
            "out_channels": self.heads,
            "features": [max(base, min(base << stage, _WIDEST[rank])) for stage in range(stages)],
            "strides": [list(stride) for stride in found.strides],
            "kernel_size": [list(kernel) for kernel in found.kernels],
            "norm": "instance",
            "activation": "leaky_relu",
            "convs": blocks if residual else [_CONVS] * stages,
            "deep_supervision": self.settings.deep_supervision,
            **({"residual": True, "decoder_convs": 1} if residual else {}),
        }

    def cost(self, found: Topology) -> Layer:
        return network_cost(self.config(found), found.patch)

    def memory(self, found: Topology, batch: int) -> int:
        return training_memory(self.cost(found), self.config(found), self.settings, found.patch, batch)

    def seconds(self, found: Topology, batch: int) -> float:
        return step_seconds(self.cost(found), self.config(found), self.settings, batch, self.cores)

    def fits(self, found: Topology, batch: int) -> bool:
        return (
            self.memory(found, batch) <= self.most
            and self.seconds(found, batch) <= self.settings.step_seconds
        )

    def exceeded(self, found: Topology, batch: int) -> str:
        """Which budget it is that this does not keep."""
        need, seconds = self.memory(found, batch), self.seconds(found, batch)
        if need > self.most:
            return f"would take {need / 1e9:.1f} GB of memory, more than {self.most_said}"
        return f"would take {seconds:.2f} s a step, more than {self.settings.step_seconds:g} s"
