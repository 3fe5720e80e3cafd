"""The processes that train one network together: `torchrun`'s, over gloo; usually there is one."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ..runtime import cores

_PATIENCE = datetime.timedelta(days=1)  # the first process may fill a cache for hours


@dataclass(frozen=True)
class Processes:
    """This process among all; every method but the properties is to be called by all of them."""

    rank: int = 0
    world_size: int = 1

    @property
    def together(self) -> bool:
        return self.world_size > 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sums(self, values: Sequence[float]) -> list[float]:
        """Each value summed over the processes."""
        if not self.together:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def from_first(self, value: Any) -> Any:
        """What the first process has (plain data)."""
        if not self.together:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]


ALONE = Processes()


@contextlib.contextmanager
def processes() -> Iterator[Processes]:
    """The processes that torchrun started; one where it did not. The cores of a machine are shared out."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield ALONE
        return
    # torchrun sets OMP_NUM_THREADS=1 where nobody has, which would leave most cores idle.
    torch.set_num_threads(max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    dist.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield Processes(dist.get_rank(), world_size)
    finally:
        dist.destroy_process_group()
