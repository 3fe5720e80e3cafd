"""Batches from any step on, prepared in the background.

Threads, not processes: nearly all of the work is done inside of torch and numpy, which let other threads run
meanwhile; nothing is pickled or copied between processes, the scans' maps are shared, and what goes wrong arrives
where it is waited for.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from ..runtime import cores
from .augment import Augmentation, augment
from .cache import Stored
from .patches import FOREGROUND, Drawn, draw

Batch = tuple[Tensor, Tensor]


class Feed:
    """Iterates over batches (x, y) for the steps asked for, in order; may be iterated again.

    x: (B, C, *patch) float32, y: (B, *patch) int64. The bits depend on the seed, the step and the batch size alone:
    neither on `workers` nor on the number of processes nor on where the iteration began.

    Args:
        stored: the training cases.
        patch_size: (d, h, w), or (h, w) for slices.
        batch_size: of all processes together.
        seed: another seed, other patches.
        augmentation: None: patches as they are.
        workers: threads; 0: in the loop itself; None: half of the cores, at most 8.
        steps: which steps, such as range(1000, 250_000).
        foreground: share of the patches that are centred on a structure.
        ignore: value of voxels that nobody labelled; patches are then centred on labelled ones.
        rank, world_size: of torch.distributed: each process gets the patches rank, rank + world_size, ... of the
            batch, batch_size / world_size of them.
        ahead: batches that are prepared before they are asked for.
        pin_memory: for copies to a GPU while it works.

    Attributes:
        waited: seconds that the loop stood still for batches so far.

    Raises ValueError for sizes that do not fit; from the iteration, RuntimeError with the case's name.

    >>> feed = Feed(cases, (64, 64, 64), 2, seed=0, augmentation=Augmentation.for_patch((64, 64, 64)), steps=range(100))
    >>> for x, y in feed:
    ...     x.shape, y.shape
    (torch.Size([2, 1, 64, 64, 64]), torch.Size([2, 64, 64, 64]))
    """

    def __init__(
        self,
        stored: Sequence[Stored],
        patch_size: Sequence[int],
        batch_size: int,
        *,
        seed: int = 0,
        augmentation: Augmentation | None = None,
        workers: int | None = None,
        steps: range,
        foreground: float = FOREGROUND,
        ignore: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        ahead: int = 3,
        pin_memory: bool = False,
    ) -> None:
        _check(stored, patch_size, batch_size, rank, world_size)
        self.stored, self.patch_size = list(stored), tuple(patch_size)
        self.patch = (1,) * (3 - len(self.patch_size)) + self.patch_size
        self.batch_size, self.seed, self.augmentation = batch_size, seed, augmentation
        self.workers = default_workers() if workers is None else workers
        self.steps, self.foreground, self.ignore = steps, foreground, ignore
        self.indices = range(rank, batch_size, world_size)
        self.ahead, self.pin_memory = ahead, pin_memory
        self.waited = 0.0

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[Batch]:
        return self._inline() if self.workers == 0 else self._background()

    def names(self, step: int) -> list[str]:
        """The cases that this process's patches of a step are from."""
        return [self.stored[self._drawn(step, index).case].name for index in self.indices]

    def _drawn(self, step: int, index: int) -> Drawn:
        return draw(
            self.stored,
            self.patch,
            seed=self.seed,
            step=step,
            index=index,
            batch=self.batch_size,
            foreground=self.foreground,
            annotated=self.ignore is not None,
        )

    def _inline(self) -> Iterator[Batch]:
        for step in self.steps:
            began = time.perf_counter()
            threads = torch.get_num_threads()
            torch.set_num_threads(1)  # sums in the order in which the workers sum
            try:
                x, y = self._empty()
                for place, index in enumerate(self.indices):
                    self._fill(x[place], y[place], step, index)
            finally:
                torch.set_num_threads(threads)
            self.waited += time.perf_counter() - began
            yield x, y

    def _background(self) -> Iterator[Batch]:
        pool = ThreadPoolExecutor(self.workers, "convoxel-feed", initializer=_single)
        todo = iter(self.steps)
        queue: deque[tuple[Batch, list[Future[None]]]] = deque()

        def submit() -> None:
            step = next(todo, None)
            if step is not None:
                x, y = self._empty()
                parts = zip(x, y, self.indices, strict=True)
                queue.append(((x, y), [pool.submit(self._fill, a, b, step, index) for a, b, index in parts]))

        threads = torch.get_num_threads()
        try:
            for _ in range(self.ahead):
                submit()
            while queue:
                batch, futures = queue.popleft()
                began = time.perf_counter()
                for future in futures:
                    future.result()
                self.waited += time.perf_counter() - began
                # New threads of others begin with the number that was set last, anywhere.
                torch.set_num_threads(threads)
                submit()
                yield batch
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            torch.set_num_threads(threads)

    def _empty(self) -> Batch:
        lead = len(self.indices)
        x = torch.empty(lead, len(self.stored[0].image), *self.patch_size, pin_memory=self.pin_memory)
        return x, torch.empty(lead, *self.patch_size, dtype=torch.int64, pin_memory=self.pin_memory)

    def _fill(self, x: Tensor, y: Tensor, step: int, index: int) -> None:
        drawn = self._drawn(step, index)
        case = self.stored[drawn.case]
        try:
            augment(case, drawn, self.augmentation, x.view(-1, *self.patch), y.view(self.patch))
        except Exception as error:
            raise RuntimeError(
                f"case {case.name}, patch {index} of step {step}: {error or type(error).__name__}"
            ) from error


def _single() -> None:
    """One thread for torch's operators in this thread; torch begins with the number that was set last anywhere, and
    does so with the first operator unless it is asked before."""
    torch.get_num_threads()
    torch.set_num_threads(1)


def default_workers() -> int:
    """Half of the cores that this process may use, at least 1, at most 8."""
    return min(8, max(1, cores() // 2))


def _check(
    stored: Sequence[Stored], patch_size: Sequence[int], batch_size: int, rank: int, world_size: int
) -> None:
    if not stored:
        raise ValueError("Feed: expected at least one case, received none")
    if len(patch_size) not in (2, 3) or min(patch_size) < 1:
        raise ValueError(
            f"Feed: patch_size should be (d, h, w) or (h, w) in voxels, received {tuple(patch_size)}"
        )
    if batch_size < 1 or batch_size % world_size or not 0 <= rank < world_size:
        raise ValueError(
            f"Feed: batch_size {batch_size} cannot be shared by {world_size} processes (rank {rank}); choose a multiple"
        )
    if len({len(case.image) for case in stored}) > 1:
        raise ValueError("Feed: the cases have different numbers of channels; were they made by one recipe?")
