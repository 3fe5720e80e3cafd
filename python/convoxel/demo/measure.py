"""What the demonstration says in numbers: Dice of the network and of the threshold baseline, and speeds."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..bench.networks import torch_twin
from ..model import Model
from .data import CLASSES


def dice(prediction: NDArray, truth: NDArray) -> list[float]:
    """Dice of each tissue, 2 |P and T| / (|P| + |T|); a tissue that neither has is nan.

    >>> dice(np.array([0, 1, 2, 2]), np.array([1, 1, 2, 3]))
    [0.6666666666666666, 0.6666666666666666, 0.0]
    """
    scores = []
    for tissue in range(1, len(CLASSES)):
        p, t = prediction == tissue, truth == tissue
        size = int(p.sum() + t.sum())
        scores.append(2 * int((p & t).sum()) / size if size else float("nan"))
    return scores


def fit_thresholds(image: NDArray, truth: NDArray, levels: int = 100) -> tuple[float, float]:
    """The two intensities between CSF, grey and white matter that give the best mean Dice inside the brain.

    image (...) and truth (...) of the same shape; all pairs of `levels` percentiles of the brain's
    intensities are tried. Counts below each level make every pair cheap.
    """
    brain = truth > 0
    cuts = np.unique(np.percentile(image[brain], np.linspace(0, 100, levels)))
    below = np.stack([np.searchsorted(np.sort(image[truth == c]), cuts) for c in (1, 2, 3)])  # (3, cuts)
    csf, grey, white = below
    total = np.array([(truth == c).sum() for c in (1, 2, 3)])
    low, high = np.triu_indices(len(cuts), 1)
    everything = below.sum(0)
    dice_csf = 2 * csf[low] / (everything[low] + total[0])
    dice_grey = 2 * (grey[high] - grey[low]) / (everything[high] - everything[low] + total[1])
    dice_white = 2 * (total[2] - white[high]) / (brain.sum() - everything[high] + total[2])
    best = int(np.argmax(dice_csf + dice_grey + dice_white))
    return float(cuts[low[best]]), float(cuts[high[best]])


def by_threshold(image: NDArray, brain: NDArray, cuts: tuple[float, float]) -> NDArray[np.uint8]:
    """Labels from two intensity thresholds inside the brain mask, background outside.

    >>> by_threshold(np.array([0.2, 0.5, 0.9, 0.9]), np.array([1, 1, 1, 0]) > 0, (0.4, 0.8))
    array([1, 2, 3, 0], dtype=uint8)
    """
    return (np.digitize(image, cuts) + 1).astype(np.uint8) * brain


def speeds(network: nn.Module, batch: tuple[Tensor, Tensor], scan: Tensor, repeats: int) -> dict[str, float]:
    """Voxels per second of training and inference, convoxel's and torch's, on copies of the network.

    batch: (N, 1, d, h, w) and labels (N, d, h, w), for whole training steps (forward, loss, backward,
    optimizer). scan: (1, 1, D, H, W), for inference. The two take turns, so that a machine that is busy
    with something else is slow for both; each number is the median after one to warm up: of `repeats`
    passes, and of four times as many training steps, which are short.
    """
    nets = {"convoxel": copy.deepcopy(network), "torch": torch_twin(network)}
    found = {}
    steps = {name: _training_step(net, batch) for name, net in nets.items()}
    for name, seconds in _in_turns(steps, 4 * repeats).items():
        found[f"training, {name}"] = batch[0].numel() / seconds
    passes = {name: partial(_infer, net.eval(), scan) for name, net in nets.items()}
    for name, seconds in _in_turns(passes, repeats).items():
        found[f"inference, {name}"] = scan.numel() / seconds
    return found


def _training_step(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Callable[[], object]:
    model = Model(network.train())
    model.compile(torch.optim.AdamW(network.parameters()), "dice_ce")
    return partial(model.train_step, *batch)


@torch.no_grad()
def _infer(network: nn.Module, scan: Tensor) -> Tensor:
    return network(scan)


def _in_turns(calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each call."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return {name: median(values) for name, values in seconds.items()}
