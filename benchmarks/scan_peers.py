"""The same weights on the same scan, whole scan to labels: MONAI's SlidingWindowInferer and convoxel.

    python benchmarks/scan_peers.py [--classes 24] [--scan 240,384,384] [--grid 160,192,192] [--patch 96,96,96]

A process each, in turn; peak memory as seen from outside. MONAI's way holds the blend of all classes, resamples it with
torch and takes the largest, with torch's network and with the accelerated one; ours has MONAI's window positions and
weights here. nnU-Net's own predictor is in tests/campaigns/nnunet_parity.py.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from watched import watched

import convoxel
from convoxel.inference import Axis, predict_on_grid
from convoxel.inference.windows import starts

Sizes = tuple[int, ...]


def network(classes: int) -> nn.Module:
    from dynamic_network_architectures.architectures.unet import PlainConvUNet

    torch.manual_seed(0)
    return PlainConvUNet(
        1, 5, (16, 32, 64, 128, 128), nn.Conv3d, 3, (1, 2, 2, 2, 2), 2, classes, 2, True, nn.InstanceNorm3d,
        {"eps": 1e-5, "affine": True}, None, None, nn.LeakyReLU, {"inplace": True}, deep_supervision=False,
    ).eval()  # fmt: skip


def image(grid: Sizes) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn((1, 1, 8, 8, 8), generator=generator)
    smooth = nn.functional.interpolate(coarse, grid, mode="trilinear")
    return smooth + 0.1 * torch.randn(smooth.shape, generator=generator)


def with_monai(net: nn.Module, args: argparse.Namespace) -> NDArray[np.uint8]:
    from monai.inferers import SlidingWindowInferer

    inferer = SlidingWindowInferer(args.patch, 1, args.overlap, mode="gaussian")
    with torch.no_grad():
        logits = inferer(image(args.grid), net)
        return nn.functional.interpolate(logits, args.scan, mode="trilinear").argmax(1)[0].byte().numpy()


def with_convoxel(net: nn.Module, args: argparse.Namespace) -> NDArray[np.uint8]:
    placed = [starts(n, p, args.overlap) for n, p in zip(args.grid, args.patch, strict=True)]
    axes = [Axis.linear(n, m) for n, m in zip(args.grid, args.scan, strict=True)]
    return predict_on_grid(net, image(args.grid)[0], patch_size=args.patch, starts=placed, axes=axes)


WAYS: dict[str, tuple[Callable[..., NDArray[np.uint8]], bool]] = {  # whether the network is accelerated
    "MONAI, torch": (with_monai, False),
    "MONAI, accelerated": (with_monai, True),
    "convoxel": (with_convoxel, True),
}


def work(args: argparse.Namespace) -> None:
    way, accelerated = WAYS[args.way]
    net = network(args.classes)
    net = convoxel.accelerate(net) if accelerated else net
    began = time.perf_counter()
    labels = way(net, args)
    print(json.dumps({"seconds": time.perf_counter() - began}))
    np.save(args.out, labels)


def main() -> None:
    def sizes(text: str) -> Sizes:
        return tuple(int(n) for n in text.split(","))

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--classes", type=int, default=24)
    parser.add_argument("--scan", type=sizes, default=(240, 384, 384))
    parser.add_argument("--grid", type=sizes, default=(160, 192, 192))
    parser.add_argument("--patch", type=sizes, default=(96, 96, 96))
    parser.add_argument("--overlap", type=float, default=0.5)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        work(args)
        return
    print("| way | seconds | peak memory (GB) | voxels labelled otherwise |\n| --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        first = None
        for way in WAYS:
            out = Path(folder, "labels.npy")
            answer, peak = watched([__file__, *sys.argv[1:], "--way", way, "--out", str(out)])
            labels = np.load(out)
            first = labels if first is None else first
            other = f"{int((labels != first).sum())} of {labels.size}"
            print(
                f"| {way} | {json.loads(answer)['seconds']:.1f} | {peak / 2**30:.2f} | {other} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
