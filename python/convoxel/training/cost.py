"""What a training step will take of memory and time, forecast from the sizes of the network's layers.

    bytes   = program + 4 * copies * weights + 4 * held * values + batches that wait
    seconds = (3 * multiply-adds / rate + values / traffic) / cores

`copies` of the weights are themselves, their gradient and what the optimizer keeps; `values` are those of all
convolutions' outputs, of the patches computed at once; multiply-adds count three times (forward, two gradients). The
constants are of the accelerated network, all decoder stages supervised, measured by tests/campaigns/forecasts.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ..runtime import isa
from .settings import Settings

# Measured on two cores of an Intel Xeon with AMX (2026-11-24), peak RSS of three steps with waiting batches; nnU-Net's
# 3-D network unless said otherwise, 6 classes. float32: two patches of 64^3 1.23 GB (forecast 1.00 of it), 96^3 1.69
# (1.01), 128^3 3.49 (1.00), twice 16 x 224 x 224 3.55 (1.01), with 16 features at first twice 96^3 1.69 (0.98), 2-D
# 8 x 256^2 1.72 (1.01), 2 x 512^2 1.82 (1.04). bfloat16: 64^3 0.92 (0.98), 96^3 1.15 (1.00), 128^3 2.13 (1.02),
# 8 x 256^2 1.27 (0.98). Residual: twice 64^3 2.05 (1.07), 96^3 2.86 (1.03), 8 x 256^2 3.40 (1.06); bfloat16 1.66
# (0.99), 2.17 (0.94), 2.67 (0.98). Checkpointing changes the peak, which lies in the topmost stage, by -10 to +3 %:
# it is not counted.
_PROGRAM = 330e6  # bytes: Python, torch and the kernels' scratch
_COPIES = {"sgd": 3, "adamw": 4}
_HELD = {
    ("float32", False): 1.45,
    ("float32", True): 1.9,
    ("bfloat16", False): 0.73,
    ("bfloat16", True): 0.95,
}
WAITING = 5  # batches that the feed holds: three ahead, one in use, one in the making

# 1e9 multiply-adds a second and core, of (2-D, 3-D) networks, and 1e6 values; Winograd's algorithm saves more in 3-D.
# Measured as above, AVX-512: 96^3 1.85 s (forecast 1.04 of it), 128^3 4.21 (1.10), twice 16 x 224 x 224 4.62 (1.00),
# with 16 features at first twice 96^3 1.34 (1.06), 8 x 256^2 1.84 (1.03). AVX2: 96^3 2.79 (1.05), 8 x 256^2 2.88
# (1.00). Baseline: twice 64^3 3.62 (1.01). bfloat16 by AMX: 96^3 0.81 (0.90), 128^3 1.79 (0.97), 8 x 256^2 0.76
# (0.94); without AMX it takes as long as float32.
_RATES = {
    "baseline": (34, 57, 116),
    "avx2": (82, 143, 116),
    "avx512": (152, 273, 116),
    "amx": (430, 790, 278),
}
# Beside a plain network's: twice 64^3 1.92 s (forecast 0.95 of it), 96^3 2.93 (1.05), 8 x 256^2 3.77 (1.12); bfloat16
# 0.94 (0.86), 1.41 (0.97), 1.62 (1.13).
_RESIDUAL = {"float32": 1.15, "bfloat16": 1.35}
_TWICE = 1.28  # with checkpointing: 96^3 2.33 s (1.06), 128^3 5.40 (1.09), 8 x 256^2 2.39 (1.01)


class Layer(NamedTuple):
    """One convolution, or the sum of many."""

    weights: int
    values: int  # of its output, of one patch
    multiply_adds: int  # forward, of one patch


def network_cost(config: Mapping[str, Any], patch: Sequence[int]) -> Layer:
    """The sum over all convolutions of a `models.UNet` of this configuration.

    >>> config = {"in_channels": 1, "out_channels": 2, "features": [8, 16], "strides": [[1, 1], [2, 2]],
    ...           "kernel_size": [[3, 3], [3, 3]], "convs": [1, 1], "deep_supervision": False}
    >>> network_cost(config, (4, 4))
    Layer(weights=2904, values=480, multiply_adds=26496)
    """
    layers = list(_layers(config, patch))
    return Layer(*(sum(part) for part in zip(*layers, strict=True)))


def _layers(config: Mapping[str, Any], patch: Sequence[int]) -> Iterator[Layer]:
    features, strides, kernels = config["features"], config["strides"], config["kernel_size"]
    voxels, size = [], list(patch)
    for stride in strides:
        size = [n // s for n, s in zip(size, stride, strict=True)]
        voxels.append(math.prod(size))
    residual, stages = config.get("residual", False), len(features)
    taps = [math.prod(kernel) for kernel in kernels]
    inputs = config["in_channels"]
    if residual:
        yield _conv(inputs, features[0], taps[0], voxels[0])
        inputs = features[0]
    for s in range(stages):
        for _ in range(config["convs"][s]):
            yield _conv(inputs, features[s], taps[s], voxels[s])
            if residual:
                yield _conv(features[s], features[s], taps[s], voxels[s])
                if inputs != features[s]:
                    yield _conv(inputs, features[s], 1, voxels[s])
            inputs = features[s]
    convs = config.get("decoder_convs") or (1 if residual else config["convs"])
    convs = [convs] * (stages - 1) if isinstance(convs, int) else convs
    for s in range(stages - 1):
        step = math.prod(strides[s + 1])
        spread = features[s + 1] * features[s] * step
        yield Layer(spread, features[s] * voxels[s], spread * voxels[s + 1])
        yield _conv(2 * features[s], features[s], taps[s], voxels[s])
        for _ in range(convs[s] - 1):
            yield _conv(features[s], features[s], taps[s], voxels[s])
        if s == 0 or config["deep_supervision"]:
            yield _conv(features[s], config["out_channels"], 1, voxels[s])


def _conv(inputs: int, outputs: int, taps: int, voxels: int) -> Layer:
    weights = inputs * outputs * taps
    return Layer(weights, outputs * voxels, weights * voxels)


def training_memory(
    network: Layer, config: Mapping[str, Any], settings: Settings, patch: Sequence[int], batch: int
) -> int:
    """Bytes at the training process's peak; `network` is `network_cost(config, patch)`."""
    held = _HELD[settings.precision, bool(config.get("residual"))] * 4 * network.values
    waiting = WAITING * batch * math.prod(patch) * (4 * config["in_channels"] + 8)  # float32, labels int64
    weights = 4 * _COPIES[settings.optimizer] * network.weights
    return round(_PROGRAM + weights + held * (batch // settings.accumulate) + waiting)


def step_seconds(
    network: Layer, config: Mapping[str, Any], settings: Settings, batch: int, cores: int
) -> float:
    """Seconds of one step on this machine's instruction set, where the cores do nothing else meanwhile."""
    plane, volume, values = _RATES[_family(settings.precision)]
    rate = volume if config["rank"] == 3 else plane
    seconds = 3 * network.multiply_adds / (1e9 * rate) + network.values / (1e6 * values)
    if config.get("residual"):
        seconds *= _RESIDUAL[settings.precision]
    if settings.checkpointing:
        seconds *= _TWICE
    return seconds * batch / cores


def _family(precision: str) -> str:
    name = isa()
    if name == "amx" and precision == "bfloat16":
        return "amx"
    return "avx512" if name in ("avx512", "avx512bf16", "amx") else name
