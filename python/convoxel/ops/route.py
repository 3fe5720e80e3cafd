"""Which algorithm computes a convolution: from shape, dtype and precision, in this place alone.

    direct    the definition: every kernel, stride and dilation; keeps precision `highest`
    winograd  three taps along H and W, three or one along D, stride and dilation 1: tiles of 4 or 2 outputs an axis
              need 6 or 4 products instead of 12 or 6; relative error 1e-6 to 4e-6; forward and both gradients
    columns   few voxels and many channels: the definition, as a product of matrices that reads the weights in place;
              keeps `highest`
    amx       bfloat16 on the ISA amx, without groups: the definition, by tiles of 16 positions and 32 channels; exact
              products, summed in float32
    voxels    forward and input gradient, without groups, to few channels: the definition, with vectors of voxels; keeps
              `highest`
    depthwise one input channel a group: the definition, with vectors of channels or of voxels; keeps `highest`

Of the first five that are possible, the lowest estimate of cycles decides. Its constants were measured on one core of
an Intel Sapphire Rapids with AVX-512; they state ratios, which other widths of vectors share.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil, prod

import torch

Tile = tuple[int, int, int]
LANES = 16
COLUMNS = 2**31  # the places that an index of columns has, and more than they are ever good for
FEW = 8  # output channels, at most, for vectors of voxels
MULTIPLIER = 4  # outputs of a channel that depthwise kernels take
ALGORITHMS = (
    "direct",
    "winograd",
    "depthwise",
    "columns",
    "amx",
    "voxels",
)  # as csrc/geometry.h numbers them


@dataclass(frozen=True)
class Route:
    algorithm: str
    tile: Tile  # outputs of a tile along D, H, W; zeros: direct
    why: str  # this one: for CONVOXEL_VERBOSE

    @property
    def numbers(self) -> tuple[int, ...]:
        """What csrc reads."""
        return ALGORITHMS.index(self.algorithm), *self.tile


DIRECT = Route("direct", (0, 0, 0), "")


@dataclass(frozen=True)
class Work:
    """A correlation: images, groups, C to K channels of a group, outputs and taps along D, H, W."""

    images: int
    groups: int
    c: int
    k: int
    out: tuple[int, ...]
    taps: tuple[int, ...]

    @property
    def k_vectors(self) -> int:
        return ceil(self.k / LANES)


def direct_cycles(work: Work) -> float:
    """Two multiply-adds of a vector a cycle, of which the direct engine reaches 0.8; weights come from far."""
    pixels = work.images * prod(work.out)
    vectors = prod(work.taps) * work.c * work.k_vectors
    return work.groups * (pixels * vectors / 2 / 0.8 + vectors * 60)


def winograd_cycles(work: Work, tile: Tile, gradient: bool) -> float:
    """Products at so much of the peak, cycles a point for the transforms of a vector of x and of y, and cycles for a
    vector of transformed weights, where they do not stay near (1 MiB)."""
    points = prod(m + 2 if m > 1 else 1 for m in tile)
    tiles = prod(ceil(n / m) for n, m in zip(work.out, tile, strict=True))
    products = work.images * tiles * points * work.c * work.k_vectors / 2
    transforms = work.images * tiles * points
    c_vectors, vectors = ceil(work.c / LANES), points * work.c * work.k_vectors
    near = vectors * LANES * 4 <= 2**20
    if gradient:
        cycles = (
            products / 0.8
            + transforms * (22 * c_vectors + 18 * work.k_vectors)
            + vectors * (12 if near else 55)
        )
    elif (
        not near and tiles <= 128
    ):  # "weights first" in conv_winograd.cpp: transformed for 64 tiles, never stored
        cycles = products / 0.45 + work.images * ceil(tiles / 64) * (vectors * 13 + vectors / points * 8 * 27)
    else:  # stored, and read again by 32 tiles at a time
        again = 6 if near else 60 + work.images * ceil(tiles / 32) * 13
        cycles = products / 0.68 + transforms * (18 * c_vectors + 9 * work.k_vectors) + vectors * again
    return work.groups * cycles


def tiles(taps: tuple[int, ...]) -> Iterator[Tile]:
    for d in (4, 2) if taps[0] == 3 else (1,):
        for hw in (4, 2):
            yield d, hw, hw


def declined(axes: list[tuple[int, ...]], dtype: torch.dtype, precision: str, algorithm: str) -> str:
    """Why Winograd's algorithm is out of the question, or nothing."""
    if algorithm in ("direct", "columns", "voxels"):
        return f"algorithm {algorithm} is set"
    if dtype == torch.float64:
        return "float64"
    if dtype == torch.float32 and precision == "highest" and algorithm != "winograd":
        return "precision highest is set"
    _, _, kernel, stride, _, dilation = zip(*axes, strict=True)
    if kernel[0] not in (1, 3) or kernel[1:] != (3, 3):
        return "other taps than 3 x 3 (x 3)"
    if max(stride) > 1 or max(dilation) > 1:
        return "stride or dilation"
    return ""


def depthwise(geometry: tuple[int, ...]) -> bool:
    """One channel in and few out of each group."""
    _, c, k, groups = geometry[:4]
    return c == groups and k <= MULTIPLIER * c


def columns_cycles(work: Work) -> float:
    """Weights are read where they lie, vectors are of voxels; the columns are gathered element by element, by an index
    that each call makes."""
    pixels = work.images * prod(work.out)
    rows = prod(work.taps) * work.c
    products = ceil(pixels / LANES) * rows * (work.k / 2 / 0.8 + 20)
    return work.groups * (products + rows * work.k / LANES * 10) + 30 * pixels * prod(work.taps)


def voxels_cycles(work: Work) -> float:
    """Two multiply-adds of a vector of voxels a cycle, of which 0.47 is reached; 3 cycles for packing an input with the
    halo of its tile, 5 for moving an output."""
    pixels = work.images * prod(work.out)
    return pixels * (work.c * (prod(work.taps) * work.k / LANES / 2 / 0.47 + 3) + 5 * work.k)


def amx_cycles(work: Work) -> float:
    """16 cycles for 16 positions, 32 channels and 16 output channels, of which 0.6 is reached; some for moving a line
    of x and of y; weights are packed, and come from far."""
    pixels, blocks = work.images * prod(work.out), ceil(work.c / 32)
    products = prod(work.taps) * blocks * work.k_vectors
    return pixels * (products / 0.6 + 12 * blocks + 6 * work.k_vectors) + products * 250


def amx_declined(groups: int, parts: tuple[int, ...], dtype: torch.dtype, algorithm: str, isa: str) -> str:
    """Why tiles are out of the question, or nothing."""
    if algorithm not in ("auto", "amx"):
        return f"algorithm {algorithm} is set"
    if dtype != torch.bfloat16 or isa != "amx":
        return "amx is for bfloat16 on the ISA amx"
    if any(rest and c % 32 for c, rest in zip(parts, parts[1:], strict=False)):
        return "amx takes parts of whole blocks of 32 channels"
    return "amx takes no groups" if groups > 1 else ""


def choose(
    op: str, geometry: tuple[int, ...], dtype: torch.dtype, precision: str, algorithm: str, isa: str = ""
) -> Route:
    """geometry: as `ops.conv_geometry.numbers` gives it; precision, algorithm, isa: in the words of `runtime`."""
    images, c, k, groups = geometry[:4]
    axes = [geometry[4 + 6 * a : 10 + 6 * a] for a in range(3)]
    if op == "conv_bias_grad":
        return Route("direct", DIRECT.tile, "no other for this gradient")
    if depthwise(geometry) and algorithm == "auto":
        return Route("depthwise", DIRECT.tile, "one input channel a group")
    sizes, outs, taps, *_ = zip(*axes, strict=True)
    c, k = c // groups, k // groups
    if op == "conv_input_grad":
        c, k = k, c
    work = Work(images, groups, c, k, outs, taps)
    why = declined(axes, dtype, precision, algorithm)
    routes = [(direct_cycles(work), Route("direct", DIRECT.tile, why or "Winograd's is not faster here"))]
    joined = geometry[25] > 0  # x has a second part
    if (
        algorithm in ("auto", "columns")
        and not joined
        and images * max(prod(sizes), prod(outs)) * prod(taps) < COLUMNS
    ):
        routes.append((columns_cycles(work), Route("columns", DIRECT.tile, "few voxels")))
    few = algorithm == "voxels" or algorithm == "auto" and k <= FEW
    if few and groups == 1 and not joined and op != "conv_weight_grad":
        routes.append((voxels_cycles(work), Route("voxels", DIRECT.tile, "few output channels")))
    if not why:
        at = replace(work, out=sizes) if op == "conv_input_grad" else work
        gradient = op == "conv_weight_grad"
        routes += [
            (winograd_cycles(at, tile, gradient), Route("winograd", tile, f"tile {'x'.join(map(str, tile))}"))
            for tile in tiles(taps)
        ]
    no_amx = amx_declined(groups, geometry[24:28], dtype, algorithm, isa)
    if not no_amx:
        routes.append((amx_cycles(work), Route("amx", DIRECT.tile, "tiles of bfloat16")))
    wanted = [r for r in routes if r[1].algorithm == algorithm]
    best = min(wanted or routes, key=lambda r: r[0])[1]
    if dtype != torch.bfloat16 or best.algorithm == "amx":
        return best
    return replace(best, why=f"{best.why}; {no_amx or 'amx is not faster here'}")
