"""Metrics: accumulated over a whole pass through the data, never a mean of batch values.

Shapes: output (N, K, ...) (of a list, the first: full resolution), truth as integer labels (N, ...) or
(N, 1, ...), or one-hot (N, K, ...). The predicted class is the argmax over axis 1; with K = 1 it is
`output > threshold`.

Missed and empty structures (Dice, IoU), decided on the counts of the whole pass: a class in the truth that
was never predicted scores 0; a class that was predicted but is not in the truth scores 0; a class in
neither has no score and is left out; no class with a score gives nan. So nothing improves by missing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from .losses import class_labels


def predicted_and_true(
    output: Tensor | Sequence[Tensor], target: Tensor, threshold: float | None, who: str
) -> tuple[Tensor, Tensor, int]:
    """Class numbers int64 (N, ...) of the prediction and of the truth, and the number of classes.

    >>> predicted_and_true(torch.tensor([[0.2, 0.8]]), torch.tensor([1]), None, "accuracy")
    (tensor([1]), tensor([1]), 2)
    """
    full = output if isinstance(output, Tensor) else output[0]
    if full.ndim >= 2 and full.shape[1] == 1:
        if threshold is None:
            raise ValueError(
                f"{who}: one output channel needs a threshold; pass the metric as an object, with "
                "threshold=0.5 for probabilities or threshold=0.0 for logits"
            )
        return (full.squeeze(1) > threshold).long(), class_labels(full, _integers(target), who), 2
    if target.shape == full.shape:
        target = target.max(1).indices
    # torch's argmax over channels takes 25 times as long as its max
    return full.max(1).indices, class_labels(full, target, who), full.shape[1]


def _integers(target: Tensor) -> Tensor:
    """Binary truth is often float 0.0 and 1.0; anything between stays float and is refused."""
    whole = target.is_floating_point() and bool((target == target.round()).all())
    return target.long() if whole else target


class Metric:
    """Base: `reset`, then `update` for each batch, then `result`."""

    def __init__(self, name: str):
        self.name = name
        self.reset()

    def reset(self) -> None:
        raise NotImplementedError(f"{type(self).__name__} must define reset()")

    def update(self, output: Tensor | Sequence[Tensor], target: Tensor) -> None:
        """output (N, K, ...), target (N, ...): add one batch to the counts."""
        raise NotImplementedError(f"{type(self).__name__} must define update(output, target)")

    def result(self) -> float:
        """The value over everything since `reset`."""
        raise NotImplementedError(f"{type(self).__name__} must define result()")


class Accuracy(Metric):
    """Fraction of positions whose predicted class is the true one; nan before the first.

    >>> accuracy = Accuracy()
    >>> accuracy.update(torch.tensor([[0.9, 0.1], [0.8, 0.2]]), torch.tensor([0, 1]))
    >>> accuracy.result()
    0.5
    """

    def __init__(self, threshold: float | None = None, name: str = "accuracy"):
        self.threshold = threshold
        super().__init__(name)

    def reset(self) -> None:
        self.right = self.total = 0

    def update(self, output: Tensor | Sequence[Tensor], target: Tensor) -> None:
        predicted, true, _ = predicted_and_true(output, target, self.threshold, "accuracy")
        self.right += int((predicted == true).sum())
        self.total += true.numel()

    def result(self) -> float:
        return self.right / self.total if self.total else math.nan


class _Overlap(Metric):
    """Counts per class over the whole pass; a subclass turns them into a score per class."""

    title: str

    def __init__(
        self, include_background: bool = False, threshold: float | None = None, name: str | None = None
    ):
        self.include_background, self.threshold = include_background, threshold
        super().__init__(name or self.title)

    def reset(self) -> None:
        self.hit = self.predicted = self.true = torch.zeros(0, dtype=torch.long)

    def update(self, output: Tensor | Sequence[Tensor], target: Tensor) -> None:
        predicted, true, classes = predicted_and_true(output, target, self.threshold, self.title)
        if not len(self.hit):
            self.hit = self.predicted = self.true = torch.zeros(classes, dtype=torch.long)
        if len(self.hit) != classes:
            raise ValueError(f"{self.name}: {classes} classes after {len(self.hit)}; call reset() first")
        self.hit = self.hit + _count(true[predicted == true], classes)
        self.predicted = self.predicted + _count(predicted, classes)
        self.true = self.true + _count(true, classes)

    def score(self) -> Tensor:
        raise NotImplementedError

    def per_class(self) -> list[float]:
        """One score per class, background first; nan where neither truth nor prediction has the class."""
        return self.score().tolist()

    def result(self) -> float:
        """The mean over the classes that have a score, background only if included."""
        scores = self.score()[0 if self.include_background else 1 :]
        return scores.nanmean().item() if len(scores) else math.nan


class Dice(_Overlap):
    """Dice per class, 2 |P and T| / (|P| + |T|), counted over the whole pass, then the mean over classes.

    Missed, empty: see the head of this file. Background (class 0) only with include_background=True.

    >>> dice, logits = Dice(), torch.tensor([[[0.0, 0, 9, 0], [9, 9, 0, 0], [0, 0, 0, 9]]])
    >>> dice.update(logits, torch.tensor([[1, 0, 0, 2]]))
    >>> round(dice.result(), 4), [round(s, 4) for s in dice.per_class()]  # the mean of classes 1 and 2
    (0.8333, [0.6667, 0.6667, 1.0])
    """

    title = "dice"

    def score(self) -> Tensor:
        return 2 * self.hit.double() / (self.predicted + self.true)


class IoU(_Overlap):
    """Intersection over union (Jaccard) per class, |P and T| / |P or T|, otherwise as Dice.

    >>> iou, logits = IoU(), torch.tensor([[[0.0, 0, 9, 0], [9, 9, 0, 0], [0, 0, 0, 9]]])
    >>> iou.update(logits, torch.tensor([[1, 0, 0, 2]]))
    >>> round(iou.result(), 4), iou.per_class()
    (0.75, [0.5, 0.5, 1.0])
    """

    title = "iou"

    def score(self) -> Tensor:
        return self.hit.double() / (self.predicted + self.true - self.hit)


class Mean(Metric):
    """Any function(output, target) -> scalar, averaged over samples (each batch weighs by its size).

    >>> error = Mean(torch.nn.functional.l1_loss, name="mae")
    >>> error.update(torch.zeros(3, 1), torch.ones(3, 1))
    >>> error.update(torch.zeros(1, 1), torch.zeros(1, 1))
    >>> error.result()
    0.75
    """

    def __init__(self, function: Callable[..., Tensor | float], name: str | None = None):
        self.function = function
        super().__init__(name or str(getattr(function, "__name__", type(function).__name__)))

    def reset(self) -> None:
        self.sum, self.samples = 0.0, 0

    @torch.no_grad()
    def update(self, output: Tensor | Sequence[Tensor], target: Tensor) -> None:
        self.sum += float(self.function(output, target)) * len(target)
        self.samples += len(target)

    def result(self) -> float:
        return self.sum / self.samples if self.samples else math.nan


def _count(classes: Tensor, n: int) -> Tensor:
    return torch.bincount(classes.flatten(), minlength=n).cpu()


NAMES: dict[str, Callable[..., Metric]] = {"accuracy": Accuracy, "dice": Dice, "iou": IoU}


def get(
    metrics: str | Metric | Callable | Iterable[str | Metric | Callable], threshold: float | None = None
) -> list[Metric]:
    """Metrics from names, Metric objects and functions, one or several; `threshold` goes to the names.

    >>> [m.name for m in get(["accuracy", Dice(include_background=True, name="dice_all")])]
    ['accuracy', 'dice_all']
    """
    several = [metrics] if isinstance(metrics, (str, Metric)) or callable(metrics) else list(metrics)
    found = [_one(metric, threshold) for metric in several]
    names = [metric.name for metric in found]
    if twice := {name for name in names if names.count(name) > 1} | ({"loss"} & set(names)):
        raise ValueError(
            f"metrics need different names ('loss' is taken), received {', '.join(sorted(twice))} again; "
            "pass objects with name=, such as metrics.Dice(name='dice_all')"
        )
    return found


def _one(metric: str | Metric | Callable, threshold: float | None) -> Metric:
    if isinstance(metric, str):
        if metric not in NAMES:
            raise ValueError(f"unknown metric {metric!r}; expected one of {', '.join(NAMES)}, or an object")
        return NAMES[metric](threshold=threshold)
    if isinstance(metric, Metric):
        return metric
    if not callable(metric) or isinstance(metric, type):
        raise TypeError(
            f"a metric must be a name ({', '.join(NAMES)}), a Metric or a function, received {metric!r}"
        )
    return Mean(metric)
