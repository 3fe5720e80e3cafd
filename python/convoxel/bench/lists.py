"""The layers that `convoxel bench layers LIST` times, and what each list should gain over torch.

The lists of whole networks are in `network_lists`. Where a list says nothing else, ours runs channels-last, the
layout of networks inside convoxel, and torch in the better of its two."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from ..geometry import Problem
from . import network_lists
from .operators import PASSES


@dataclass(frozen=True)
class Layers:
    """Problems; the gain over torch that a pass should have at `least` (geometric mean) and that we `want`; whether
    ours is timed in both memory formats."""

    texts: tuple[str, ...]
    least: dict[str, float] = field(default_factory=dict)
    want: dict[str, float] = field(default_factory=dict)
    both: bool = False

    @property
    def problems(self) -> list[Problem]:
        return [Problem.parse(text) for text in self.texts]


def every(gain: float) -> dict[str, float]:
    return dict.fromkeys(PASSES, gain)


def network(texts: Iterable[str]) -> Layers:
    return Layers(tuple(texts), every(0.97), every(1.1))


LISTS = {
    # the convolutions that carry nnU-Net's 3-D network at a 128^3 patch: 73 % of its arithmetic
    "hot": Layers(
        (
            "conv n1 c32 k32 i128x128x128 f3x3x3 p1x1x1",
            "conv n1 c64 k32 i128x128x128 f3x3x3 p1x1x1",
            "conv n1 c64 k64 i64x64x64 f3x3x3 p1x1x1",
            "conv n1 c128 k64 i64x64x64 f3x3x3 p1x1x1",
            "conv n1 c128 k128 i32x32x32 f3x3x3 p1x1x1",
            "conv n1 c256 k256 i16x16x16 f3x3x3 p1x1x1",
        ),
        {"forward": 3, "input_grad": 3, "weight_grad": 2},
        {"forward": 4, "input_grad": 4, "weight_grad": 3.5},
    ),
    "first": Layers(
        (
            "conv n1 c1 k32 i128x128x128 f3x3x3 p1x1x1",
            "conv n1 c2 k32 i96x96x96 f3x3x3 p1x1x1",
            "conv n1 c4 k32 i96x96x96 f3x3x3 p1x1x1",
            "conv n4 c1 k32 i256x256 f3x3 p1x1",
            "conv n4 c3 k64 i224x224 f3x3 p1x1",
        ),
        every(4),
        every(8),
    ),
    "stride": Layers(
        (
            "conv n1 c32 k64 i128x128x128 f3x3x3 s2x2x2 p1x1x1",
            "conv n1 c64 k128 i64x64x64 f3x3x3 s2x2x2 p1x1x1",
            "conv n1 c128 k256 i32x32x32 f3x3x3 s2x2x2 p1x1x1",
            "conv n1 c256 k320 i16x16x16 f3x3x3 s2x2x2 p1x1x1",
            "conv n4 c32 k64 i256x256 f3x3 s2x2 p1x1",
        ),
        every(1.3),
        every(2),
    ),
    "transposed": Layers(
        (
            "conv_transpose n1 c64 k32 i64x64x64 f2x2x2 s2x2x2",
            "conv_transpose n1 c32 k32 i48x48x48 f2x2x2 s2x2x2",
            "conv_transpose n1 c128 k64 i32x32x32 f2x2x2 s2x2x2",
            "conv_transpose n1 c256 k128 i16x16x16 f2x2x2 s2x2x2",
            "conv_transpose n4 c64 k32 i128x128 f2x2 s2x2",
        ),
        every(2),
        every(4),
    ),
    "deep": Layers(
        (
            "conv n1 c320 k320 i8x8x8 f3x3x3 p1x1x1",
            "conv n1 c640 k320 i8x8x8 f3x3x3 p1x1x1",
            "conv n1 c320 k320 i4x4x4 f3x3x3 p1x1x1",
        ),
        every(1.5),
        every(2.5),
    ),
    "depthwise": Layers(
        (
            "conv n1 c32 k32 i96x96x96 f3x3x3 p1x1x1 g32",
            "conv n1 c32 k32 i64x64x64 f5x5x5 p2x2x2 g32",
            "conv n4 c64 k64 i128x128 f3x3 p1x1 g64",
            "conv n4 c64 k64 i128x128 f5x5 p2x2 g64",
        ),
        every(3),
        every(8),
    ),
    "pointwise": Layers(
        (
            "conv n1 c32 k3 i128x128x128 f1x1x1",
            "conv n1 c64 k64 i64x64x64 f1x1x1",
            "conv n1 c256 k256 i16x16x16 f1x1x1",
            "linear n4096 c320 k320",
            "linear n32768 c96 k384",
        ),
        every(0.97),
        every(1.1),
    ),
    "conv2d": Layers(
        (
            "conv n4 c32 k32 i256x256 f3x3 p1x1",
            "conv n4 c64 k32 i256x256 f3x3 p1x1",
            "conv n4 c64 k64 i128x128 f3x3 p1x1",
            "conv n4 c128 k128 i64x64 f3x3 p1x1",
            "conv n4 c256 k256 i32x32 f3x3 p1x1",
            "conv n4 c512 k512 i16x16 f3x3 p1x1",
        ),
        every(2),
        every(3),
    ),
    # 113 MB a tensor in 3-D: memory bounds them
    "around": Layers(
        (
            "instance_norm n1 c32 i96x96x96",
            "batch_norm n1 c32 i96x96x96",
            "group_norm n1 c32 i96x96x96 g8",
            "leaky_relu n1 c32 i96x96x96",
            "relu n1 c32 i96x96x96",
            "max_pool n1 c32 i96x96x96 f2x2x2",
            "avg_pool n1 c32 i96x96x96 f2x2x2",
            "interpolate n1 c32 i48x48x48 s2x2x2",
            "interpolate n1 c32 i48x48x48 s2x2x2 nearest",
            "instance_norm n4 c32 i256x256",
            "batch_norm n4 c32 i256x256",
            "max_pool n4 c32 i256x256 f2x2",
            "interpolate n4 c32 i128x128 s2x2",
        ),
        every(2),
        every(3),
        both=True,
    ),
    # so small that what surrounds the kernel shows; at most 25 us more than torch
    "small": Layers(
        (
            "conv n1 c8 k8 i8x8x8 f3x3x3 p1x1x1",
            "conv n1 c8 k8 i16x16 f3x3 p1x1",
            "conv_transpose n1 c8 k8 i4x4x4 f2x2x2 s2x2x2",
            "linear n4 c64 k64",
            "instance_norm n1 c8 i8x8x8",
            "leaky_relu n1 c8 i8x8x8",
            "max_pool n1 c8 i8x8x8 f2x2x2",
            "interpolate n1 c8 i4x4x4 s2x2x2",
        ),
    ),
    **{name: network(texts) for name, texts in network_lists.LAYERS.items()},
}

# How many times as fast a network should at least be: (network, dtype of ours, what), over which variant.
NETWORK_LEAST: dict[tuple[str, str, str], dict[str, float]] = {
    ("nnunet3d", "f32", "forward"): {"torch": 4, "torch, memory kept": 2.2, "openvino": 2},
    ("nnunet3d", "f32", "step"): {"torch": 4, "torch, memory kept": 2.2, "torch bf16": 1.7},
    ("nnunet3d", "bf16", "forward"): {"openvino bf16": 1.3},
    **{
        (name, "f32", what): {"torch": 2}
        for name in ("nnunet2d", "basicunet", "dynunet", "segresnet")
        for what in ("forward", "step")
    },
}
