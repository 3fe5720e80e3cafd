"""An upper abdomen out of ellipsoids and tubes: organs, vessels and lesions on a canvas of tissues.

Everything is placed in the patient's frame (x Right, y Anterior, z Superior, mm; the origin in front of the
spine at the height of the kidneys' upper poles), jittered from patient to patient. What is painted later
covers what is there; labels are where more than half of a voxel is covered.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .imaging import Tissue, between
from .shapes import Box, Field, Grid, coverage, ellipsoid, rotation, separate, tube, union

LABELS = {"background": 0, "liver": 1, "spleen": 2, "kidneys": 3, "vessels": 4, "lesion": 5}
_EVERYWHERE: Box = (slice(None), slice(None), slice(None))
_LESIONS = ("cyst", "metastasis", "adenoma")


class Canvas:
    """One image per modality, (M, D, H, W) float32, and the label map (D, H, W) uint8."""

    def __init__(self, grid: Grid, tissues: dict[str, Tissue], rng: np.random.Generator) -> None:
        self.grid, self.tissues, self.rng = grid, tissues, rng
        shape = grid.points.shape[1:]
        self.images = np.empty((len(tissues["air"]), *shape), np.float32)
        self.images[:] = np.reshape(tissues["air"], (-1, 1, 1, 1))
        self.labels = np.zeros(shape, np.uint8)

    def paint(
        self, field: Field, tissue: str | Tissue, label: str | None = None, box: Box = _EVERYWHERE
    ) -> None:
        """Cover what lies inside the field, given over the voxels of `box`."""
        values = self.tissues[tissue] if isinstance(tissue, str) else tissue
        share = coverage(field)
        for image, value in zip(self.images, values, strict=True):
            part = image[box]
            part += share * (np.float32(value) - part)
        if label is not None:
            self.labels[box][field < 0] = LABELS[label]

    def blob(
        self, centre: ArrayLike, radii: tuple[float, float, float], tissue: str, turn: ArrayLike | None = None
    ) -> None:
        """An ellipsoid without a label."""
        box = self.grid.box(centre, max(radii))
        if box is not None:
            self.paint(ellipsoid(self.grid.at(box), centre, radii, turn), tissue, box=box)


def draw(grid: Grid, tissues: dict[str, Tissue], rng: np.random.Generator) -> Canvas:
    """A patient of the random generator's choice, on the grid."""
    canvas = Canvas(grid, tissues, rng)
    _trunk(canvas)
    liver, kidneys = _organs(canvas)
    _vessels(canvas, liver)
    _lesions(canvas, liver, kidneys)
    return canvas


def _trunk(canvas: Canvas) -> None:
    """Skin and fat, wall and ribs, lungs, bowel, stomach, spine: what no label names."""
    rng, (x, y, z) = canvas.rng, canvas.grid.points
    width, depth = rng.uniform(150, 172), rng.uniform(98, 118)
    fat, wall = rng.uniform(8, 22), rng.uniform(9, 13)
    skin = ((np.abs(x / width) ** 2.4 + np.abs((y + 5) / depth) ** 2.4) ** (1 / 2.4) - 1) * depth
    cavity = skin + np.float32(fat + wall)
    canvas.paint(skin, "fat")
    canvas.paint(np.maximum(skin + np.float32(fat), -cavity), "muscle")
    bars = 8 - 12 * np.cos((z + 0.5 * y) * (2 * np.pi / 26))  # ribs fall towards the front
    cage = np.maximum(np.abs(cavity - np.float32(wall / 2)) - np.float32(3), np.float32(25) - z + 0.3 * y)
    canvas.paint(np.maximum(cage, bars), "bone")
    for side in (-1, 1):
        lung = ellipsoid(canvas.grid.points, (side * 78, -5, rng.uniform(185, 195)), (66, 82, 98))
        canvas.paint(np.maximum(lung, cavity + 3), "lung")
    _bowel(canvas)
    for height in np.arange(-180, 200, 33) + rng.uniform(0, 33):  # vertebrae, with a disc between two
        canvas.blob((0, -62, height), (24, 19, 17), "bone")
        canvas.blob((0, -62, height), (20, 15, 13), "marrow")
        canvas.blob((0, -62, height + 16.5), (20, 16, 4), "muscle")
        canvas.blob((0, -96, height), (6, 14, 10), "bone")
    canvas.paint(tube(canvas.grid.points, (0, -84, -200), (0, -84, 220), (8, 8)), "water")
    for side in (-1, 1):
        canvas.paint(
            tube(canvas.grid.points, (side * 33, -68, -220), (side * 26, -66, 60), (21, 7)), "muscle"
        )
        canvas.paint(
            tube(canvas.grid.points, (side * 34, -88, -220), (side * 30, -86, 220), (17, 15)), "muscle"
        )


def _bowel(canvas: Canvas) -> None:
    rng = canvas.rng
    for _ in range(18):
        centre = rng.uniform((-90, 0, -130), (80, 66, -12))
        size = rng.uniform(11, 19)
        canvas.blob(centre, (size * 1.5, size, size), "bowel", rotation(rng.uniform(-60, 60, 3)))
        if rng.random() < 0.4:
            canvas.blob(centre + (0, size * 0.4, 0), (size * 0.8, size * 0.4, size * 0.6), "air")
    stomach = np.array([-62, 36, 52]) + rng.uniform(-8, 8, 3)
    canvas.blob(stomach, (40, 30, 44), "muscle", rotation((0, 25, 0)))
    canvas.blob(stomach, (36, 26, 40), "bowel", rotation((0, 25, 0)))
    canvas.blob(stomach + (0, 15, 8), (20, 9, 24), "air")  # gas rises to the front of who lies on the back


def _organs(canvas: Canvas) -> tuple[Field, Field]:
    """Paints liver, spleen and kidneys; returns the fields of liver and kidneys."""
    rng, points = canvas.rng, canvas.grid.points

    def jitter(size: float) -> NDArray[np.float64]:
        return rng.uniform(-size, size, 3)

    def organ(
        centre: tuple[float, ...], radii: tuple[float, ...], angles: tuple[float, ...], shift: float
    ) -> Field:
        size = np.array(radii) * rng.uniform(0.88, 1.12, 3) * rng.uniform(0.93, 1.07)
        turn = rotation(np.array(angles) + jitter(8))
        return ellipsoid(points, np.array(centre) + jitter(shift), tuple(size), turn)

    right = organ((74, 4, 42), (64, 74, 72), (0, 10, 0), 5)
    left = organ((8, 42, 62), (72, 34, 34), (0, -12, 0), 5)
    spleen = organ((-104, -38, 56), (25, 44, 50), (20, 0, -20), 6)
    kidneys = [
        organ((side * 62, -56, -22 - side * 9), (27, 23, 53), (10, side * -12, 0), 5) for side in (-1, 1)
    ]
    hili = [organ((side * 40, -50, -22 - side * 9), (13, 12, 20), (0, 0, 0), 2) for side in (-1, 1)]
    kidney = union(*(np.maximum(k, -hilus) for k, hilus in zip(kidneys, hili, strict=True)))
    liver, spleen, kidney = separate([union(right, left, blend=18), spleen, kidney], gap=3)
    canvas.paint(liver, "liver", "liver")
    canvas.paint(spleen, "spleen", "spleen")
    canvas.paint(kidney, "kidney", "kidneys")
    canvas.paint(kidney + np.float32(8), "medulla")
    return liver, kidney


def _vessels(canvas: Canvas, liver: Field) -> None:
    """Aorta and caval vein with their branches to the kidneys, and the portal tree inside the liver."""
    rng, grid = canvas.rng, canvas.grid
    finest = max(1.6, 0.6 * float(np.linalg.norm(grid.affine[:3, :3], axis=0).min()))
    tubes: list[tuple[NDArray[np.float64], NDArray[np.float64], float, float]] = []

    def path(knots: ArrayLike, first: float, last: float) -> None:
        corners = np.array(knots, float) + rng.uniform(-3, 3, (len(np.array(knots)), 3))
        sizes = np.linspace(first, last, len(corners))
        tubes.extend(zip(corners[:-1], corners[1:], sizes[:-1], sizes[1:], strict=True))

    def branch(at: NDArray[np.float64], way: NDArray[np.float64], length: float, radius: float) -> None:
        """Murray's law: a tube splits into two of 2^(-1/3) of its radius."""
        end = at + length * way
        tubes.append((at, end, radius, radius * 0.85))
        if radius * 0.79 < finest:
            return
        for _ in range(2):
            side = way + rng.uniform(-0.8, 0.8, 3)
            branch(end, side / np.linalg.norm(side), length * rng.uniform(0.65, 0.95), radius * 0.79)

    aorta = [(-10, -34, height) for height in (230, 130, 60, 0, -60, -100)]
    path(aorta, 12, 9)
    path([(17, -33, height) for height in (-110, -60, 0, 60)] + [(24, -15, 110)], 9, 12)
    for side in (-1, 1):
        path([(-10, -34, -100), (side * 20 - 5, -35, -150), (side * 45, -25, -220)], 7, 6)
        path([(-10, -34, -15), (side * 26, -42, -20), (side * 48, -48, -22 - side * 9)], 3.6, 2.8)
    _tubes(canvas, tubes, None)
    tubes.clear()
    path([(6, -8, -20), (22, 2, 15), (40, 8, 34)], 6.5, 6.0)
    _tubes(canvas, tubes, None)
    tubes.clear()
    branch(np.array([40.0, 8, 34]), np.array([0.85, -0.3, 0.43]), 27, 5.0)
    branch(np.array([40.0, 8, 34]), np.array([-0.5, 0.65, 0.57]), 27, 4.4)
    _tubes(canvas, tubes, liver + np.float32(5))


def _tubes(
    canvas: Canvas,
    tubes: list[tuple[NDArray[np.float64], NDArray[np.float64], float, float]],
    within: Field | None,
) -> None:
    for start, end, first, last in tubes:
        box = canvas.grid.box((start + end) / 2, float(np.linalg.norm(end - start)) / 2 + max(first, last))
        if box is not None:
            field = tube(canvas.grid.at(box), start, end, (first, last))
            canvas.paint(
                field if within is None else np.maximum(field, within[box]), "vessel", "vessels", box
            )


def _lesions(canvas: Canvas, liver: Field, kidney: Field) -> None:
    """One to six in the liver, of different sizes and contrasts; in every third patient one in a kidney."""
    rng = canvas.rng
    for _ in range(1 + min(int(rng.poisson(1.6)), 5)):
        _lesion(canvas, liver, "liver", float(np.exp(rng.uniform(np.log(5), np.log(19)))))
    if rng.random() < 1 / 3:
        _lesion(canvas, kidney, "kidney", rng.uniform(6, 12))


def _lesion(canvas: Canvas, organ: Field, tissue: str, radius: float) -> None:
    """An ellipsoid with a bumpy surface around a random voxel of the organ, cut where the organ ends."""
    rng, grid = canvas.rng, canvas.grid
    deep = np.flatnonzero(organ < -0.6 * radius)
    if not deep.size:
        deep = np.flatnonzero(organ < 0)
    if not deep.size:  # the organ lies outside the field of view
        return
    centre = grid.points.reshape(3, -1)[:, deep[rng.integers(deep.size)]]
    kind = canvas.tissues[str(rng.choice(_LESIONS))]
    values = between(canvas.tissues[tissue], kind, rng.uniform(0.55, 1.1))
    radii = tuple(radius * rng.uniform(0.75, 1.25, 3))
    turn, waves, phases = (
        rotation(rng.uniform(-90, 90, 3)),
        rng.normal(0, 3 / radius, (4, 3)),
        rng.uniform(0, 6, 4),
    )
    box = grid.box(centre, max(radii) * 1.3)
    if box is None:
        return
    points = grid.at(box)
    bumps = sum(np.sin(np.tensordot(w, points, 1) + p) for w, p in zip(waves, phases, strict=True))
    field = ellipsoid(points, centre, radii, turn) + np.float32(0.07 * radius) * np.asarray(bumps, np.float32)
    canvas.paint(np.maximum(field, organ[box] + np.float32(1)), values, "lesion", box)
