"""HD95 and surface Dice against the package surface-distance, on random masks: python tests/campaigns/surfaces.py

Needs `pip install surface-distance` (0.1). Prints how many pairs were compared, the seed, and the largest differences.
"""

import argparse
import itertools
import sys

import numpy as np
from scipy import ndimage

from convoxel import evaluation
from convoxel.evaluation import surfaces
from convoxel.volume import Volume

try:
    import surface_distance as theirs
    from surface_distance import lookup_tables
except ImportError:
    sys.exit("pip install surface-distance")

SPACINGS = [(1, 1, 1), (3, 0.7, 0.7), (0.5, 2, 1.25), (5, 0.8, 0.8)]


def areas() -> float:
    """The largest difference of the 256 areas, over the spacings, in parts of the area."""
    worst = 0.0
    for spacing in SPACINGS:
        table = lookup_tables.create_table_neighbour_code_to_surface_area(spacing)
        ours = surfaces.areas(spacing)
        for code in range(1, 255):
            bits = itertools.product((0, 1), repeat=3)
            kernel = lookup_tables.ENCODE_NEIGHBOURHOOD_3D_KERNEL
            mine = sum(1 << (4 * z + 2 * y + x) for z, y, x in bits if code & kernel[z, y, x])
            worst = max(worst, abs(ours[mine] / table[code] - 1))
    return worst


def masks(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Truth and prediction: unrelated, nearly right, shifted, or noise; some touch the border."""
    shape = tuple(rng.integers(3, 40, 3))
    smooth = rng.uniform(0, 3)
    noise = ndimage.gaussian_filter(rng.normal(size=(2, *shape)), (0, smooth, smooth, smooth))
    kind = rng.integers(4)
    first = noise[0] > np.quantile(noise[0], rng.uniform(0.3, 0.95))
    if kind == 0:
        second = noise[1] > np.quantile(noise[1], rng.uniform(0.3, 0.95))
    elif kind == 1:
        second = noise[0] + 0.3 * noise[1] > np.quantile(noise[0], 0.7)
    elif kind == 2:
        second = np.roll(first, rng.integers(-3, 4, 3), (0, 1, 2))
    else:
        second = first ^ (rng.random(shape) < 0.02)
    return first, second


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    compared, other = 0, []
    worst = {"hd95_mm": 0.0, "surface_dice": 0.0}
    for _ in range(args.pairs):
        truth, prediction = masks(rng)
        if not truth.any() or not prediction.any():
            continue
        spacing = SPACINGS[rng.integers(len(SPACINGS))]
        tolerance = float(rng.choice([0.0, 0.5, 1.0, 2.0, 3.3]))
        distances = theirs.compute_surface_distances(truth, prediction, spacing)
        expected = {
            "hd95_mm": theirs.compute_robust_hausdorff(distances, 95),
            "surface_dice": theirs.compute_surface_dice_at_tolerance(distances, tolerance),
        }
        grid = Volume(truth.astype(np.uint8), spacing)
        found = evaluation.scores(grid.like(prediction.astype(np.uint8)), grid, 1, tolerance)
        compared += 1
        for name in worst:
            worst[name] = max(worst[name], abs(found[name] - expected[name]))
        if abs(found["hd95_mm"] - expected["hd95_mm"]) > 1e-9:
            other.append((truth.shape, spacing, found["hd95_mm"], expected["hd95_mm"]))
    print(f"areas of 254 neighbourhoods, {len(SPACINGS)} spacings: up to {areas():.1e} apart")
    print(f"{compared} pairs, seed {args.seed}: HD95 up to {worst['hd95_mm']:.1e} mm apart, "
          f"surface Dice up to {worst['surface_dice']:.1e}")  # fmt: skip
    for line in other[:10]:
        print("another HD95:", *line)
    sys.exit(1 if max(worst.values()) > 1e-9 else 0)


if __name__ == "__main__":
    main()
