"""MONAI's own training, with one line added: its trainer, network, loss, metric and sliding-window inferer.

Spheres in noise (MONAI's synthetic images, no download) are to be found by MONAI's UNet. The same script runs twice,
as it is and with `convoxel.accelerate`, from the same weights on the same images, and prints both side by side.

    pip install convoxel monai pytorch-ignite
    python examples/monai_training.py
"""

import time
from dataclasses import dataclass

import numpy as np
import torch
from ignite.engine import Events
from monai.data import DataLoader, Dataset, create_test_image_3d
from monai.engines import SupervisedTrainer
from monai.inferers import SlidingWindowInferer
from monai.losses import DiceCELoss
from monai.metrics import DiceMetric
from monai.networks.nets import UNet
from torch import nn

import convoxel

PATCH, SCAN = 64, 96  # voxels


@dataclass
class Outcome:
    """Seconds of an iteration and of a scan's prediction (medians), and the Dice coefficient on scans not seen."""

    step: float
    scan: float
    dice: float


def samples(count: int, size: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Images (1, D, H, W) of noise and bright spheres, and labels of the same shape, 1 inside."""
    made = []
    for i in range(count):
        random = np.random.RandomState(seed + i)
        image, label = create_test_image_3d(size, size, size, num_objs=8, rad_max=max(6, size // 6), noise_max=0.8,
                                            num_seg_classes=1, random_state=random)  # fmt: skip
        made.append(
            {"image": torch.from_numpy(image)[None].float(), "label": torch.from_numpy(label)[None].float()}
        )
    return made


def network() -> nn.Module:
    torch.manual_seed(0)
    return UNet(3, 1, 2, channels=(16, 32, 64, 128), strides=(2, 2, 2), num_res_units=2)


def train(net: nn.Module, iterations: int) -> float:
    """Trains in place; the median seconds of an iteration."""
    times: list[float] = []
    loader = DataLoader(Dataset(samples(2 * iterations, PATCH, seed=0)), batch_size=2)
    trainer = SupervisedTrainer(
        device=torch.device("cpu"), max_epochs=1, train_data_loader=loader, network=net,
        optimizer=torch.optim.Adam(net.parameters(), lr=2e-3),
        loss_function=DiceCELoss(to_onehot_y=True, softmax=True),
    )  # fmt: skip
    trainer.add_event_handler(Events.ITERATION_STARTED, lambda: times.append(-time.perf_counter()))
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda: times.append(times.pop() + time.perf_counter())
    )
    trainer.run()
    return sorted(times)[len(times) // 2]


def evaluate(net: nn.Module, scans: int) -> tuple[float, float]:
    """The median seconds of a scan, and the mean Dice coefficient."""
    inferer = SlidingWindowInferer(roi_size=PATCH, sw_batch_size=2, overlap=0.5, mode="gaussian")
    metric, times = DiceMetric(include_background=False), []
    with torch.inference_mode():
        for sample in samples(scans, SCAN, seed=10_000):
            start = time.perf_counter()
            logits = inferer(sample["image"][None], net.eval())
            times.append(time.perf_counter() - start)
            found = nn.functional.one_hot(logits.argmax(1), 2).movedim(-1, 1)
            true = nn.functional.one_hot(sample["label"].long(), 2).movedim(-1, 1)
            metric(found, true)
    return sorted(times)[len(times) // 2], metric.aggregate().item()


def run(accelerated: bool, iterations: int, scans: int) -> Outcome:
    net = network()
    if accelerated:
        net = convoxel.accelerate(net)  # the one line
    step = train(net, iterations)
    return Outcome(step, *evaluate(net, scans))


def main(iterations: int = 40, scans: int = 4) -> tuple[Outcome, Outcome]:
    before, after = (run(accelerated, iterations, scans) for accelerated in (False, True))
    print(f"{'':<24}{'before':>10}{'after':>10}")
    for what, a, b in (("s an iteration", before.step, after.step), ("s a scan", before.scan, after.scan)):
        print(f"{what:<24}{a:>10.3f}{b:>10.3f}   {a / b:.2f}x")
    print(f"{'Dice':<24}{before.dice:>10.3f}{after.dice:>10.3f}")
    return before, after


if __name__ == "__main__":
    main()
