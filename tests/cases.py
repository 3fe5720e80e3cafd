"""The problems that tests and benchmarks share. A Problem is one pasteable string (convoxel.geometry)."""

from convoxel.geometry import Problem


def problems(*lines: str) -> list[Problem]:
    return [Problem.parse(line) for line in lines]


# Small problems that together touch every rule: ranks, odd and prime sizes, tails of channels and pixels,
# anisotropy, strides beyond the kernel, dilation, groups, padding wider than the kernel.
CONV = problems(
    "conv n2 c3 k5 i17 f3 p1",
    "conv n1 c1 k1 i1 f1",
    "conv n2 c4 k6 i31 f5 s3 p2 d2 g2",
    "conv n2 c1 k32 i29x31 f3x3 p1x1",
    "conv n1 c17 k33 i13x7 f3x5 s1x2 p1x2",
    "conv n2 c8 k8 i9x11 f3x3 p2x2 d2x2 g8",
    "conv n1 c3 k3 i23x19 f1x1",
    "conv n1 c2 k4 i12x12 f2x2 s2x2",
    "conv n1 c4 k4 i9x9 f4x4 p1x3",
    "conv n1 c5 k7 i6x7x11 f3x3x3 p1x1x1",
    "conv n2 c33 k34 i5x6x16 f3x3x3 p1x1x1 nobias",
    "conv n1 c70 k40 i4x4x4 f3x3x3 p1x1x1",
    "conv n1 c130 k16 i3x3x5 f3x3x3 p1x1x1",
    "conv n1 c16 k16 i6x8x32 f1x3x3 p0x1x1",
    "conv n1 c32 k64 i8x8x8 f3x3x3 s2x2x2 p1x1x1",
    "conv n1 c4 k6 i7x9x11 f3x3x3 s3x2x1 p2x0x1 d1x3x2 g2",
    "conv n1 c6 k6 i11x5x9 f1x1x1 s2x3x4",
    "conv n1 c3 k2 i2x2x30 f2x2x2 p3x3x3",
    "conv n1 c1 k2 i40x3x3 f3x1x1 p30x0x0 d29x1x1",
    "conv n3 c2 k3 i1x1x1 f3x3x3 p1x1x1",
)

CONV_TRANSPOSE = problems(
    "conv_transpose n2 c3 k5 i17 f3 s2 p1 o1",
    "conv_transpose n1 c4 k6 i9x7 f2x2 s2x2",
    "conv_transpose n2 c6 k4 i5x8 f3x3 s1x3 p1x0 o0x2 d2x1 g2",
    "conv_transpose n1 c32 k16 i4x5x6 f2x2x2 s2x2x2",
    "conv_transpose n1 c17 k33 i3x4x5 f3x3x3 s2x2x2 p1x1x1 o1x1x1 nobias",
    "conv_transpose n1 c2 k2 i3x4x5 f1x2x3 s3x3x1 o1x0x0",
    "conv_transpose n1 c2 k3 i5x5x5 f2x2x2 d3x3x3 o2x1x0",
    "conv_transpose n1 c3 k3 i6x6x6 f3x3x3 s4x4x4 p2x2x2 d2x2x2",
)
