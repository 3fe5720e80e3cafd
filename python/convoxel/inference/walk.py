"""The walk of a prediction: windows in, finished voxels out, and little in between."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .network import Network
from .plan import Band, Plan
from .rows import LARGEST, LAST_POSITIVE, SCORES, Rows, label_type, values_of

Region = tuple[slice, slice, slice]
Take = Callable[[Region, NDArray[np.float32]], None]
_BLOCK = 8 << 20  # bytes of logits that `scores` is given at a time, about
HANDED_OUT = (
    8 * _BLOCK
)  # bytes meanwhile: a block, its copy, probabilities, the heap's holes; 65 MB were measured


class Walk:
    """One prediction, band by band; arguments as predict_on_grid has them."""

    rows: Rows  # these four as soon as the number of channels is known
    labels: NDArray[Any]
    values: NDArray[np.int32]
    kind: int

    def __init__(self, network: Network, plan: Plan, weights: Tensor, regions: Sequence[int] | None,
                 scores: Take | None, rows: int, scratch: Path | None,
                 activation: Callable[[Tensor], Tensor] | None = None) -> None:  # fmt: skip
        self.network, self.plan, self.weights, self.regions = network, plan, weights, regions
        self.scores, self.activation = scores, activation
        self.capacity, self.scratch, self.begun = rows, scratch, False

    def run(self, advance: Callable[[int], object]) -> NDArray[Any]:
        """Labels; `advance` is told of every window."""
        with ExitStack() as self.exit:
            for group in self.plan.groups():
                windows = [(*band.starts, last) for band in group for last in self.plan.starts[2]]
                for i in range(0, len(windows), self.plan.batch):
                    some = windows[i : i + self.plan.batch]
                    self._blend(some, group if i == 0 else [])
                    advance(len(some))
                for band in group:
                    self._settle(band)
        return self.labels

    def _blend(self, windows: list[tuple[int, int, int]], new: Sequence[Band]) -> None:
        """Adds every pass over these windows; `new` are the bands that they begin."""
        order = self.plan.order
        placed = [tuple(start[order.index(a)] for a in range(3)) for start in windows]
        for y, flips in self.network(placed):
            if not self.begun:
                self._begin(y.shape[1])
            if y.shape[1] != self.rows.classes:
                raise ValueError(f"predict_labels: logits had {self.rows.classes} channels, now {y.shape[1]}")
            if new:
                self.rows.begin(new)
                new = []
            turned = y.permute(0, 1, *(2 + a for a in order))
            for logits, start in zip(turned, windows, strict=True):
                self.rows.add(logits, self.weights, start, [flips[a] for a in order])
            del y, turned, logits

    def _begin(self, classes: int) -> None:
        self.kind = LARGEST if self.regions is None else LAST_POSITIVE
        if self.regions is None and classes < 2:
            raise ValueError(
                "predict_labels: the model returns one channel, and the largest of one is always background; "
                "return two, for a logit z: torch.cat([torch.zeros_like(z), z], 1), or name it a region"
            )
        if self.regions is not None and len(self.regions) != classes:
            raise ValueError(
                f"predict_labels: {len(self.regions)} regions {tuple(self.regions)} are named, the model returns "
                f"{classes} channels; name one label for each"
            )
        self.values = values_of(classes, self.regions)
        if self.values.min() < 0 or self.values.max() > 65535:
            raise ValueError(f"predict_labels: labels up to {self.values.max()} do not fit uint16")
        shape = [len(self.plan.axes[self.plan.order.index(a)]) for a in range(3)]
        self.labels = np.empty(shape, label_type(self.values))
        self.rows = Rows(self.plan, classes, self.capacity, self.scratch)
        self.exit.callback(self.rows.close)
        self.begun = True

    def _settle(self, band: Band) -> None:
        """What is finished after a band: divided, read by the output, given up."""
        if not self.rows.divide(band):
            raise ValueError("predict_labels: the model's logits are NaN; check its weights and the input")
        if self.activation is not None:
            self.rows.apply(band, self.activation)
        z, y = (range(*span) for span in band.output)
        if z and y:
            block = self.rows.output(z, y, self.kind, self.values, self.labels.dtype)
            self.labels.transpose(self.plan.order)[z.start : z.stop, y.start : y.stop] = block
            if self.scores is not None:
                self._hand_out(z, y, self.scores)
        self.rows.drop(band)

    def _hand_out(self, z: range, y: range, take: Take) -> None:
        """Blocks, long along the image's later axes: in a file (D, H, W) that is one place, not many."""
        back = [self.plan.order.index(a) for a in range(3)]
        count = max(1, _BLOCK // (4 * self.rows.classes * len(self.plan.axes[2])))  # rows
        if self.plan.order[0] < self.plan.order[1]:
            height = min(len(y), count)
            depth = count // height
        else:
            depth = min(len(z), count)
            height = count // depth
        for a, b in product(range(0, len(z), depth), range(0, len(y), height)):
            some, rows = z[a : a + depth], y[b : b + height]
            block = self.rows.output(some, rows, SCORES, self.values, np.dtype(np.float32))
            where = (slice(some.start, some.stop), slice(rows.start, rows.stop), slice(0, block.shape[2]))
            take((where[back[0]], where[back[1]], where[back[2]]), block.transpose(*back, 3))
