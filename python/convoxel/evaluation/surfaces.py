"""Surfaces of masks, in mm: their elements, the elements' areas, and distances between two surfaces.

The definition is that of Nikolov et al., "Clinically Applicable Segmentation of Head and Neck Anatomy for
Radiotherapy" (J Med Internet Res 2021;23(7):e26151), and of their package surface-distance. Every 2 x 2 x 2
neighbourhood of voxels that holds both inside and outside is one surface element. It lies at the
neighbourhood's centre, where eight voxels meet, and has the area of the triangles that marching cubes put there;
so elements weigh by the surface that they stand for, whatever the spacing. A structure that the edge of the
scan cuts has a surface there.

    HD95         = max over both directions of the 95th percentile (by area) of the distances to the other surface
    surface Dice = (area of A within t of B + area of B within t of A) / (area of A + area of B)

Distances are exact: between element centres, to the nearest.

A grid with one slice has contours instead: lengths for areas, times the slice's thickness, which cancels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

_ROUNDING = 1 + 1e-6  # spacings come from float32: a distance of one voxel of 1 mm is within 1 mm
_NEAR = 5  # voxels
_GAP = (
    8  # empty slices: a lattice of stray voxels is 218,000 pieces of a whole body then (10 s), not 20 million
)
_PAIRS_PER_VOXEL = 8  # a tree looks at a pair of points, at worst, in 20 ns; a transform takes 150 ns a voxel
Corner = tuple[int, int, int]


class Surface(NamedTuple):
    """Elements of one mask's surface, n of them.

    number: (n,) int64, ascending: of the corner where the element lies, on the grid of (D+1, H+1, W+1).
    corners: (n, 3) int64, the same as (z, y, x). areas: (n,) float64 in mm^2. spacing: (z, y, x) in mm.
    """

    number: NDArray[np.int64]
    corners: NDArray[np.int64]
    areas: NDArray[np.float64]
    spacing: tuple[float, ...]

    @property
    def points(self) -> NDArray[np.float64]:
        """(n, 3), (z, y, x) in mm from the grid's first corner."""
        return self.corners * np.array(self.spacing)

    def where(self, keep: NDArray[Any]) -> Surface:
        """The elements that a mask (n,) or a list of indices names."""
        return self._replace(number=self.number[keep], corners=self.corners[keep], areas=self.areas[keep])


def surface(
    mask: NDArray[np.bool_],
    spacing: Sequence[float],
    *,
    start: Sequence[int] = (0, 0, 0),
    grid: Sequence[int] | None = None,
) -> Surface:
    """The surface of a mask (d, h, w) which lies at `start` in a `grid` of (D, H, W) voxels; all else is outside.

    spacing: (z, y, x) in mm. grid: None is the mask's own shape.

    >>> square = surface(np.ones((1, 4, 4), bool), (1.0, 0.5, 0.5))  # one slice: a contour of 2 x 2 mm, cut corners
    >>> round(float(square.areas.sum()), 3)
    7.414
    """
    grid = mask.shape if grid is None else grid
    thick = [n > 1 for n in grid]
    table = areas(spacing)
    corners, sizes = [np.zeros((0, 3), np.int64)], [np.zeros(0)]
    for box in _pieces(mask) if mask.any() else ():
        code = _codes(mask[box], thick)
        place = np.flatnonzero((code != 0) & (code != 255))
        first = np.add(start, [part.start for part in box])
        corners.append(np.stack(np.unravel_index(place, code.shape), 1) + first)
        sizes.append(table[code.flat[place]])
    several = np.concatenate(corners)
    number = np.ravel_multi_index(tuple(several.T), tuple(n + 1 for n in grid)).astype(np.int64)
    order = np.argsort(number, kind="stable")
    whole = Surface(number, several, np.concatenate(sizes), tuple(map(float, spacing)))
    return whole.where(order)


def _codes(mask: NDArray[np.bool_], thick: Sequence[bool]) -> NDArray[np.uint8]:
    """(d+1, h+1, w+1): which voxels of each neighbourhood are inside; an axis that is not thick keeps its 1."""
    code = np.pad(mask.astype(np.uint8), [(1, int(t)) for t in thick])
    for axis, bit in ((2, 1), (1, 2), (0, 4)):
        before, after = _cut(code, axis, slice(None, -1)), _cut(code, axis, slice(1, None))
        code = before | after << bit if thick[axis] else after | after << bit
    return code


def _pieces(mask: NDArray[np.bool_], axis: int = 0) -> Iterator[tuple[slice, ...]]:
    """Boxes that hold all of a mask, at least _GAP empty slices between any two: stray voxels far off cost little."""
    if axis == 3:
        yield ()
        return
    there = np.asarray(mask.any(tuple(range(1, 3 - axis))))
    ends = np.flatnonzero(np.diff(np.pad(there, 1).astype(np.int8)))
    wide = np.flatnonzero(ends[2::2] - ends[1:-1:2] >= _GAP)
    lows, highs = ends[::2][np.append(0, wide + 1)], ends[1::2][np.append(wide, -1)]
    for low, high in zip(lows.tolist(), highs.tolist(), strict=True):
        inner = np.asarray(mask[low:high].any(0))
        for rest in _pieces(inner, axis + 1):
            yield slice(low, high), *rest


def _cut(array: NDArray[Any], axis: int, part: slice) -> NDArray[Any]:
    return array[(slice(None),) * axis + (part,)]


def distances(of: Surface, to: Surface) -> NDArray[np.float64]:
    """(n,) in mm: from each element of one surface to the nearest element of the other; both have some.

    Most elements of a good prediction are the truth's, and most others have it near: a k-d tree finds those 10 to
    40 times as fast as a distance transform of the box around both surfaces. But it compares nearly all pairs where
    many points are about as far from everything, as a ball's in the middle of a body are (68,000 points: 368 s, the
    transform 7 s), so the far ones take whichever costs less at worst.
    """
    from scipy.spatial import cKDTree

    found = np.zeros(len(of.number))
    apart = np.flatnonzero(~np.isin(of.number, to.number, assume_unique=True))
    if not len(apart):
        return found
    tree, threads = cKDTree(to.points, balanced_tree=False), torch.get_num_threads()
    near = _NEAR * max(of.spacing)
    nearest = tree.query(of.points[apart], distance_upper_bound=near, workers=threads)[1]
    far = np.flatnonzero(nearest == len(to.number))
    if len(far):
        rest = of.where(apart[far])
        if len(far) * len(to.number) > _PAIRS_PER_VOXEL * math.prod(_box(rest, to)[1]):
            found[apart[far]] = _transformed(rest, to)
            apart, nearest = np.delete(apart, far), np.delete(nearest, far)
        else:
            nearest[far] = tree.query(rest.points, workers=threads)[1]
    found[apart] = _lengths(of.corners[apart] - to.corners[nearest], of.spacing)
    return found


def _transformed(of: Surface, to: Surface) -> NDArray[np.float64]:
    """`distances` by a distance transform: 13 bytes for each voxel of the box around both."""
    from scipy import ndimage

    low, shape = _box(of, to)
    outside = np.ones(shape, bool)
    outside[tuple((to.corners - low).T)] = False
    nearest = ndimage.distance_transform_edt(
        outside, sampling=of.spacing, return_distances=False, return_indices=True
    )
    z, y, x = (of.corners - low).T
    return _lengths(of.corners - low - nearest[:, z, y, x].T, of.spacing)


def _box(a: Surface, b: Surface) -> tuple[NDArray[np.int64], tuple[int, ...]]:
    """First corner and shape of the box around both."""
    low = np.minimum(a.corners.min(0), b.corners.min(0))
    high = np.maximum(a.corners.max(0), b.corners.max(0))
    return low, tuple((high - low + 1).tolist())


def _lengths(corners: NDArray[np.int64], spacing: Sequence[float]) -> NDArray[np.float64]:
    return np.sqrt(((corners * np.array(spacing)) ** 2).sum(1))


def hausdorff(distance: NDArray[np.float64], area: NDArray[np.float64], share: float = 0.95) -> float:
    """The distance in mm within which `share` of the area lies: of the elements, the first that reaches it.

    >>> hausdorff(np.array([3.0, 0.0, 1.0]), np.array([1.0, 8.0, 1.0]), share=0.9)
    1.0
    """
    order = np.argsort(distance, kind="stable")
    reached = np.cumsum(area[order])
    return float(distance[order][np.searchsorted(reached, share * reached[-1] * (1 - 1e-12))])


def surface_scores(
    a: Surface,
    b: Surface,
    tolerance: float,
    counted: tuple[NDArray[np.bool_], NDArray[np.bool_]] | None = None,
) -> tuple[float, float] | None:
    """HD95 in mm and surface Dice at `tolerance` mm of two surfaces that have elements.

    counted: which elements of each have a say (all are something to be near to); None: all. Where no element of
    either has a say there is no score: None.
    """
    keep_a, keep_b = counted or (np.ones(len(a.number), bool), np.ones(len(b.number), bool))
    sides = [
        (distances(mine.where(keep), other), mine.areas[keep])
        for mine, keep, other in ((a, keep_a, b), (b, keep_b, a))
        if keep.any()
    ]
    if not sides:
        return None
    near = sum(float(area[distance <= tolerance * _ROUNDING].sum()) for distance, area in sides)
    return max(hausdorff(*side) for side in sides), near / sum(float(area.sum()) for _, area in sides)


def areas(spacing: Sequence[float]) -> NDArray[np.float64]:
    """(256,) mm^2: the area of a neighbourhood's surface by its code, 1 << (4 z + 2 y + x) for each voxel inside.

    The surface cuts the lines between inside and outside voxels in half. Along a neighbourhood's faces the cuts
    join to loops, around the fewer voxels where that is open; a loop is filled by a fan of triangles,
    the one of largest area at equal spacings. These are marching cubes' triangles as surface-distance has them
    (tests/campaigns/surfaces.py compares all 256).

    >>> float(areas((1.0, 2.0, 2.0))[0b00001111])  # all of one slice inside: a face of 2 x 2 mm
    4.0
    """
    z, y, x = spacing
    scale = np.array([y * x, z * x, z * y])
    return np.array([float(np.linalg.norm(normals * scale, axis=1).sum()) / 2 for normals in _triangles()])


@lru_cache(maxsize=1)
def _triangles() -> tuple[NDArray[np.float64], ...]:
    """For each of the 256 codes its triangles' normals (t, 3), twice their area long at unit spacing."""
    corners = list(itertools.product((0, 1), (0, 1), (0, 1)))
    found = []
    for code in range(256):
        few = code if code.bit_count() <= 4 else 255 - code
        inside = {corner: bool(few >> (4 * corner[0] + 2 * corner[1] + corner[2]) & 1) for corner in corners}
        fans = [_fan(loop) for loop in _loops(inside)]
        found.append(np.concatenate(fans) if fans else np.zeros((0, 3)))
    return tuple(found)


def _loops(inside: dict[Corner, bool]) -> list[NDArray[np.float64]]:
    """Closed polygons (n, 3) around the voxels inside, through the middles of the lines that are cut."""
    following: dict[tuple[float, ...], tuple[float, ...]] = {}
    for axis, side in itertools.product(range(3), (0, 1)):
        ring = [(0, 0), (1, 0), (1, 1), (0, 1)][:: 1 if side else -1]  # counterclockwise from outside
        face = [tuple(np.roll((side, *pair), axis).tolist()) for pair in ring]
        steps = [(face[i], face[(i + 1) % 4]) for i in range(4)]
        change = [inside[b] - inside[a] for a, b in steps]
        middles = [tuple((np.add(a, b) / 2).tolist()) for a, b in steps]
        for i in (i for i in range(4) if change[i] == 1):
            leave = next(j % 4 for j in range(i + 1, i + 4) if change[j % 4] == -1)
            following[middles[i]] = middles[leave]
    loops = []
    while following:
        first, point = following.popitem()
        loop = [first]
        while point != first:
            loop.append(point)
            point = following.pop(point)
        loops.append(np.array(loop))
    return loops


def _fan(loop: NDArray[np.float64]) -> NDArray[np.float64]:
    """Normals (n - 2, 3) of the fan of largest area."""
    fans = []
    for k in range(len(loop)):
        rays = np.roll(loop, -k, axis=0)[1:] - loop[k]
        fans.append(np.cross(rays[:-1], rays[1:]))
    return max(fans, key=lambda normals: round(float(np.linalg.norm(normals, axis=1).sum()), 9))
