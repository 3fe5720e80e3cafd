"""Shapes as fields: negative inside, positive outside, about millimetres near the surface.

A field needs only to be smooth: `coverage` divides it by its own change over a voxel, and that is the
share of the voxel inside, whatever the field's unit, the voxels' sizes and the bending of space.
Points are (3, D, H, W) float32: x to the patient's Right, y to Anterior, z to Superior, in mm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Field = NDArray[np.float32]
Points = NDArray[np.float32]
Box = tuple[slice, slice, slice]


@dataclass(frozen=True)
class Grid:
    """Voxels (D, H, W) of a scan, and where in the (bent) patient each of their centres lies."""

    affine: NDArray[np.float64]  # (4, 4), (x, y, z) indices to the scanner's RAS+ mm
    pose: NDArray[np.float64]  # (4, 4), the scanner's RAS+ mm to the patient's, before bending
    points: Points  # (3, D, H, W)
    bend: float  # mm that bending moves a point at most

    def at(self, box: Box) -> Points:
        """(3, d, h, w): where the voxels of the box lie."""
        z, y, x = box
        return self.points[:, z, y, x]

    def box(self, centre: ArrayLike, reach: float) -> Box | None:
        """The voxels that a shape of that centre and radius (patient mm) can touch; None if there are none."""
        to_patient = self.pose @ self.affine
        index = np.linalg.solve(to_patient, [*np.asarray(centre, float), 1.0])[2::-1]
        steps = np.linalg.norm(to_patient[:3, :3], axis=0)[::-1]
        half = (reach + self.bend) / steps + 2
        low = np.maximum(np.floor(index - half), 0).astype(int)
        high = np.minimum(np.ceil(index + half) + 1, self.points.shape[1:]).astype(int)
        if (high - low < 2).any():  # a slope needs two voxels
            return None
        z, y, x = (slice(a, b) for a, b in zip(low, high, strict=True))
        return z, y, x


def smooth_noise(rng: np.random.Generator, shape: Sequence[int], cells: ArrayLike) -> Field:
    """(D, H, W) smooth random values of deviation about 1: cubic B-splines through random knots.

    cells: knot intervals along each axis, so that shape / cells voxels lie between two knots.
    """
    counts = [float(c) for c in np.asarray(cells)]
    field = rng.standard_normal([int(np.ceil(c)) + 3 for c in counts], np.float32)
    for axis, (n, c) in enumerate(zip(shape, counts, strict=True)):
        weights = _spline_weights(n, c, field.shape[axis])
        field = np.moveaxis(np.tensordot(weights, field, (1, axis)), 0, axis)
    return np.asarray(field / 0.33, np.float32)  # a B-spline of unit knots has deviation 0.48^1.5


def _spline_weights(n: int, cells: float, knots: int) -> NDArray[np.float32]:
    """(n, knots): the cubic B-splines of the knots at n voxel centres."""
    position = (np.arange(n) + 0.5) / n * cells + 1
    t = np.abs(position[:, None] - np.arange(knots))
    near, far = (4 - 6 * t**2 + 3 * t**3) / 6, (2 - t) ** 3 / 6
    return np.where(t < 1, near, np.where(t < 2, far, 0)).astype(np.float32)


def ellipsoid(
    points: Points, centre: ArrayLike, radii: Sequence[float], turn: ArrayLike | None = None
) -> Field:
    """(|q| - 1) min(radii) with q = turn (p - centre) / radii; turn (3, 3) is a rotation."""
    q = points - np.asarray(centre, np.float32)[:, None, None, None]
    if turn is not None:
        q = np.tensordot(np.asarray(turn, np.float32), q, 1)
    q /= np.asarray(radii, np.float32)[:, None, None, None]
    return np.sqrt(np.einsum("i...,i...->...", q, q)) * min(radii) - np.float32(min(radii))


def tube(points: Points, start: ArrayLike, end: ArrayLike, radii: tuple[float, float]) -> Field:
    """Distance to the segment from start to end, less a radius that runs from one to the other."""
    a, b = np.asarray(start, np.float32), np.asarray(end, np.float32)
    along = b - a
    q = points - a[:, None, None, None]
    t = np.clip(np.tensordot(along, q, 1) / np.float32(along @ along), 0, 1)
    q = q - along[:, None, None, None] * t
    distance = np.sqrt(np.einsum("i...,i...->...", q, q))
    return distance - (np.float32(radii[0]) + np.float32(radii[1] - radii[0]) * t)


def union(*fields: Field, blend: float = 0.0) -> Field:
    """The smaller field; surfaces nearer than `blend` mm to each other grow together."""
    joined = fields[0]
    for field in fields[1:]:
        if blend:
            h = np.maximum(blend - np.abs(joined - field), 0) / np.float32(blend)
            joined = np.minimum(joined, field) - h * h * np.float32(blend / 4)
        else:
            joined = np.minimum(joined, field)
    return joined


def separate(fields: Sequence[Field], gap: float) -> list[Field]:
    """The same shapes, each kept `gap` mm from where it would overlap another: no voxel has two owners."""
    parted = []
    for i, field in enumerate(fields):
        others = [other for j, other in enumerate(fields) if j != i]
        nearest = np.minimum.reduce(others)
        parted.append(np.maximum(field, (field - nearest + np.float32(gap)) / 2))
    return parted


def coverage(field: Field) -> Field:
    """(D, H, W) share of each voxel inside, from 0 to 1: the partial volume."""
    slopes = np.gradient(field)
    across = np.abs(slopes[0]) + np.abs(slopes[1]) + np.abs(slopes[2])
    return np.clip(np.float32(0.5) - field / np.maximum(across, np.float32(1e-6)), 0, 1)


def rotation(angles: ArrayLike) -> NDArray[np.float64]:
    """(3, 3): turned about x, then y, then z, in degrees."""
    matrix = np.eye(3)
    for axis, angle in enumerate(np.deg2rad(np.asarray(angles, float))):
        i, j = (n for n in range(3) if n != axis)
        turn = np.eye(3)
        turn[i, i] = turn[j, j] = np.cos(angle)
        turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
        matrix = turn @ matrix
    return matrix
