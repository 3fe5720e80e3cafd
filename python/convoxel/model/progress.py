"""The progress bar of the long loops, and the running means that it shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..metrics import Metric

Values = Mapping[str, float]


def text(values: Values) -> str:
    """
    >>> text({"loss": 0.123456, "accuracy": 0.5})
    'loss 0.1235, accuracy 0.5'
    """
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items())


class Bar:
    """A tqdm bar over the batches of `data` if verbose is 1, otherwise nothing at all."""

    def __init__(self, title: str, data: Any, verbose: int, leave: bool = True):
        if verbose not in (0, 1, 2):
            raise ValueError(f"verbose must be 0 (nothing), 1 (bar) or 2 (lines), received {verbose!r}")
        self.bar = None
        if verbose == 1:
            self.bar = _tqdm()(total=_length(data), desc=title, unit="batch", leave=leave, dynamic_ncols=True)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def step(self, values: Callable[[], Values]) -> None:
        """One batch further; `values` is only asked where a bar shows it."""
        if self.bar is not None:
            self.bar.set_postfix_str(text(values()), refresh=False)
            self.bar.update()

    def show(self, values: Values) -> None:
        """The values that stay when the bar is done."""
        if self.bar is not None:
            self.bar.set_postfix_str(text(values))


class Means:
    """The values of one pass: what the steps returned, averaged over samples, then the metrics' results.

    >>> means = Means([])
    >>> batches = means.add({"loss": 1.0}, samples=3), means.add({"loss": 5.0}, samples=1)
    >>> means.values()
    {'loss': 2.0}
    """

    def __init__(self, metrics: Sequence[Metric]):
        self.metrics, self.sums, self.samples = metrics, dict[str, float](), dict[str, int]()
        for metric in metrics:
            metric.reset()

    def add(self, step: Mapping[str, Any], samples: int) -> dict[str, float]:
        """The batch's values as floats; each counts once per sample."""
        values = {k: v.item() if isinstance(v, Tensor) else float(v) for k, v in step.items()}
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value * samples
            self.samples[name] = self.samples.get(name, 0) + samples
        return values

    def values(self) -> dict[str, float]:
        if not any(self.samples.values()):
            raise ValueError(
                "the data gave no batch; a generator can be read only once: pass arrays, a loader or a list"
            )
        means = {name: total / self.samples[name] for name, total in self.sums.items()}
        return means | {metric.name: metric.result() for metric in self.metrics}


def _length(data: Any) -> int | None:
    try:
        return len(data)
    except TypeError:  # a stream: the bar counts without an end
        return None


def _tqdm() -> Any:
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError(
            'the progress bar needs tqdm: pip install "convoxel[train]", or verbose=0'
        ) from error
    return tqdm
