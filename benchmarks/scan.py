"""A large CT labelled under a ceiling: peak memory seen from outside, and what everything but the network takes.

    python benchmarks/scan.py    # 118 classes, network grid 400 x 256 x 256, scan 600 x 512 x 512, 4 GB
    python benchmarks/scan.py --classes 24 --scan 200,256,256 --grid 133,128,128 --max-ram 1GB
    python benchmarks/scan.py --profile    # and the seconds of each part of the work

A small network stands in, so that the rest of the work shows; its own time is taken out. Beside it one window is run
through an accelerated nnU-Net PlainConvUNet of as many classes: windows times that is what a real network would take.
The dense way, float32 scores on the scan's grid, would hold classes x D x H x W x 4 bytes.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from watched import watched

import convoxel
from convoxel.inference import labels as whole_scans
from convoxel.inference import predict_labels
from convoxel.inference.rows import Rows
from convoxel.volume import Volume, read, write

PARTS: dict[str, tuple[Any, str]] = {  # of --profile: functions that do not call each other
    "resampling": (whole_scans, "_on_grid"),
    "fresh rows": (Rows, "begin"),
    "blending": (Rows, "add"),
    "dividing": (Rows, "divide"),
    "labels": (Rows, "output"),
    "writing": (whole_scans, "write"),
}


def clocked() -> dict[str, float]:
    """Seconds spent in each of PARTS from now on."""
    spent = dict.fromkeys(PARTS, 0.0)

    def clock(part: str, function: Any) -> Any:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[part] += time.perf_counter() - began

        return run

    for part, (home, name) in PARTS.items():
        setattr(home, name, clock(part, getattr(home, name)))
    return spent


class Timed:
    """A small network of many classes, and the seconds spent in it."""

    def __init__(self, classes: int) -> None:
        torch.manual_seed(0)
        layers = (torch.nn.Conv3d(1, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv3d(8, classes, 1))
        self.net = convoxel.accelerate(torch.nn.Sequential(*layers).eval())
        self.seconds, self.windows = 0.0, 0

    def __call__(self, x: Tensor) -> Tensor:
        began = time.perf_counter()
        y = self.net(x)
        self.seconds += time.perf_counter() - began
        self.windows += len(x)
        return y


def make_scan(shape: tuple[int, int, int], spacing: tuple[float, float, float], path: Path) -> None:
    """Smooth blobs and noise in Hounsfield units, int16."""
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.normal(0, 300, (1, 1, 12, 10, 10))).float()
    array = np.empty(shape, np.int16)
    depth = np.linspace(0, 11, shape[0])
    planes = torch.nn.functional.interpolate(coarse[0], shape[1:], mode="bicubic")[0].numpy()
    for z, u in enumerate(depth):
        low, t = min(int(u), 10), u - min(int(u), 10)
        array[z] = (1 - t) * planes[low] + t * planes[low + 1] + rng.normal(0, 20, shape[1:])
    write(Volume(array, spacing), path)


def work(args: argparse.Namespace) -> None:
    """The measured process: file to file."""
    began = time.perf_counter()
    scan = read(args.input)
    spacing = [n * s / m for n, s, m in zip(scan.grid_shape, scan.spacing, args.grid, strict=True)]
    loaded, net, spent = time.perf_counter() - began, Timed(args.classes), clocked() if args.profile else {}
    predict_labels(
        net, scan, patch_size=args.patch, overlap=args.overlap, spacing=spacing, normalize=lambda x: x.div_(300),
        max_ram=args.max_ram, scratch=args.scratch, out=args.out, progress=True,
    )  # fmt: skip
    whole = time.perf_counter() - began
    parts = {"reading": loaded, **spent}
    print(json.dumps({"whole": whole, "network": net.seconds, "windows": net.windows, "parts": parts}))


def real_network(classes: int, patch: tuple[int, int, int]) -> float:
    """Seconds for one window of an accelerated PlainConvUNet (nnU-Net's default of six stages)."""
    from dynamic_network_architectures.architectures.unet import PlainConvUNet
    from torch import nn

    net = PlainConvUNet(
        1, 6, (32, 64, 128, 256, 320, 320), nn.Conv3d, 3, (1, 2, 2, 2, 2, 2), 2, classes, 2, True, nn.InstanceNorm3d,
        {"eps": 1e-5, "affine": True}, None, None, nn.LeakyReLU, {"inplace": True}, deep_supervision=False,
    )  # fmt: skip
    net, x, seconds = convoxel.accelerate(net.eval()), torch.randn(1, 1, *patch), []
    with torch.no_grad():
        for _ in range(4):
            began = time.perf_counter()
            net(x)
            seconds.append(time.perf_counter() - began)
    return min(seconds)


def main() -> None:
    def sizes(text: str) -> tuple[int, ...]:
        return tuple(int(n) for n in text.split(","))

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--classes", type=int, default=118)
    parser.add_argument("--scan", type=sizes, default=(600, 512, 512), help="voxels of the scan, D,H,W")
    parser.add_argument("--grid", type=sizes, default=(400, 256, 256), help="voxels of the network's grid")
    parser.add_argument("--patch", type=sizes, default=(96, 96, 96))
    parser.add_argument("--overlap", type=float, default=0.5)
    parser.add_argument("--max-ram", default="4GB")
    parser.add_argument("--scratch", help="a folder for a scratch file")
    parser.add_argument("--skip-real", action="store_true", help="do not time the PlainConvUNet")
    parser.add_argument("--profile", action="store_true", help="also the seconds of each part of the work")
    parser.add_argument("--input", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.input:
        work(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        scan, out = Path(folder, "scan.nii.gz"), Path(folder, "labels.nii.gz")
        make_scan(args.scan, (1.0, 0.75, 0.75), scan)
        answer, peak = watched([__file__, *sys.argv[1:], "--input", str(scan), "--out", str(out)])
        t = json.loads(answer)
        labels = read(out)
        held = len(np.unique(labels.array))
    rest = t["whole"] - t["network"]
    dense = args.classes * int(np.prod(args.scan, dtype=np.int64)) * 4
    print(
        f"peak memory from outside   {peak / 2**30:.2f} GB (ceiling {args.max_ram}; "
        f"dense scores: {dense / 2**30:.1f} GB)"
    )
    print(f"labels                     {labels.shape}, {held} of {args.classes} classes occur")
    print(f"file to file               {t['whole']:.1f} s, of it the small network {t['network']:.1f} s, "
          f"everything else {rest:.1f} s ({t['windows']} windows)")  # fmt: skip
    if args.profile:
        parts = {**t["parts"], "the rest": rest - sum(t["parts"].values())}
        print(f"everything else            {', '.join(f'{part} {s:.1f}' for part, s in parts.items())}")
    if not args.skip_real:
        one = real_network(args.classes, args.patch)
        print(f"PlainConvUNet, accelerated {one:.2f} s a window, {one * t['windows']:.0f} s: everything else is "
              f"{100 * rest / (one * t['windows']):.1f} % of it")  # fmt: skip


if __name__ == "__main__":
    main()
