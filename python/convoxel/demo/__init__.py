"""The demonstration: one command trains a 3D U-Net on our kernels to segment a real MRI, and checks it.

Data (`data`), augmentation (`augment`), training (`train`), numbers (`measure`), files (`report`, `plots`).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import memory, runtime
from ..inference import predict_labels
from ..models import UNet
from ..volume import Volume
from . import data, measure, plots, report, train
from .data import Brain
from .train import Recipe

TEST_SEED = 1000  # the test image's disturbance never shares a seed with the training


def run(
    out: str | Path,
    *,
    quick: bool = False,
    seed: int = 0,
    epochs: int | None = None,
    threads: int | None = None,
) -> bool:
    """The whole demonstration; prints as it goes and leaves its files in the folder `out`.

    quick: a short form for automatic tests: everything is produced, nothing is learned to speak of.
    seed: of the weights, the augmentation and the test image. epochs: instead of the recipe's number.
    threads: instead of torch's number.
    Returns whether the Dice target is reached; the short form makes no such claim and returns True.
    Raises ValueError, ImportError and OSError for what stands in the way, before the training begins.

    >>> convoxel.demo.run("demo-output", quick=True)
    True
    """
    recipe = train.recipe(quick, epochs)
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1, received {threads}")
    plots.require_matplotlib()
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    with _settings(threads):
        return _run(folder, recipe, quick, seed)


def _run(out: Path, recipe: Recipe, quick: bool, seed: int) -> bool:
    brain = data.load_brain()
    _introduce(recipe, quick)
    runtime.reset_stats()
    start = time.perf_counter()
    network, curve = train.train(brain, recipe, seed)
    print(f"\nTrained in {time.perf_counter() - start:.0f} s. {_served()}\n")

    image = brain.image.like(data.disturb(brain.image.array, TEST_SEED + seed))
    prediction = predict_labels(train.MirrorMean(network), image, patch_size=_whole_scan(network, image))
    threshold, scores = _score(brain, image, prediction)
    print(report.dice_table(scores), "\n")
    speeds = measure.speeds(network, _training_batch(brain, recipe), _scan(network, image), 1 if quick else 5)
    print(f"{report.speed_table(speeds)}\n{report.SPEEDS.format(*recipe.patch)}\n")

    files = report.write_volumes(out, brain, image, prediction)
    files |= plots.write(out, image.array, brain.labels.array, threshold, prediction.array, curve, scores)
    report.write_numbers(out / "numbers.json", scores, speeds, curve)
    print(f"Files in {out}:", *(f"  {name:<20}{what}" for name, what in files.items()), sep="\n")
    return _verdict(scores, quick)


def _introduce(recipe: Recipe, quick: bool) -> None:
    print(report.ABOUT)
    if quick:
        print("Short form (--quick): a test that everything runs. It learns little and claims no Dice.")
    print(
        f"Trained on the planes y >= {data.TRAIN.start} of {data.TRAIN.stop} (towards the face), tested on y < "
        f"{data.TEST.stop} (towards the back of the head).\n"
        f"Test image: a bias field of +-{data.BIAS:.0%} and noise of {data.NOISE} (white matter is 0.84). The "
        "threshold baseline is given the true outline\nof the brain and the best two thresholds of the training "
        "half of the same image; the network is given neither.\n"
        "The network trains on random patches under bias fields and noise of the same kind, other seeds. Its "
        "answer is the mean\nover the eight mirror images of the test image.\n"
        f"Strict mode: every layer runs on convoxel's kernels ({runtime.isa()}, {torch.get_num_threads()} threads) "
        f"or stops.\n"
    )


def _served() -> str:
    """How many operator calls convoxel's kernels served since the last reset, from its own counters."""
    rows = runtime.stats().values()
    served, handed = sum(row["served"] for row in rows), sum(row["torch"] for row in rows)
    return f"convoxel's kernels served {served} operator calls, torch's {handed}."


def _score(brain: Brain, image: Volume, prediction: Volume) -> tuple[NDArray, report.Scores]:
    """The threshold baseline's labels (D, H, W), and all Dice values on the test half."""
    truth = brain.labels.array

    def baseline(scan: NDArray) -> NDArray:
        cuts = measure.fit_thresholds(scan[:, data.TRAIN], truth[:, data.TRAIN])
        return measure.by_threshold(scan, truth > 0, cuts)

    threshold = baseline(image.array)
    found = (baseline(brain.image.array), threshold, prediction.array)
    return threshold, report.Scores(*(measure.dice(f[:, data.TEST], truth[:, data.TEST]) for f in found))


def _whole_scan(network: UNet, image: Volume) -> tuple[int, ...]:
    """One window for the whole scan: its size, rounded up to what the network's strides divide."""
    return tuple(-(-n // d) * d for n, d in zip(image.shape, network.divisor, strict=True))


def _scan(network: UNet, image: Volume) -> Tensor:
    """(1, 1, D, H, W), padded with zeros to the size that the network takes."""
    size = _whole_scan(network, image)
    padding = [(0, n - m) for n, m in zip(size, image.shape, strict=True)]
    return torch.from_numpy(np.pad(image.array, padding))[None, None]


def _training_batch(brain: Brain, recipe: Recipe) -> tuple[Tensor, Tensor]:
    patches = train.patches(brain, recipe, seed=0)
    images, labels = zip(*(patches[i] for i in range(recipe.batch)), strict=True)
    return torch.stack(images), torch.stack(labels)


def _verdict(scores: report.Scores, quick: bool) -> bool:
    if quick:
        print("Short form: everything was produced; no Dice is claimed.")
        return True
    missed = scores.missed()
    if missed is None:
        print(
            f"Target reached: mean Dice {np.mean(scores.network):.3f}, at least {report.TARGET:.2f} and at "
            f"least {report.MARGIN:.2f} above the threshold's {np.mean(scores.threshold):.3f}."
        )
    else:
        print(f"Target missed: {missed}.")
    return missed is None


@contextmanager
def _settings(threads: int | None) -> Iterator[None]:
    """Strict mode and the number of threads inside; afterwards as they were."""
    strict, before = runtime.is_strict(), torch.get_num_threads()
    runtime.set_strict(True)
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        runtime.set_strict(strict)
        torch.set_num_threads(before)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `convoxel demo`."""
    parser.add_argument(
        "--out", default="demo-output", metavar="DIR", help="folder for the files (default: %(default)s)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="short form: produces everything, claims no Dice"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of weights, augmentation and test image (default: 0)"
    )
    parser.add_argument("--epochs", type=int, metavar="N", help="instead of the recipe's number")
    parser.add_argument("--threads", type=int, metavar="N", help="instead of torch's number, one per core")


def run_command(args: argparse.Namespace) -> int:
    """`convoxel demo`: 0 when the target is reached, or everything produced in the short form; otherwise 1."""
    memory.keep_freed(True)  # for both sides of the comparison
    done = run(args.out, quick=args.quick, seed=args.seed, epochs=args.epochs, threads=args.threads)
    return 0 if done else 1
