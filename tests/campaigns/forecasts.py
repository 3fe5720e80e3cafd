"""Training steps measured beside what convoxel.training.cost forecasts: python tests/campaigns/forecasts.py [NAMES]

One fresh process for each network: three steps of the accelerated network with SGD on random patches, peak RSS and the
fastest step. Let nothing else run. CONVOXEL_ISA and --precision choose what is measured; the constants of cost.py are
fitted to the lines that this prints.
"""

import argparse
import json
import subprocess
import sys
import time

import torch

import convoxel
from convoxel import models
from convoxel.inference.machine import peak_memory
from convoxel.training.budget import Budget
from convoxel.training.cost import WAITING
from convoxel.training.settings import Settings
from convoxel.training.topology import topology

CLASSES = 6
STEPS = 3
# name: network, spacing, patch, batch, features of the first stage
NETWORKS = {
    "64": ("plain", (1.0, 1.0, 1.0), (64, 64, 64), 2, 32),
    "96": ("plain", (1.0, 1.0, 1.0), (96, 96, 96), 1, 32),
    "128": ("plain", (1.0, 1.0, 1.0), (128, 128, 128), 1, 32),
    "slim": ("plain", (1.0, 1.0, 1.0), (96, 96, 96), 2, 16),
    "flat": ("plain", (5.0, 1.0, 1.0), (16, 224, 224), 2, 32),
    "phantom": ("plain", (3.8, 2.7, 2.7), (64, 112, 112), 2, 32),
    "slices": ("plain", (1.0, 1.0), (256, 256), 8, 32),
    "large-slices": ("plain", (1.0, 1.0), (512, 512), 2, 32),
    "residual-64": ("residual", (1.0, 1.0, 1.0), (64, 64, 64), 2, 32),
    "residual-96": ("residual", (1.0, 1.0, 1.0), (96, 96, 96), 1, 32),
    "residual-slices": ("residual", (1.0, 1.0), (256, 256), 8, 32),
}


def measure(name: str, precision: str, checkpointing: bool) -> dict[str, float]:
    """In this process: peak bytes and seconds of a step, and the forecasts."""
    kind, spacing, patch, batch, base = NETWORKS[name]
    settings = Settings(rank=len(patch), network=kind, base_features=base, precision=precision,
                        checkpointing=checkpointing)  # fmt: skip
    budget = Budget(settings, 1, CLASSES, None, None)
    found = topology(spacing, patch)
    assert found.patch == patch, found
    network = convoxel.accelerate(models.create("unet", **budget.config(found)), inplace=True).train()
    if checkpointing:
        network.checkpointing = True
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.99, nesterov=True)
    waiting = [
        (torch.randn(batch, 1, *patch), torch.randint(0, CLASSES, (batch, *patch))) for _ in range(WAITING)
    ]
    best = float("inf")
    for x, y in waiting[:STEPS]:
        began = time.perf_counter()
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            outputs = network(x)
        loss = torch.zeros(())
        for output in outputs:
            strides = [n // m for n, m in zip(patch, output.shape[2:], strict=True)]
            picked = y[(slice(None), *(slice(None, None, s) for s in strides))]
            loss = loss + torch.nn.functional.cross_entropy(output.float(), picked)
        loss.backward()
        optimizer.step()
        best = min(best, time.perf_counter() - began)
    return {"memory": peak_memory(), "seconds": best, "forecast_memory": budget.memory(found, batch),
            "forecast_seconds": budget.seconds(found, batch)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", metavar="NAMES", help=f"of {', '.join(NETWORKS)}; all if none")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.names[0], args.precision, args.checkpointing)))
        return
    print(f"{convoxel.runtime.isa()}, {torch.get_num_threads()} threads, {args.precision}"
          + ", checkpointing" * args.checkpointing)  # fmt: skip
    for name in args.names or NETWORKS:
        command = [sys.executable, __file__, name, "--one", "--precision", args.precision]
        done = subprocess.run(
            command + ["--checkpointing"] * args.checkpointing, capture_output=True, text=True, check=True
        )
        m = json.loads(done.stdout)
        print(
            f"{name:16} {m['memory'] / 1e9:.2f} GB, forecast {m['forecast_memory'] / m['memory']:.2f} of it; "
            f"{m['seconds']:.2f} s, forecast {m['forecast_seconds'] / m['seconds']:.2f} of it",
            flush=True,
        )


if __name__ == "__main__":
    main()
