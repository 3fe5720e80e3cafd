"""What a network learns to find: labels that exclude each other, or regions that may overlap."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .cases import Dataset


@dataclass(frozen=True)
class Structures:
    """The structures of a dataset in the order of the network's outputs, background left out."""

    names: tuple[str, ...]
    values: tuple[tuple[int, ...], ...]  # that each consists of
    overlap: bool  # regions: a sigmoid each; otherwise a softmax, with background as output 0
    ignore: int | None

    @classmethod
    def of(cls, dataset: Dataset) -> Structures:
        """
        >>> Structures.of(find_cases("Dataset001_Phantom")).names
        ('liver', 'spleen', 'kidneys', 'vessels', 'lesion')
        """
        found = {
            name: value if isinstance(value, tuple) else (value,) for name, value in dataset.labels.items()
        }
        found = {name: values for name, values in found.items() if set(values) != {0}}
        if not dataset.has_regions:
            found = dict(sorted(found.items(), key=lambda item: item[1]))
        return cls(tuple(found), tuple(found.values()), dataset.has_regions, dataset.ignore)

    @property
    def heads(self) -> int:
        """The network's outputs."""
        return len(self.names) + (not self.overlap)

    @property
    def classes(self) -> int:
        """Label values, background included: 0 to classes - 1."""
        return max(value for values in self.values for value in values) + 1

    def masks(self, labels: Tensor) -> Tensor:
        """(*size) values -> (K, *size) bool."""
        return torch.stack([torch.isin(labels, torch.tensor(values)) for values in self.values])

    def predicted(self, logits: Tensor) -> Tensor:
        """(heads, *size) -> (K, *size) bool."""
        if self.overlap:
            return logits > 0
        return logits.argmax(0) == torch.arange(1, self.heads).view(-1, *[1] * (logits.ndim - 1))
