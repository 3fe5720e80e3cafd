"""50 training steps of every network of tests/networks.py: float64 by torch, float32 by torch and accelerated.

    python tests/campaigns/follow.py [NAME…]

Prints how far the losses are from the float64 run's: the largest difference over the steps, in `highest` and `high`, as
multiples of torch's own. SiLU stands for the activations, whose kinks make it a matter of luck. Exit code 1 if a run in
`highest` is further from float64 than twice torch's.
"""

import copy
import sys
from pathlib import Path

import torch
from torch import nn

import convoxel

sys.path.insert(0, str(Path(__file__).parents[1]))
from networks import NETWORKS, build, image, outputs  # noqa: E402

STEPS = 50


def losses(net: nn.Module, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The loss of every step."""
    optimizer, found = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9), []
    for _ in range(STEPS):
        optimizer.zero_grad()
        y = outputs(net(x))[0]
        loss = nn.functional.cross_entropy(y[:, 0] if y.dim() > labels.dim() + 1 else y, labels)
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return torch.tensor(found, dtype=torch.float64)


def follow(name: str) -> bool:
    """Prints a network's line; whether it holds."""
    x = image(name, 1)
    pool = nn.functional.avg_pool2d if x.dim() == 4 else nn.functional.avg_pool3d
    labels = (pool(x, 5, 1, 2)[:, 0] > 0).long()
    net = build(name, smooth=True)
    exact = losses(copy.deepcopy(net).double(), x.double(), labels)
    theirs = (losses(copy.deepcopy(net), x, labels) - exact).abs().max().item()
    ours = {}
    for precision in ("highest", "high"):
        convoxel.set_float32_conv_precision(precision)
        ours[precision] = (
            (losses(convoxel.accelerate(copy.deepcopy(net)), x, labels) - exact).abs().max().item()
        )
    print(f"{name:<34} loss {exact[0]:.4f} to {exact[-1]:.4f}; off by: torch {theirs:.1e}"
          + "".join(f", {p} {d:.1e} ({d / theirs:.1f}x)" for p, d in ours.items()), flush=True)  # fmt: skip
    return ours["highest"] <= 2 * theirs


if __name__ == "__main__":
    sys.exit(0 if all([follow(name) for name in sys.argv[1:] or NETWORKS]) else 1)
