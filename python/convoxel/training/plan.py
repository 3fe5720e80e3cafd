"""The network, its patch and its batch, planned from a dataset's fingerprint and the machine at hand.

The rules are nnU-Net's (Isensee 2021; nnunetv2 2.8.1, experiment_planning/experiment_planners), but for the budget:
where nnU-Net shrinks the patch until a GPU has room for it, here it shrinks until a step keeps within the memory and
the time that the settings allow.

grid      spacing, axes, normalisation
topology  patch and pooling
budget    what a patch costs, and may
cost      forecasts of memory and time
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..importers.networks import Description
from ..importers.nnunet_recipe import NnunetRecipe
from ..progress import duration
from .budget import Budget
from .cases import Dataset
from .fingerprint import READER, Fingerprint
from .grid import IMAGE, LOGITS, Grid, by, plan_grid, plan_normalisation
from .settings import Settings
from .topology import Topology, nearest_patch, shrink, topology

_LEAST_BATCH = 2
_COVERED = 0.05  # of the dataset's voxels, in one batch at most


@dataclass(frozen=True)
class Plan:
    """What is trained: plain data."""

    recipe: NnunetRecipe
    network: Description  # {"name": "unet", "config": {...}}, for models.create
    patch_size: tuple[int, ...]  # voxels, in the network's axes
    batch_size: int  # of all processes together
    reasons: tuple[str, ...]  # why all of it is as it is, a line each
    memory_bytes: int  # forecast of the training process's peak
    step_seconds: float  # forecast, on cores that do nothing else

    def to_json(self) -> dict[str, Any]:
        """Plain data from which `from_json` makes an equal one."""
        return {**vars(self), "recipe": self.recipe.to_json()}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Plan:
        """The reverse of `to_json`; KeyError, TypeError or ValueError for anything else."""
        return cls(
            recipe=NnunetRecipe.from_json(found["recipe"]),
            network=dict(found["network"]),
            patch_size=tuple(found["patch_size"]),
            batch_size=int(found["batch_size"]),
            reasons=tuple(found["reasons"]),
            memory_bytes=int(found["memory_bytes"]),
            step_seconds=float(found["step_seconds"]),
        )


def make_plan(
    dataset: Dataset,
    fingerprint: Fingerprint,
    settings: Settings,
    *,
    cores: int | None = None,
    memory_bytes: int | None = None,
) -> Plan:
    """What to train on a dataset on this machine.

    Args:
        settings: those that are given are kept: spacing and patch_size in the scans' axes (z, y, x), batch_size.
        cores: that the steps run on; None: torch's threads.
        memory_bytes: that the machine has; None: as the system says. Half of it is used unless settings.memory says
            otherwise.

    Raises:
        ValueError: label values with gaps, single slices for a 3-D network, a patch that its network cannot pool, or
            no network small enough for the memory; with the remedy.

    >>> plan = make_plan(dataset, fingerprint(dataset), Settings(), cores=2)
    >>> plan.patch_size, plan.batch_size, plan.network["config"]["features"]
    ((64, 112, 112), 2, [32, 64, 128, 256, 320])
    """
    _check_labels(dataset)
    if fingerprint.names != tuple(dataset.names):
        raise ValueError(
            f"{dataset.folder}: its cases are not those of the fingerprint; take the fingerprint anew"
        )
    grid = plan_grid(dataset, fingerprint, settings)
    schemes, masked, intensities = plan_normalisation(dataset, fingerprint)
    rank = settings.rank
    labels = {
        name: list(value) if isinstance(value, tuple) else value for name, value in dataset.labels.items()
    }
    if dataset.ignore is not None:
        labels["ignore"] = dataset.ignore

    def recipe(patch: tuple[int, ...]) -> NnunetRecipe:
        return NnunetRecipe(
            channels=dataset.channels,
            labels=labels,
            region_order=dataset.region_order,
            reader=READER,
            transpose=grid.transpose,
            spacing=grid.spacing[3 - rank :],
            patch_size=patch,
            schemes=schemes,
            masked=masked,
            intensities=tuple(tuple(numbers) for numbers in fingerprint.intensities),
            data=IMAGE,
            logits=LOGITS,
            mirror=tuple(range(rank)) if settings.mirror else (),
        )

    try:
        heads = recipe((1,) * rank).heads
    except ValueError as error:
        raise ValueError(f"{dataset.folder / 'dataset.json'}: {error}") from error
    budget = Budget(settings, len(dataset.channels), heads, cores, memory_bytes)
    found, batch, reasons = _Planner(grid, len(dataset.cases), settings, budget).plan()
    config = budget.config(found)
    return Plan(
        recipe=recipe(found.patch),
        network={"name": "unet", "config": config},
        patch_size=found.patch,
        batch_size=batch,
        reasons=(*grid.reasons, *intensities, *reasons, *_missing(dataset, fingerprint)),
        memory_bytes=budget.memory(found, batch),
        step_seconds=budget.seconds(found, batch),
    )


def _check_labels(dataset: Dataset) -> None:
    """Values 0 to K - 1, and K for ignore, as `losses` wants them."""
    values = dataset.values
    where = dataset.folder / "dataset.json"
    if values != tuple(range(len(values))):
        raise ValueError(
            f"{where}: the label values are {', '.join(map(str, values))}; they have to be 0 to {len(values) - 1} "
            "without a gap, 0 for the background: renumber them there and in the label maps"
        )
    if dataset.ignore is not None and dataset.ignore != values[-1]:
        raise ValueError(
            f"{where}: ignore is {dataset.ignore}, it has to be the highest value, {values[-1]}: renumber the labels "
            "there and in the label maps"
        )
    if len(values) - (dataset.ignore is not None) < 2:
        raise ValueError(f"{where}: it names no structure beside the background, there is nothing to learn")


def _missing(dataset: Dataset, found: Fingerprint) -> list[str]:
    """Structures that no case has a voxel of."""
    return [
        f"No label map has a voxel of {name}: the network cannot learn it."
        for name, value in dataset.labels.items()
        if not any(found.counts.get(v, 0) for v in (value if isinstance(value, tuple) else (value,)))
    ]


class _Planner:
    """Patch and batch within the budget."""

    def __init__(self, grid: Grid, cases: int, settings: Settings, budget: Budget) -> None:
        self.grid, self.cases, self.settings, self.budget = grid, cases, settings, budget
        self.spacing, self.median = grid.spacing[3 - settings.rank :], grid.median[3 - settings.rank :]

    def plan(self) -> tuple[Topology, int, list[str]]:
        least = self._least_batch()
        found, larger = self._patch(least)
        self._check(found, least)
        batch, why = self._batch(found, least, larger is None and self.settings.patch_size is None)
        return found, batch, [self._about_patch(found, larger, least), self._about_network(found), why,
                              self._about_step(found, batch)]  # fmt: skip

    def _least_batch(self) -> int:
        parts, given = self.settings.accumulate, self.settings.batch_size
        least = -(-max(_LEAST_BATCH, parts) // parts) * parts if given is None else given
        if least % parts:
            raise ValueError(
                f"batch_size: {given} patches cannot be computed in {parts} equal parts (accumulate); choose a multiple"
            )
        return least

    def _patch(self, batch: int) -> tuple[Topology, Topology | None]:
        given = self.settings.patch_size
        if given is None:
            return shrink(self.spacing, self.median, lambda found: self.budget.fits(found, batch))
        patch = self.grid.turned(given)
        found = topology(self.spacing, patch)
        if found.patch != patch:
            nearest = self.grid.back(nearest_patch(self.spacing, patch))
            divisor = self.grid.back(found.divisor)
            raise ValueError(
                f"patch_size: {by(given)} voxels; a network for it halves its axes until {by(divisor)} voxels are one, "
                f"so they have to be multiples of that; the nearest that fits is {by(nearest)}"
            )
        return found, None

    def _check(self, found: Topology, batch: int) -> None:
        if len(found.strides) < 2:
            raise ValueError(
                f"a patch of {by(found.patch)} voxels is too small for a network that pools (12 voxels on one axis, or "
                f"8 on two); the median scan has {by(self.median)}: choose a smaller spacing or a larger patch_size"
            )
        given = self.settings.patch_size is not None and self.settings.memory is None
        if (need := self.budget.memory(found, batch)) > (self.budget.machine if given else self.budget.most):
            raise ValueError(
                f"memory: training on {batch} patches of {by(found.patch)} voxels would take {need / 1e9:.1f} GB, more "
                f"than {'this machine has' if given else self.budget.most_said}; set a smaller base_features (it is "
                f"{self.settings.base_features}), patch_size or batch_size, a larger accumulate, or a larger memory"
            )

    def _batch(self, found: Topology, least: int, covers: bool) -> tuple[int, str]:
        if self.settings.batch_size is not None:
            return least, f"Batch: {least} patches a step, as the settings say."
        parts = self.settings.accumulate
        most = round(_COVERED * math.prod(self.grid.median) * self.cases / math.prod(found.patch))
        batch = least
        while covers and batch + parts <= most and self.budget.fits(found, batch + parts):
            batch += parts
        if not covers:
            why = "the fewest that learning is steady with; what a step may cost goes into the patch"
        elif batch + parts > most:
            why = (
                f"the patch cannot grow, and a batch has {_COVERED:.0%} of all voxels of the dataset at most"
            )
        else:
            why = f"the patch cannot grow, and {batch + parts} {self.budget.exceeded(found, batch + parts)}"
        return batch, f"Batch: {batch} patches a step: {why}."

    def _about_patch(self, found: Topology, larger: Topology | None, batch: int) -> str:
        extent = by([round(n * s) for n, s in zip(found.patch, self.spacing, strict=True)])
        share = math.prod(min(1.0, n / m) for n, m in zip(found.patch, self.median, strict=True))
        if self.settings.patch_size is not None:
            why = "as the settings say"
        elif larger is None:
            why = "it covers the median scan" if share > 0.99 else "no larger ones are planned"
        else:
            why = f"the next larger one, {by(larger.patch)}, {self.budget.exceeded(larger, batch)}"
            if not self.budget.fits(found, batch):
                why += f"; this is the smallest, and {self.budget.exceeded(found, batch)}"
        return f"Patch: {by(found.patch)} voxels ({extent} mm, {share:.0%} of the median scan): {why}."

    def _about_network(self, found: Topology) -> str:
        config = self.budget.config(found)
        left = by([n // d for n, d in zip(found.patch, found.divisor, strict=True)])
        weights = self.budget.cost(found).weights / 1e6
        text = (
            f"Network: a {self.settings.network} U-Net with {len(found.strides)} stages of "
            f"{', '.join(map(str, config['features']))} channels and {weights:.1f} million weights, which halves the "
            f"patch until {left} voxels are left"
        )
        flat = sum(1 in kernel for kernel in found.kernels)
        if flat:
            stages = "first stage works" if flat == 1 else f"first {flat} stages work"
            text += f"; its {stages} within slices, whose voxels are smaller than the distance between slices"
        return text + "."

    def _about_step(self, found: Topology, batch: int) -> str:
        settings, budget = self.settings, self.budget
        seconds = budget.seconds(found, batch)
        whole = duration(seconds * settings.total_steps)
        engine = (
            " with the engine convoxel; torch takes longer and more" if settings.engine != "convoxel" else ""
        )
        return (
            f"Forecast: {seconds:.1f} s a step on {budget.cores} core{'s' * (budget.cores > 1)}, {whole} for "
            f"{settings.epochs} epochs of {settings.steps_per_epoch} steps, {budget.memory(found, batch) / 1e9:.1f} GB "
            f"of memory{engine}."
        )
